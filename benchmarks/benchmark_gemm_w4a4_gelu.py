"""The first half of FLUX.1's MLP: one fused kernel against GEMM, GELU and quantization one after another, and bf16.

    .venv/bin/python benchmarks/benchmark_gemm_w4a4_gelu.py

TOP/s counts 2 M N K of the first linear.
"""

import torch
from benchmark_gemm_w4a4 import arguments
from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4
from comfyui_svdquant.triton_kernels.gemm_w4a4_gelu import gemm_w4a4_gelu
from comfyui_svdquant.triton_kernels.quantize_act import quantize_act
from kernel_timing import RANK, TOKENS, compare, gpu

K, N = 3072, 12288


def main() -> None:
    device = gpu()
    a = arguments(K, N, RANK, device)
    smooth, down = (torch.rand(*shape, device=device).to(torch.bfloat16) + 0.5 for shape in ((N,), (N, RANK)))
    x, weight = (torch.randn(rows, K, device=device, dtype=torch.bfloat16) for rows in (TOKENS, N))

    def gelu(y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(y, approximate="tanh")

    runs = {
        "fused": lambda: gemm_w4a4_gelu(*a, False, smooth, down, True),
        "one after another": lambda: quantize_act(gelu(gemm_w4a4(*a, False)), smooth, down, True),
        "torch bf16, linear and GELU": lambda: gelu(torch.nn.functional.linear(x, weight)),
    }
    compare(f"K {K} N {N}", runs, 2e-12 * TOKENS * K * N, "TOP/s")


if __name__ == "__main__":
    main()

"""gemm_w4a16 at FLUX.1's modulation shapes, against torch's linear in bf16.

    .venv/bin/python benchmarks/benchmark_gemm_w4a16.py

TB/s counts the 4-bit weight and its scales once: what a kernel bound by memory would reach.
"""

import torch
from comfyui_svdquant.triton_kernels.gemm_w4a16 import gemm_w4a16
from kernel_timing import compare, gpu

SHAPES = ((3072, 18432), (3072, 9216))  # img_mod and txt_mod; modulation of the single blocks


def main() -> None:
    device = gpu()
    for k, n in SHAPES:
        w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        weight = torch.randint(0, 256, (n, k // 2), device=device, dtype=torch.uint8)
        scale, zero = (torch.rand(k // 64, n, device=device).to(torch.bfloat16) for _ in range(2))
        bias = torch.randn(n, device=device, dtype=torch.bfloat16)
        for m in (1, 2, 4, 16):
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            runs = {
                "gemm_w4a16": lambda x=x, a=(weight, scale, zero, bias): gemm_w4a16(x, *a),
                "torch bf16": lambda x=x, w=w, b=bias: torch.nn.functional.linear(x, w, b),
            }
            compare(f"M {m} K {k} N {n}", runs, n * k * (0.5 + 4 / 64) * 1e-12, "TB/s")


if __name__ == "__main__":
    main()

"""gemm_w4a8 at FLUX.1's shapes and fewer tokens, against widening first and against torch's linear in bf16.

    .venv/bin/python benchmarks/benchmark_gemm_w4a8.py

The GEMM alone: benchmark_linear.py has the whole linear. TOP/s counts 2 M N K.
"""

import torch
from comfyui_svdquant.triton_kernels.common import arch
from comfyui_svdquant.triton_kernels.gemm_w4a8 import gemm_w4a8
from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8
from comfyui_svdquant.triton_kernels.rounding import has_e4m3
from comfyui_svdquant.triton_kernels.widen_w4 import widen_w4
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu


def main() -> None:
    device = gpu()
    for tokens in (TOKENS, 512, 16):
        for k, n in SHAPES:
            compare(f"M {tokens} K {k} N {n}", runs(tokens, k, n, device), 2e-12 * tokens * k * n, "TOP/s")


def runs(m: int, k: int, n: int, device: torch.device) -> dict:
    weight = torch.randint(-128, 128, (n, k // 2), device=device, dtype=torch.int8)
    scale = torch.rand(k // 64, n, device=device).to(torch.bfloat16)
    hidden, up = (torch.randn(rows, RANK, device=device, dtype=torch.bfloat16) for rows in (m, n))
    bias, act = torch.randn(n, device=device, dtype=torch.bfloat16), torch.rand(m, device=device)
    codes = torch.randint(-127, 128, (m, k), device=device, dtype=torch.int8)

    def widen_first(codes: torch.Tensor, kind: str) -> torch.Tensor:
        w8, row_scale, _ = widen_w4(weight, scale, kind)
        return gemm_w8a8(codes, act, w8, row_scale, hidden, up, bias)

    calls = {}
    for kind in ("int8", "fp8") if has_e4m3(arch(device)) else ("int8",):
        c = codes.to(torch.float8_e4m3fn) if kind == "fp8" else codes
        calls[f"{kind} in the kernel"] = lambda c=c: gemm_w4a8(c, act, weight, scale, hidden, up, bias)
        calls[f"{kind} widened first"] = lambda c=c, kind=kind: widen_first(c, kind)
    x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    return calls | {"torch bf16": lambda: torch.nn.functional.linear(x, w)}


if __name__ == "__main__":
    main()

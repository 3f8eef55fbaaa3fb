"""widen_w4 at FLUX.1's shapes, against a copy of as many bytes, and against the GEMM that it prepares.

    .venv/bin/python benchmarks/benchmark_widen_w4.py

TB/s counts nibbles once and the widened weight (nothing for the GEMM). The baseline is `gemm_w8a8`: the ratio says how
many times one widening fits into it, the price of widening again in every step.
"""

import torch
from comfyui_svdquant.triton_kernels.common import arch
from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8
from comfyui_svdquant.triton_kernels.rounding import has_e4m3
from comfyui_svdquant.triton_kernels.widen_w4 import widen_w4
from kernel_timing import SHAPES, TOKENS, compare, gpu


def main() -> None:
    device = gpu()
    for k, n in SHAPES:
        weight = torch.randint(-128, 128, (n, k // 2), device=device, dtype=torch.int8)
        scale = torch.rand(k // 64, n, device=device).to(torch.bfloat16)
        w8, row_scale, _ = widen_w4(weight, scale, "int8")
        codes, act = torch.ones(TOKENS, k, device=device, dtype=torch.int8), torch.ones(TOKENS, device=device)
        none = [torch.empty(rows, 0, device=device, dtype=torch.bfloat16) for rows in (TOKENS, n)]
        runs = {}
        for kind in ("int8", "fp8") if has_e4m3(arch(device)) else ("int8",):
            runs[kind] = lambda w=weight, s=scale, kind=kind: widen_w4(w, s, kind)
        half = torch.empty(3 * n * k // 4, device=device, dtype=torch.int8)
        runs["copy"] = lambda half=half: half.clone()
        runs["gemm_w8a8"] = lambda a=(codes, act, w8, row_scale, *none): gemm_w8a8(*a, None)
        compare(f"K {k} N {n}", runs, 1.5e-12 * n * k, "TB/s")


if __name__ == "__main__":
    main()

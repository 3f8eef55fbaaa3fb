"""gemm_nvfp4 at FLUX.1's shapes, against torch's linear in bf16 and against itself without the branch.

    .venv/bin/python benchmarks/benchmark_gemm_nvfp4.py

The GEMM alone: benchmark_linear.py has the whole linear. TOP/s counts 2 M N K.
"""

from functools import partial

import torch
from comfyui_svdquant.triton_kernels.gemm_nvfp4 import gemm_nvfp4
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu


def arguments(k: int, n: int, rank: int, device: torch.device) -> list[torch.Tensor]:
    """Of `gemm_nvfp4`, random."""
    codes, weight = (torch.randint(0, 256, (rows, k // 2), device=device, dtype=torch.uint8) for rows in (TOKENS, n))
    scales, weight_scale = (torch.rand(rows, k // 16, device=device).to(torch.float8_e4m3fn) for rows in (TOKENS, n))
    hidden, up = (torch.randn(rows, rank, device=device, dtype=torch.bfloat16) for rows in (TOKENS, n))
    bias = torch.randn(n, device=device, dtype=torch.bfloat16)
    return [codes, scales, weight, weight_scale, torch.tensor(1.0, device=device), hidden, up, bias]


def main() -> None:
    device = gpu()
    for k, n in SHAPES:
        x, weight = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (TOKENS, n))
        runs = {}
        for rank in (RANK, 0, 4 * RANK):
            runs[f"rank {rank}"] = partial(gemm_nvfp4, *arguments(k, n, rank, device))
        runs["torch bf16"] = partial(torch.nn.functional.linear, x, weight)
        compare(f"K {k} N {n}", runs, 2e-12 * TOKENS * k * n, "TOP/s")


if __name__ == "__main__":
    main()

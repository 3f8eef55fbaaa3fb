"""gemm_w4a4 at FLUX.1's shapes, against torch's linear in bf16 and against itself without the branch.

    .venv/bin/python benchmarks/benchmark_gemm_w4a4.py

The GEMM alone: benchmark_linear.py has the whole linear. TOP/s counts 2 M N K.
"""

from functools import partial

import torch
from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu


def arguments(k: int, n: int, rank: int, device: torch.device) -> list[torch.Tensor]:
    """Of `gemm_w4a4`, random."""
    codes, weight = (torch.randint(-128, 128, (rows, k // 2), device=device, dtype=torch.int8) for rows in (TOKENS, n))
    scales = torch.rand(k // 64, TOKENS, device=device).to(torch.bfloat16).t()
    weight_scale = torch.rand(k // 64, n, device=device).to(torch.bfloat16)
    hidden, up = (torch.randn(rows, rank, device=device, dtype=torch.bfloat16) for rows in (TOKENS, n))
    return [codes, scales, weight, weight_scale, hidden, up, torch.randn(n, device=device, dtype=torch.bfloat16)]


def main() -> None:
    device = gpu()
    for k, n in SHAPES:
        x, weight = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (TOKENS, n))
        runs = {}
        for rank in (RANK, 0, 4 * RANK):
            runs[f"rank {rank}"] = partial(gemm_w4a4, *arguments(k, n, rank, device), act_unsigned=False)
        runs["torch bf16"] = partial(torch.nn.functional.linear, x, weight)
        compare(f"K {k} N {n}", runs, 2e-12 * TOKENS * k * n, "TOP/s")


if __name__ == "__main__":
    main()

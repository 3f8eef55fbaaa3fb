"""gemm_w8a8 at FLUX.1's shapes, against torch's linear in bf16 and against itself without the branch.

    .venv/bin/python benchmarks/benchmark_gemm_w8a8.py

The GEMM alone: benchmark_linear.py has the whole linear. TOP/s counts 2 M N K.
"""

from functools import partial

import torch
from comfyui_svdquant.triton_kernels.common import arch
from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8
from comfyui_svdquant.triton_kernels.rounding import has_e4m3
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu


def arguments(k: int, n: int, rank: int, kind: str, device: torch.device) -> list[torch.Tensor]:
    """Of `gemm_w8a8`, random."""
    codes, weight = (torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8) for rows in (TOKENS, n))
    if kind == "fp8":
        codes, weight = codes.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    act_scales, weight_scale = torch.rand(TOKENS, device=device), torch.rand(n, device=device)
    hidden, up = (torch.randn(rows, rank, device=device, dtype=torch.bfloat16) for rows in (TOKENS, n))
    return [codes, act_scales, weight, weight_scale, hidden, up, torch.randn(n, device=device, dtype=torch.bfloat16)]


def main() -> None:
    device = gpu()
    for k, n in SHAPES:
        x, weight = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (TOKENS, n))
        runs = {}
        for kind in ("int8", "fp8") if has_e4m3(arch(device)) else ("int8",):
            for rank in (RANK, 0, 4 * RANK):
                runs[f"{kind} rank {rank}"] = partial(gemm_w8a8, *arguments(k, n, rank, kind, device))
        runs["torch bf16"] = partial(torch.nn.functional.linear, x, weight)
        compare(f"K {k} N {n}", runs, 2e-12 * TOKENS * k * n, "TOP/s")


if __name__ == "__main__":
    main()

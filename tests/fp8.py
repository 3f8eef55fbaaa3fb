"""What GPUs do with e4m3: how Triton rounds to it, and how far matrix units are from exact sums."""

import os

import pytest
import torch
from torch import Tensor


def runs(kind: str, on: torch.device) -> bool:
    """Whether the GPU at hand has matrix units for this kind of codes."""
    from comfyui_svdquant.triton_kernels import quantize_token

    return kind != "fp8" or quantize_token.has_e4m3(quantize_token.arch(on))


def need(kind: str, on: torch.device) -> None:
    """Skip the test if it has not."""
    if not runs(kind, on):
        pytest.skip("needs a GPU with e4m3 matrix units")


def rounds_to(codes: Tensor, exact: Tensor) -> Tensor:
    """Where e4m3 codes are the nearest to float32 ``exact``; on sm 89 Triton drops its last bits first, as for fp16."""
    dropped = (exact.view(torch.int32) & -0x2000).view(torch.float32)
    return (codes.float() == exact.to(codes.dtype).float()) | (codes.float() == dropped.to(codes.dtype).float())


def sum_error(depth: int) -> float:
    """Of a sum of so many products, as a part of the sum of their magnitudes.

    Ada and Hopper drop what lies 13 bits below the largest addend of an MMA, which is 32 deep (arXiv 2411.10958,
    2412.19437): here they lose up to a quarter of the most that 33 can lose together. The interpreter keeps float32.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return depth * 2.0**-24
    return -(-depth // 32) * 33 * 2.0**-15

"""What the kernels share: the name of the GPU, the checks of arguments, and rounding to four bits."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import MAGIC, divide, magnitude_bits, reciprocal, safe_scale

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@cache
def arch(device: torch.device) -> str:
    """``sm90``, ``gfx942``, ...: what a table of configurations is keyed by; ``cpu`` in the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def expect(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """:class:`ValueError` that names the argument unless it has this shape, one of these dtypes, and this device."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}.")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}.")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}.")


def custom_op(launch: Callable[..., Any]) -> Any:
    """A function that launches kernels as `torch.ops.svdquant.<name>`, for whoever traces; still without a fake.

    The linear calls the function itself: torch's way to an op costs the host 25 µs, more than Triton's launch.
    """
    return torch.library.custom_op(f"svdquant::{launch.__name__}", launch, mutates_args=())


def cdiv(size: int, block: int) -> int:
    """Blocks that cover a size. `triton.cdiv` is for kernels, and takes microseconds on the host."""
    return -(-size // block)


@triton.jit
def quotient(x, y, EXACT: tl.constexpr, PTX: tl.constexpr):
    """The IEEE quotient of float32, for any ``y`` (EXACT) or one with the value of a bf16 or fp16 number."""
    if EXACT:
        return tl.div_rn(x, y)
    high, low = reciprocal(y, PTX)
    return divide(x, high, low)


@triton.jit
def group_scales(x, UNSIGNED: tl.constexpr, dtype: tl.constexpr):
    """Scales of float32 groups ``x (..., 64)``: absmax / 7 (15 unsigned) rounded to ``dtype``, without the last axis.

    All zeros have scale 1. A group with NaN, or whose scale is not finite, has scale NaN: so has its output.
    """
    absmax = tl.max(magnitude_bits(x), axis=len(x.shape) - 1).to(tl.float32, bitcast=True)
    largest = tl.full(absmax.shape, 15.0 if UNSIGNED else 7.0, tl.float32)
    return safe_scale(quotient(absmax, largest, False, False).to(dtype).to(tl.float32))


@triton.jit
def round_to_code(x, UNSIGNED: tl.constexpr):
    """The nearest code (half to even) of float32 ``x`` that is scaled already: its four bits, in an int32."""
    low: tl.constexpr = 0.0 if UNSIGNED else -7.0
    high: tl.constexpr = 15.0 if UNSIGNED else 7.0
    clamped = tl.minimum(tl.maximum(x, low), high)
    return (clamped + MAGIC).to(tl.int32, bitcast=True) & 15


@triton.jit
def pack_codes(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes of four bits in ``ROWS * COLUMNS`` int32 as int8 ``(ROWS, COLUMNS / 2)``, low nibble = even column."""
    low, high = tl.split(tl.reshape(codes, [ROWS, COLUMNS // 2, 2]))
    return (low | (high << 4)).to(tl.int8)


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile of an (M, N) result this program makes: GROUP_M rows of tiles at a time, so that both inputs are
    found in the L2 cache again."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + program % height, program % (GROUP_M * tiles_n) // height


@triton.jit
def branch_and_bias(
    acc,
    hidden_ptr,
    up_ptr,
    bias_ptr,
    rows,
    columns,
    R,
    hidden_stride,
    up_stride,
    BLOCK_R: tl.constexpr,
):
    """``acc (BLOCK_M, BLOCK_N)`` float32 + hidden (M, R) · proj_up (N, R)ᵀ + bias (N,); BLOCK_R = 0: no branch."""
    if BLOCK_R > 0:
        for start in tl.range(0, R, BLOCK_R, num_stages=2):  # more would not fit beside float32
            ranks = start + tl.arange(0, BLOCK_R)
            mask = (ranks < R)[None, :]
            hidden = tl.load(hidden_ptr + rows[:, None] * hidden_stride + ranks[None, :], mask=mask, other=0.0)
            up = tl.load(up_ptr + columns[:, None] * up_stride + ranks[None, :], mask=mask, other=0.0)
            acc = tl.dot(hidden, up.to(hidden.dtype).T, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    return acc


def block_r(rank: int) -> int:
    """Ranks per step of `branch_and_bias`: the largest that wastes none, once the rank is a multiple of 16."""
    return 0 if rank == 0 else 32 if rank % 32 == 0 else 16

"""What the kernels share: the name of the GPU, the checks of arguments, and rounding to four bits."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}.")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}.")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}.")


@triton.jit
def group_scales(x, UNSIGNED: tl.constexpr, dtype: tl.constexpr):
    """Scales of float32 groups ``x (..., 64)``: absmax / 7 (15 unsigned) rounded to ``dtype``, without the last axis.

    All zeros have scale 1. A group with NaN, or whose scale is not finite, has scale NaN: so has its output.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered like magnitudes, NaN on top; a float max drops NaN
    absmax = tl.max(bits, axis=len(x.shape) - 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(absmax, 15.0 if UNSIGNED else 7.0).to(dtype).to(tl.float32)
    scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def round_to_code(x, UNSIGNED: tl.constexpr):
    """The nearest code (half to even) of float32 ``x`` that is scaled already: its four bits, in an int32."""
    low: tl.constexpr = 0.0 if UNSIGNED else -7.0
    high: tl.constexpr = 15.0 if UNSIGNED else 7.0
    clamped = tl.minimum(tl.maximum(x, low), high)
    return (clamped + 12582912.0).to(tl.int32, bitcast=True) & 15  # 1.5 * 2^23: the sum has no fraction bits


@triton.jit
def pack_codes(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes of four bits in ``ROWS * COLUMNS`` int32 as int8 ``(ROWS, COLUMNS / 2)``, low nibble = even column."""
    low, high = tl.split(tl.reshape(codes, [ROWS, COLUMNS // 2, 2]))
    return (low | (high << 4)).to(tl.int8)

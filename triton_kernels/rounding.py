"""What the 8-bit kernels share: rounding that does not depend on the backend, and which parts have e4m3.

The formats (float32 division, codes rounded half to even, NaN kept) leave no room for a compiler's choice.
"""

from functools import cache

import triton
import triton.language as tl

from . import EXACT_SUMS

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low mantissa


@triton.jit
def reciprocal(d, PTX: tl.constexpr):
    """``1 / d`` of a float32 as the sum of two, good to about 2**-46, however roughly the backend divides.

    PTX: one instruction, where a division takes eight to be right for d above 2**126 as well.
    """
    if PTX:
        high = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [d], tl.float32, is_pure=True, pack=1)
    else:
        high = 1.0 / d
    return high, tl.fma(-high, d, 1.0) * high


@triton.jit
def divide(v, high, low):
    """The IEEE quotient ``v / d`` in two instructions (``tl.div_rn`` takes about 14), for d a bf16 or fp16 number.

    A quotient of a 24-bit by an 11-bit number is no nearer than 2**-36 to a boundary between two float32, and the
    error before the last rounding is 2**-46. (Below 2**-100 the products underflow.)
    """
    return tl.fma(v, high, v * low)


@triton.jit
def magnitude_bits(v):
    """Bit pattern of ``|v|``: as integers they order like the numbers, with NaN above infinity, on every backend."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def round_half_even(v):
    """Nearest int32 of a float32, ``|v| < 2**22``."""
    return (v + MAGIC).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def codes_of(packed):
    """The low and the high codes, in float32, of bytes in an int32 that hold two nibbles in two's complement.

    Without a shift or a conversion: the nibble, its sign bit flipped, is put under the exponent of 2**23 or 2**19.
    """
    low = ((packed & 0x0F) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    high = ((packed & 0xF0) ^ 0x49000080).to(tl.float32, bitcast=True) - 524296.0
    return low, high


@triton.jit
def round_product(a, b):
    """Nearest int32 of the exact ``a b``, ``|a b| < 2**22``. Said as an FMA, which compilers make of it or not."""
    return tl.fma(a, b, MAGIC).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def safe_scale(scale):
    """One for zero, so that division is safe; NaN for infinity, so that the row is NaN as in a plain implementation."""
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(scale < float("inf"), scale, float("nan"))


PART = 512  # columns


def columns_at_once(arch: str, k: int) -> int:
    """How many e4m3 products the matrix units should sum before the rest is added outside of them; 0: all.

    Ada's and Hopper's drop what lies 13 bits below the largest addend (arXiv 2411.10958, 2412.19437); what that costs
    is in docs/kernels_w8.md.
    """
    return PART if arch in ("sm89", "sm90") and k > EXACT_SUMS else 0


@cache
def has_e4m3(arch: str) -> bool:
    """Whether the matrix units take float8_e4m3fn (gfx942's take the other kind, e4m3fnuz)."""
    if arch.startswith("sm"):
        return int(arch[2:]) >= 89
    return arch == "cpu" or arch.startswith(("gfx12", "gfx95"))


def expect_e4m3(op: str, name: str, arch: str) -> None:
    """ValueError on a part without."""
    if not has_e4m3(arch):
        raise ValueError(f"{op}: {name} is fp8, but {arch} has no float8_e4m3fn matrix units; use int8.")

"""What stands in front of a linear and is computed by its quantizer, so that it is never written to memory.

    ""      x (M, K) as it is
    "norm"  LayerNorm(x) · mult + shift: no affine weights; mult and shift (B, K), each row for M / B rows of x
    "rms"   RMSNorm(x) · mult: likewise; where the norm has a weight, it is in mult
    "gelu"  [x | GELU(tail)], tanh: x (M, K0) and tail (M, K - K0) side by side, K0 may be 0
    "silu"  [x | SiLU(gate) · tail]: likewise, and gate like tail

In FLUX they stand in front of every linear but the attention's last. Computed in float32 and rounded to x's dtype once:
the quantizer goes on with that, as if it had been read.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, expect
from .rounding import reciprocal


def columns(
    op: str, x: Tensor, tail: Tensor | None, gate: Tensor | None, mult: Tensor | None, shift: Tensor | None
) -> int:
    """K; :class:`ValueError` that names what does not fit."""
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (M, K).")
    k = x.shape[1]
    if tail is not None:
        if mult is not None or shift is not None:
            raise ValueError(f"{op}: tail and mult exclude each other.")
        expect(op, "tail", tail, (x.shape[0], tail.shape[-1]), (x.dtype,), x.device)
        k += tail.shape[1]
    if gate is not None:
        if tail is None:
            raise ValueError(f"{op}: gate needs a tail.")
        expect(op, "gate", gate, tuple(tail.shape), (x.dtype,), x.device)
    if mult is not None:
        expect(op, "mult", mult, (mult.shape[0], k), FLOATS, x.device)
        if shift is not None:
            expect(op, "shift", shift, tuple(mult.shape), FLOATS, x.device)
        if mult.shape[0] == 0 or x.shape[0] % mult.shape[0]:
            raise ValueError(
                f"{op}: mult has {mult.shape[0]} rows, which {x.shape[0]} rows of x cannot be shared among."
            )
    elif shift is not None:
        raise ValueError(f"{op}: shift needs a mult.")
    return k


def arguments(
    x: Tensor, tail: Tensor | None, gate: Tensor | None, mult: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[dict[str, object], int]:
    """The kernel's arguments for the input, and into how many parts of equal height its rows are cut."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if tail is not None:
        tail = tail if tail.stride(1) == 1 else tail.contiguous()
        if gate is not None and gate.stride() != tail.stride():  # the kernels know one
            tail, gate = tail.contiguous(), gate.contiguous()
    if tail is not None:
        before = "gelu" if gate is None else "silu"
    else:
        before = "" if mult is None else "rms" if shift is None else "norm"
    parts = 1 if mult is None else mult.shape[0]
    read = x if x.shape[1] or tail is None else tail  # none of x is; its address and stride would make another kernel
    given: dict[str, object] = {
        "x": read, "stride_m": read.stride(0), "tail": tail, "gate": gate, "split": x.shape[1],
        "tail_stride": 0 if tail is None else tail.stride(0),
        "mult": None if mult is None else mult.contiguous(), "shift": None if shift is None else shift.contiguous(),
        "rows_per_mod": x.shape[0] // parts, "eps": eps,
        "BEFORE": before,
    }  # fmt: skip
    return given, parts


@triton.jit
def rows_of_program(M, rows_per_mod, BEFORE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows (the last one again beyond the end), which of them are there, and their row of mult and shift."""
    block, arange = tl.program_id(0), tl.arange(0, BLOCK_M)
    if BEFORE == "norm" or BEFORE == "rms":  # no program has rows of two parts, so it reads one row of mult and shift
        blocks = tl.cdiv(rows_per_mod, BLOCK_M)
        part = (block // blocks).to(tl.int64)
        row = block % blocks * BLOCK_M + arange
        return part * rows_per_mod + tl.minimum(row, rows_per_mod - 1), row < rows_per_mod, part
    else:
        row = block * BLOCK_M + arange
        return tl.minimum(row, M - 1).to(tl.int64), row < M, 0


@triton.jit
def load_columns(x, rows, ks, K, stride_m, EVEN: tl.constexpr):
    """x[rows, ks], zero beyond the last column."""
    pointers = x + rows[:, None] * stride_m + ks[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(ks < K)[None, :], other=0.0)


@triton.jit
def moments(
    x, rows, K, stride_m, eps, BEFORE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of rows, BLOCKS at a step; two passes, so that a large mean does not cost the
    variance its digits. RMSNorm: with a mean of zero."""
    if BEFORE != "norm" and BEFORE != "rms":
        return 0.0, 0.0
    else:
        block = tl.arange(0, BLOCK_K)
        total = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
        if BEFORE == "norm":
            for k in range(0, K, BLOCK_K * BLOCKS):
                for i in tl.static_range(BLOCKS):
                    total += load_columns(x, rows, k + i * BLOCK_K + block, K, stride_m, EVEN).to(tl.float32)
        mean = tl.sum(total, axis=1) / K
        square = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K * BLOCKS):
            for i in tl.static_range(BLOCKS):
                ks = k + i * BLOCK_K + block
                distance = load_columns(x, rows, ks, K, stride_m, EVEN).to(tl.float32) - mean[:, None]
                if not EVEN:
                    distance = tl.where((ks < K)[None, :], distance, 0.0)
                square += distance * distance
        return mean, tl.rsqrt(tl.sum(square, axis=1) / K + eps)


@triton.jit
def load_input(
    x, mult, shift, rows, part, ks, K, split, stride_m, mean, rstd, BEFORE: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """The linear's input at (rows, ks) in x's dtype, for the columns before split; zero beyond them."""
    if BEFORE == "rms":
        wide = load_columns(x, rows, ks, K, stride_m, EVEN).to(tl.float32)
        if EVEN:
            by = tl.load(mult + part * K + ks)
        else:
            by = tl.load(mult + part * K + ks, mask=ks < K, other=0.0)
        return (wide * rstd[:, None] * by.to(tl.float32)[None, :]).to(x.dtype.element_ty)
    elif BEFORE == "norm":
        wide = load_columns(x, rows, ks, K, stride_m, EVEN).to(tl.float32)
        normed = tl.fma(wide, rstd[:, None], (-mean * rstd)[:, None])
        if EVEN:
            by, plus = tl.load(mult + part * K + ks), tl.load(shift + part * K + ks)
        else:
            by = tl.load(mult + part * K + ks, mask=ks < K, other=0.0)
            plus = tl.load(shift + part * K + ks, mask=ks < K, other=0.0)
        return tl.fma(normed, by.to(tl.float32)[None, :], plus.to(tl.float32)[None, :]).to(x.dtype.element_ty)
    else:
        return load_columns(x, rows, ks, split, stride_m, EVEN)


@triton.jit
def load_tail(tail, gate, rows, ks, K, split, tail_stride, EVEN: tl.constexpr, PTX: tl.constexpr):
    """The same for the columns from split on; zero beyond the last."""
    tile = load_columns(tail, rows, ks - split, K - split, tail_stride, EVEN)
    # A number for every row keeps Triton from doing all of this once more in the layout of the product's operand.
    if gate is None:
        slope = tl.where(rows >= 0, SLOPE, 0.0)[:, None]
        return gelu(tile.to(tl.float32), slope, PTX).to(tile.dtype)
    else:
        slope = tl.where(rows >= 0, SILU_SLOPE, 0.0)[:, None]
        wide = load_columns(gate, rows, ks - split, K - split, tail_stride, EVEN).to(tl.float32)
        return (times_sigmoid(wide, wide * slope, PTX) * tile.to(tl.float32)).to(tile.dtype)


SLOPE = tl.constexpr(-2.302208198144325)  # -2 √(2/π) / ln 2
SILU_SLOPE = tl.constexpr(-1.4426950408889634)  # -1 / ln 2


@triton.jit
def gelu(x, slope, PTX: tl.constexpr):
    """GELU with tanh of float32: x · sigmoid(2 √(2/π) (x + 0.044715 x³)), as 1 + tanh(u) = 2 sigmoid(2u); base 2."""
    return times_sigmoid(x, x * tl.fma(x * x, 0.044715 * SLOPE, slope), PTX)


@triton.jit
def times_sigmoid(x, power, PTX: tl.constexpr):
    """``x / (1 + 2^power)`` of float32; zero where that overflows."""
    if PTX:
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [power], tl.float32, is_pure=True, pack=1)
    else:
        e = tl.exp2(power)
    high, _ = reciprocal(1.0 + e, PTX)
    return x * high


# For the kernels' `compile_cases`: types of the scalars, and what a plain input has not.
TYPES = {"stride_m": "i32:16", "tail_stride": "i32:16", "split": "i32:16", "rows_per_mod": "i32", "eps": "fp32"}
PLAIN = {"tail": None, "gate": None, "mult": None, "shift": None, "BEFORE": ""}


def input_case(before: str) -> tuple[dict[str, str], dict[str, object]]:
    """Types and constants of bf16 inputs with something in front; a product of weight and modulation is in float32."""
    bf16 = {"gelu": ("tail",), "silu": ("tail", "gate"), "norm": ("mult", "shift"), "rms": ()}[before]
    given = dict.fromkeys(bf16, "*bf16") or {"mult": "*fp32"}
    constants = {name: value for name, value in PLAIN.items() if name not in given}
    return given, constants | {"BEFORE": before}

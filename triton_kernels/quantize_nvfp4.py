"""NVFP4 activations and the first half of the low-rank branch, in one pass over the input.

    v      = (x [+ 0.171875 if act_unsigned]) / smooth_factor      float32, IEEE division
    scales = absmax(v) / 6 over 16 columns, rounded to e4m3 (at most 448; 1 where that is zero)
    codes  = v / scales in e2m1: half to even, at most 6
    hidden = x proj_down                                           raw x, float32 accumulation

``x (M, K)`` bf16 or fp16, K a multiple of 16; ``smooth_factor (K,)``; ``proj_down (K, R)``, R >= 0. Returns ``codes
(M, K/2)`` uint8 (low nibble = even column, bit 3 the sign), ``scales (M, K/16)`` float8_e4m3fn, ``hidden (M, R)`` in
x's dtype. Bit for bit ``svdq_core.formats.nvfp4``; a group with a NaN has scale NaN. Integer arithmetic makes both
kinds of codes, so this runs where the hardware knows neither.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, cdiv, custom_op, expect
from .inputs import PLAIN, TYPES, arguments, columns, input_case, load_input, load_tail, moments, rows_of_program
from .launching import launch
from .quantize_token import GELU_SHIFT, block_r, project, smoothed
from .rounding import divide, magnitude_bits, reciprocal, round_half_even
from .tiles import Tiles, measured

FLOAT16S = (torch.bfloat16, torch.float16)


CHOICES = {"BLOCK_M": (16, 32), "BLOCK_K": (64, 128, 256), "num_warps": (4, 8), "num_stages": (1, 2, 3)}


@cache
def config(part: str, found: Tiles = ()) -> dict[str, int]:
    """16 rows, as many columns as the registers of the compiled code hold; not measured."""
    amd = part.startswith("gfx")
    tiles = {"BLOCK_M": 16, "BLOCK_K": 64 if amd else 256, "num_warps": 4, "num_stages": 1 if amd else 2}
    return tiles | {"PTX": part.startswith("sm")} | dict(found)


@triton.jit
def encode_e4m3(v):
    """e4m3 codes, in an int32, of a float32 in 0...448 or NaN: half to even."""
    bits = magnitude_bits(v)
    # 3 of 23 mantissa bits stay: add half of the last one, ties to even, and move the exponent's bias from 127 to 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    code = tl.where(bits < 0x3C800000, round_half_even(v * 512.0), normal)  # below 2**-6: multiples of 2**-9
    return tl.where(bits > 0x7F800000, 0x7F, code)


@triton.jit
def decode_e4m3(code):
    """The float32 of an e4m3 code in an int32, sign bit clear: its bits under float32's exponent, times 2**120."""
    value = (code << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    return tl.where(code == 0x7F, float("nan"), value)


@triton.jit
def encode_e2m1(v):
    """e2m1 codes, in an int32, of a float32: half to even, at most 6."""
    bits = magnitude_bits(v)
    size = tl.minimum(bits, 0x40C00000)  # 6
    # 1 of 23 mantissa bits stays, and the bias moves from 127 to 1
    normal = ((size + 0x1FFFFF + ((size >> 22) & 1)) >> 22) - 252
    code = tl.where(size < 0x3F800000, round_half_even(size.to(tl.float32, bitcast=True) * 2.0), normal)
    return code | ((v.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit(do_not_specialize=["M", "rows_per_mod"])
def quantize_nvfp4_kernel(
    x, tail, gate, mult, shift, smooth, down, codes, scales, hidden,
    M, K, R, split, stride_m, tail_stride, rows_per_mod, eps,
    SHIFT: tl.constexpr, BEFORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows, all of K. Grid: (row blocks, blocks of BLOCK_R columns of proj_down)."""
    rows, inside, part = rows_of_program(M, rows_per_mod, BEFORE, BLOCK_M)
    inside = inside[:, None]
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mean, rstd = moments(x, rows, K, stride_m, eps, BEFORE, BLOCK_K, 1, EVEN)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    block = tl.arange(0, BLOCK_K)
    for k in range(0, split, BLOCK_K):
        tile = load_input(x, mult, shift, rows, part, k + block, K, split, stride_m, mean, rstd, BEFORE, EVEN)
        acc = project(tile, down, k + block, split, rs, R, acc, EVEN)
        store_codes(tile, smooth, codes, scales, rows, inside, k, split, K, SHIFT, BLOCK_M, BLOCK_K, EVEN, PTX)
    if tail is not None:
        for k in range(split, K, BLOCK_K):
            tile = load_tail(tail, gate, rows, k + block, K, split, tail_stride, EVEN, PTX)
            acc = project(tile, down, k + block, K, rs, R, acc, EVEN)
            store_codes(tile, smooth, codes, scales, rows, inside, k, K, K, SHIFT, BLOCK_M, BLOCK_K, EVEN, PTX)
    pointers = hidden + rows[:, None] * R + rs[None, :]
    tl.store(pointers, acc.to(hidden.dtype.element_ty), inside & (rs < R)[None, :])


@triton.jit
def store_codes(
    tile, smooth, codes, scales, rows, inside, k, end, K,
    SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the columns from ``k``, before ``end``; a program with other ranks leaves them out."""
    if tl.program_id(1) == 0:
        ks = k + tl.arange(0, BLOCK_K)
        groups = smoothed(tile, smooth, ks, end, SHIFT, EVEN, PTX).reshape(BLOCK_M, BLOCK_K // 16, 16)
        absmax = tl.max(magnitude_bits(groups), axis=2).to(tl.float32, bitcast=True)
        scale = encode_e4m3(tl.minimum(tl.div_rn(absmax, 6.0), 448.0, propagate_nan=tl.PropagateNan.ALL))
        scale = tl.where(scale == 0, 0x38, scale)
        high, low = reciprocal(decode_e4m3(scale), PTX)
        code = encode_e2m1(divide(groups, high[:, :, None], low[:, :, None]))
        even, odd = tl.split(code.reshape(BLOCK_M, BLOCK_K // 2, 2))
        at = k // 2 + tl.arange(0, BLOCK_K // 2)
        pointers = codes + rows[:, None] * (K // 2) + at[None, :]
        tl.store(pointers, (even | (odd << 4)).to(tl.uint8), inside & (at < end // 2)[None, :])
        at = k // 16 + tl.arange(0, BLOCK_K // 16)
        pointers = scales + rows[:, None] * (K // 16) + at[None, :]
        tl.store(pointers, scale.to(tl.uint8), inside & (at < end // 16)[None, :])


def check(x: Tensor, smooth_factor: Tensor, proj_down: Tensor, *before: Tensor | None) -> int:
    """K."""
    op, k = "quantize_nvfp4", columns("quantize_nvfp4", x, *before)
    if k % 16 or x.shape[1] % 16:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (M, K) with K a multiple of 16.")
    expect(op, "x", x, tuple(x.shape), FLOAT16S, x.device)
    expect(op, "smooth_factor", smooth_factor, (k,), FLOATS, x.device)
    expect(op, "proj_down", proj_down, (k, proj_down.shape[-1]), FLOAT16S, x.device)
    return k


def outputs(x: Tensor, k: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for codes, scales and hidden."""
    m = x.shape[0]
    codes, scales = x.new_empty((m, k // 2), dtype=torch.uint8), x.new_empty((m, k // 16), dtype=torch.float8_e4m3fn)
    return codes, scales, x.new_empty((m, rank))


def quantize_nvfp4(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    tail: Tensor | None = None,
    gate: Tensor | None = None,
    mult: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(codes (M, K/2), scales (M, K/16), hidden (M, R))`` of ``x (M, K)``: see the formulas above; of more than x, if
    there is a tail or a mult: :mod:`.inputs`."""
    k, m, rank = check(x, smooth_factor, proj_down, tail, gate, mult, shift), x.shape[0], proj_down.shape[1]
    codes, scales, hidden = outputs(x, k, rank)
    if m == 0:
        return codes, scales, hidden
    given, parts = arguments(x, tail, gate, mult, shift, eps)
    found = measured(f"quantize_nvfp4 {given['BEFORE']}".strip(), CHOICES, x.device, m, k, rank)
    tiles, width = config(arch(x.device), found), block_r(rank)
    even = k % tiles["BLOCK_K"] == x.shape[1] % tiles["BLOCK_K"] == 0 and rank > 0 and rank % width == 0
    with torch.cuda.device_of(x):
        launch(
            quantize_nvfp4_kernel,
            (parts * cdiv(m // parts, tiles["BLOCK_M"]), max(1, cdiv(rank, width))),
            **given, smooth=smooth_factor.contiguous(), down=proj_down.contiguous(),
            codes=codes, scales=scales.view(torch.uint8), hidden=hidden, M=m, K=k, R=rank,
            SHIFT=GELU_SHIFT if act_unsigned else 0.0, BLOCK_R=width, EVEN=even, **tiles,
        )  # fmt: skip
    return codes, scales, hidden


@custom_op(quantize_nvfp4).register_fake
def quantize_nvfp4_fake(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    tail: Tensor | None = None,
    gate: Tensor | None = None,
    mult: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(x, check(x, smooth_factor, proj_down, tail, gate, mult, shift), proj_down.shape[1])


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {name: "*bf16" for name in ("x", "smooth", "down", "hidden")}
    types |= {"codes": "*u8", "scales": "*u8", "M": "i32", "K": "i32:16", "R": "i32:16"} | TYPES
    fp16 = {name: t.replace("bf16", "fp16") for name, t in types.items()}
    signed = {"SHIFT": 0.0, "BLOCK_R": 32, "EVEN": True}
    shifted = signed | {"SHIFT": GELU_SHIFT}
    kernel, tiles = quantize_nvfp4_kernel, config(arch)
    norm, rms, gelu, silu = map(input_case, ("norm", "rms", "gelu", "silu"))
    return {
        "signed": (kernel, types, signed | PLAIN, tiles),
        "shifted": (kernel, fp16, shifted | PLAIN | {"BLOCK_R": 64, "EVEN": False}, tiles),
        "norm": (kernel, types | norm[0], signed | norm[1], tiles),
        "rms": (kernel, types | rms[0], signed | rms[1], tiles),
        "gelu": (kernel, types | gelu[0], shifted | gelu[1], tiles),
        "silu": (kernel, types | silu[0], signed | silu[1], tiles),
    }

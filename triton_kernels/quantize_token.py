"""8-bit activations, one scale per token, with the down-projection of the branch in the same pass over the input.

    v      = (x [+ 0.171875 if act_unsigned]) / smooth_factor        float32, IEEE division
    int8   : scale = absmax(v) / 127 in x's dtype, codes = round(v / scale) in -127...127
    uint8  : scale = absmax(v) / 255 in x's dtype, codes = round(v / scale) in 0...255, stored as code - 128
    fp8    : scale = absmax(v) / 448 in float32,   codes = v · (1 / scale) in float8_e4m3fn
    hidden = x proj_down                                             raw x, float32 accumulation

``x (M, K)`` bf16 or fp16, ``smooth_factor (K,)``, ``proj_down (K, R)``, R >= 0; returns ``codes (M, K)`` int8 or
float8_e4m3fn, ``scales (M,)`` float32, ``hidden (M, R)`` in x's dtype. A zero scale becomes one. ``int8`` and
``uint8`` are ``svdq_core.formats.int8``'s signed and unsigned grids bit for bit; ``uint8`` needs ``weight_sum`` in the
GEMM. ``fp8`` needs a part that converts to e4m3fn (sm 89 and later, gfx950, gfx12). A token with a NaN, or whose scale
is not finite, gets scale NaN, hence a row of NaN.

One program takes 16 or more whole rows: the scale is known only at the end of the row, so the input is read a second
time, back to front, while its end is still in the cache. SVDQuant, arXiv 2411.05007, section 4.3 (fused
down-projection); the per-token 8-bit form is design, not paper.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, cdiv, custom_op, expect, quotient
from .inputs import PLAIN, TYPES, arguments, columns, input_case, load_input, load_tail, moments, rows_of_program
from .launching import launch
from .rounding import divide, expect_e4m3, has_e4m3, magnitude_bits, reciprocal, round_half_even, safe_scale
from .tiles import Tiles, measured

FLOAT16S = (torch.bfloat16, torch.float16)
KINDS = {"int8": torch.int8, "uint8": torch.int8, "fp8": torch.float8_e4m3fn}
GELU_SHIFT = 0.171875
WIDEST_RANK = 64  # columns of proj_down that one program multiplies; those beyond go to others, which read x again


CHOICES = {"BLOCK_M": (16, 32), "BLOCK_K": (128, 256, 512), "num_warps": (4, 8), "num_stages": (1, 2, 3)}


@cache
def config(part: str, found: Tiles = ()) -> dict[str, int]:
    """Blocks and warps by instruction and register counts of the compiled code (docs/kernels_w8.md), not measured.

    16 rows make 288 programs of FLUX.1's 4608 tokens, two or three for each multiprocessor of the large parts; 256
    columns give a thread four rows to share the reciprocal of λ among. AMD's pipeline buffers in registers.
    """
    amd = part.startswith("gfx")
    tiles = {"BLOCK_M": 16, "BLOCK_K": 128 if amd else 256, "num_warps": 4, "num_stages": 1 if amd else 2}
    return tiles | {"PTX": part.startswith("sm")} | dict(found)


@triton.jit
def smoothed(x, smooth, ks, K, SHIFT: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr):
    """``(x + SHIFT) / λ`` in float32, 0 beyond the last column."""
    v = x.to(tl.float32)
    if SHIFT != 0.0:
        v += SHIFT
    if EVEN:
        factor = tl.load(smooth + ks)
    else:
        factor = tl.load(smooth + ks, mask=ks < K, other=1.0)
        if SHIFT != 0.0:
            v = tl.where((ks < K)[None, :], v, 0.0)
    return quotient(v, factor.to(tl.float32)[None, :], factor.dtype == tl.float32, PTX)


@triton.jit
def project(x, down, ks, K, rs, R, acc, EVEN: tl.constexpr):
    """``acc + x proj_down[ks, rs]``."""
    pointers = down + ks.to(tl.int64)[:, None] * R + rs[None, :]
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(ks < K)[:, None] & (rs < R)[None, :], other=0.0)
    return tl.dot(x, tile.to(x.dtype), acc)


@triton.jit(do_not_specialize=["M", "rows_per_mod"])
def quantize_token_kernel(
    x, tail, gate, mult, shift, smooth, down, codes, scales, hidden,
    M, K, R, split, stride_m, tail_stride, rows_per_mod, eps,
    KIND: tl.constexpr, SHIFT: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, blocks of BLOCK_R columns of proj_down); the first of these quantizes. EVEN: blocks fit."""
    rows, inside, part = rows_of_program(M, rows_per_mod, BEFORE, BLOCK_M)
    block = tl.arange(0, BLOCK_K)
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mean, rstd = moments(x, rows, K, stride_m, eps, BEFORE, BLOCK_K, 1, EVEN)

    top = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, split, BLOCK_K):
        tile = load_input(x, mult, shift, rows, part, k + block, K, split, stride_m, mean, rstd, BEFORE, EVEN)
        top = largest(tile, smooth, k + block, split, top, SHIFT, EVEN, PTX)
        acc = project(tile, down, k + block, split, rs, R, acc, EVEN)
    if tail is not None:
        for k in range(split, K, BLOCK_K):
            tile = load_tail(tail, gate, rows, k + block, K, split, tail_stride, EVEN, PTX)
            top = largest(tile, smooth, k + block, K, top, SHIFT, EVEN, PTX)
            acc = project(tile, down, k + block, K, rs, R, acc, EVEN)
    pointers = hidden + rows[:, None] * R + rs[None, :]
    tl.store(pointers, acc.to(x.dtype.element_ty), mask=inside[:, None] & (rs < R)[None, :])
    if tl.program_id(1) > 0:
        return

    LIMIT: tl.constexpr = 448.0 if KIND == "fp8" else (255.0 if KIND == "uint8" else 127.0)
    scale = tl.div_rn(tl.max(magnitude_bits(top), axis=1).to(tl.float32, bitcast=True), LIMIT)
    if KIND != "fp8":
        scale = scale.to(x.dtype.element_ty).to(tl.float32)
    scale = safe_scale(scale)
    tl.store(scales + rows, scale, mask=inside)
    high, low = reciprocal(scale, PTX)
    if KIND == "fp8":
        high = tl.div_rn(1.0, scale)  # no format defines this one: a product is enough

    WIDE: tl.constexpr = 2 * BLOCK_K  # without the product's tiles there are registers for more rows a thread
    wide = tl.arange(0, WIDE)
    if tail is not None:
        for back in range(0, K - split, WIDE):
            ks = split + (K - split - 1) // WIDE * WIDE - back + wide
            tile = load_tail(tail, gate, rows, ks, K, split, tail_stride, EVEN, PTX)
            v = smoothed(tile, smooth, ks, K, SHIFT, EVEN, PTX)
            tl.store(
                codes + rows[:, None] * K + ks[None, :],
                encode(v, high, low, KIND),
                mask=inside[:, None] & (ks < K)[None, :],
            )
    for back in range(0, split, WIDE):
        ks = (split - 1) // WIDE * WIDE - back + wide
        tile = load_input(x, mult, shift, rows, part, ks, K, split, stride_m, mean, rstd, BEFORE, EVEN)
        v = smoothed(tile, smooth, ks, split, SHIFT, EVEN, PTX)
        tl.store(
            codes + rows[:, None] * K + ks[None, :],
            encode(v, high, low, KIND),
            mask=inside[:, None] & (ks < split)[None, :],
        )


@triton.jit
def largest(tile, smooth, ks, end, top, SHIFT: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr):
    """The larger one of ``top`` and the smoothed magnitudes; NaN stays. Only the programs that quantize need it."""
    if tl.program_id(1) == 0:
        size = tl.abs(smoothed(tile, smooth, ks, end, SHIFT, EVEN, PTX))
        top = tl.maximum(top, size, propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def encode(v, high, low, KIND: tl.constexpr):
    """Codes of v, divided by the scale whose reciprocal is given; the clamp catches a scale that was rounded down."""
    if KIND == "fp8":
        return tl.clamp(v * high[:, None], -448.0, 448.0).to(tl.float8e4nv)
    else:
        q = divide(v, high[:, None], low[:, None])
        if KIND == "uint8":
            return (round_half_even(tl.clamp(q, 0.0, 255.0)) - 128).to(tl.int8)
        else:
            return round_half_even(tl.clamp(q, -127.0, 127.0)).to(tl.int8)


def check(
    x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool, kind: str, *before: Tensor | None
) -> int:
    """K."""
    op = "quantize_token"
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is '{kind}', expected one of {', '.join(KINDS)}.")
    if kind == "uint8" and not act_unsigned:
        raise ValueError(f"{op}: kind 'uint8' is for act_unsigned layers; use 'int8'.")
    k = columns(op, x, *before)
    expect(op, "x", x, tuple(x.shape), FLOAT16S, x.device)
    expect(op, "smooth_factor", smooth_factor, (k,), FLOATS, x.device)
    expect(op, "proj_down", proj_down, (k, proj_down.shape[-1]), FLOAT16S, x.device)
    return k


def outputs(x: Tensor, k: int, rank: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Room for codes, scales and hidden."""
    m = x.shape[0]
    codes, scales = x.new_empty((m, k), dtype=KINDS[kind]), x.new_empty((m,), dtype=torch.float32)
    return codes, scales, x.new_empty((m, rank))


def quantize_token(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    kind: str,
    tail: Tensor | None = None,
    gate: Tensor | None = None,
    mult: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(codes (M, K), scales (M,), hidden (M, R))`` of ``x (M, K)``: see the formulas above; of more than x, if there
    is a tail or a mult: :mod:`.inputs`."""
    k = check(x, smooth_factor, proj_down, act_unsigned, kind, tail, gate, mult, shift)
    if kind == "fp8":
        expect_e4m3("quantize_token", "kind", arch(x.device))
    m, rank = x.shape[0], proj_down.shape[1]
    codes, scales, hidden = outputs(x, k, rank, kind)
    if m == 0:
        return codes, scales, hidden
    given, parts = arguments(x, tail, gate, mult, shift, eps)
    found = measured(f"quantize_token {kind} {given['BEFORE']}".strip(), CHOICES, x.device, m, k, rank)
    tiles, widest = config(arch(x.device), found), block_r(rank)
    wide = 2 * tiles["BLOCK_K"]  # the second pass takes two blocks
    even = k % wide == x.shape[1] % wide == 0 and rank > 0 and rank % widest == 0
    blocks = parts * cdiv(m // parts, tiles["BLOCK_M"])
    with torch.cuda.device_of(x):
        launch(
            quantize_token_kernel,
            (blocks, cdiv(rank, widest) if rank else 1),
            **given, smooth=smooth_factor.contiguous(), down=proj_down.contiguous(),
            codes=codes, scales=scales, hidden=hidden, M=m, K=k, R=rank,
            KIND=kind, SHIFT=GELU_SHIFT if act_unsigned else 0.0, BLOCK_R=widest, EVEN=even, **tiles,
        )  # fmt: skip
    return codes, scales, hidden


@cache
def block_r(rank: int) -> int:
    """Columns of the branch that one program makes."""
    return min(WIDEST_RANK, max(16, triton.next_power_of_2(rank)))


@custom_op(quantize_token).register_fake
def quantize_token_fake(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    kind: str,
    tail: Tensor | None = None,
    gate: Tensor | None = None,
    mult: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    k = check(x, smooth_factor, proj_down, act_unsigned, kind, tail, gate, mult, shift)
    return outputs(x, k, proj_down.shape[1], kind)


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {name: "*bf16" for name in ("x", "smooth", "down", "hidden")}
    types |= {"scales": "*fp32", "M": "i32", "K": "i32:16", "R": "i32:16"} | TYPES
    int8, fp16 = types | {"codes": "*i8"}, {name: t.replace("bf16", "fp16") for name, t in types.items()}
    whole = {"SHIFT": 0.0, "BLOCK_R": 32, "EVEN": True}
    constants, shifted = whole | PLAIN, whole | PLAIN | {"SHIFT": GELU_SHIFT, "EVEN": False}
    kernel, tiles = quantize_token_kernel, config(arch)
    norm, rms, gelu, silu = map(input_case, ("norm", "rms", "gelu", "silu"))
    cases = {
        "int8": (kernel, int8, constants | {"KIND": "int8"}, tiles),
        "uint8": (kernel, fp16 | {"codes": "*i8"}, shifted | {"KIND": "uint8"}, tiles),
        "norm": (kernel, int8 | norm[0], whole | norm[1] | {"KIND": "int8"}, tiles),
        "rms": (kernel, int8 | rms[0], whole | rms[1] | {"KIND": "int8"}, tiles),
        "gelu": (kernel, int8 | gelu[0], whole | gelu[1] | {"KIND": "uint8", "SHIFT": GELU_SHIFT}, tiles),
        "silu": (kernel, int8 | silu[0], whole | silu[1] | {"KIND": "int8"}, tiles),
    }
    if has_e4m3(arch):
        fp8 = types | {"codes": "*fp8e4nv"}
        cases["fp8"] = (kernel, fp8, constants | {"KIND": "fp8", "BLOCK_R": WIDEST_RANK}, tiles)
    return cases

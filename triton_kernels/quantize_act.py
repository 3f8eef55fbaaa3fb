"""INT4 activations and the first half of the low-rank branch, in one pass over the input.

    x̂ = x / λ                     act_unsigned: x̂ = (x + 0.171875) / λ
    s = max|x̂| / 7                over 64 columns, rounded to x's dtype; act_unsigned: / 15
    codes = round(x̂ / s)          half to even, -7...7; act_unsigned: 0...15
    hidden = x · proj_down        of the raw x, float32 sums

What stands in front of the linear can be computed on the way: :mod:`.inputs`.

Shapes: x (M, K) bf16, fp16 or float32, K a multiple of 64; smooth_factor λ (K,); proj_down (K, R), R may be 0.
Results: codes (M, K/2) int8, low nibble = even column; scales (M, K/64) in x's dtype, stored column by column because
the GEMM reads them so; hidden (M, R) in x's dtype.
Source: SVDQuant (arXiv 2411.05007) sections 4.1 to 4.3. The divisions are IEEE, so codes and scales are exactly
those of a plain implementation.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, cdiv, custom_op, expect, group_scales, pack_codes, quotient, round_to_code
from .inputs import PLAIN, TYPES, arguments, columns, input_case, load_input, load_tail, moments, rows_of_program
from .launching import launch
from .tiles import Tiles, measured

GELU_SHIFT = tl.constexpr(0.171875)
WIDER = tl.constexpr(4)  # blocks at once, where nothing but mean and variance is made of them
WIDER_RMS = tl.constexpr(2)  # as lean, and Z-Image's 3840 columns fill them


@triton.jit(do_not_specialize=["rows_per_mod"])
def quantize_act_kernel(
    x,
    tail,
    gate,
    mult,
    shift,
    smooth_ptr,
    down_ptr,
    codes_ptr,
    scales_ptr,
    hidden_ptr,
    M,
    K,
    R,
    split,
    stride_m,
    tail_stride,
    rows_per_mod,
    eps,
    down_stride_k,
    down_stride_r,
    UNSIGNED: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program: BLOCK_M rows, all of K. Grid: (row blocks, blocks of BLOCK_R columns of proj_down). EVEN: blocks of
    columns fit."""
    rows, inside, part = rows_of_program(M, rows_per_mod, BEFORE, BLOCK_M)
    row_mask = inside[:, None]
    blocks: tl.constexpr = WIDER if BEFORE == "norm" else WIDER_RMS
    mean, rstd = moments(x, rows, K, stride_m, eps, BEFORE, BLOCK_K, blocks, EVEN)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R if BLOCK_R > 0 else 1)
    hidden = tl.zeros([BLOCK_M, BLOCK_R if BLOCK_R > 0 else 1], tl.float32)
    for start in range(0, split, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = load_input(x, mult, shift, rows, part, k, K, split, stride_m, mean, rstd, BEFORE, EVEN)
        hidden = project(tile, down_ptr, k, split, ranks, R, down_stride_k, down_stride_r, hidden, BLOCK_R, EVEN)
        store_codes(
            tile, smooth_ptr, codes_ptr, scales_ptr, rows, row_mask, start, split, M, K,
            UNSIGNED, EVEN, BLOCK_M, BLOCK_K, PTX,
        )  # fmt: skip
    if tail is not None:
        for start in range(split, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            tile = load_tail(tail, gate, rows, k, K, split, tail_stride, EVEN, PTX)
            hidden = project(tile, down_ptr, k, K, ranks, R, down_stride_k, down_stride_r, hidden, BLOCK_R, EVEN)
            store_codes(
                tile, smooth_ptr, codes_ptr, scales_ptr, rows, row_mask, start, K, M, K,
                UNSIGNED, EVEN, BLOCK_M, BLOCK_K, PTX,
            )  # fmt: skip
    if BLOCK_R > 0:
        hidden_at = hidden_ptr + rows[:, None] * R + ranks[None, :]
        tl.store(hidden_at, hidden.to(hidden_ptr.dtype.element_ty), mask=row_mask & (ranks < R)[None, :])


@triton.jit
def project(
    tile, down_ptr, k, end, ranks, R, stride_k, stride_r, hidden, BLOCK_R: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """``hidden + tile proj_down[k, ranks]``."""
    if BLOCK_R > 0:
        down_at = down_ptr + k[:, None].to(tl.int64) * stride_k + ranks[None, :] * stride_r
        if EVEN:
            down = tl.load(down_at)
        else:
            down = tl.load(down_at, mask=(k < end)[:, None] & (ranks < R)[None, :], other=0.0)
        hidden = tl.dot(tile, down.to(tile.dtype), hidden, input_precision="ieee")
    return hidden


@triton.jit
def store_codes(
    tile, smooth_ptr, codes_ptr, scales_ptr, rows, row_mask, start, end, M, K,
    UNSIGNED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the columns from ``start``, before ``end``; a program with other ranks leaves them out."""
    if tl.program_id(1) == 0:
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            smooth = tl.load(smooth_ptr + k).to(tl.float32)
        else:
            smooth = tl.load(smooth_ptr + k, mask=k < end, other=1.0).to(tl.float32)
        wide = tile.to(tl.float32)
        if UNSIGNED:
            wide += GELU_SHIFT
        smoothed = quotient(wide, smooth[None, :], smooth_ptr.dtype.element_ty == tl.float32, PTX)
        groups = tl.reshape(smoothed, [BLOCK_M, BLOCK_K // 64, 64])
        scales = group_scales(groups, UNSIGNED, scales_ptr.dtype.element_ty)
        scaled = quotient(groups, scales[:, :, None], scales_ptr.dtype.element_ty == tl.float32, PTX)
        codes = round_to_code(scaled, UNSIGNED)
        group = start // 64 + tl.arange(0, BLOCK_K // 64)
        scales_at = scales_ptr + group[None, :].to(tl.int64) * M + rows[:, None]
        scales_mask = row_mask & (group < end // 64)[None, :]
        tl.store(scales_at, scales.to(scales_ptr.dtype.element_ty), mask=scales_mask)
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        codes_at = codes_ptr + rows[:, None] * (K // 2) + byte[None, :]
        codes_mask = row_mask & (byte < end // 2)[None, :]
        tl.store(codes_at, pack_codes(codes, BLOCK_M, BLOCK_K), mask=codes_mask)


CHOICES = {"BLOCK_M": (16, 32), "BLOCK_K": (64, 128, 256), "num_warps": (4, 8), "num_stages": (1, 2, 3)}


@cache
def config(arch: str, rank: int, dtype: torch.dtype, plain: bool, found: Tiles = ()) -> dict[str, int]:
    """Blocks, warps, pipeline; not measured. Few rows per program, so that a 4608-token image fills the GPU, and eight
    columns per thread: every step then has the same layout, and none is done twice. proj_down must fit in shared
    memory; columns of a wider one go to other programs, which read x again."""
    widest = 64 if dtype == torch.float32 else 128
    conf = {"BLOCK_M": 16, "BLOCK_K": 128, "BLOCK_R": min(max(16, triton.next_power_of_2(rank)), widest) if rank else 0}
    conf |= {"num_warps": 4 if arch == "gfx942" else 8, "num_stages": 3, "PTX": arch.startswith("sm")}
    if not plain or conf["BLOCK_R"] == 128:
        conf |= {"num_stages": 2}
    if dtype == torch.float32:
        conf |= {"num_stages": 1}
    if arch.startswith("gfx1"):
        conf |= {"BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    return conf | dict(found)


def check(x: Tensor, smooth_factor: Tensor, proj_down: Tensor, *before: Tensor | None) -> int:
    """K."""
    op, k = "quantize_act", columns("quantize_act", x, *before)
    if k % 64 or x.shape[1] % 64:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (M, K) with K a multiple of 64.")
    expect(op, "x", x, tuple(x.shape), FLOATS, x.device)
    expect(op, "smooth_factor", smooth_factor, (k,), FLOATS, x.device)
    expect(op, "proj_down", proj_down, (k, proj_down.shape[-1]), FLOATS, x.device)
    return k


def outputs(x: Tensor, k: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for codes, scales and hidden."""
    m = x.shape[0]
    return x.new_empty((m, k // 2), dtype=torch.int8), x.new_empty((k // 64, m)).t(), x.new_empty((m, rank))


def quantize_act(
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
    """Codes, scales and hidden of x: see the top of this file; of more than x, if there is a tail or a mult:
    :mod:`.inputs`."""
    k, m, rank = check(x, smooth_factor, proj_down, tail, gate, mult, shift), x.shape[0], proj_down.shape[1]
    codes, scales, hidden = outputs(x, k, rank)
    if m == 0:
        return codes, scales, hidden
    given, parts = arguments(x, tail, gate, mult, shift, eps)
    found = measured(f"quantize_act {given['BEFORE']}".strip(), CHOICES, x.device, m, k, rank)
    conf = config(arch(x.device), rank, x.dtype, given["BEFORE"] == "", found)
    width = conf["BLOCK_K"] * {"norm": WIDER.value, "rms": WIDER_RMS.value}.get(given["BEFORE"], 1)
    even = k % width == x.shape[1] % width == 0 and rank > 0 and rank % conf["BLOCK_R"] == 0
    blocks = parts * cdiv(m // parts, conf["BLOCK_M"])
    with torch.cuda.device_of(x):
        launch(
            quantize_act_kernel,
            (blocks, cdiv(rank, conf["BLOCK_R"]) if rank else 1),
            **given, smooth_ptr=smooth_factor.contiguous(), down_ptr=proj_down,
            codes_ptr=codes, scales_ptr=scales, hidden_ptr=hidden, M=m, K=k, R=rank,
            down_stride_k=proj_down.stride(0), down_stride_r=proj_down.stride(1),
            UNSIGNED=act_unsigned, EVEN=even, **conf,
        )  # fmt: skip
    return codes, scales, hidden


@custom_op(quantize_act).register_fake
def quantize_act_fake(
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
    types = {name: "*bf16" for name in ("x", "smooth_ptr", "down_ptr", "scales_ptr", "hidden_ptr")}
    types |= {"codes_ptr": "*i8", "M": "i32", "K": "i32:16", "R": "i32:16", "down_stride_k": "i32:16"} | TYPES
    whole = {"down_stride_r": 1, "UNSIGNED": False, "EVEN": True}
    signed, ragged = whole | PLAIN, whole | PLAIN | {"EVEN": False}
    norm, rms, gelu, silu = map(input_case, ("norm", "rms", "gelu", "silu"))
    fp16 = {name: t.replace("bf16", "fp16") for name, t in types.items()}
    fp32 = {name: t.replace("bf16", "fp32") for name, t in types.items()}
    kernel, bf16 = quantize_act_kernel, torch.bfloat16
    in_front = config(arch, 32, bf16, False)
    return {
        "signed": (kernel, types, signed, config(arch, 32, bf16, True)),
        "unsigned": (kernel, fp16, ragged | {"UNSIGNED": True}, config(arch, 32, torch.float16, True)),
        "norm": (kernel, types | norm[0], whole | norm[1], in_front),
        "rms": (kernel, types | rms[0], whole | rms[1], in_front),
        "gelu": (kernel, types | gelu[0], whole | gelu[1] | {"UNSIGNED": True}, in_front),
        "silu": (kernel, types | silu[0], whole | silu[1], in_front),
        "rank 160": (kernel, types, ragged, config(arch, 160, bf16, True)),
        "float32": (kernel, fp32, ragged, config(arch, 160, torch.float32, True)),
    }

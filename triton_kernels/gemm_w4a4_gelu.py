"""The first linear of an MLP that hands the second one its quantized input: y is never written.

    y = the 4-bit linear of `gemm_w4a4`, rounded to 16 bit
    h = GELU(y), the tanh one, rounded to 16 bit
    codes, scales, hidden = `quantize_act`(h, next_smooth, next_down, next_unsigned)

Shapes: codes, scales, weight, weight_scale, hidden, proj_up, bias as in `gemm_w4a4`, N a multiple of 64; next_smooth
(N,); next_down (N, R2), R2 may be 0. Results as those of `quantize_act`: codes (M, N/2), scales (M, N/64), hidden
(M, R2). The two roundings to 16 bit are those of the unfused path, so the fused one differs from it by the last digit
of the GELU at most.
Source: SVDQuant (arXiv 2411.05007) section 4.3.

hidden sums over all of N, which many programs share. Each makes TILES tiles of a row and writes its float32 sum to a
place of its own; `torch.sum` adds the places. Atomic additions would need no places, but add in another order every
time, and the same seed would no longer give the same picture.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FLOATS,
    arch,
    block_r,
    branch_and_bias,
    cdiv,
    custom_op,
    expect,
    group_scales,
    pack_codes,
    quotient,
    round_to_code,
    tile_of,
)
from .gemm_w4a4 import check, config, rowwise, scaled_sums
from .inputs import SLOPE, gelu
from .launching import launch
from .quantize_act import GELU_SHIFT

TILES = 4  # of 64 columns, for one program; places · M · R2 · 4 bytes, 48 places at FLUX's 12288 columns


@triton.jit
def gemm_w4a4_gelu_kernel(
    codes_ptr,
    scales_ptr,
    weight_ptr,
    weight_scale_ptr,
    hidden_ptr,
    up_ptr,
    bias_ptr,
    next_smooth_ptr,
    next_down_ptr,
    next_codes_ptr,
    next_scales_ptr,
    partial_ptr,
    M,
    N,
    R,
    next_r,
    row_bytes,
    scales_stride_m,
    scales_stride_g,
    hidden_stride,
    up_stride,
    next_down_stride,
    UNSIGNED: tl.constexpr,
    NEXT_UNSIGNED: tl.constexpr,
    PTX: tl.constexpr,
    MAGIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NEXT_BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program: TILES tiles (BLOCK_M, 64) side by side, each one group of the next layer's columns."""
    tile_m, place = tile_of(M, N, BLOCK_M, 64 * TILES, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, row_mask = tl.minimum(row, M - 1).to(tl.int64), row < M
    dtype: tl.constexpr = next_scales_ptr.dtype.element_ty
    for tile in range(place * TILES, tl.minimum(place * TILES + TILES, N // 64)):
        columns = (tile * 64 + tl.arange(0, 64)).to(tl.int64)
        acc = scaled_sums(
            codes_ptr,
            scales_ptr,
            weight_ptr,
            weight_scale_ptr,
            rows,
            columns,
            N,
            row_bytes,
            scales_stride_m,
            scales_stride_g,
            UNSIGNED,
            PTX,
            MAGIC,
            BLOCK_M,
            64,
        )
        acc = branch_and_bias(acc, hidden_ptr, up_ptr, bias_ptr, rows, columns, R, hidden_stride, up_stride, BLOCK_R)
        h = gelu(acc.to(dtype).to(tl.float32), SLOPE, PTX).to(dtype)
        if NEXT_BLOCK_R > 0:
            tl.debug_barrier()  # sums of the tile before may come back to other threads than those that stored them
            summed = tl.where(tile > place * TILES, next_r, 0)  # ranks that have a sum of the tiles before
            for start in range(0, next_r, NEXT_BLOCK_R):
                ranks = start + tl.arange(0, NEXT_BLOCK_R)
                down_at = next_down_ptr + columns[:, None] * next_down_stride + ranks[None, :]
                down = tl.load(down_at, mask=(ranks < next_r)[None, :], other=0.0).to(dtype)
                partial_at = partial_ptr + (place * M + rows[:, None]) * next_r + ranks[None, :]
                mask = row_mask[:, None] & (ranks < next_r)[None, :]
                before = tl.load(partial_at, mask=row_mask[:, None] & (ranks < summed)[None, :], other=0.0)
                tl.store(partial_at, tl.dot(h, down, before, input_precision="ieee"), mask=mask)
        wide = h.to(tl.float32)
        if NEXT_UNSIGNED:
            wide += GELU_SHIFT
        smooth = tl.load(next_smooth_ptr + columns).to(tl.float32)
        smoothed = quotient(wide, smooth[None, :], next_smooth_ptr.dtype.element_ty == tl.float32, PTX)
        next_scales = group_scales(smoothed, NEXT_UNSIGNED, dtype)
        scaled = quotient(smoothed, next_scales[:, None], dtype == tl.float32, PTX)
        next_codes = round_to_code(scaled, NEXT_UNSIGNED)
        tl.store(next_scales_ptr + tile * M + rows, next_scales.to(dtype), mask=row_mask)
        next_codes_at = next_codes_ptr + rows[:, None] * (N // 2) + (tile * 32 + tl.arange(0, 32))[None, :]
        tl.store(next_codes_at, pack_codes(next_codes, BLOCK_M, 64), mask=row_mask[:, None])


@cache
def configured(arch: str, m: int) -> dict[str, int]:
    """As `gemm_w4a4`, with tiles one group wide, and changed where the longer epilogue would spill registers."""
    conf = {name: value for name, value in config(arch, m).items() if name != "BLOCK_N"}
    if arch.startswith("sm10"):
        conf |= {"num_warps": 8}
    if arch.startswith("gfx11"):
        conf |= {"BLOCK_M": 32, "num_warps": 4}
    return conf


def check_next(weight: Tensor, next_smooth: Tensor, next_down: Tensor) -> None:
    op, n = "gemm_w4a4_gelu", weight.shape[0]
    if n % 64:
        raise ValueError(f"{op}: weight has {n} rows, expected a multiple of 64: they are the next layer's columns.")
    expect(op, "next_smooth", next_smooth, (n,), FLOATS, weight.device)
    expect(op, "next_down", next_down, (n, next_down.shape[-1]), FLOATS, weight.device)


def outputs(scales: Tensor, weight: Tensor, next_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for codes, scales and hidden of the next layer."""
    m, n = scales.shape[0], weight.shape[0]
    codes = scales.new_empty((m, n // 2), dtype=torch.int8)
    return codes, scales.new_empty((n // 64, m)).t(), scales.new_empty((m, next_down.shape[1]))


def gemm_w4a4_gelu(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
    next_smooth: Tensor,
    next_down: Tensor,
    next_unsigned: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and hidden of the next layer: see the top of this file."""
    check("gemm_w4a4_gelu", codes, scales, weight, weight_scale, hidden, proj_up, bias)
    check_next(weight, next_smooth, next_down)
    m, n, rank, next_rank = codes.shape[0], weight.shape[0], hidden.shape[1], next_down.shape[1]
    next_codes, next_scales, next_hidden = outputs(scales, weight, next_down)
    if m == 0 or n == 0:
        return next_codes, next_scales, next_hidden.zero_()
    hidden, proj_up, next_down = rowwise(hidden), rowwise(proj_up), rowwise(next_down)
    places = cdiv(n, 64 * TILES)
    partial = scales.new_empty((places, m, next_rank), dtype=torch.float32)
    conf = configured(arch(codes.device), m)
    with torch.cuda.device_of(codes):
        launch(
            gemm_w4a4_gelu_kernel,
            (cdiv(m, conf["BLOCK_M"]) * places,),
            codes.contiguous(),
            scales,
            weight.contiguous().view(torch.int8),
            weight_scale.contiguous(),
            hidden,
            proj_up,
            None if bias is None else bias.contiguous(),
            next_smooth.contiguous(),
            next_down,
            next_codes,
            next_scales,
            partial,
            m,
            n,
            rank,
            next_rank,
            codes.shape[1],
            *scales.stride(),
            hidden.stride(0),
            proj_up.stride(0),
            next_down.stride(0),
            UNSIGNED=act_unsigned,
            NEXT_UNSIGNED=next_unsigned,
            BLOCK_R=block_r(rank),
            NEXT_BLOCK_R=16 if next_rank else 0,  # more would spill registers
            TILES=TILES,
            **conf,
        )
    return next_codes, next_scales, partial.sum(0).to(scales.dtype)


@custom_op(gemm_w4a4_gelu).register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
    next_smooth: Tensor,
    next_down: Tensor,
    next_unsigned: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    check("gemm_w4a4_gelu", codes, scales, weight, weight_scale, hidden, proj_up, bias)
    check_next(weight, next_smooth, next_down)
    return outputs(scales, weight, next_down)


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    names = ("scales", "weight_scale", "hidden", "up", "bias", "next_smooth", "next_down", "next_scales")
    types = {f"{name}_ptr": "*bf16" for name in names}
    types |= {"codes_ptr": "*i8", "weight_ptr": "*i8", "next_codes_ptr": "*i8", "partial_ptr": "*fp32", "M": "i32"}
    types |= {name: "i32:16" for name in ("N", "R", "next_r", "row_bytes", "scales_stride_g")}
    types |= {name: "i32:16" for name in ("hidden_stride", "up_stride", "next_down_stride")}
    constants = {"scales_stride_m": 1, "BLOCK_R": 32, "NEXT_BLOCK_R": 16, "TILES": TILES}
    constants |= {"UNSIGNED": False, "NEXT_UNSIGNED": True}
    return {"flux": (gemm_w4a4_gelu_kernel, types, constants, configured(arch, 4608))}

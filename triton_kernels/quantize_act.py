"""INT4 activations and the first half of the low-rank branch, in one pass over the input.

    x̂ = x / λ                     act_unsigned: x̂ = (x + 0.171875) / λ
    s = max|x̂| / 7                over 64 columns, rounded to x's dtype; act_unsigned: / 15
    codes = round(x̂ / s)          half to even, -7...7; act_unsigned: 0...15
    hidden = x · proj_down        of the raw x, float32 sums

`quantize_act_norm` puts FLUX's adaptive norm in front: x becomes LayerNorm(x)·(1 + mod_scale) + mod_shift, computed in
float32 and rounded to x's dtype once.

Shapes: x (M, K) bf16, fp16 or float32, K a multiple of 64; smooth_factor λ (K,); proj_down (K, R), R may be 0.
Results: codes (M, K/2) int8, low nibble = even column; scales (M, K/64) in x's dtype, stored column by column because
the GEMM reads them so; hidden (M, R) in x's dtype.
Source: SVDQuant (arXiv 2411.05007) sections 4.1 to 4.3. The divisions are IEEE, so codes and scales are exactly
those of a plain implementation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, expect, group_scales, pack_codes, quotient, round_to_code

GELU_SHIFT = tl.constexpr(0.171875)


@triton.jit
def quantize_act_kernel(
    x_ptr,
    smooth_ptr,
    down_ptr,
    mod_scale_ptr,
    mod_shift_ptr,
    codes_ptr,
    scales_ptr,
    hidden_ptr,
    M,
    K,
    R,
    x_stride,
    down_stride_k,
    down_stride_r,
    rows_per_mod,
    eps,
    UNSIGNED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program: BLOCK_M rows, all of K. Grid: (row blocks, blocks of BLOCK_R columns of proj_down). EVEN: blocks of
    columns fit, and rows beyond the last one repeat it."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    rows = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + tl.minimum(rows, M - 1)[:, None] * x_stride
    if NORM:
        mean, rstd = row_moments(x_rows, row_mask, K, eps, BLOCK_M, BLOCK_K)
        mod_rows = rows[:, None] // rows_per_mod * K
    if BLOCK_R > 0:
        ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        hidden = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        mask = row_mask[:, None] & (k < K)[None, :]
        if EVEN:
            x = tl.load(x_rows + k[None, :])
        else:
            x = tl.load(x_rows + k[None, :], mask=mask, other=0.0)
        if NORM:
            mod_scale = tl.load(mod_scale_ptr + mod_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
            mod_shift = tl.load(mod_shift_ptr + mod_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
            normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            x = (normed * (1.0 + mod_scale) + mod_shift).to(x.dtype)
        if BLOCK_R > 0:
            down_mask = (k < K)[:, None] & (ranks < R)[None, :]
            down_at = down_ptr + k[:, None].to(tl.int64) * down_stride_k + ranks[None, :] * down_stride_r
            if EVEN:
                down = tl.load(down_at)
            else:
                down = tl.load(down_at, mask=down_mask, other=0.0)
            hidden = tl.dot(x, down.to(x.dtype), hidden, input_precision="ieee")
        if tl.program_id(1) == 0:
            if EVEN:
                smooth = tl.load(smooth_ptr + k).to(tl.float32)
            else:
                smooth = tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32)
            wide = x.to(tl.float32)
            if UNSIGNED:
                wide += GELU_SHIFT
            smoothed = quotient(wide, smooth[None, :], smooth_ptr.dtype.element_ty == tl.float32, PTX)
            groups = tl.reshape(smoothed, [BLOCK_M, BLOCK_K // 64, 64])
            scales = group_scales(groups, UNSIGNED, scales_ptr.dtype.element_ty)
            scaled = quotient(groups, scales[:, :, None], scales_ptr.dtype.element_ty == tl.float32, PTX)
            codes = round_to_code(scaled, UNSIGNED)
            group = start // 64 + tl.arange(0, BLOCK_K // 64)
            scales_at = scales_ptr + group[None, :].to(tl.int64) * M + rows[:, None]
            scales_mask = row_mask[:, None] & (group < K // 64)[None, :]
            tl.store(scales_at, scales.to(scales_ptr.dtype.element_ty), mask=scales_mask)
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            codes_at = codes_ptr + rows[:, None] * (K // 2) + byte[None, :]
            codes_mask = row_mask[:, None] & (byte < K // 2)[None, :]
            tl.store(codes_at, pack_codes(codes, BLOCK_M, BLOCK_K), mask=codes_mask)
    if BLOCK_R > 0:
        hidden_at = hidden_ptr + rows[:, None] * R + ranks[None, :]
        tl.store(hidden_at, hidden.to(hidden_ptr.dtype.element_ty), mask=row_mask[:, None] & (ranks < R)[None, :])


@triton.jit
def row_moments(x_rows, row_mask, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows: two passes, so that a large mean costs no digits."""
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = row_mask[:, None] & (start + columns < K)[None, :]
        total += tl.load(x_rows + start + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / K
    square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = row_mask[:, None] & (start + columns < K)[None, :]
        x = tl.load(x_rows + start + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        distance = tl.where(mask, x - mean[:, None], 0.0)
        square += distance * distance
    return mean, tl.rsqrt(tl.sum(square, axis=1) / K + eps)


def config(arch: str, rank: int, dtype: torch.dtype, norm: bool) -> dict[str, int]:
    """Blocks, warps, pipeline; not measured. Few rows per program, so that a 4608-token image fills the GPU, and eight
    columns per thread: every step then has the same layout, and none is done twice. proj_down must fit in shared
    memory; columns of a wider one go to other programs, which read x again."""
    widest = 64 if dtype == torch.float32 else 128
    conf = {"BLOCK_M": 16, "BLOCK_K": 128, "BLOCK_R": min(max(16, triton.next_power_of_2(rank)), widest) if rank else 0}
    conf |= {"num_warps": 4 if arch == "gfx942" else 8, "num_stages": 3, "PTX": arch.startswith("sm")}
    if norm or conf["BLOCK_R"] == 128:
        conf |= {"num_stages": 2}
    if dtype == torch.float32:
        conf |= {"num_stages": 1}
    if arch.startswith("gfx1"):
        conf |= {"BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    return conf


def check(op: str, x: Tensor, smooth_factor: Tensor, proj_down: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] % 64:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (M, K) with K a multiple of 64.")
    k, device = x.shape[1], x.device
    expect(op, "x", x, tuple(x.shape), FLOATS, device)
    expect(op, "smooth_factor", smooth_factor, (k,), FLOATS, device)
    expect(op, "proj_down", proj_down, (k, proj_down.shape[-1]), FLOATS, device)


def outputs(x: Tensor, proj_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for codes, scales and hidden."""
    m, k = x.shape
    codes = x.new_empty((m, k // 2), dtype=torch.int8)
    return codes, x.new_empty((k // 64, m)).t(), x.new_empty((m, proj_down.shape[1]))


def launch(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    mod_scale: Tensor | None = None,
    mod_shift: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    (m, k), rank = x.shape, proj_down.shape[1]
    codes, scales, hidden = outputs(x, proj_down)
    if m == 0:
        return codes, scales, hidden
    x = x if x.stride(1) == 1 else x.contiguous()
    conf = config(arch(x.device), rank, x.dtype, mod_scale is not None)
    even = k % conf["BLOCK_K"] == 0 and rank > 0 and rank % conf["BLOCK_R"] == 0
    grid = (triton.cdiv(m, conf["BLOCK_M"]), triton.cdiv(rank, conf["BLOCK_R"]) if rank else 1)
    with torch.cuda.device_of(x):
        quantize_act_kernel[grid](
            x,
            smooth_factor.contiguous(),
            proj_down,
            mod_scale,
            mod_shift,
            codes,
            scales,
            hidden,
            m,
            k,
            rank,
            x.stride(0),
            *proj_down.stride(),
            m if mod_scale is None else m // mod_scale.shape[0],
            eps,
            UNSIGNED=act_unsigned,
            NORM=mod_scale is not None,
            EVEN=even,
            **conf,
        )
    return codes, scales, hidden


@torch.library.custom_op("svdquant::quantize_act", mutates_args=())
def quantize_act(
    x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and hidden of x: see the top of this file."""
    check("quantize_act", x, smooth_factor, proj_down)
    return launch(x, smooth_factor, proj_down, act_unsigned)


@quantize_act.register_fake
def _(x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool) -> tuple[Tensor, Tensor, Tensor]:
    check("quantize_act", x, smooth_factor, proj_down)
    return outputs(x, proj_down)


@torch.library.custom_op("svdquant::quantize_act_norm", mutates_args=())
def quantize_act_norm(
    x: Tensor,
    mod_scale: Tensor,
    mod_shift: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_act` of LayerNorm(x)·(1 + mod_scale) + mod_shift, both (B, K) for M / B rows of x each."""
    check_norm(x, mod_scale, mod_shift, smooth_factor, proj_down)
    return launch(x, smooth_factor, proj_down, act_unsigned, mod_scale.contiguous(), mod_shift.contiguous(), eps)


@quantize_act_norm.register_fake
def _(
    x: Tensor,
    mod_scale: Tensor,
    mod_shift: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm(x, mod_scale, mod_shift, smooth_factor, proj_down)
    return outputs(x, proj_down)


def check_norm(x: Tensor, mod_scale: Tensor, mod_shift: Tensor, smooth_factor: Tensor, proj_down: Tensor) -> None:
    op = "quantize_act_norm"
    check(op, x, smooth_factor, proj_down)
    batch = mod_scale.shape[0]
    expect(op, "mod_scale", mod_scale, (batch, x.shape[1]), FLOATS, x.device)
    expect(op, "mod_shift", mod_shift, (batch, x.shape[1]), FLOATS, x.device)
    if batch == 0 or x.shape[0] % batch:
        raise ValueError(f"{op}: mod_scale has {batch} rows, which {x.shape[0]} rows of x cannot be shared among.")


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {name: "*bf16" for name in ("x_ptr", "smooth_ptr", "down_ptr", "scales_ptr", "hidden_ptr")}
    types |= {"codes_ptr": "*i8", "M": "i32", "K": "i32:16", "R": "i32:16", "x_stride": "i32:16", "eps": "fp32"}
    types |= {"down_stride_k": "i32:16", "rows_per_mod": "i32:16"}
    signed = {
        "down_stride_r": 1,
        "UNSIGNED": False,
        "NORM": False,
        "EVEN": True,
        "mod_scale_ptr": None,
        "mod_shift_ptr": None,
    }
    unsigned = signed | {"UNSIGNED": True, "EVEN": False}
    mod = types | {"mod_scale_ptr": "*bf16", "mod_shift_ptr": "*bf16"}
    norm = {"down_stride_r": 1, "UNSIGNED": False, "NORM": True, "EVEN": True}
    fp16 = {name: t.replace("bf16", "fp16") for name, t in types.items()}
    fp32 = {name: t.replace("bf16", "fp32") for name, t in types.items()}
    return {
        "signed": (quantize_act_kernel, types, signed, config(arch, 32, torch.bfloat16, False)),
        "unsigned": (quantize_act_kernel, fp16, unsigned, config(arch, 32, torch.float16, False)),
        "norm": (quantize_act_kernel, mod, norm, config(arch, 32, torch.bfloat16, True)),
        "rank 160": (quantize_act_kernel, types, signed | {"EVEN": False}, config(arch, 160, torch.bfloat16, False)),
        "float32": (quantize_act_kernel, fp32, signed | {"EVEN": False}, config(arch, 160, torch.float32, False)),
    }

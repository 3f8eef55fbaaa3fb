"""The 4-bit linear: INT4 codes times INT4 codes with a scale per 64 columns, the low-rank branch and the bias.

    y = Σ_g scales[:, g] · weight_scale[g, :] · (codes_g · weight_gᵀ)  +  hidden · proj_upᵀ  +  bias

Shapes: codes (M, K/2) int8 and scales (M, K/64) as `quantize_act` makes them; weight (N, K/2) int8, signed nibbles,
low nibble = even column; weight_scale (K/64, N); hidden (M, R), proj_up (N, R), R may be 0; bias (N,) or None.
Result: y (M, N) in the dtype of scales.
Source: SVDQuant (arXiv 2411.05007) section 4.3; the file format is ComfyUI's `svdquant_w4a4`.

Even and odd columns of a group are two products of depth 32: their order inside a group is free, so no nibble ever
moves to another byte. A nibble becomes an int8 of 16 times its value (`byte & 0xF0`, `byte << 4`), which keeps its
sign; the factors 16 leave with the scales. Integer sums are exact (64 · 112 · 128 < 2^31), then everything is float32.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, block_r, branch_and_bias, cdiv, custom_op, expect, tile_of
from .launching import launch
from .tiles import Tiles, measured


@triton.jit
def low_nibbles(x, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """16 times the signed, or the unsigned low nibble of int8."""
    if PTX and SIGNED:
        return four_bytes("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", x)
    if PTX:
        return four_bytes("and.b32 $0, $1, 0x0F0F0F0F;", x)
    return x << 4 if SIGNED else x & 15


@triton.jit
def high_nibbles(x, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """16 times the signed, or the unsigned high nibble of int8."""
    if PTX and SIGNED:
        return four_bytes("and.b32 $0, $1, 0xF0F0F0F0;", x)
    if PTX:
        return four_bytes("{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }", x)
    return x & -16 if SIGNED else (x >> 4) & 15


@triton.jit
def four_bytes(ASM: tl.constexpr, x):
    """PTX for a register of four int8, which the compiler would take apart. (LLVM refuses the like for AMD.)"""
    return tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def scaled_sums(
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
    UNSIGNED: tl.constexpr,
    PTX: tl.constexpr,
    MAGIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The main loop: float32 (BLOCK_M, BLOCK_N) of the 4-bit product, for rows and columns given as int64.

    MAGIC: the integer sums start at the bits of 1.5 · 2^23, so they are the bits of the float 1.5 · 2^23 + sum, and
    a float subtraction converts them: where `mma.sync` adds to a start that it shares among all sums, this is free.
    """
    SCALE: tl.constexpr = 1.0 / 16 if UNSIGNED else 1.0 / 256
    byte = tl.arange(0, 32)
    codes_at = codes_ptr + rows[:, None] * row_bytes + byte[None, :]
    weight_at = weight_ptr + columns[:, None] * row_bytes + byte[None, :]
    scales_at = scales_ptr + rows * scales_stride_m
    weight_scale_at = weight_scale_ptr + columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, row_bytes, 32):
        codes = tl.load(codes_at)
        weight = tl.load(weight_at)
        scales = tl.load(scales_at).to(tl.float32) * SCALE
        weight_scale = tl.load(weight_scale_at).to(tl.float32)
        start = tl.full([BLOCK_M, BLOCK_N], 0x4B400000 if MAGIC else 0, tl.int32)
        sums = tl.dot(
            low_nibbles(codes, not UNSIGNED, PTX), low_nibbles(weight, True, PTX).T, start, out_dtype=tl.int32
        )
        sums = tl.dot(
            high_nibbles(codes, not UNSIGNED, PTX), high_nibbles(weight, True, PTX).T, sums, out_dtype=tl.int32
        )
        if MAGIC:
            sums = sums.to(tl.float32, bitcast=True) - 12582912.0
        acc += sums.to(tl.float32) * (scales[:, None] * weight_scale[None, :])
        codes_at += 32
        weight_at += 32
        scales_at += scales_stride_g
        weight_scale_at += N
    return acc


@triton.jit
def gemm_w4a4_kernel(
    codes_ptr,
    scales_ptr,
    weight_ptr,
    weight_scale_ptr,
    hidden_ptr,
    up_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    R,
    row_bytes,
    scales_stride_m,
    scales_stride_g,
    hidden_stride,
    up_stride,
    UNSIGNED: tl.constexpr,
    PTX: tl.constexpr,
    MAGIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """One program: one (BLOCK_M, BLOCK_N) tile of y. Rows and columns beyond the edge repeat the last: no masks.

    EVEN_N: there are no such columns, and the compiler may load the scales of neighbours together.
    """
    tile_m, tile_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(row, M - 1).to(tl.int64)
    columns = (column if EVEN_N else tl.minimum(column, N - 1)).to(tl.int64)
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
        BLOCK_N,
    )
    acc = branch_and_bias(acc, hidden_ptr, up_ptr, bias_ptr, rows, columns, R, hidden_stride, up_stride, BLOCK_R)
    mask = (row < M)[:, None] & (column < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


CHOICES = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}


@cache
def config(arch: str, m: int, found: Tiles = ()) -> dict[str, int]:
    """Tile, warps, pipeline, from compiled instruction counts (docs/kernels_w4a4.md), and what was measured to be
    better."""
    conf = {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4}
    if arch.startswith("gfx"):
        conf |= {"num_warps": 8, "num_stages": 2, "BLOCK_N": 128 if arch.startswith("gfx9") else 64}
    if m <= 64:
        conf |= {"BLOCK_M": 64, "num_warps": 4}
    # wgmma adds in place, so that a start costs a move per sum; AMD converts at full rate
    return conf | {"PTX": arch.startswith("sm"), "MAGIC": arch != "sm90" and not arch.startswith("gfx")} | dict(found)


def check(
    op: str,
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
) -> None:
    if codes.dim() != 2 or codes.shape[1] % 32:
        raise ValueError(f"{op}: codes has shape {tuple(codes.shape)}, expected (M, K/2) with K a multiple of 64.")
    (m, half), n, device = codes.shape, weight.shape[0], codes.device
    rank = hidden.shape[-1]
    expect(op, "codes", codes, (m, half), (torch.int8,), device)
    expect(op, "scales", scales, (m, half // 32), FLOATS, device)
    expect(op, "weight", weight, (n, half), (torch.int8, torch.uint8), device)
    expect(op, "weight_scale", weight_scale, (half // 32, n), FLOATS, device)
    expect(op, "hidden", hidden, (m, rank), FLOATS, device)
    expect(op, "proj_up", proj_up, (n, rank), FLOATS, device)
    if bias is not None:
        expect(op, "bias", bias, (n,), FLOATS, device)


def rowwise(tensor: Tensor) -> Tensor:
    """With columns next to each other; the rows may be apart."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def gemm_w4a4(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
) -> Tensor:
    """y (M, N): see the top of this file."""
    check("gemm_w4a4", codes, scales, weight, weight_scale, hidden, proj_up, bias)
    m, n, rank = codes.shape[0], weight.shape[0], hidden.shape[1]
    y = codes.new_empty((m, n), dtype=scales.dtype)
    if m == 0 or n == 0:
        return y
    hidden, proj_up = rowwise(hidden), rowwise(proj_up)
    conf = config(arch(codes.device), m, measured("gemm_w4a4", CHOICES, codes.device, m, 2 * codes.shape[1], n))
    grid = (cdiv(m, conf["BLOCK_M"]) * cdiv(n, conf["BLOCK_N"]),)
    with torch.cuda.device_of(codes):
        launch(
            gemm_w4a4_kernel,
            grid,
            codes.contiguous(),
            scales,
            weight.contiguous().view(torch.int8),
            weight_scale.contiguous(),
            hidden,
            proj_up,
            None if bias is None else bias.contiguous(),
            y,
            m,
            n,
            rank,
            codes.shape[1],
            *scales.stride(),
            hidden.stride(0),
            proj_up.stride(0),
            UNSIGNED=act_unsigned,
            BLOCK_R=block_r(rank),
            EVEN_N=n % conf["BLOCK_N"] == 0,
            **conf,
        )
    return y


@custom_op(gemm_w4a4).register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
) -> Tensor:
    check("gemm_w4a4", codes, scales, weight, weight_scale, hidden, proj_up, bias)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=scales.dtype)


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {name: "*bf16" for name in ("scales_ptr", "weight_scale_ptr", "hidden_ptr", "up_ptr", "bias_ptr", "y_ptr")}
    types |= {"codes_ptr": "*i8", "weight_ptr": "*i8", "M": "i32", "N": "i32:16", "row_bytes": "i32:16", "R": "i32:16"}
    types |= {"scales_stride_g": "i32:16", "hidden_stride": "i32:16", "up_stride": "i32:16"}
    fp16 = {name: t.replace("bf16", "fp16") for name, t in types.items()}
    fp32 = {name: t.replace("bf16", "fp32") for name, t in types.items()}
    constants = {"scales_stride_m": 1, "BLOCK_R": 32, "EVEN_N": True}
    one = {**constants, "UNSIGNED": False, "bias_ptr": None, "M": 1}
    return {
        "signed": (gemm_w4a4_kernel, types, {**constants, "UNSIGNED": False}, config(arch, 4608)),
        "unsigned": (gemm_w4a4_kernel, fp16, {**constants, "UNSIGNED": True}, config(arch, 4608)),
        "float32": (gemm_w4a4_kernel, fp32, {**constants, "UNSIGNED": False}, config(arch, 4608)),
        "one row": (gemm_w4a4_kernel, types, one, config(arch, 1)),
    }

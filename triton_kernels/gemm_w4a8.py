"""8-bit activations against INT4 weights widened inside the GEMM, with the branch and the bias in its epilogue.

    row_scale = max over the groups of weight_scale / 16 (int8) or / 32 (fp8)
    w8        = round(code · weight_scale / row_scale)                      -128...127, or e4m3; half to even
    y         = act_scales ⊗ row_scale ∘ (codes w8ᵀ) + hidden proj_upᵀ + bias

``codes (M, K)`` int8 or float8_e4m3fn and ``act_scales (M,)`` float32 from ``quantize_token`` (kinds ``int8`` and
``fp8``), ``weight (N, K/2)`` int8 or uint8 nibbles, low nibble = even column, ``weight_scale (K/64, N)``; ``hidden (M,
R)`` and ``proj_up (N, R)`` bf16 or fp16, R >= 0; ``bias (N,)`` or None. Returns ``y (M, N)`` in the dtype of
``hidden``. fp8 needs sm 89 or later, gfx950 or gfx12.

Needs no scratch, where ``widen_w4`` needs N K bytes, but widens each weight again for every BLOCK_M tokens, which
takes about as long as the products (instructions counted in docs/kernels_w8.md): for small M or little memory. The
product is computed as ``w8 codesᵀ``: Hopper's tensor cores take the widened side from registers only on the left.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, cdiv, custom_op, expect, tile_of
from .launching import launch
from .rounding import MAGIC, codes_of, columns_at_once, expect_e4m3, has_e4m3
from .tiles import Tiles, measured

FLOAT16S = (torch.bfloat16, torch.float16)
BLOCK_R = 32


CHOICES = {
    "BLOCK_M": (32, 64, 128, 256),
    "BLOCK_N": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}


@cache
def config(part: str, m: int, k: int, fp8: bool, found: Tiles = ()) -> dict[str, int]:
    """Tiles for a part, a shape and the kind of codes, and what was measured to be better.

    The sums of long rows of fp8 are kept twice, so the shipped tile is half as high there.
    """
    tiles = tiles_of(part, m)
    at_once = columns_at_once(part, k) if fp8 else 0
    if at_once:
        tiles = tiles | {"BLOCK_M": tiles["BLOCK_M"] // 2}
    return tiles | {"PARTS": at_once // 64} | dict(found)


def tiles_of(part: str, m: int) -> dict[str, int]:
    """By registers and instructions of the compiled code, not measured."""
    if part == "cpu":
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    if m <= 32:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if part == "sm90":
        return {"BLOCK_M": 256, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    if part.startswith(("gfx", "sm10")):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    # mma.sync: the warps that share rows of the tile each widen them, so few warps
    return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4}


@triton.jit
def widen(code, ratio, FP8: tl.constexpr):
    """``code · ratio`` in 8 bit."""
    if FP8:
        return (code * ratio).to(tl.float8e4nv)
    else:
        return tl.fma(code, ratio, MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["M"])
def gemm_w4a8_kernel(
    codes, act_scales, weight, weight_scale, largest, hidden, proj_up, bias, y, M, N, K, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns outside repeat the last one: loads need no mask, the store drops them
    column = tl.minimum(cols, N - 1)
    left = weight + column.to(tl.int64)[:, None] * (K // 2) + tl.arange(0, 32)[None, :]
    right = codes + tl.minimum(rows, M - 1).to(tl.int64)[None, :] * K + tl.arange(0, 64)[:, None]
    scale = weight_scale + column
    FP8: tl.constexpr = codes.dtype.element_ty != tl.int8
    UNIT: tl.constexpr = 1.0 / 32 if FP8 else 1.0 / 16
    top = tl.load(largest + column).to(tl.float32)
    by_col = tl.where(top == 0.0, 1.0, top) * UNIT
    inverse = 1.0 / by_col
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if FP8 else tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # no registers unless it is used
    for step in range(0, K // 64):
        low, high = codes_of(tl.load(left).to(tl.int32))
        ratio = (tl.load(scale).to(tl.float32) * inverse)[:, None]
        w8 = tl.join(widen(low, ratio, FP8), widen(high, ratio, FP8)).reshape(BLOCK_N, 64)
        acc = tl.dot(w8, tl.load(right), acc, out_dtype=acc.dtype)
        if PARTS > 0:  # noqa: SIM102 (only this one is decided when compiled)
            if step % PARTS == PARTS - 1:
                total += acc
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        left += 32
        scale += N
        right += 64

    if PARTS > 0:
        acc += total
    by_row = tl.load(act_scales + rows, rows < M, 0.0)
    out = acc.to(tl.float32) * by_col[:, None] * by_row[None, :]
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        rs = r + tl.arange(0, BLOCK_R)
        up = tl.load(
            proj_up + cols.to(tl.int64)[:, None] * R + rs[None, :], (cols < N)[:, None] & (rs < R)[None, :], 0.0
        )
        part = tl.load(
            hidden + rows.to(tl.int64)[None, :] * R + rs[:, None], (rows < M)[None, :] & (rs < R)[:, None], 0.0
        )
        out = tl.dot(up.to(part.dtype), part, out)
    if bias is not None:
        out += tl.load(bias + cols, cols < N, 0.0).to(tl.float32)[:, None]
    pointers = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(pointers, out.to(y.dtype.element_ty).T, (rows < M)[:, None] & (cols < N)[None, :])


def check(
    codes: Tensor,
    act_scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None = None,
) -> None:
    op, device = "gemm_w4a8", codes.device
    if codes.dim() != 2 or codes.shape[1] % 64:
        raise ValueError(f"{op}: codes has shape {tuple(codes.shape)}, expected (M, K) with K a multiple of 64.")
    (m, k), n, rank = codes.shape, weight.shape[0], proj_up.shape[-1]
    expect(op, "codes", codes, (m, k), (torch.int8, torch.float8_e4m3fn), device)
    expect(op, "act_scales", act_scales, (m,), (torch.float32,), device)
    expect(op, "weight", weight, (n, k // 2), (torch.int8, torch.uint8), device)
    expect(op, "weight_scale", weight_scale, (k // 64, n), FLOATS, device)
    expect(op, "hidden", hidden, (m, rank), FLOAT16S, device)
    expect(op, "proj_up", proj_up, (n, rank), FLOAT16S, device)
    if bias is not None:
        expect(op, "bias", bias, (n,), FLOATS, device)
    if row_scale is not None:
        expect(op, "row_scale", row_scale, (n,), (weight_scale.dtype,), device)


def gemm_w4a8(
    codes: Tensor,
    act_scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """``y (M, N)``: see the formulas above. ``row_scale (N,)`` is :func:`row_scale_of` the scales, if it is at hand."""
    check(codes, act_scales, weight, weight_scale, hidden, proj_up, bias, row_scale)
    part = arch(codes.device)
    if codes.dtype == torch.float8_e4m3fn:
        expect_e4m3("gemm_w4a8", "codes", part)
    (m, k), n, rank = codes.shape, weight.shape[0], proj_up.shape[1]
    y = hidden.new_empty((m, n))
    if m == 0:
        return y
    fp8 = codes.dtype != torch.int8
    found = measured("gemm_w4a8 fp8" if fp8 else "gemm_w4a8 int8", CHOICES, codes.device, m, k, n)
    tiles = config(part, m, k, fp8, found)
    grid = (cdiv(m, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"]),)
    with torch.cuda.device_of(codes):
        launch(
            gemm_w4a8_kernel,
            grid,
            codes.contiguous(),
            act_scales.contiguous(),
            weight.view(torch.int8).contiguous(),
            weight_scale.contiguous(),
            row_scale_of(weight_scale) if row_scale is None else row_scale.contiguous(),
            hidden.contiguous(),
            proj_up.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            m,
            n,
            k,
            rank,
            BLOCK_R=BLOCK_R,
            GROUP_M=8,
            **tiles,
        )
    return y


def row_scale_of(weight_scale: Tensor) -> Tensor:
    """The largest scale (N,) of every row of the weight."""
    return weight_scale.abs().amax(dim=0)


@custom_op(gemm_w4a8).register_fake
def gemm_w4a8_fake(
    codes: Tensor,
    act_scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None = None,
) -> Tensor:
    check(codes, act_scales, weight, weight_scale, hidden, proj_up, bias, row_scale)
    return hidden.new_empty((codes.shape[0], weight.shape[0]))


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {name: "*bf16" for name in ("weight_scale", "largest", "hidden", "proj_up", "bias", "y")}
    types |= {"weight": "*i8", "act_scales": "*fp32", "M": "i32", "N": "i32:16", "K": "i32:16", "R": "i32:16"}
    constants = {"BLOCK_R": BLOCK_R, "GROUP_M": 8}
    cases = {
        "int8": (gemm_w4a8_kernel, types | {"codes": "*i8"}, constants, config(arch, 4608, 12288, False)),
        "int8 small": (gemm_w4a8_kernel, types | {"codes": "*i8"}, constants, config(arch, 1, 12288, False)),
    }
    if has_e4m3(arch):
        for name, m, k in (("fp8", 4608, 3072), ("fp8 wide", 4608, 12288), ("fp8 small", 1, 12288)):
            cases[name] = (gemm_w4a8_kernel, types | {"codes": "*fp8e4nv"}, constants, config(arch, m, k, True))
    return cases

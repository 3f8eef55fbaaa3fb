"""8-bit GEMM, one scale per token and per output channel, with the branch and the bias in its epilogue.

    y = act_scales ⊗ weight_scale ∘ (codes weightᵀ [+ 128 weight_sum]) + hidden proj_upᵀ + bias

``codes (M, K)`` and ``weight (N, K)`` both int8 or both float8_e4m3fn, ``act_scales (M,)`` float32, ``weight_scale
(N,)`` float; ``hidden (M, R)`` and ``proj_up (N, R)`` bf16 or fp16, R >= 0; ``bias (N,)`` or None. ``weight_sum (N,)``
int32, the sums over k of ``weight``, where the codes are ``quantize_token``'s ``uint8`` (stored minus 128). Returns
``y (M, N)`` in the dtype of ``hidden``.

int8 products accumulate exactly in int32. e4m3 products accumulate in float32; Ada's and Hopper's tensor cores keep
about 14 bits of such a sum, so long rows are summed in parts, of PARTS steps each (``rounding.columns_at_once``). The
main loop scales nothing: it runs the weights of an INT8 file, and INT4 weights after ``widen_w4``, at the full 8-bit
rate. fp8 needs sm 89 or later, gfx950 or gfx12.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, cdiv, custom_op, expect, tile_of
from .launching import launch
from .rounding import columns_at_once, expect_e4m3, has_e4m3
from .tiles import Tiles, measured

FLOAT16S = (torch.bfloat16, torch.float16)
BLOCK_R = 32
# By shared memory, registers and instructions per MMA of the compiled code (docs/kernels_w8.md), not measured. 128 x
# 256 is the largest tile whose sums fit the registers; where they are kept twice, half of it. int8 on sm 100 compiles
# to mma.sync, far below tcgen05's rate: prefer fp8 there.
SMALL = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
AMPERE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
RDNA = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
CONFIGS = {
    "sm80": AMPERE | {"num_stages": 4},
    "sm86": AMPERE,
    "sm89": AMPERE,
    "sm90": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4},
    "sm100": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    "sm120": AMPERE,
    "gfx942": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
    "gfx1100": RDNA,
    "gfx1201": RDNA,
    "cpu": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1},
}
NEAREST = {"sm87": "sm86", "sm103": "sm100", "sm121": "sm120", "gfx950": "gfx942", "gfx1200": "gfx1201"}
CHOICES = {
    "BLOCK_M": (32, 64, 128, 256),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
WAVE = 96  # tiles below which a large part is not filled


@cache
def config(part: str, m: int, n: int, k: int, fp8: bool, found: Tiles = ()) -> dict[str, int]:
    """Tiles for a part, a shape and the kind of codes, and what was measured to be better."""
    tiles = tiles_of(part, m, n, fp8) | dict(found)
    at_once = columns_at_once(part, k) if fp8 else 0
    if at_once:
        tiles = tiles | {"BLOCK_N": min(tiles["BLOCK_N"], 128)}
    return tiles | {"PARTS": at_once // tiles["BLOCK_K"]}


def tiles_of(part: str, m: int, n: int, fp8: bool) -> dict[str, int]:
    """Without regard to K."""
    if part != "cpu" and m <= 32:
        # fp8 of fewer than 64 rows would be widened to fp16: no mma.sync of sm 90 and 100 takes it
        return SMALL | {"BLOCK_M": 64} if fp8 and part.startswith(("sm9", "sm10")) else SMALL
    part = NEAREST.get(part, part)
    tiles = CONFIGS.get(part, AMPERE if part.startswith("sm") else RDNA)
    few = cdiv(m, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"]) < WAVE
    return tiles | {"BLOCK_N": tiles["BLOCK_N"] // 2} if few else tiles


@triton.jit
def add_branch(out, hidden, proj_up, rows, M, cols, N, R, BLOCK_R: tl.constexpr):
    """``out + hidden proj_upᵀ`` for one tile, float32."""
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        rs = r + tl.arange(0, BLOCK_R)
        inside = (rs < R)[None, :]
        left = tl.load(hidden + rows.to(tl.int64)[:, None] * R + rs[None, :], (rows < M)[:, None] & inside, 0.0)
        right = tl.load(proj_up + cols.to(tl.int64)[:, None] * R + rs[None, :], (cols < N)[:, None] & inside, 0.0)
        out = tl.dot(left, right.to(left.dtype).T, out)
    return out


@triton.jit(do_not_specialize=["M"])
def gemm_w8a8_kernel(
    codes, act_scales, weight, weight_scale, weight_sum, hidden, proj_up, bias, y, M, N, K, R,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # rows and columns outside repeat the last one: loads need no mask, the store drops them
    left = codes + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + ks[None, :]
    right = weight + tl.minimum(cols, N - 1).to(tl.int64)[:, None] * K + ks[None, :]
    FP8: tl.constexpr = codes.dtype.element_ty != tl.int8
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if FP8 else tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # no registers unless it is used
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = (ks < K - k)[None, :]
            a, b = tl.load(left, inside, 0.0), tl.load(right, inside, 0.0)
        acc = tl.dot(a, b.T, acc, out_dtype=acc.dtype)
        if PARTS > 0:  # noqa: SIM102 (only this one is decided when compiled)
            if k // BLOCK_K % PARTS == PARTS - 1:
                total += acc
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        left += BLOCK_K
        right += BLOCK_K

    if PARTS > 0:
        acc += total
    if weight_sum is not None:
        acc += 128 * tl.load(weight_sum + cols, cols < N, 0)[None, :]
    by_row = tl.load(act_scales + rows, rows < M, 0.0)
    by_col = tl.load(weight_scale + cols, cols < N, 0.0).to(tl.float32)
    out = acc.to(tl.float32) * by_col[None, :] * by_row[:, None]
    out = add_branch(out, hidden, proj_up, rows, M, cols, N, R, BLOCK_R)
    if bias is not None:
        out += tl.load(bias + cols, cols < N, 0.0).to(tl.float32)[None, :]
    pointers = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(pointers, out.to(y.dtype.element_ty), (rows < M)[:, None] & (cols < N)[None, :])


def check(
    codes: Tensor,
    act_scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    weight_sum: Tensor | None,
) -> None:
    op, device = "gemm_w8a8", codes.device
    if codes.dim() != 2:
        raise ValueError(f"{op}: codes has shape {tuple(codes.shape)}, expected (M, K).")
    (m, k), n, rank = codes.shape, weight.shape[0], proj_up.shape[-1]
    expect(op, "codes", codes, (m, k), (torch.int8, torch.float8_e4m3fn), device)
    expect(op, "act_scales", act_scales, (m,), (torch.float32,), device)
    expect(op, "weight", weight, (n, k), (codes.dtype,), device)
    expect(op, "weight_scale", weight_scale, (n,), FLOATS, device)
    expect(op, "hidden", hidden, (m, rank), FLOAT16S, device)
    expect(op, "proj_up", proj_up, (n, rank), FLOAT16S, device)
    if bias is not None:
        expect(op, "bias", bias, (n,), FLOATS, device)
    if weight_sum is not None:
        if codes.dtype != torch.int8:
            raise ValueError(f"{op}: weight_sum is given, but only int8 codes are stored minus 128.")
        expect(op, "weight_sum", weight_sum, (n,), (torch.int32,), device)


def gemm_w8a8(
    codes: Tensor,
    act_scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """``y (M, N)``: see the formula above."""
    check(codes, act_scales, weight, weight_scale, hidden, proj_up, bias, weight_sum)
    part = arch(codes.device)
    if codes.dtype == torch.float8_e4m3fn:
        expect_e4m3("gemm_w8a8", "codes", part)
    (m, k), n, rank = codes.shape, weight.shape[0], proj_up.shape[1]
    y = hidden.new_empty((m, n))
    if m == 0:
        return y
    fp8 = codes.dtype != torch.int8
    found = measured("gemm_w8a8 fp8" if fp8 else "gemm_w8a8 int8", CHOICES, codes.device, m, k, n)
    tiles = config(part, m, n, k, fp8, found)
    grid = (cdiv(m, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"]),)
    with torch.cuda.device_of(codes):
        launch(
            gemm_w8a8_kernel,
            grid,
            codes.contiguous(),
            act_scales.contiguous(),
            weight.contiguous(),
            weight_scale.contiguous(),
            None if weight_sum is None else weight_sum.contiguous(),
            hidden.contiguous(),
            proj_up.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            m,
            n,
            k,
            rank,
            EVEN_K=k % tiles["BLOCK_K"] == 0,
            BLOCK_R=BLOCK_R,
            GROUP_M=8,
            **tiles,
        )
    return y


@custom_op(gemm_w8a8).register_fake
def gemm_w8a8_fake(
    codes: Tensor,
    act_scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    check(codes, act_scales, weight, weight_scale, hidden, proj_up, bias, weight_sum)
    return hidden.new_empty((codes.shape[0], weight.shape[0]))


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {name: "*bf16" for name in ("weight_scale", "hidden", "proj_up", "bias", "y")}
    types |= {"act_scales": "*fp32", "weight_sum": "*i32", "M": "i32", "N": "i32:16", "K": "i32:16", "R": "i32:16"}
    constants = {"EVEN_K": True, "BLOCK_R": BLOCK_R, "GROUP_M": 8}
    wide = 12288
    int8, usual = types | {"codes": "*i8", "weight": "*i8"}, constants | {"weight_sum": None}
    cases = {
        "int8": (gemm_w8a8_kernel, int8, usual, config(arch, 4608, 3072, wide, False)),
        "uint8": (gemm_w8a8_kernel, int8, constants, config(arch, 4608, 3072, wide, False)),
        "int8 medium": (gemm_w8a8_kernel, int8, usual, config(arch, 512, 3072, wide, False)),
        "int8 small": (gemm_w8a8_kernel, int8, usual, config(arch, 1, 3072, wide, False)),
    }
    if has_e4m3(arch):
        fp8 = types | {"codes": "*fp8e4nv", "weight": "*fp8e4nv"}
        for name, m, k in (
            ("fp8", 4608, 3072),
            ("fp8 wide", 4608, wide),
            ("fp8 medium", 512, 3072),
            ("fp8 small", 1, wide),
        ):
            cases[name] = (gemm_w8a8_kernel, fp8, usual, config(arch, m, 3072, k, True))
    return cases

"""NVFP4 GEMM, with the branch and the bias in its epilogue.

    y = weight_scale_2 · Σ_groups scales ⊗ weight_scale ∘ (codes weightᵀ) + hidden proj_upᵀ + bias

``codes (M, K/2)`` and ``weight (N, K/2)`` uint8 or int8 of e2m1 nibbles, low nibble = even column; ``scales (M, K/16)``
and ``weight_scale (N, K/16)`` float8_e4m3fn; ``weight_scale_2`` float32, one number () or one for every row (N,);
``hidden (M, R)`` and ``proj_up (N, R)`` bf16 or fp16, R >= 0; ``bias (N,)`` or None. K a multiple of 64. Returns
``y (M, N)`` in the dtype of ``hidden``, summed in float32.

Blackwell (sm 100, 103, 120, 121) multiplies these numbers natively, scales included. Elsewhere nibbles and scales
are multiplied in fp16 in registers, which is exact: e2m1 · e4m3 has at most six significant bits, and times 2**-7 all
of them lie on fp16's grid. So a file made for one part gives the same products on every other, at the rate of the
16-bit units at best.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, cdiv, custom_op, expect, tile_of
from .gemm_w8a8 import BLOCK_R, add_branch
from .launching import launch
from .tiles import Tiles, measured

FLOAT16S = (torch.bfloat16, torch.float16)
NATIVE = ("sm100", "sm103", "sm120", "sm121")


CHOICES = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}


@cache
def config(part: str, m: int, found: Tiles = ()) -> dict[str, int]:
    """Tiles by spills, shared memory and instructions of the compiled code, and what was measured to be better."""
    return shipped(part, m) | dict(found)


def shipped(part: str, m: int) -> dict[str, int]:
    native, amd = part in NATIVE, part.startswith("gfx")
    tiles = {"NATIVE": native, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    if part == "cpu":
        return tiles | {"BLOCK_M": 32, "BLOCK_N": 32}
    if native:
        return tiles | {"BLOCK_K": 256 if part.startswith("sm10") else 128}
    if m <= 32:
        return tiles | {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    if amd:
        return tiles | {"BLOCK_N": 64, "num_stages": 2}
    return tiles if part == "sm90" else tiles | {"BLOCK_N": 64, "num_warps": 4}


@triton.jit
def widen(nibbles, scales, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """The even and the odd columns of a tile of e2m1 nibbles times their e4m3 scales times 2**-7, in fp16.

    The bits of e2m1 under fp16's exponent are the value times 2**-14, those of e4m3 the value times 2**-8.
    """
    code = scales.to(tl.int16)
    factor = (code << 7).to(tl.float16, bitcast=True) * 32768.0
    factor = tl.where(code == 0x7F, float("nan"), factor).to(tl.float16)
    factor = tl.broadcast_to(factor[:, :, None], (ROWS, BYTES // 8, 8)).reshape(ROWS, BYTES)
    packed = nibbles.to(tl.int16)
    even = ((packed & 7) << 9) | ((packed & 8) << 12)
    odd = ((packed & 0x70) << 5) | ((packed & 0x80) << 8)
    return even.to(tl.float16, bitcast=True) * factor, odd.to(tl.float16, bitcast=True) * factor


@triton.jit(do_not_specialize=["M", "by_row"])
def gemm_nvfp4_kernel(
    codes, scales, weight, weight_scale, weight_scale_2, hidden, proj_up, bias, y, M, N, K, R, by_row,
    NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """``by_row``: 1 if weight_scale_2 has an entry for every row, else 0."""
    tile_m, tile_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns outside repeat the last one: only the end of K needs a mask, the store drops them
    row, col = tl.minimum(rows, M - 1).to(tl.int64)[:, None], tl.minimum(cols, N - 1).to(tl.int64)[:, None]
    at, group = tl.arange(0, BLOCK_K // 2)[None, :], tl.arange(0, BLOCK_K // 16)[None, :]
    left, left_scale = codes + row * (K // 2) + at, scales + row * (K // 16) + group
    right, right_scale = weight + col * (K // 2) + at, weight_scale + col * (K // 16) + group
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        here, there = at < (K - k) // 2, group < (K - k) // 16
        a, b = tl.load(left, here, 0), tl.load(right, here, 0)
        a_scale, b_scale = tl.load(left_scale, there, 0.0), tl.load(right_scale, there, 0.0)
        if NATIVE:
            acc = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", acc)
        else:
            a_even, a_odd = widen(a, a_scale, BLOCK_M, BLOCK_K // 2)
            b_even, b_odd = widen(b, b_scale, BLOCK_N, BLOCK_K // 2)
            acc = tl.dot(a_even, b_even.T, acc)
            acc = tl.dot(a_odd, b_odd.T, acc)
        left += BLOCK_K // 2
        right += BLOCK_K // 2
        left_scale += BLOCK_K // 16
        right_scale += BLOCK_K // 16

    factor = tl.load(weight_scale_2 + tl.minimum(cols, N - 1) * by_row)[None, :]
    out = acc * (factor if NATIVE else factor * 16384.0)  # 2**-7 of either side
    out = add_branch(out, hidden, proj_up, rows, M, cols, N, R, BLOCK_R)
    if bias is not None:
        out += tl.load(bias + cols, cols < N, 0.0).to(tl.float32)[None, :]
    pointers = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(pointers, out.to(y.dtype.element_ty), (rows < M)[:, None] & (cols < N)[None, :])


def check(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
) -> None:
    op, device = "gemm_nvfp4", codes.device
    if codes.dim() != 2 or codes.shape[1] % 32:
        raise ValueError(f"{op}: codes has shape {tuple(codes.shape)}, expected (M, K/2) with K a multiple of 64.")
    (m, half), n, rank = codes.shape, weight.shape[0], proj_up.shape[-1]
    expect(op, "codes", codes, (m, half), (torch.uint8, torch.int8), device)
    expect(op, "scales", scales, (m, half // 8), (torch.float8_e4m3fn,), device)
    expect(op, "weight", weight, (n, half), (torch.uint8, torch.int8), device)
    expect(op, "weight_scale", weight_scale, (n, half // 8), (torch.float8_e4m3fn,), device)
    by_row = (n,) if weight_scale_2.dim() else ()
    expect(op, "weight_scale_2", weight_scale_2, by_row, (torch.float32,), device)
    expect(op, "hidden", hidden, (m, rank), FLOAT16S, device)
    expect(op, "proj_up", proj_up, (n, rank), FLOAT16S, device)
    if bias is not None:
        expect(op, "bias", bias, (n,), FLOATS, device)


def gemm_nvfp4(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``y (M, N)``: see the formula above."""
    check(codes, scales, weight, weight_scale, weight_scale_2, hidden, proj_up, bias)
    (m, half), n, rank = codes.shape, weight.shape[0], proj_up.shape[1]
    y = hidden.new_empty((m, n))
    if m == 0:
        return y
    tiles = config(arch(codes.device), m, measured("gemm_nvfp4", CHOICES, codes.device, m, 2 * half, n))
    scale_type = torch.float8_e4m3fn if tiles["NATIVE"] else torch.uint8  # Ampere has no e4m3, not even to load
    grid = (cdiv(m, tiles["BLOCK_M"]) * cdiv(n, tiles["BLOCK_N"]),)
    with torch.cuda.device_of(codes):
        launch(
            gemm_nvfp4_kernel,
            grid,
            codes.view(torch.uint8).contiguous(),
            scales.contiguous().view(scale_type),
            weight.view(torch.uint8).contiguous(),
            weight_scale.contiguous().view(scale_type),
            weight_scale_2.contiguous(),
            hidden.contiguous(),
            proj_up.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            m,
            n,
            2 * half,
            rank,
            weight_scale_2.dim(),
            BLOCK_R=BLOCK_R,
            GROUP_M=8,
            **tiles,
        )
    return y


@custom_op(gemm_nvfp4).register_fake
def gemm_nvfp4_fake(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    hidden: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
) -> Tensor:
    check(codes, scales, weight, weight_scale, weight_scale_2, hidden, proj_up, bias)
    return hidden.new_empty((codes.shape[0], weight.shape[0]))


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    scale = "*fp8e4nv" if arch in NATIVE else "*u8"
    types = {name: "*bf16" for name in ("hidden", "proj_up", "bias", "y")}
    types |= {"codes": "*u8", "weight": "*u8", "scales": scale, "weight_scale": scale, "weight_scale_2": "*fp32"}
    types |= {"M": "i32", "N": "i32:16", "K": "i32:16", "R": "i32:16", "by_row": "i32"}
    constants = {"BLOCK_R": BLOCK_R, "GROUP_M": 8}
    return {
        "large": (gemm_nvfp4_kernel, types, constants, config(arch, 4608)),
        "small": (gemm_nvfp4_kernel, types, constants, config(arch, 1)),
    }

"""4-bit weights with a zero point, 16-bit activations: the modulation linears, whose M is the batch.

    w = (code - 8) · weight_scale + weight_zero                  per 64 columns
    y = x wᵀ + hidden proj_upᵀ + bias

``x (M, K)`` bf16 or fp16, ``weight (N, K/2)`` uint8 or int8 of uint4 codes, low nibble = even column,
``weight_scale`` and ``weight_zero (K/64, N)``, ``bias (N,)`` or None; ``hidden (M, R)`` and ``proj_up (N, R)`` or None
(a LoRA on such a layer). ``y (M, N)`` in x's dtype. AWQ, arXiv 2306.00978.

Memory-bound for small M: K/2 bytes a row. float32 arithmetic on the plain units, because a matrix instruction would
pad M to 16 and round the weights to 16 bit: nothing is rounded but y. M programs read one weight, so this is for
batches; a long input belongs to a GEMM.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, cdiv, custom_op, expect
from .launching import launch
from .rounding import codes_of

FLOAT16S = (torch.bfloat16, torch.float16)
# 16 rows x 256 bytes: 64 columns a thread; 576 programs for FLUX.1's smallest modulation. Not measured.
CONFIG = {"BLOCK_N": 16, "GROUPS": 8, "num_warps": 4}


@triton.jit
def gemm_w4a16_kernel(
    x, weight, weight_scale, weight_zero, bias, hidden, proj_up, y, N, K, R, stride_m,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: one token, BLOCK_N channels. Tokens run fastest, so that they share a weight in L2."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < N
    pairs = (x + row * stride_m).to(tl.pointer_type(tl.int32), bitcast=True)
    acc = tl.zeros((BLOCK_N, GROUPS, 32), tl.float32)
    for group in range(0, K // 64, GROUPS):
        groups = group + tl.arange(0, GROUPS)
        valid = groups < K // 64
        bytes_ = groups[:, None] * 32 + tl.arange(0, 32)[None, :]
        mask = inside[:, None] & valid[None, :]
        packed = tl.load(
            weight + cols.to(tl.int64)[:, None, None] * (K // 2) + bytes_[None, :, :], mask[:, :, None], 0
        ).to(tl.int32)
        at = groups.to(tl.int64)[None, :] * N + cols[:, None]
        scale = tl.load(weight_scale + at, mask, 0.0).to(tl.float32)
        zero = tl.load(weight_zero + at, mask, 0.0).to(tl.float32)
        scale, zero = scale[:, :, None], zero[:, :, None]
        pair = tl.load(pairs + bytes_, valid[:, None], 0)
        if x.dtype.element_ty == tl.bfloat16:  # the upper half of a float32
            even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        else:
            even = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low, high = codes_of(packed ^ 0x88)  # code - 8 has the bits of code with the sign flipped
        acc = tl.fma(low * scale + zero, even[None, :, :], acc)
        acc = tl.fma(high * scale + zero, odd[None, :, :], acc)
    total = tl.sum(tl.sum(acc, axis=2), axis=1)
    if hidden is not None:
        for r in range(0, R, BLOCK_R):
            rs = r + tl.arange(0, BLOCK_R)
            up = tl.load(
                proj_up + cols.to(tl.int64)[:, None] * R + rs[None, :], inside[:, None] & (rs < R)[None, :], 0.0
            )
            part = tl.load(hidden + row * R + rs, rs < R, 0.0)
            total += tl.sum(up.to(tl.float32) * part.to(tl.float32)[None, :], axis=1)
    if bias is not None:
        total += tl.load(bias + cols, inside, 0.0).to(tl.float32)
    tl.store(y + row * N + cols, total.to(y.dtype.element_ty), inside)


def check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    proj_up: Tensor | None,
) -> None:
    op, device = "gemm_w4a16", x.device
    if x.dim() != 2 or x.shape[1] % 64:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (M, K) with K a multiple of 64.")
    (m, k), n = x.shape, weight.shape[0]
    expect(op, "x", x, (m, k), FLOAT16S, device)
    expect(op, "weight", weight, (n, k // 2), (torch.int8, torch.uint8), device)
    expect(op, "weight_scale", weight_scale, (k // 64, n), FLOATS, device)
    expect(op, "weight_zero", weight_zero, (k // 64, n), FLOATS, device)
    if bias is not None:
        expect(op, "bias", bias, (n,), FLOATS, device)
    if (hidden is None) != (proj_up is None):
        raise ValueError(f"{op}: hidden and proj_up come together; one of them is None.")
    if hidden is not None and proj_up is not None:
        expect(op, "hidden", hidden, (m, proj_up.shape[-1]), FLOATS, device)
        expect(op, "proj_up", proj_up, (n, proj_up.shape[-1]), FLOATS, device)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None = None,
    proj_up: Tensor | None = None,
) -> Tensor:
    """``y (M, N)``: see the formula above."""
    check(x, weight, weight_scale, weight_zero, bias, hidden, proj_up)
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty((m, n))
    if m == 0:
        return y
    if x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:  # pairs of columns are read as one int32
        x = x.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        launch(
            gemm_w4a16_kernel,
            (m, cdiv(n, CONFIG["BLOCK_N"])),
            x,
            weight.view(torch.uint8).contiguous(),
            weight_scale.contiguous(),
            weight_zero.contiguous(),
            None if bias is None else bias.contiguous(),
            None if hidden is None else hidden.contiguous(),
            None if proj_up is None else proj_up.contiguous(),
            y,
            n,
            k,
            0 if proj_up is None else proj_up.shape[1],
            x.stride(0),
            BLOCK_R=32,
            **CONFIG,
        )
    return y


@custom_op(gemm_w4a16).register_fake
def gemm_w4a16_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None = None,
    proj_up: Tensor | None = None,
) -> Tensor:
    check(x, weight, weight_scale, weight_zero, bias, hidden, proj_up)
    return x.new_empty((x.shape[0], weight.shape[0]))


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {name: "*bf16" for name in ("x", "weight_scale", "weight_zero", "bias", "hidden", "proj_up", "y")}
    types |= {"weight": "*u8", "N": "i32:16", "K": "i32:16", "R": "i32:16", "stride_m": "i32:16"}
    plain = {name: t for name, t in types.items() if name not in ("hidden", "proj_up")}
    constants = {"BLOCK_R": 32}
    without = constants | {"hidden": None, "proj_up": None}
    return {
        "plain": (gemm_w4a16_kernel, plain, without, CONFIG),
        "branch": (gemm_w4a16_kernel, types, constants, CONFIG),
    }

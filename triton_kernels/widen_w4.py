"""INT4 weights widened to 8 bit, once, for a plain 8-bit GEMM (W4A8 execution of a W4A4 file).

    row_scale = max over the row's groups of |weight_scale| / 16 (int8) or / 32 (fp8)
    w8        = round(code · (weight_scale / row_scale))          half to even; the ratio is one float32 per group,
                                                                  int8 rounds its exact product
    weight_sum = Σ_k w8                                           of kind uint8: int8, for ``uint8`` activations

``weight (N, K/2)`` int8 or uint8, low nibble = even column, two's complement; ``weight_scale (K/64, N)``. Returns
``w8 (N, K)`` int8 or float8_e4m3fn, ``row_scale (N,)`` float32 and ``weight_sum (N,)`` int32, or ``(0,)``. The
rounding adds about -42 dB (int8) or -32 dB (fp8) to the weight, against -19 dB of the 4-bit rounding itself
(`docs/kernels_w8.md`). The groups of the largest scale are exact: codes of -8...7 become -128...112, or -256...224.

Memory-bound: K/2 bytes a row in, K bytes out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, arch, cdiv, custom_op, expect, quotient
from .launching import launch
from .rounding import codes_of, expect_e4m3, has_e4m3, magnitude_bits, round_product, safe_scale

KINDS = {"int8": torch.int8, "uint8": torch.int8, "fp8": torch.float8_e4m3fn}  # of the activations
# 16 rows x 4 groups: 2 KB of nibbles, 32 values a thread. 8 such steps make programs enough for large parts, and the
# scales of the whole row, which each reads first, small beside them. By register count, not measured.
CONFIG = {"BLOCK_N": 16, "GROUPS": 4, "STEPS": 8, "num_warps": 4}


@triton.jit
def load_codes(weight, rows, N, group, K, GROUPS: tl.constexpr):
    """`codes_of` the even and the odd columns of ``GROUPS`` groups: ``(BLOCK_N, GROUPS, 32)`` each."""
    groups = group + tl.arange(0, GROUPS)
    bytes_ = groups[:, None] * 32 + tl.arange(0, 32)[None, :]
    mask = (rows < N)[:, None, None] & (groups < K // 64)[None, :, None]
    packed = tl.load(weight + rows.to(tl.int64)[:, None, None] * (K // 2) + bytes_[None, :, :], mask=mask, other=0)
    return codes_of(packed.to(tl.int32))


@triton.jit
def load_scales(weight_scale, rows, N, group, K, GROUPS: tl.constexpr):
    """Their scales in float32: ``(BLOCK_N, GROUPS)``."""
    groups = group + tl.arange(0, GROUPS)
    mask = (rows < N)[:, None] & (groups < K // 64)[None, :]
    return tl.load(weight_scale + groups.to(tl.int64)[None, :] * N + rows[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def largest_scale(weight_scale, rows, N, K, GROUPS: tl.constexpr):
    """Of each row, NaN if there is one: ``(BLOCK_N,)``."""
    top = tl.zeros((rows.shape[0], GROUPS), tl.int32)
    for group in range(0, K // 64, GROUPS):
        top = tl.maximum(top, magnitude_bits(load_scales(weight_scale, rows, N, group, K, GROUPS)))
    return tl.max(top, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def widen_w4_kernel(
    weight, weight_scale, w8, row_scale, weight_sum, N, K,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, blocks of STEPS · GROUPS groups)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    UNIT: tl.constexpr = 1.0 / 32 if KIND == "fp8" else 1.0 / 16  # a division by these need not be exact on a GPU
    scale = safe_scale(largest_scale(weight_scale, rows, N, K, GROUPS * STEPS) * UNIT)
    if tl.program_id(1) == 0:
        tl.store(row_scale + rows, scale, mask=rows < N)

    total = tl.zeros((BLOCK_N, GROUPS, 32), tl.int32)
    first = tl.program_id(1) * GROUPS * STEPS
    for group in range(first, tl.minimum(first + GROUPS * STEPS, K // 64), GROUPS):
        low, high = load_codes(weight, rows, N, group, K, GROUPS)
        scales = load_scales(weight_scale, rows, N, group, K, GROUPS)
        ratio = quotient(scales, scale[:, None], weight_scale.dtype.element_ty == tl.float32, False)[:, :, None]
        if KIND == "fp8":
            pair = tl.join((low * ratio).to(tl.float8e4nv), (high * ratio).to(tl.float8e4nv))
        else:
            low, high = round_product(low, ratio), round_product(high, ratio)
            if KIND == "uint8":
                total += low + high
            pair = tl.join(low.to(tl.int8), high.to(tl.int8))
        columns = group * 64 + tl.arange(0, GROUPS * 64)
        pointers = w8 + rows.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(pointers, pair.reshape(BLOCK_N, GROUPS * 64), mask=(rows < N)[:, None] & (columns < K)[None, :])
    if KIND == "uint8":
        tl.atomic_add(weight_sum + rows, tl.sum(tl.sum(total, axis=2), axis=1), mask=rows < N)


def check(weight: Tensor, weight_scale: Tensor, kind: str) -> None:
    op = "widen_w4"
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is '{kind}', expected one of {', '.join(KINDS)}.")
    if weight.dim() != 2 or weight.shape[1] % 32:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (N, K/2) with K a multiple of 64.")
    n, half = weight.shape
    expect(op, "weight", weight, (n, half), (torch.int8, torch.uint8), weight.device)
    expect(op, "weight_scale", weight_scale, (half // 32, n), FLOATS, weight.device)


def outputs(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the wide weight, its scales, and its sums: none but for uint8."""
    n, k = weight.shape[0], weight.shape[1] * 2
    w8, row_scale = weight.new_empty((n, k), dtype=KINDS[kind]), weight.new_empty((n,), dtype=torch.float32)
    return w8, row_scale, weight.new_empty((n if kind == "uint8" else 0,), dtype=torch.int32)


def widen_w4(weight: Tensor, weight_scale: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(w8 (N, K), row_scale (N,), weight_sum (N,))``: see the formulas above."""
    check(weight, weight_scale, kind)
    if kind == "fp8":
        expect_e4m3("widen_w4", "kind", arch(weight.device))
    n, half = weight.shape
    w8, row_scale, weight_sum = outputs(weight, kind)
    if kind == "uint8":
        weight_sum.zero_()
    grid = (cdiv(n, CONFIG["BLOCK_N"]), cdiv(half // 32, CONFIG["GROUPS"] * CONFIG["STEPS"]))
    with torch.cuda.device_of(weight):
        launch(
            widen_w4_kernel,
            grid,
            weight.view(torch.int8).contiguous(), weight_scale.contiguous(), w8, row_scale, weight_sum, n, 2 * half,
            KIND=kind, **CONFIG,
        )  # fmt: skip
    return w8, row_scale, weight_sum


@custom_op(widen_w4).register_fake
def widen_w4_fake(weight: Tensor, weight_scale: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    check(weight, weight_scale, kind)
    return outputs(weight, kind)


def compile_cases(arch: str) -> dict[str, tuple]:
    """What `tests/test_compile_matrix.py` compiles: kernel, argument types, constants, options."""
    types = {"weight": "*i8", "weight_scale": "*bf16", "w8": "*i8", "row_scale": "*fp32", "weight_sum": "*i32"}
    types |= {"N": "i32:16", "K": "i32:16"}
    cases = {kind: (widen_w4_kernel, types, {"KIND": kind}, CONFIG) for kind in ("int8", "uint8")}
    if has_e4m3(arch):
        cases["fp8"] = (widen_w4_kernel, types | {"w8": "*fp8e4nv"}, {"KIND": "fp8"}, CONFIG)
    return cases

"""INT4 weights widened to 8 bit: codes bit for bit by the formula, and how little that loses."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.svdq_core.packing import pack_int4, unpack_int4
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8 import need, rounds_to, runs

INT4 = get_format("int4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def check(weight: Tensor, weight_scale: Tensor, kind: str, on: torch.device) -> tuple[Tensor, Tensor]:
    """The widened weight and its exact original, float64, after comparing codes, scales and sums with the formula."""
    from comfyui_svdquant.triton_kernels.widen_w4 import widen_w4

    w8, row_scale, weight_sum = (t.cpu() for t in widen_w4(weight.to(on), weight_scale.to(on), kind))
    codes = unpack_int4(weight).float().unflatten(1, (-1, 64))
    scale = weight_scale.t().float()
    wanted = scale.abs().amax(dim=1) / (32 if kind == "fp8" else 16)
    wanted = torch.where(wanted == 0, 1.0, wanted)
    assert torch.equal(row_scale, wanted)
    values = (codes.double() * (scale / wanted.unsqueeze(1)).double().unsqueeze(2)).flatten(1)
    if kind == "fp8":
        assert rounds_to(w8, values.float()).all()
    else:
        assert torch.equal(w8, values.round().to(torch.int8))
    assert torch.equal(weight_sum, w8.sum(dim=1, dtype=torch.int32) if kind == "uint8" else weight_sum[:0])
    exact = INT4.unpack({"weight": weight, "weight_scale": weight_scale}, torch.float64)
    return w8.double() * row_scale.double().unsqueeze(1), exact


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40),
    groups=st.one_of(st.integers(1, 9), st.integers(30, 70)),  # one block of columns, and more
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(["int8", "uint8", "fp8"]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_spread_of_scales(on, n, groups, dtype, kind, spread, seed):
    assume(runs(kind, on))
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, groups * 64), generator=g)
    scale = 10 ** (spread * (torch.rand(groups, n, generator=g) - 0.5)) * 1e-2
    widened, exact = check(pack_int4(codes), scale.to(DTYPES[dtype]), kind, on)
    # int8 rounds to half of the row's step; e4m3 to 2⁻⁴ of the value, or half of its smallest step
    top = scale.to(DTYPES[dtype]).double().amax(dim=0).unsqueeze(1)
    room = torch.maximum(exact.abs() / 16, top / 32 * 2.0**-10) if kind == "fp8" else (top / 32).expand_as(exact)
    assert ((widened - exact).abs() <= room * (1 + 1e-5)).all()


@pytest.mark.ptx
@pytest.mark.parametrize(("kind", "decibels"), [("int8", -40.0), ("uint8", -40.0), ("fp8", -31.0)])
def test_the_loss_is_far_below_that_of_four_bits(on, kind, decibels):
    """Gaussian weights, whose 4-bit rounding is at -19 dB."""
    need(kind, on)
    w = torch.randn(48, 1024, generator=torch.Generator().manual_seed(0))
    codes, scales = INT4.round_weight(w, torch.bfloat16)
    tensors = INT4.pack(codes, scales, torch.bfloat16, torch.ones(()))
    widened, exact = check(tensors["weight"], tensors["weight_scale"], kind, on)
    assert 20 * torch.log10((widened - exact).norm() / exact.norm()) < decibels


def test_zeros(on):
    widened, _ = check(torch.zeros(3, 64, dtype=torch.int8), torch.ones(2, 3, dtype=torch.bfloat16), "int8", on)
    assert not widened.any()


@pytest.mark.parametrize(
    ("weight", "scale", "kind", "message"),
    [
        (torch.zeros(4, 33, dtype=torch.int8), torch.ones(1, 4), "int8", "multiple of 64"),
        (torch.zeros(4, 32), torch.ones(1, 4), "int8", "weight is float32"),
        (torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1), "int8", "weight_scale has shape"),
        (torch.zeros(4, 32, dtype=torch.int8), torch.ones(1, 4), "int4", "kind is 'int4'"),
    ],
)
def test_wrong_arguments_are_named(on, weight, scale, kind, message):
    from comfyui_svdquant.triton_kernels.widen_w4 import widen_w4

    with pytest.raises(ValueError, match=message):
        widen_w4(weight.to(on), scale.to(on), kind)


def test_it_is_a_proper_custom_op(on):

    weight, scale = torch.zeros(5, 64, dtype=torch.uint8, device=on), torch.ones(2, 5, dtype=torch.bfloat16, device=on)
    torch.library.opcheck(torch.ops.svdquant.widen_w4.default, (weight, scale, "int8"))

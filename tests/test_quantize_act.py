"""INT4 activations: codes and scales are exactly the reference's, and the branch's first half is right."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import GELU_SHIFT, get_format
from comfyui_svdquant.svdq_core.packing import unpack_int4, unpack_uint4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import in_front

INT4 = get_format("int4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, on purpose


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(
    m: int, k: int, rank: int, dtype: torch.dtype, seed: int, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x with outlier columns, a smoothing factor over `spread` decades, and a down-projection, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g) * torch.where(torch.rand(k, generator=g) < 0.05, 30.0, 1.0)
    smooth = 10 ** (spread * (torch.rand(k, generator=g) - 0.5))
    return x.to(dtype), smooth.to(dtype), (torch.randn(k, rank, generator=g) / k**0.5).to(dtype)


def check(x: Tensor, smooth: Tensor, down: Tensor, unsigned: bool, on: torch.device) -> None:
    from comfyui_svdquant.triton_kernels.quantize_act import quantize_act

    codes, scales, hidden = (t.cpu() for t in quantize_act(x.to(on), smooth.to(on), down.to(on), unsigned))
    assert codes.dtype == torch.int8 and scales.dtype == hidden.dtype == x.dtype
    check_codes(codes, scales, x, smooth, unsigned)
    check_hidden(hidden, x, down)


def check_codes(codes: Tensor, scales: Tensor, x: Tensor, smooth: Tensor, unsigned: bool) -> None:
    """Bit for bit: what codes and scales stand for is what the reference rounds to, NaN where it has NaN."""
    smoothed = (x.float() + (GELU_SHIFT if unsigned else 0)) / smooth.float()
    groups = smoothed.unflatten(-1, (-1, 64)).abs().amax(dim=-1)
    wanted_scales = (groups / (15 if unsigned else 7)).to(x.dtype)
    wanted_scales = torch.where(wanted_scales == 0, 1, wanted_scales)
    finite = wanted_scales.isfinite()
    assert torch.equal(scales[finite], wanted_scales[finite])
    assert scales[~finite].isnan().all()
    unpacked = (unpack_uint4 if unsigned else unpack_int4)(codes).float().unflatten(-1, (-1, 64))
    found = (unpacked * scales.float().unsqueeze(-1)).flatten(-2)
    wanted = INT4.round_activations(smoothed, x.dtype, unsigned)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def check_hidden(hidden: Tensor, x: Tensor, down: Tensor) -> None:
    """One rounding to x's dtype after float32 sums, whose order is free: K · 2⁻²⁴ of the sum of magnitudes."""
    exact = x.double() @ down.double()
    room = exact.abs() * torch.finfo(x.dtype).eps / 2 + x.double().abs() @ down.double().abs() * x.shape[1] * 2.0**-24
    ok = exact.isfinite() & (exact.abs() < torch.finfo(x.dtype).max / 2)
    assert ((hidden.double() - exact).abs() <= room + torch.finfo(x.dtype).tiny)[ok].all()


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    groups=st.integers(1, 7),
    rank=st.sampled_from([0, 1, 16, 32, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    unsigned=st.booleans(),
    magnitude=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_size_of_values(on, m, groups, rank, dtype, unsigned, magnitude, seed):
    x, smooth, down = draw(m, groups * 64, rank, DTYPES[dtype], seed, spread=2)
    check((x.float() * magnitude).to(x.dtype), smooth, down, unsigned, on)


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.floats(-65504, 65504, width=16), min_size=128, max_size=128),
    unsigned=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_any_values(on, values, unsigned, dtype):
    x = torch.tensor(values, dtype=torch.float32).to(DTYPES[dtype]).reshape(1, 128)
    _, smooth, down = draw(1, 128, 16, x.dtype, 0)
    check(x, smooth, down, unsigned, on)


@pytest.mark.parametrize("unsigned", [False, True])
def test_ties_round_to_even(on, unsigned):
    """A scale of one and values at the halves."""
    x = torch.zeros(2, 64)
    x[:, 0] = 15 if unsigned else 7
    x[0, 1:15], x[1, 1:15] = torch.arange(14) + 0.5, -torch.arange(14) - 0.5
    x = (x.clamp(-7, 7) if not unsigned else x) - (GELU_SHIFT if unsigned else 0)
    check(x, torch.ones(64), torch.zeros(64, 16), unsigned, on)


@pytest.mark.ptx
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("rank", [0, 32, 256])
def test_a_shape_of_whole_blocks(on, rank, unsigned):
    """As layers have it: columns and ranks without a rest, which then need no mask; rows with one."""
    check(*draw(37, 512, rank, torch.bfloat16, 3), unsigned, on)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_group(on, bad, dtype):
    x, smooth, down = draw(3, 192, 0, DTYPES[dtype], 1)
    x[1, 70] = bad
    check(x, smooth, down, False, on)


def test_zeros_and_an_outlier_that_overflows_the_scale(on):
    x, smooth, down = draw(4, 128, 16, torch.float16, 2)
    x[0], x[1, :64], x[2, 5] = 0, 0, 65504
    check(x, smooth * 1e-3, down, False, on)


def test_strides_empty_input_and_wide_rank(on):
    from comfyui_svdquant.triton_kernels.quantize_act import quantize_act

    x, smooth, down = draw(20, 128, 300, torch.bfloat16, 3)
    check(x, smooth, down.t().contiguous().t(), False, on)
    check(x.t().contiguous().t(), smooth, down, False, on)
    check(x[::2], smooth, down[:, :16], True, on)
    codes, scales, hidden = quantize_act(x[:0].to(on), smooth.to(on), down.to(on), False)
    assert codes.shape == (0, 64) and scales.shape == (0, 2) and hidden.shape == (0, 300)


def test_wrong_arguments_are_named(on):
    from comfyui_svdquant.triton_kernels.quantize_act import quantize_act

    x, smooth, down = (t.to(on) for t in draw(2, 128, 16, torch.bfloat16, 4))
    for name, wrong in {
        "x has shape": (x[:, :100], smooth, down),
        "smooth_factor has shape": (x, smooth[:64], down),
        "smooth_factor is int8": (x, smooth.to(torch.int8), down),
        "proj_down has shape": (x, smooth, down[:64]),
        "proj_down is on meta": (x, smooth, down.to("meta")),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=name):
            quantize_act(*wrong, False)


def test_it_is_a_proper_custom_op(on):

    x, smooth, down = (t.to(on) for t in draw(5, 128, 16, torch.bfloat16, 5))
    torch.library.opcheck(torch.ops.svdquant.quantize_act.default, (x, smooth, down, False))
    torch.library.opcheck(torch.ops.svdquant.quantize_act.default, (x[:, :64], smooth, down, False, x[:, 64:]))
    torch.library.opcheck(torch.ops.svdquant.quantize_act.default, (x, smooth, down, False, None, None, x[:1], x[1:2]))


@settings(max_examples=15, deadline=None)
@given(case=in_front.cases(64), dtype=st.sampled_from(sorted(DTYPES)), unsigned=st.booleans())
def test_what_stands_in_front(on, case, dtype, unsigned):
    in_front.check("quantize_act", *in_front.draw(*case, DTYPES[dtype]), (unsigned,), on)


@pytest.mark.ptx
@pytest.mark.parametrize("case", in_front.WHOLE)
def test_what_stands_in_front_of_whole_blocks(on, case):
    in_front.check("quantize_act", *in_front.draw(*case, torch.bfloat16), (True,), on)


@pytest.mark.ptx
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, likewise
def test_what_stands_in_front_of_huge_values(on):
    in_front.check_huge("quantize_act", (False,), on)

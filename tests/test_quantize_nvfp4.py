"""NVFP4 activations: codes and scales are exactly the reference's, and the branch's first half is right."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import GELU_SHIFT, get_format
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import in_front

NVFP4 = get_format("nvfp4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, on purpose


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, k: int, rank: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x with outlier columns, a smoothing factor over two decades, and a down-projection, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g) * torch.where(torch.rand(k, generator=g) < 0.05, 30.0, 1.0)
    smooth = 10 ** (2 * (torch.rand(k, generator=g) - 0.5))
    return x.to(dtype), smooth.to(dtype), (torch.randn(k, rank, generator=g) / k**0.5).to(dtype)


def check(x: Tensor, smooth: Tensor, down: Tensor, shifted: bool, on: torch.device) -> None:
    from comfyui_svdquant.triton_kernels.quantize_nvfp4 import quantize_nvfp4

    codes, scales, hidden = (t.cpu() for t in quantize_nvfp4(x.to(on), smooth.to(on), down.to(on), shifted))
    assert scales.dtype == torch.float8_e4m3fn and hidden.dtype == x.dtype
    tensors = {"weight": codes, "weight_scale": scales, "weight_scale_2": torch.ones(())}
    smoothed = (x.float() + (GELU_SHIFT if shifted else 0)) / smooth.float()
    wanted_scale = (
        (smoothed.unflatten(1, (-1, 16)).abs().amax(dim=2) / 6).clamp(max=448).to(torch.float8_e4m3fn).float()
    )
    wanted_scale = torch.where(wanted_scale == 0, 1, wanted_scale)
    torch.testing.assert_close(scales.float(), wanted_scale, rtol=0, atol=0, equal_nan=True)
    wanted = NVFP4.round_activations(smoothed, x.dtype)
    found = NVFP4.unpack(tensors, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    check_hidden(hidden, x, down)


def check_hidden(hidden: Tensor, x: Tensor, down: Tensor) -> None:
    """One rounding to x's dtype after float32 sums, whose order is free: K · 2⁻²⁴ of the sum of magnitudes."""
    exact = x.double() @ down.double()
    room = exact.abs() * torch.finfo(x.dtype).eps / 2 + x.double().abs() @ down.double().abs() * x.shape[1] * 2.0**-24
    ok = exact.isfinite() & (exact.abs() < torch.finfo(x.dtype).max / 2)
    assert ((hidden.double() - exact).abs() <= room + torch.finfo(x.dtype).tiny)[ok].all()


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 40),
    groups=st.integers(1, 25),
    rank=st.sampled_from([0, 1, 16, 32, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    shifted=st.booleans(),
    magnitude=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_size_of_values(on, m, groups, rank, dtype, shifted, magnitude, seed):
    x, smooth, down = draw(m, groups * 16, rank, DTYPES[dtype], seed)
    check((x.float() * magnitude).to(x.dtype), smooth, down, shifted, on)


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.floats(-65504, 65504, width=16), min_size=96, max_size=96),
    dtype=st.sampled_from(sorted(DTYPES)),
    shifted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_values(on, values, dtype, shifted, seed):
    x, smooth, down = draw(2, 48, 16, DTYPES[dtype], seed)
    check(torch.tensor(values).reshape(2, 48).to(x.dtype), smooth, down, shifted, on)


@pytest.mark.ptx
@pytest.mark.parametrize("shifted", [False, True])
def test_a_shape_of_whole_blocks(on, shifted):
    """As layers have it: columns and ranks without a rest, which then need no mask; rows with one."""
    check(*draw(37, 512, 32, torch.bfloat16, 3), shifted, on)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_ties_zeros_outliers_and_nan(on, dtype):
    """λ = 1 and a largest value of 6 put every quarter on a tie of e2m1; 6 · s for all e4m3 scales s, and between."""
    x = torch.arange(128).sub(60).div(8).clamp(-6, 6).repeat(5, 1)
    x[:, ::16] = 6.0
    x[1], x[2, 5], x[3, 7] = 0, 3e4, torch.nan
    steps = torch.arange(1, 129).unsqueeze(1) * 6 / 512  # e4m3's subnormal scales and beyond, and halfway points
    x = torch.cat([x, steps * torch.linspace(-1, 1, 128), steps / 2 * torch.linspace(-1, 1, 128)]).to(DTYPES[dtype])
    check(x, torch.ones(128, dtype=x.dtype), torch.randn(128, 16).to(x.dtype), False, on)


def test_strided_and_empty_inputs(on):
    from comfyui_svdquant.triton_kernels.quantize_nvfp4 import quantize_nvfp4

    x, smooth, down = (t.to(on) for t in draw(6, 128, 16, torch.bfloat16, 0))
    wanted = quantize_nvfp4(x, smooth, down, False)
    for other in (torch.cat([x, x], dim=1)[:, :128], x.t().contiguous().t()):
        for found, expected in zip(quantize_nvfp4(other, smooth, down, False), wanted):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    codes, scales, hidden = quantize_nvfp4(x[:0], smooth, down, False)
    assert codes.shape == (0, 64) and scales.shape == (0, 8) and hidden.shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 128)}, "x is float32"),
        ({"x": torch.zeros(4, 72, dtype=torch.bfloat16)}, "multiple of 16"),
        ({"smooth_factor": torch.ones(64, dtype=torch.bfloat16)}, "smooth_factor has shape"),
        ({"proj_down": torch.ones(64, 16, dtype=torch.bfloat16)}, "proj_down has shape"),
    ],
)
def test_wrong_arguments_are_named(on, change, message):
    from comfyui_svdquant.triton_kernels.quantize_nvfp4 import quantize_nvfp4

    x, smooth, down = draw(4, 128, 16, torch.bfloat16, 0)
    arguments = {"x": x, "smooth_factor": smooth, "proj_down": down, "act_unsigned": False} | change
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(**{name: a.to(on) if isinstance(a, Tensor) else a for name, a in arguments.items()})


def test_it_is_a_proper_custom_op(on):

    x, smooth, down = (t.to(on) for t in draw(5, 128, 16, torch.bfloat16, 0))
    torch.library.opcheck(torch.ops.svdquant.quantize_nvfp4.default, (x, smooth, down, True))
    torch.library.opcheck(torch.ops.svdquant.quantize_nvfp4.default, (x[:, :64], smooth, down, False, x[:, 64:]))
    torch.library.opcheck(
        torch.ops.svdquant.quantize_nvfp4.default, (x, smooth, down, False, None, None, x[:1], x[1:2])
    )


@settings(max_examples=15, deadline=None)
@given(case=in_front.cases(16), dtype=st.sampled_from(sorted(DTYPES)), shifted=st.booleans())
def test_what_stands_in_front(on, case, dtype, shifted):
    in_front.check("quantize_nvfp4", *in_front.draw(*case, DTYPES[dtype]), (shifted,), on)


@pytest.mark.ptx
@pytest.mark.parametrize("case", in_front.WHOLE)
def test_what_stands_in_front_of_whole_blocks(on, case):
    in_front.check("quantize_nvfp4", *in_front.draw(*case, torch.bfloat16), (True,), on)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, likewise
def test_what_stands_in_front_of_huge_values(on):
    in_front.check_huge("quantize_nvfp4", (False,), on)

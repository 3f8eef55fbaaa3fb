"""Per-token 8-bit activations: int8 codes and scales are exactly the reference's, and so is the branch's first half."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import GELU_SHIFT, get_format
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import in_front
from fp8 import need, rounds_to, runs

INT8 = get_format("int8")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, on purpose
CASES = [("int8", False), ("int8", True), ("uint8", True), ("fp8", False), ("fp8", True)]


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, k: int, rank: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x with outlier columns, a smoothing factor over two decades, and a down-projection, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g) * torch.where(torch.rand(k, generator=g) < 0.05, 30.0, 1.0)
    smooth = 10 ** (2 * (torch.rand(k, generator=g) - 0.5))
    return x.to(dtype), smooth.to(dtype), (torch.randn(k, rank, generator=g) / k**0.5).to(dtype)


def check(x: Tensor, smooth: Tensor, down: Tensor, kind: str, unsigned: bool, on: torch.device) -> None:
    from comfyui_svdquant.triton_kernels.quantize_token import quantize_token

    codes, scales, hidden = (t.cpu() for t in quantize_token(x.to(on), smooth.to(on), down.to(on), unsigned, kind))
    assert scales.dtype == torch.float32 and hidden.dtype == x.dtype
    smoothed = (x.float() + (GELU_SHIFT if unsigned else 0)) / smooth.float()
    wanted = wanted_scales(smoothed, kind, x.dtype)
    torch.testing.assert_close(scales, wanted, rtol=0, atol=0, equal_nan=True)
    finite = wanted.isfinite()
    if kind == "fp8":
        # no format defines it: the product with the IEEE reciprocal, rounded to nearest even, saturating
        exact = (smoothed * (1 / wanted).unsqueeze(1)).clamp(-448, 448)
        assert rounds_to(codes, exact)[finite].all()
    else:
        # bit for bit what the format rounds to; a row that is NaN there has scale NaN here, whatever its codes
        values = (codes.float() + (128 if kind == "uint8" else 0)) * scales.unsqueeze(1)
        reference = INT8.round_activations(smoothed.clone(), x.dtype, kind == "uint8")
        torch.testing.assert_close(values, reference, rtol=0, atol=0, equal_nan=True)
    check_hidden(hidden, x, down)


def wanted_scales(smoothed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    scales = smoothed.abs().amax(dim=1) / {"int8": 127, "uint8": 255, "fp8": 448}[kind]
    if kind != "fp8":
        scales = scales.to(dtype).float()
    scales = torch.where(scales == 0, 1.0, scales)
    return torch.where(scales.isfinite(), scales, torch.nan)


def check_hidden(hidden: Tensor, x: Tensor, down: Tensor) -> None:
    """One rounding to x's dtype after float32 sums, whose order is free: K · 2⁻²⁴ of the sum of magnitudes."""
    exact = x.double() @ down.double()
    room = exact.abs() * torch.finfo(x.dtype).eps / 2 + x.double().abs() @ down.double().abs() * x.shape[1] * 2.0**-24
    ok = exact.isfinite() & (exact.abs() < torch.finfo(x.dtype).max / 2)
    assert ((hidden.double() - exact).abs() <= room + torch.finfo(x.dtype).tiny)[ok].all()


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 40).map(lambda k: 16 * k),
    rank=st.sampled_from([0, 1, 16, 32, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    case=st.sampled_from(CASES),
    magnitude=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_size_of_values(on, m, k, rank, dtype, case, magnitude, seed):
    assume(runs(case[0], on))
    x, smooth, down = draw(m, k, rank, DTYPES[dtype], seed)
    check((x.float() * magnitude).to(x.dtype), smooth, down, *case, on)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-65504, 65504, width=16), min_size=96, max_size=96),
    dtype=st.sampled_from(sorted(DTYPES)),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**31),
)
def test_any_values(on, values, dtype, case, seed):
    assume(runs(case[0], on))
    x, smooth, down = draw(2, 48, 16, DTYPES[dtype], seed)
    check(torch.tensor(values).reshape(2, 48).to(x.dtype), smooth, down, *case, on)


@pytest.mark.ptx
@pytest.mark.parametrize(("kind", "unsigned"), CASES)
def test_a_shape_of_whole_blocks(on, kind, unsigned):
    """As layers have it: columns and ranks without a rest, which then need no mask; rows with one."""
    need(kind, on)
    check(*draw(37, 1024, 32, torch.bfloat16, 3), kind, unsigned, on)


@pytest.mark.ptx
@pytest.mark.parametrize(("kind", "unsigned"), CASES)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_ties_zeros_outliers_infinity_and_nan(on, kind, unsigned, dtype):
    """λ = 1 and a largest value of the grid's limit put every half on a tie."""
    need(kind, on)
    limit = {"int8": 127.0, "uint8": 255.0, "fp8": 448.0}[kind]
    x = torch.arange(128).sub(60).div(2).repeat(6, 1)
    x[:, 0] = limit
    x[1], x[2, 5], x[3, 7], x[4, 9] = 0, 3e4, torch.inf, torch.nan
    x = x.to(DTYPES[dtype])
    check(x, torch.ones(128, dtype=x.dtype), torch.randn(128, 16).to(x.dtype), kind, unsigned, on)


def test_the_two_instruction_division_is_ieee(on):
    """Every bf16 mantissa as a divisor, and random fp16 ones, of random float32: what `divide` promises."""
    global divide, reciprocal, tl  # a kernel sees the names of its module
    high_bits = torch.arange(128, dtype=torch.int32) << 16 | 0x3F800000
    fp16 = torch.rand(896).add(1e-3).mul(100).half().float()
    divisors = torch.cat([high_bits.view(torch.float32), fp16])
    values = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 1024).contiguous()
    import triton
    import triton.language as tl
    from comfyui_svdquant.triton_kernels.quantize_token import arch, config
    from comfyui_svdquant.triton_kernels.rounding import divide, reciprocal

    @triton.jit
    def kernel(v, d, q, BLOCK: tl.constexpr, PTX: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        high, low = reciprocal(tl.load(d + tl.arange(0, BLOCK)), PTX)
        tl.store(q + at, divide(tl.load(v + at), high, low))

    quotients = torch.empty_like(values).to(on)
    kernel[(len(values),)](values.to(on), divisors.to(on), quotients, 1024, config(arch(on))["PTX"])
    assert torch.equal(quotients.cpu(), values / divisors)


def test_strided_and_empty_inputs(on):
    from comfyui_svdquant.triton_kernels.quantize_token import quantize_token

    x, smooth, down = (t.to(on) for t in draw(6, 128, 16, torch.bfloat16, 0))
    wide = torch.cat([x, x], dim=1)
    wanted = quantize_token(x, smooth, down, False, "int8")
    for other in (wide[:, :128], x.t().contiguous().t()):
        for found, expected in zip(quantize_token(other, smooth, down, False, "int8"), wanted):
            assert torch.equal(found, expected)
    codes, scales, hidden = quantize_token(x[:0], smooth, down, False, "int8")
    assert codes.shape == (0, 128) and scales.shape == (0,) and hidden.shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int4"}, "kind is 'int4'"),
        ({"kind": "uint8"}, "act_unsigned"),
        ({"x": torch.zeros(4, 128)}, "x is float32"),
        ({"x": torch.zeros(128, dtype=torch.bfloat16)}, r"x has shape \(128,\)"),
        ({"smooth_factor": torch.ones(64, dtype=torch.bfloat16)}, "smooth_factor has shape"),
        ({"proj_down": torch.ones(64, 16, dtype=torch.bfloat16)}, "proj_down has shape"),
        ({"tail": torch.zeros(3, 64, dtype=torch.bfloat16)}, "tail has shape"),
        ({"tail": torch.zeros(4, 64)}, "tail is float32"),
        ({"tail": torch.zeros(4, 64, dtype=torch.bfloat16)}, "smooth_factor has shape"),
        ({"gate": torch.zeros(4, 64)}, "gate needs a tail"),
        ({"tail": torch.zeros(4, 64).bfloat16(), "gate": torch.zeros(4, 32).bfloat16()}, "gate has shape"),
        ({"shift": torch.ones(1, 128)}, "shift needs a mult"),
        ({"mult": torch.ones(1, 128), "shift": torch.ones(2, 128)}, "shift has shape"),
        ({"mult": torch.ones(3, 128), "shift": torch.ones(3, 128)}, "cannot be shared"),
        ({"mult": torch.ones(1, 128), "tail": torch.zeros(4, 64, dtype=torch.bfloat16)}, "exclude each other"),
    ],
)
def test_wrong_arguments_are_named(on, change, message):
    from comfyui_svdquant.triton_kernels.quantize_token import quantize_token

    x, smooth, down = draw(4, 128, 16, torch.bfloat16, 0)
    arguments = {"x": x, "smooth_factor": smooth, "proj_down": down, "act_unsigned": False, "kind": "int8"} | change
    moved = {name: a.to(on) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    with pytest.raises(ValueError, match=message):
        quantize_token(**moved)


def test_it_is_a_proper_custom_op(on):

    op = torch.ops.svdquant.quantize_token.default
    x, smooth, down = (t.to(on) for t in draw(5, 128, 16, torch.bfloat16, 0))
    torch.library.opcheck(op, (x, smooth, down, True, "uint8"))
    torch.library.opcheck(op, (x[:, :64], smooth, down, False, "int8", x[:, 64:]))
    torch.library.opcheck(op, (x, smooth, down, False, "int8", None, None, x[:1], x[1:2]))


@settings(max_examples=15, deadline=None)
@given(case=in_front.cases(16), dtype=st.sampled_from(sorted(DTYPES)), kind=st.sampled_from(CASES))
def test_what_stands_in_front(on, case, dtype, kind):
    assume(runs(kind[0], on))
    in_front.check("quantize_token", *in_front.draw(*case, DTYPES[dtype]), kind[::-1], on)


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("case", "kind", "unsigned"),
    [(case, "uint8", True) for case in in_front.WHOLE] + [(case, "fp8", False) for case in in_front.WHOLE[:2]],
)
def test_what_stands_in_front_of_whole_blocks(on, case, kind, unsigned):
    need(kind, on)
    in_front.check("quantize_token", *in_front.draw(*case, torch.bfloat16), (unsigned, kind), on)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, likewise
def test_what_stands_in_front_of_huge_values(on):
    in_front.check_huge("quantize_token", (False, "int8"), on)

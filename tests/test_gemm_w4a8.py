"""INT4 weights widened inside the GEMM: against the formula in float64, and against the 16-bit layer of the file."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.svdq_core.packing import pack_int4, unpack_int4
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8 import need, runs, sum_error

INT4 = get_format("int4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, n: int, k: int, rank: int, dtype: torch.dtype, kind: str, seed: int) -> dict[str, Tensor | None]:
    """Random arguments of `gemm_w4a8`, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    if kind == "fp8":
        codes = torch.randn(m, k, generator=g).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    return {
        "codes": codes,
        "act_scales": torch.rand(m, generator=g) + 0.1,
        "weight": pack_int4(torch.randint(-8, 8, (n, k), generator=g)),
        "weight_scale": (10 ** (2 * torch.rand(k // 64, n, generator=g) - 4)).to(dtype),
        "hidden": torch.randn(m, rank, generator=g).to(dtype),
        "proj_up": torch.randn(n, rank, generator=g).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
    }


def check(arguments: dict[str, Tensor | None], on: torch.device) -> None:
    """y against the exact product with the file's weights: the widening's rounding, and what gemm_w8a8 allows.

    int8 rounds code · scale to half of 1/16 of the row's largest scale, e4m3 to a relative 2⁻⁴ or half its least step.
    """
    from comfyui_svdquant.triton_kernels.gemm_w4a8 import gemm_w4a8

    y = gemm_w4a8(**{name: None if a is None else a.to(on) for name, a in arguments.items()}).cpu()
    act = arguments["codes"].double() * arguments["act_scales"].double().unsqueeze(1)
    scale = arguments["weight_scale"].double().t()
    weight = (unpack_int4(arguments["weight"]).double().unflatten(1, (-1, 64)) * scale.unsqueeze(2)).flatten(1)
    hidden, up = arguments["hidden"].double(), arguments["proj_up"].double()
    bias = 0 if arguments["bias"] is None else arguments["bias"].double()
    exact = act @ weight.t() + hidden @ up.t() + bias
    top = scale.amax(dim=1, keepdim=True)
    fp8 = arguments["codes"].dtype == torch.float8_e4m3fn
    widening = torch.maximum(weight.abs() / 16, top / 32 * 2.0**-10) if fp8 else (top / 32).expand_as(weight)
    sums = act.abs() @ weight.abs().t() + hidden.abs() @ up.abs().t() + 1
    steps = (hidden.shape[1] + 8) * 2.0**-24 + (sum_error(act.shape[1]) if fp8 else 0)
    room = exact.abs() * torch.finfo(y.dtype).eps / 2 + sums * steps + act.abs() @ widening.t() * (1 + 2.0**-9)
    assert y.dtype == arguments["hidden"].dtype
    assert ((y.double() - exact).abs() <= room).all()


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 140),
    groups=st.integers(1, 8),
    rank=st.sampled_from([0, 1, 16, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(["int8", "fp8"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(on, m, n, groups, rank, dtype, kind, with_bias, seed):
    assume(runs(kind, on))
    arguments = draw(m, n, groups * 64, rank, DTYPES[dtype], kind, seed)
    check(arguments | ({} if with_bias else {"bias": None}), on)


@pytest.mark.ptx
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_full_size_tiles(on, kind):
    """Ragged, with the tiles of a large layer."""
    need(kind, on)
    check(draw(260, 150, 192, 32, torch.bfloat16, kind, 1), on)


@pytest.mark.ptx
def test_long_sums_of_one_sign(on):
    """As for gemm_w8a8: parts of a long sum of fp8 products are added outside of the matrix units."""
    from comfyui_svdquant.triton_kernels.gemm_w4a8 import gemm_w4a8

    need("fp8", on)
    arguments = draw(3, 5, 8192, 0, torch.bfloat16, "fp8", 2) | {"bias": None}
    arguments["codes"] = arguments["codes"].float().abs().to(torch.float8_e4m3fn)
    arguments["weight"] = arguments["weight"] & 0x77  # codes of 0 to 7
    arguments["weight_scale"] = torch.full_like(arguments["weight_scale"], 0.5)  # widened without rounding
    y = gemm_w4a8(**{name: None if a is None else a.to(on) for name, a in arguments.items()}).cpu().double()
    exact = arguments["codes"].double() @ unpack_int4(arguments["weight"]).double().t() / 2
    exact = exact * arguments["act_scales"].double().unsqueeze(1)
    assert ((y - exact).abs() <= exact * 2.0**-6).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_that_are_powers_of_two_are_exact(on, kind):
    """Ratios of 1, 1/2, 1/4, 1/8: then nothing is rounded but y, so this sees a wrong column or nibble."""
    from comfyui_svdquant.triton_kernels.gemm_w4a8 import gemm_w4a8

    need(kind, on)
    arguments = draw(9, 40, 512, 16, torch.float16, kind, 0)
    scale = 2.0 ** -torch.randint(6, 10, (8, 40), generator=torch.Generator().manual_seed(1))
    scale[0] = 2.0**-6
    arguments["weight_scale"] = scale.half()
    y = gemm_w4a8(**{name: a.to(on) for name, a in arguments.items()}).cpu()
    weight = INT4.unpack({n: arguments[n] for n in ("weight", "weight_scale")}, torch.float64)
    act = arguments["codes"].double() * arguments["act_scales"].double().unsqueeze(1)
    exact = act @ weight.t() + arguments["hidden"].double() @ arguments["proj_up"].double().t() + arguments["bias"]
    lost = sum_error(512) * (act.abs() @ weight.abs().t()) if kind == "fp8" else 0
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-10 + 1e-3 + lost).all()


# As for widen_w4 and gemm_w8a8 (test_gemm_w8a8.py)
@pytest.mark.parametrize(("kind", "decibels"), [("int8", -36), ("fp8", -29)])
def test_the_whole_path_against_the_layer_in_16_bit(on, kind, decibels):
    from comfyui_svdquant.triton_kernels.gemm_w4a8 import gemm_w4a8
    from comfyui_svdquant.triton_kernels.quantize_token import quantize_token

    need(kind, on)
    g = torch.Generator().manual_seed(0)
    codes, scales = INT4.round_weight(torch.randn(96, 512, generator=g), torch.bfloat16)
    tensors = INT4.pack(codes, scales, torch.bfloat16, torch.ones(()))
    x, smooth = torch.randn(24, 512, generator=g).bfloat16(), (torch.rand(512, generator=g) + 0.5).bfloat16()
    down, up = torch.randn(512, 32, generator=g).bfloat16() / 16, torch.randn(96, 32, generator=g).bfloat16()
    act, act_scales, hidden = quantize_token(x.to(on), smooth.to(on), down.to(on), False, kind)
    weight, scale = tensors["weight"].to(on), tensors["weight_scale"].to(on)
    y = gemm_w4a8(act, act_scales, weight, scale, hidden, up.to(on), None).cpu()
    exact = x.double() / smooth.double() @ INT4.unpack(tensors, torch.float64).t()
    exact = exact + x.double() @ down.double() @ up.double().t()
    assert 20 * torch.log10((y.double() - exact).norm() / exact.norm()) < decibels


def test_zero_weights_and_empty_input(on):
    from comfyui_svdquant.triton_kernels.gemm_w4a8 import gemm_w4a8

    arguments = draw(3, 20, 128, 0, torch.bfloat16, "int8", 0) | {"weight_scale": torch.zeros(2, 20), "bias": None}
    moved = {name: None if a is None else a.to(on) for name, a in arguments.items()}
    assert not gemm_w4a8(**moved).any()
    found, wanted = (gemm_w4a8(**moved | {"row_scale": scale}) for scale in (moved["weight_scale"][0], None))
    assert torch.equal(found, wanted), "all scales are the same"
    empty = {name: moved[name][:0] for name in ("codes", "act_scales", "hidden")}
    assert gemm_w4a8(**moved | empty).shape == (0, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 96, dtype=torch.int8)}, "multiple of 64"),
        ({"weight": torch.zeros(32, 128, dtype=torch.int8)}, "weight has shape"),
        ({"weight_scale": torch.zeros(32, 2)}, "weight_scale has shape"),
        ({"hidden": torch.zeros(4, 16)}, "hidden is float32"),
        ({"row_scale": torch.zeros(31, dtype=torch.bfloat16)}, "row_scale has shape"),
    ],
)
def test_wrong_arguments_are_named(on, change, message):
    from comfyui_svdquant.triton_kernels.gemm_w4a8 import gemm_w4a8

    arguments = draw(4, 32, 128, 16, torch.bfloat16, "int8", 0) | change
    with pytest.raises(ValueError, match=message):
        gemm_w4a8(**{name: None if a is None else a.to(on) for name, a in arguments.items()})


def test_it_is_a_proper_custom_op(on):

    arguments = draw(5, 32, 128, 16, torch.bfloat16, "int8", 0)
    torch.library.opcheck(
        torch.ops.svdquant.gemm_w4a8.default, tuple(None if a is None else a.to(on) for a in arguments.values())
    )

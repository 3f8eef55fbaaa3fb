"""The 8-bit GEMM against float64, and the whole W4A8 path against the 16-bit layer that its file stands for."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import GELU_SHIFT, get_format
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8 import need, runs, sum_error

INT4, INT8 = get_format("int4"), get_format("int8")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, n: int, k: int, rank: int, dtype: torch.dtype, kind: str, seed: int) -> dict[str, Tensor | None]:
    """Random arguments of `gemm_w8a8`, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    if kind == "fp8":
        codes, weight = (torch.randn(s, generator=g).mul(100).clamp(-448, 448) for s in ((m, k), (n, k)))
        codes, weight = codes.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    else:
        codes, weight = (torch.randint(-127, 128, s, generator=g, dtype=torch.int8) for s in ((m, k), (n, k)))
    return {
        "codes": codes,
        "act_scales": torch.rand(m, generator=g) + 0.1,
        "weight": weight,
        "weight_scale": (torch.rand(n, generator=g) * 1e-2).to(dtype),
        "hidden": torch.randn(m, rank, generator=g).to(dtype),
        "proj_up": torch.randn(n, rank, generator=g).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
        "weight_sum": weight.sum(dim=1, dtype=torch.int32) if kind == "uint8" else None,
    }


def check(arguments: dict[str, Tensor | None], on: torch.device) -> None:
    """One rounding of y; float32 everywhere else: three roundings of the main term, K (fp8) and R of the sums."""
    from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8

    y = gemm_w8a8(**{name: None if a is None else a.to(on) for name, a in arguments.items()}).cpu()
    codes, act, weight, scale, hidden, up, bias = (
        None if arguments[name] is None else arguments[name].double()
        for name in ("codes", "act_scales", "weight", "weight_scale", "hidden", "proj_up", "bias")
    )
    codes = codes + (128 if arguments["weight_sum"] is not None else 0)
    exact = codes @ weight.t() * act.unsqueeze(1) * scale + hidden @ up.t() + (0 if bias is None else bias)
    sums = (codes.abs() @ weight.abs().t()) * act.unsqueeze(1) * scale + hidden.abs() @ up.abs().t()
    fp8 = arguments["codes"].dtype == torch.float8_e4m3fn
    steps = (hidden.shape[1] + 4) * 2.0**-24 + (sum_error(codes.shape[1]) if fp8 else 0)
    room = exact.abs() * torch.finfo(y.dtype).eps / 2 + (sums + 1) * steps
    assert y.dtype == arguments["hidden"].dtype
    assert ((y.double() - exact).abs() <= room).all()


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 140),
    k=st.integers(1, 30).map(lambda k: 16 * k),
    rank=st.sampled_from([0, 1, 16, 32, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(["int8", "uint8", "fp8"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(on, m, n, k, rank, dtype, kind, with_bias, seed):
    assume(runs(kind, on))
    arguments = draw(m, n, k, rank, DTYPES[dtype], kind, seed)
    check(arguments | ({} if with_bias else {"bias": None}), on)


@pytest.mark.ptx
@pytest.mark.parametrize("kind", ["int8", "uint8", "fp8"])
def test_full_size_tiles(on, kind, monkeypatch):
    """Ragged, with the tiles of a layer that fills the GPU."""
    from comfyui_svdquant.triton_kernels import gemm_w8a8

    need(kind, on)
    monkeypatch.setattr(gemm_w8a8, "WAVE", 0)
    check(draw(150, 270, 256, 32, torch.bfloat16, kind, 1), on)


@pytest.mark.ptx
def test_long_sums_of_one_sign(on):
    """Ada's and Hopper's matrix units lose 12 % of such a sum of fp8 products, if nobody adds its parts elsewhere."""
    from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8

    need("fp8", on)
    arguments = draw(3, 5, 8192, 0, torch.bfloat16, "fp8", 2) | {"bias": None}
    for name in ("codes", "weight"):
        arguments[name] = arguments[name].float().abs().to(torch.float8_e4m3fn)
    y = gemm_w8a8(**{name: None if a is None else a.to(on) for name, a in arguments.items()}).cpu().double()
    exact = arguments["codes"].double() @ arguments["weight"].double().t()
    exact = exact * arguments["act_scales"].double().unsqueeze(1) * arguments["weight_scale"].double()
    assert ((y - exact).abs() <= exact * 2.0**-6).all()


def test_sums_of_the_longest_rows_do_not_overflow(on):
    """Every product at its largest, K = 15 360: 2.5e8 in int32; the unsigned grid doubles it."""
    arguments = draw(2, 3, 15360, 16, torch.bfloat16, "uint8", 0)
    arguments["codes"].fill_(127)
    arguments["weight"].fill_(-127)
    arguments["weight_sum"].fill_(-127 * 15360)
    check(arguments, on)


def test_nan_stays_in_its_row(on):
    from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8

    arguments = draw(5, 20, 64, 16, torch.bfloat16, "int8", 0)
    arguments["act_scales"][3] = torch.nan
    y = gemm_w8a8(**{name: None if a is None else a.to(on) for name, a in arguments.items()})
    assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()


# dB of the output's error for Gaussian weights and inputs with outlier columns. A grid of 8 bit rounds each factor to
# -37 dB or better (int8), -31 to -35 dB (e4m3, a relative 2⁻⁴ at worst); measured: -36.6, -35.0, -40.1, -31.3.
@pytest.mark.parametrize(
    ("act", "unsigned", "wide", "decibels"),
    [
        ("int8", False, "int8", -35),
        ("int8", True, "int8", -33),
        ("uint8", True, "uint8", -37),
        ("fp8", False, "fp8", -30),
    ],
)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_w4a8_against_the_layer_in_16_bit(on, act, unsigned, wide, decibels, dtype):
    """quantize_token, widen_w4 and gemm_w8a8 on one INT4 layer; no rounding of activations in the exact result."""
    need(act, on)
    from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8
    from comfyui_svdquant.triton_kernels.quantize_token import quantize_token
    from comfyui_svdquant.triton_kernels.widen_w4 import widen_w4

    x, smooth, tensors, down, up, bias = int4_layer(DTYPES[dtype], unsigned)
    weight, scale = tensors["weight"], tensors["weight_scale"]
    w8, row_scale, weight_sum = widen_w4(weight.to(on), scale.to(on), wide)
    codes, act_scales, hidden = quantize_token(x.to(on), smooth.to(on), down.to(on), unsigned, act)
    sums = weight_sum if act == "uint8" else None
    y = gemm_w8a8(codes, act_scales, w8, row_scale, hidden, up.to(on), bias.to(on), sums).cpu()
    smoothed = (x.double() + (GELU_SHIFT if unsigned else 0)) / smooth.double()
    exact = smoothed @ INT4.unpack(tensors, torch.float64).t() + x.double() @ down.double() @ up.double().t() + bias
    assert 20 * torch.log10((y.double() - exact).norm() / exact.norm()) < decibels


def int4_layer(dtype: torch.dtype, unsigned: bool, m: int = 24, n: int = 96, k: int = 512, rank: int = 32) -> tuple:
    """x (outlier columns, or after GELU), λ that tames it, INT4 tensors, proj_down, proj_up, bias."""
    g = torch.Generator().manual_seed(0)
    outliers = torch.where(torch.rand(k, generator=g) < 0.05, 20.0, 1.0)
    x = torch.randn(m, k, generator=g) * outliers
    x = torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x
    codes, scales = INT4.round_weight(torch.randn(n, k, generator=g), dtype)
    tensors = INT4.pack(codes, scales, dtype, torch.ones(()))
    down, up = torch.randn(k, rank, generator=g) / k**0.5, torch.randn(n, rank, generator=g)
    bias = torch.randn(n, generator=g)
    return x.to(dtype), outliers.sqrt().to(dtype), tensors, down.to(dtype), up.to(dtype), bias.to(dtype)


def test_w8a8_file_is_what_the_format_says(on):
    """INT8 weights: the reference's forward, whose only other rounding is that of hidden and y to 16 bit."""
    from comfyui_svdquant.svdq_core.linear import QuantizedLinear
    from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8
    from comfyui_svdquant.triton_kernels.quantize_token import quantize_token

    for unsigned in (False, True):
        x, smooth, _, down, up, bias = int4_layer(torch.bfloat16, unsigned)
        codes, scales = INT8.round_weight(torch.randn(96, 512, generator=torch.Generator().manual_seed(1)), x.dtype)
        tensors = INT8.pack(codes, scales, x.dtype, torch.ones(()))
        layer = QuantizedLinear(INT8, tensors, smooth, down, up, bias, act_unsigned=unsigned)
        kind = "uint8" if unsigned else "int8"
        act, act_scales, hidden = quantize_token(x.to(on), smooth.to(on), down.to(on), unsigned, kind)
        weight, weight_scale = tensors["weight"].to(on), tensors["weight_scale"][0].to(on)
        sums = weight.sum(dim=1, dtype=torch.int32) if unsigned else None
        y = gemm_w8a8(act, act_scales, weight, weight_scale, hidden, up.to(on), bias.to(on), sums).cpu()
        exact = layer(x).double()
        room = exact.abs() * 2.0**-7 + (x.double() @ down.double()).abs() @ up.double().abs().t() * 2.0**-8
        assert ((y.double() - exact).abs() <= room).all()


def test_empty_and_strided_inputs(on):
    from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8

    arguments = draw(6, 32, 64, 16, torch.bfloat16, "int8", 0)
    moved = {name: None if a is None else a.to(on) for name, a in arguments.items()}
    strided = {name: moved[name].t().contiguous().t() for name in ("codes", "weight", "hidden", "proj_up")}
    assert torch.equal(gemm_w8a8(**moved), gemm_w8a8(**moved | strided))
    empty = {name: moved[name][:0] for name in ("codes", "act_scales", "hidden")}
    assert gemm_w8a8(**moved | empty).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 64)}, "codes is float32"),
        ({"act_scales": torch.zeros(5)}, "act_scales has shape"),
        ({"weight": torch.zeros(32, 64, dtype=torch.float8_e4m3fn)}, "weight is float8_e4m3fn"),
        ({"weight_scale": torch.zeros(1, 32)}, "weight_scale has shape"),
        ({"hidden": torch.zeros(4, 16)}, "hidden is float32"),
        ({"proj_up": torch.zeros(32, 8, dtype=torch.bfloat16)}, "hidden has shape"),
        ({"bias": torch.zeros(1)}, "bias has shape"),
        ({"weight_sum": torch.zeros(32)}, "weight_sum is float32"),
    ],
)
def test_wrong_arguments_are_named(on, change, message):
    from comfyui_svdquant.triton_kernels.gemm_w8a8 import gemm_w8a8

    arguments = draw(4, 32, 64, 16, torch.bfloat16, "int8", 0) | change
    with pytest.raises(ValueError, match=message):
        gemm_w8a8(**{name: None if a is None else a.to(on) for name, a in arguments.items()})


def test_it_is_a_proper_custom_op(on):

    arguments = draw(5, 32, 64, 16, torch.bfloat16, "int8", 0)
    torch.library.opcheck(
        torch.ops.svdquant.gemm_w8a8.default, tuple(None if a is None else a.to(on) for a in arguments.values())
    )

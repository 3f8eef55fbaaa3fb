"""The 4-bit linear against float64, and the two kernels together against `QuantizedLinear`."""

import pytest
import torch
from comfyui_svdquant.svdq_core import QuantizedLinear
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.svdq_core.packing import pack_int4, unpack_int4, unpack_uint4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, n: int, k: int, rank: int, dtype: torch.dtype, seed: int, unsigned: bool = False) -> dict[str, Tensor]:
    """Arguments of `gemm_w4a4` on the CPU: every code, -8 of weights included, and scales over a decade."""
    g = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if unsigned else (-7, 8)
    return {
        "codes": pack_int4(torch.randint(low, high, (m, k), generator=g)),
        "scales": (10 ** torch.rand(m, k // 64, generator=g) / 10).to(dtype),
        "weight": pack_int4(torch.randint(-8, 8, (n, k), generator=g)),
        "weight_scale": (10 ** torch.rand(k // 64, n, generator=g) / 100).to(dtype),
        "hidden": torch.randn(m, rank, generator=g).to(dtype),
        "proj_up": torch.randn(n, rank, generator=g).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
    }


def exact(a: dict[str, Tensor | None], unsigned: bool) -> tuple[Tensor, Tensor]:
    """y in float64, and the sum of the magnitudes that make it up."""
    codes = (unpack_uint4 if unsigned else unpack_int4)(a["codes"]).double()
    x = codes * a["scales"].double().repeat_interleave(64, 1)
    w = unpack_int4(a["weight"]).double() * a["weight_scale"].t().double().repeat_interleave(64, 1)
    hidden, up = a["hidden"].double(), a["proj_up"].double()
    bias = torch.zeros(()) if a["bias"] is None else a["bias"].double()
    return x @ w.t() + hidden @ up.t() + bias, x.abs() @ w.abs().t() + hidden.abs() @ up.abs().t() + bias.abs()


def check(a: dict[str, Tensor | None], unsigned: bool, on: torch.device) -> None:
    """One rounding to y's dtype; before it a float32 rounding per group, product and rank: (K / 64 + R + 8) · 2⁻²⁴."""
    from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4

    y = gemm_w4a4(*(None if t is None else t.to(on) for t in a.values()), unsigned).cpu()
    wanted, magnitude = exact(a, unsigned)
    assert y.dtype == a["scales"].dtype and y.shape == wanted.shape
    terms = a["scales"].shape[1] * 3 + a["hidden"].shape[1] + 8
    room = wanted.abs() * torch.finfo(y.dtype).eps / 2 + magnitude * terms * 2.0**-24
    assert ((y.double() - wanted).abs() <= room).all()


@settings(max_examples=20, deadline=None)
@given(
    m=st.one_of(st.integers(1, 40), st.integers(120, 140)),
    n=st.one_of(st.integers(1, 40), st.integers(120, 140)),
    groups=st.integers(1, 5),
    rank=st.sampled_from([0, 1, 16, 32, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    unsigned=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(on, m, n, groups, rank, dtype, unsigned, bias, seed):
    a = draw(m, n, groups * 64, rank, DTYPES[dtype], seed, unsigned)
    check(a if bias else a | {"bias": None}, unsigned, on)


@pytest.mark.ptx
@pytest.mark.parametrize("unsigned", [False, True])
def test_full_size_tiles(on, unsigned):
    """Ragged, with the tiles of a large layer."""
    check(draw(150, 70, 320, 32, torch.bfloat16, 1, unsigned), unsigned, on)


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_largest_codes_do_not_overflow(on, unsigned):
    a = draw(16, 16, 256, 0, torch.float32, 0, unsigned)
    a["codes"] = torch.full_like(a["codes"], -1 if unsigned else 0x77)  # 15, or 7
    a["weight"] = torch.full_like(a["weight"], -120)  # -8
    check(a, unsigned, on)


@pytest.mark.parametrize("unsigned", [False, True])
def test_either_way_to_float(on, unsigned, monkeypatch):
    """Parts differ in how sums become floats; both ways are right everywhere."""
    from comfyui_svdquant.triton_kernels import gemm_w4a4

    for magic in (False, True):
        config = gemm_w4a4.config
        monkeypatch.setattr(gemm_w4a4, "config", lambda *args, c=config, m=magic: c(*args) | {"MAGIC": m})
        check(draw(70, 70, 128, 16, torch.bfloat16, 6, unsigned), unsigned, on)


@pytest.mark.parametrize("unsigned", [False, True])
def test_order_of_nibbles(on, unsigned):
    """One code of the input and one of the weight: only where their columns agree is there a product."""
    from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4

    codes = pack_int4(torch.eye(128, dtype=torch.int8) * 3)
    one, empty = torch.ones(128, 2), torch.zeros(128, 0)
    y = gemm_w4a4(*(t.to(on) for t in (codes, one, codes, one.t(), empty, empty)), None, unsigned)
    assert torch.equal(y.cpu(), torch.eye(128) * 9)


def test_nan_stays_in_its_row_and_column(on):
    from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4

    a = draw(5, 7, 128, 16, torch.bfloat16, 1)
    a["scales"][2, 1] = float("nan")
    a["weight_scale"][0, 3] = float("nan")
    y = gemm_w4a4(*(t.to(on) for t in a.values()), False).cpu()
    wanted = torch.zeros(5, 7, dtype=torch.bool)
    wanted[2], wanted[:, 3] = True, True
    assert torch.equal(y.isnan(), wanted)


def test_strides_and_empty_input(on):
    a = draw(20, 24, 128, 32, torch.bfloat16, 2)
    check({name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in a.items()}, False, on)
    check(
        {**draw(20, 24, 128, 16, torch.bfloat16, 2), "hidden": a["hidden"][:, :16], "proj_up": a["proj_up"][:, 16:]},
        False,
        on,
    )
    check({name: t[:0] if name in ("codes", "scales", "hidden") else t for name, t in a.items()}, False, on)


def test_wrong_arguments_are_named(on):
    from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4

    a = {name: t.to(on) for name, t in draw(4, 8, 128, 16, torch.bfloat16, 3).items()}
    for name, wrong in {
        "codes": a["codes"][:, :20],
        "scales": a["scales"][:, :1],
        "weight": a["weight"].to(torch.int32),
        "weight_scale": a["weight_scale"].t(),
        "hidden": a["hidden"][:3],
        "proj_up": a["proj_up"][:, :8],
        "bias": a["bias"].to("meta"),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=f"{name} (has shape|is )"):
            gemm_w4a4(*(a | {name: wrong}).values(), False)


def test_custom_op_is_well_formed(on):

    a = [t.to(on) for t in draw(4, 8, 128, 16, torch.bfloat16, 4).values()]
    torch.library.opcheck(torch.ops.svdquant.gemm_w4a4.default, (*a, False))
    torch.library.opcheck(torch.ops.svdquant.gemm_w4a4.default, (*a[:-1], None, True))


@pytest.mark.ptx
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_whole_linear_is_the_reference(on, dtype, unsigned):
    """quantize_act and gemm_w4a4 on a layer as it is in a file: hidden is rounded to 16 bit, and both results."""
    from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4
    from comfyui_svdquant.triton_kernels.quantize_act import quantize_act

    dtype, g, (m, n, k, rank) = DTYPES[dtype], torch.Generator().manual_seed(5), (37, 80, 320, 32)
    fmt = get_format("int4")
    w = torch.randn(n, k, generator=g) / k**0.5
    codes, scales = fmt.round_weight(w, dtype)
    layer = QuantizedLinear(
        fmt,
        fmt.pack(codes, scales, dtype, fmt.tensor_scale(w)),
        smooth_factor=(torch.rand(k, generator=g) + 0.5).to(dtype),
        proj_down=(torch.randn(k, rank, generator=g) / k**0.5).to(dtype),
        proj_up=(torch.randn(n, rank, generator=g) / rank**0.5).to(dtype),
        bias=torch.randn(n, generator=g).to(dtype),
        act_unsigned=unsigned,
    )
    x = torch.randn(m, k, generator=g)
    x = (torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x).to(dtype)
    t = {name: v.to(on) for name, v in layer.state_dict().items()}
    *quantized, hidden = quantize_act(x.to(on), t["smooth_factor"], t["proj_down"], unsigned)
    y = gemm_w4a4(*quantized, t["weight"], t["weight_scale"], hidden, t["proj_up"], t["bias"], unsigned).cpu()
    wanted, eps = layer(x).double(), torch.finfo(dtype).eps / 2
    branch = (x.double() @ layer.proj_down.double()).abs() @ layer.proj_up.double().abs().t()
    assert ((y.double() - wanted).abs() <= eps * (2 * wanted.abs() + branch) + 1e-5).all()

"""The modulation linears against float64: nothing but y is rounded."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.svdq_core.packing import pack_int4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

AWQ = get_format("awq")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, n: int, k: int, rank: int | None, dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    """Random arguments of `gemm_w4a16`, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(m, k, generator=g).to(dtype),
        "weight": pack_int4(torch.randint(0, 16, (n, k), generator=g)).view(torch.uint8),
        "weight_scale": (torch.rand(k // 64, n, generator=g) * 1e-1).to(dtype),
        "weight_zero": (torch.randn(k // 64, n, generator=g) * 1e-1).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
        "hidden": None if rank is None else torch.randn(m, rank, generator=g).to(dtype),
        "proj_up": None if rank is None else torch.randn(n, rank, generator=g).to(dtype),
    }


def check(arguments: dict[str, Tensor | None], on: torch.device) -> None:
    """One rounding of y; float32 sums of K + R terms, and the weight's two operations, before it."""
    from comfyui_svdquant.triton_kernels.gemm_w4a16 import gemm_w4a16

    y = gemm_w4a16(**{name: None if a is None else a.to(on) for name, a in arguments.items()}).cpu()
    x, up, bias = arguments["x"].double(), arguments["proj_up"], arguments["bias"]
    tensors = {name: arguments[name] for name in ("weight", "weight_scale", "weight_zero")}
    weight = AWQ.unpack(tensors, torch.float64)
    exact, sums, terms = x @ weight.t(), x.abs() @ (weight.abs() + 1).t(), x.shape[1] + 4
    if up is not None:
        hidden = arguments["hidden"].double()
        exact, sums = exact + hidden @ up.double().t(), sums + hidden.abs() @ up.double().abs().t()
        terms += up.shape[1]
    exact = exact if bias is None else exact + bias
    room = exact.abs() * torch.finfo(y.dtype).eps / 2 + (sums + 1) * terms * 2.0**-24
    assert y.dtype == arguments["x"].dtype
    assert ((y.double() - exact).abs() <= room).all()


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 16),
    n=st.integers(1, 70),
    groups=st.integers(1, 20),
    rank=st.sampled_from([None, 0, 16, 48]),
    dtype=st.sampled_from(sorted(DTYPES)),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(on, m, n, groups, rank, dtype, with_bias, seed):
    arguments = draw(m, n, groups * 64, rank, DTYPES[dtype], seed)
    check(arguments | ({} if with_bias else {"bias": None}), on)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_outliers_and_nan(on, dtype):
    from comfyui_svdquant.triton_kernels.gemm_w4a16 import gemm_w4a16

    arguments = draw(3, 20, 128, None, DTYPES[dtype], 0)
    arguments["x"][1, 5] = 3e4
    check(arguments, on)
    arguments["x"][1, 6] = torch.nan
    y = gemm_w4a16(**{name: None if a is None else a.to(on) for name, a in arguments.items()})
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_empty_odd_and_strided_inputs(on):
    """x is read two columns at a time: an odd offset or stride must not matter."""
    from comfyui_svdquant.triton_kernels.gemm_w4a16 import gemm_w4a16

    arguments = {n: None if a is None else a.to(on) for n, a in draw(3, 20, 128, 16, torch.bfloat16, 0).items()}
    wanted, x = gemm_w4a16(**arguments), arguments["x"]
    wide = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)  # row stride 129, offset 1
    for other in (wide[:, 1:], x.t().contiguous().t()):
        assert torch.equal(gemm_w4a16(**arguments | {"x": other}), wanted)
    assert gemm_w4a16(**arguments | {"x": x[:0], "hidden": arguments["hidden"][:0]}).shape == (0, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 96, dtype=torch.bfloat16)}, "multiple of 64"),
        ({"x": torch.zeros(3, 128)}, "x is float32"),
        ({"weight": torch.zeros(20, 128, dtype=torch.uint8)}, "weight has shape"),
        ({"weight_zero": torch.zeros(20, 2)}, "weight_zero has shape"),
        ({"hidden": None}, "hidden and proj_up"),
        ({"proj_up": torch.zeros(3, 16)}, "proj_up has shape"),
    ],
)
def test_wrong_arguments_are_named(on, change, message):
    from comfyui_svdquant.triton_kernels.gemm_w4a16 import gemm_w4a16

    arguments = draw(3, 20, 128, 16, torch.bfloat16, 0) | change
    with pytest.raises(ValueError, match=message):
        gemm_w4a16(**{name: None if a is None else a.to(on) for name, a in arguments.items()})


def test_it_is_a_proper_custom_op(on):

    arguments = draw(2, 20, 128, 16, torch.bfloat16, 0)
    torch.library.opcheck(
        torch.ops.svdquant.gemm_w4a16.default, tuple(None if a is None else a.to(on) for a in arguments.values())
    )

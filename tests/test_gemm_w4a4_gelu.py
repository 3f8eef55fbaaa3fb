"""The fused first half of an MLP against `gemm_w4a4`, GELU and the quantization of the reference."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import GELU_SHIFT, get_format
from comfyui_svdquant.svdq_core.packing import pack_int4, unpack_int4, unpack_uint4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

INT4 = get_format("int4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, on purpose


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, n: int, k: int, rank: int, next_rank: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Arguments on the CPU, such that y has a size where GELU bends."""
    g = torch.Generator().manual_seed(seed)
    return {
        "codes": pack_int4(torch.randint(-7, 8, (m, k), generator=g)),
        "scales": (0.5 + torch.rand(m, k // 64, generator=g)).to(dtype),
        "weight": pack_int4(torch.randint(-8, 8, (n, k), generator=g)),
        "weight_scale": ((0.5 + torch.rand(k // 64, n, generator=g)) / 20 / k**0.5).to(dtype),
        "hidden": torch.randn(m, rank, generator=g).to(dtype),
        "proj_up": (torch.randn(n, rank, generator=g) / max(rank, 1) ** 0.5).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
        "next_smooth": (torch.rand(n, generator=g) + 0.5).to(dtype),
        "next_down": (torch.randn(n, next_rank, generator=g) / n**0.5).to(dtype),
    }


def run(a: dict[str, Tensor | None], unsigned: bool, on: torch.device) -> tuple[Tensor, ...]:
    from comfyui_svdquant.triton_kernels.gemm_w4a4_gelu import gemm_w4a4_gelu

    *linear, smooth, down = (None if t is None else t.to(on) for t in a.values())
    return tuple(t.cpu() for t in gemm_w4a4_gelu(*linear, False, smooth, down, unsigned))


def check(a: dict[str, Tensor | None], unsigned: bool, on: torch.device) -> None:
    """Codes may fall to the neighbour where the last digit of a GELU did; in bf16 and fp16 hardly any does."""
    from comfyui_svdquant.triton_kernels.gemm_w4a4 import gemm_w4a4

    codes, scales, hidden = run(a, unsigned, on)
    y = gemm_w4a4(*(None if t is None else t.to(on) for t in list(a.values())[:7]), False).cpu()
    h = torch.nn.functional.gelu(y.double(), approximate="tanh").to(y.dtype)
    smoothed = (h.float() + (GELU_SHIFT if unsigned else 0)) / a["next_smooth"].float()
    wanted = INT4.round_activations(smoothed, y.dtype, unsigned)
    step = scales.float().repeat_interleave(64, dim=1)
    found = (unpack_uint4 if unsigned else unpack_int4)(codes).float() * step
    assert codes.dtype == torch.int8 and scales.dtype == hidden.dtype == y.dtype
    assert ((found - wanted).abs() <= 1.02 * step).all()
    if y.dtype != torch.float32:
        assert (found == wanted).double().mean() > 0.95
    down = a["next_down"].double()
    slack = (torch.finfo(y.dtype).eps + h.shape[1] * 2.0**-24) * (h.double().abs() @ down.abs()) + 1e-6
    assert hidden.shape == (y.shape[0], down.shape[1])
    assert ((hidden.double() - h.double() @ down).abs() <= slack).all()


@settings(max_examples=12, deadline=None)
@given(
    m=st.one_of(st.integers(1, 40), st.integers(120, 140)),
    n=st.sampled_from([64, 128, 320]),
    groups=st.integers(1, 4),
    rank=st.sampled_from([0, 16, 48]),
    next_rank=st.sampled_from([0, 1, 16, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    unsigned=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(on, m, n, groups, rank, next_rank, dtype, unsigned, bias, seed):
    a = draw(m, n, groups * 64, rank, next_rank, DTYPES[dtype], seed)
    check(a if bias else a | {"bias": None}, unsigned, on)


@pytest.mark.ptx
def test_full_size_tiles(on):
    """Ragged, with the tiles of a large layer, and both branches."""
    check(draw(150, 128, 192, 32, 32, torch.bfloat16, 1), True, on)


def test_large_values_of_either_sign(on):
    a = draw(8, 64, 64, 0, 16, torch.float32, 0)
    a["bias"] = torch.linspace(-2000, 2000, 64)
    check(a, True, on)


@pytest.mark.ptx
def test_nan_stays_in_its_row(on):
    a = draw(5, 128, 64, 16, 16, torch.bfloat16, 1)
    a["scales"][2] = float("nan")
    _, scales, hidden = run(a, True, on)
    for result in (scales, hidden):
        assert result[2].isnan().all() and result[[0, 1, 3, 4]].isfinite().all()


def test_empty_input_and_wrong_arguments(on):
    a = draw(4, 128, 64, 16, 16, torch.bfloat16, 2)
    empty = run({name: t[:0] if name in ("codes", "scales", "hidden") else t for name, t in a.items()}, True, on)
    assert [tuple(t.shape) for t in empty] == [(0, 64), (0, 2), (0, 16)]
    rows = ("weight", "proj_up", "bias", "next_smooth", "next_down")
    narrow = {name: t[:100] if name in rows else t for name, t in a.items()} | {
        "weight_scale": a["weight_scale"][:, :100]
    }
    with pytest.raises(ValueError, match="weight has 100 rows"):
        run(narrow, True, on)
    for name in ("next_smooth", "next_down"):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            run(a | {name: a[name][:64]}, True, on)


def test_custom_op_is_well_formed(on):

    *linear, smooth, down = (t.to(on) for t in draw(4, 64, 64, 16, 16, torch.bfloat16, 3).values())
    torch.library.opcheck(torch.ops.svdquant.gemm_w4a4_gelu.default, (*linear, False, smooth, down, True))

"""The NVFP4 GEMM against float64, and the whole layer against the format's reference.

Without a Blackwell GPU this is the fallback: the interpreter has no `dot_scaled` (the compile matrix looks at that).
"""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import get_format
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

NVFP4 = get_format("nvfp4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def on(kernel_device):
    return kernel_device


def draw(m: int, n: int, k: int, rank: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    """Random arguments of `gemm_nvfp4`, on the CPU: every nibble, and scales from e4m3's smallest to its largest."""
    g = torch.Generator().manual_seed(seed)
    codes, weight = (torch.randint(0, 256, (rows, k // 2), generator=g, dtype=torch.uint8) for rows in (m, n))
    act, scale = (torch.randint(1, 0x7F, (rows, k // 16), generator=g, dtype=torch.uint8) for rows in (m, n))
    return {
        "codes": codes,
        "scales": act.view(torch.float8_e4m3fn),
        "weight": weight,
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_scale_2": torch.rand((), generator=g) * 1e-4,
        "hidden": torch.randn(m, rank, generator=g).to(dtype),
        "proj_up": torch.randn(n, rank, generator=g).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
    }


def unpacked(codes: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    return NVFP4.unpack(
        {"weight": codes, "weight_scale": scales, "weight_scale_2": tensor_scale}, torch.float32
    ).double()


def check(arguments: dict[str, Tensor | None], on: torch.device) -> None:
    """One rounding of y; the products are exact, and the K + R sums are float32."""
    from comfyui_svdquant.triton_kernels.gemm_nvfp4 import gemm_nvfp4

    y = gemm_nvfp4(**{name: None if a is None else a.to(on) for name, a in arguments.items()}).cpu()
    act = unpacked(arguments["codes"], arguments["scales"], torch.ones(()))
    weight = unpacked(arguments["weight"], arguments["weight_scale"], torch.ones(()))
    factor = arguments["weight_scale_2"].double()
    hidden, up = arguments["hidden"].double(), arguments["proj_up"].double()
    bias = 0 if arguments["bias"] is None else arguments["bias"].double()
    exact = act @ weight.t() * factor + hidden @ up.t() + bias
    sums = act.abs() @ weight.abs().t() * factor + hidden.abs() @ up.abs().t() + 1
    room = exact.abs() * torch.finfo(y.dtype).eps / 2 + sums * (hidden.shape[1] + act.shape[1] + 8) * 2.0**-24
    ok = exact.abs() < torch.finfo(y.dtype).max / 2
    assert y.dtype == arguments["hidden"].dtype
    assert ((y.double() - exact).abs() <= room)[ok].all()


@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 100),
    groups=st.integers(1, 6),
    rank=st.sampled_from([0, 1, 16, 48, 160]),
    dtype=st.sampled_from(sorted(DTYPES)),
    with_bias=st.booleans(),
    by_row=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(on, m, n, groups, rank, dtype, with_bias, by_row, seed):
    arguments = draw(m, n, groups * 64, rank, DTYPES[dtype], seed)
    scales = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 1e-4
    check(arguments | ({"weight_scale_2": scales} if by_row else {}) | ({} if with_bias else {"bias": None}), on)


@pytest.mark.ptx
def test_full_size_tiles(on):
    """Ragged, with the tiles of a large layer."""
    check(draw(150, 140, 320, 32, torch.bfloat16, 1), on)


def test_every_product_of_code_and_scale_is_exact(on):
    """One nonzero weight a row makes y that weight times a power of two: all 16 codes under all positive scales."""
    from comfyui_svdquant.triton_kernels.gemm_nvfp4 import gemm_nvfp4

    n = 126 * 16
    codes, scales = torch.arange(16).repeat(126), torch.arange(1, 127).repeat_interleave(16)
    weight = torch.zeros(n, 32, dtype=torch.uint8)
    weight[:, 3] = codes.to(torch.uint8) << 4  # column 7
    weight_scale = scales.to(torch.uint8).unsqueeze(1).repeat(1, 4).view(torch.float8_e4m3fn)
    act = torch.full((1, 32), 0x22, dtype=torch.uint8)  # ones
    act_scale = torch.full((1, 4), 0.125).to(torch.float8_e4m3fn)
    none = torch.zeros(1, 0, dtype=torch.float16), torch.zeros(n, 0, dtype=torch.float16)
    arguments = (act, act_scale, weight, weight_scale, torch.tensor(1.0), *none)
    y = gemm_nvfp4(*(a.to(on) for a in arguments), None).cpu()
    wanted = unpacked(weight, weight_scale, torch.ones(())).sum(dim=1) / 8
    assert torch.equal(y[0].double(), wanted.half().double())


def test_nan_stays_in_its_row(on):
    from comfyui_svdquant.triton_kernels.gemm_nvfp4 import gemm_nvfp4

    arguments = draw(5, 20, 64, 16, torch.bfloat16, 0)
    arguments["scales"].view(torch.uint8)[3, 1] = 0x7F
    y = gemm_nvfp4(**{name: a.to(on) for name, a in arguments.items()})
    assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_layer_is_what_the_format_says(on, dtype):
    """The reference's forward; the other roundings are those of hidden and y to 16 bit."""
    from comfyui_svdquant.svdq_core.linear import QuantizedLinear
    from comfyui_svdquant.triton_kernels.gemm_nvfp4 import gemm_nvfp4
    from comfyui_svdquant.triton_kernels.quantize_nvfp4 import quantize_nvfp4

    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(70, 256, generator=g), torch.randn(24, 256, generator=g).to(DTYPES[dtype])
    codes, scales = NVFP4.round_weight(w, x.dtype)
    tensors = NVFP4.pack(codes, scales, x.dtype, NVFP4.tensor_scale(w))
    smooth = (torch.rand(256, generator=g) + 0.5).to(x.dtype)
    down, up = (torch.randn(s, generator=g).div(16).to(x.dtype) for s in ((256, 32), (70, 32)))
    layer = QuantizedLinear(NVFP4, tensors, smooth, down, up, torch.randn(70, generator=g).to(x.dtype))
    act, act_scales, hidden = quantize_nvfp4(x.to(on), smooth.to(on), down.to(on), False)
    stored = (tensors[name].to(on) for name in ("weight", "weight_scale", "weight_scale_2"))
    y = gemm_nvfp4(act, act_scales, *stored, hidden, up.to(on), layer.bias.to(on)).cpu()
    exact, eps = layer(x.float()).double(), torch.finfo(x.dtype).eps
    room = exact.abs() * eps + ((x.double() @ down.double()).abs() @ up.double().abs().t() + 1) * eps
    assert ((y.double() - exact).abs() <= room).all()


def test_empty_and_strided_inputs(on):
    from comfyui_svdquant.triton_kernels.gemm_nvfp4 import gemm_nvfp4

    arguments = {name: a.to(on) for name, a in draw(6, 32, 64, 16, torch.bfloat16, 0).items()}
    strided = {name: arguments[name].t().contiguous().t() for name in ("codes", "scales", "weight", "weight_scale")}
    assert torch.equal(gemm_nvfp4(**arguments), gemm_nvfp4(**arguments | strided))
    empty = {name: arguments[name][:0] for name in ("codes", "scales", "hidden")}
    assert gemm_nvfp4(**arguments | empty).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 40, dtype=torch.uint8)}, "multiple of 64"),
        ({"scales": torch.zeros(4, 4)}, "scales is float32"),
        ({"weight": torch.zeros(32, 64, dtype=torch.uint8)}, "weight has shape"),
        ({"weight_scale_2": torch.zeros(1)}, "weight_scale_2 has shape"),
        ({"hidden": torch.zeros(4, 16)}, "hidden is float32"),
    ],
)
def test_wrong_arguments_are_named(on, change, message):
    from comfyui_svdquant.triton_kernels.gemm_nvfp4 import gemm_nvfp4

    arguments = draw(4, 32, 64, 16, torch.bfloat16, 0) | change
    with pytest.raises(ValueError, match=message):
        gemm_nvfp4(**{name: None if a is None else a.to(on) for name, a in arguments.items()})


def test_it_is_a_proper_custom_op(on):

    arguments = draw(5, 32, 64, 16, torch.bfloat16, 0)
    # not test_schema: it compares inputs before and after in a way that torch has not for e4m3 on a CPU
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.svdquant.gemm_nvfp4.default, tuple(a.to(on) for a in arguments.values()), test_utils=checks
    )

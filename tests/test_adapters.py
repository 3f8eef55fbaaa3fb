"""Adapters beside a quantized linear against ComfyUI's merge of the same patches into the float64 weight."""

import pytest
import torch
from comfyui_svdquant.svdq_core.adapters import LowRank, join, loha, reduce
from comfyui_svdquant.svdq_core.formats import FORMATS, GELU_SHIFT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import small_flux
from sampling import error_db

pytestmark = pytest.mark.usefixtures("host")

N, K = 96, 128
OFFSETS = {"whole": None, "rows": (0, 32, 48), "columns": (1, 64, 64)}
ADDITIVE = ["lora", "loha", "lokr", "lokr factored", "glora", "glora old", "diff"]
OTHERS = ["dora", "dora loha", "dora columns", "dora lokr", "dora glora", "oft", "boft"]


def tensor(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


def make_value(kind: str, n: int, k: int, alpha: float | None, seed: int):
    """A patch's value for a weight (n, k) as ``comfy.lora.load_lora`` makes it."""
    from comfy.weight_adapter import boft, glora, loha, lokr, lora, oft

    g = torch.Generator().manual_seed(seed)
    r = 4
    up, down = tensor(g, n, r), tensor(g, r, k, scale=k**-0.5)
    if kind == "lora":
        return lora.LoRAAdapter(set(), (up, down, alpha, None, None, None))
    if kind == "dora":
        return lora.LoRAAdapter(set(), (up, down, alpha, None, 1 + tensor(g, n, 1, scale=0.3), None))
    if kind == "dora columns":
        return lora.LoRAAdapter(set(), (up, down, alpha, None, 1 + tensor(g, 1, k, scale=0.3), None))
    if kind in ("loha", "dora loha"):
        magnitude = 1 + tensor(g, n, 1, scale=0.3) if kind == "dora loha" else None
        second = (tensor(g, n, r), tensor(g, r, k))
        return loha.LoHaAdapter(set(), (up, down, alpha, *second, None, None, magnitude))
    if kind in ("lokr", "dora lokr"):
        magnitude = {"lokr": None, "dora lokr": 1 + tensor(g, *((n, 1) if seed % 2 else (1, k)), scale=0.3)}[kind]
        return lokr.LoKrAdapter(set(), (tensor(g, 8, 4), tensor(g, n // 8, k // 4), alpha, *[None] * 5, magnitude))
    if kind == "lokr factored":
        factors = tensor(g, n // 8, 2), tensor(g, 2, k // 4)
        return lokr.LoKrAdapter(set(), (None, None, alpha, tensor(g, 8, 2), tensor(g, 2, 4), *factors, None, None))
    if kind in ("glora", "dora glora"):
        a = tensor(g, k, r, scale=k**-0.5), tensor(g, r, k)
        magnitude = 1 + tensor(g, n, 1, scale=0.3) if kind == "dora glora" else None
        return glora.GLoRAAdapter(set(), (*a, up, down, alpha, magnitude))
    if kind == "glora old":
        a = tensor(g, r, k), tensor(g, k, r, scale=k**-0.5)
        return glora.GLoRAAdapter(set(), (*a, down, up, alpha, None))
    if kind == "oft":
        return oft.OFTAdapter(set(), (tensor(g, n // 8, 8, 8, scale=0.2), None, alpha, None))
    if kind == "boft":
        return boft.BOFTAdapter(set(), (tensor(g, 2, n // 8, 8, 8, scale=0.2), None, alpha or 0.0, None))
    return ("diff", (up @ down,))


@st.composite
def patch_lists(draw, kinds):
    patches = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(kinds))
        allowed = ["whole", "rows"] if kind in ("dora", "dora loha", "oft") else ["whole"]
        offset = OFFSETS[draw(st.sampled_from([*OFFSETS] if kind in ADDITIVE else allowed))]
        n = offset[2] if offset and offset[0] == 0 else N
        k = offset[2] if offset and offset[0] == 1 else K
        value = make_value(kind, n, k, draw(st.sampled_from([None, 0.5, 8.0])), draw(st.integers(0, 99)))
        patches.append((draw(st.sampled_from([-1.0, 0.0, 0.4, 1.0, 1.5])), value, 1.0, offset, None))
    return patches


def make_linear(fmt: str, unsigned: bool = False):
    """(SVDQuantOps.Linear, its layer) in float32."""
    from comfyui_svdquant.svdq_core.host.ops import SVDQuantOps

    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / K**0.5
    layer = small_flux.quantize_layer(weight, weight[:, 0], FORMATS[fmt], unsigned)
    linear = SVDQuantOps.Linear(K, N, dtype=torch.float32)
    linear.load_state_dict(layer.state_dict())
    return linear, layer


def merged(layer, patches) -> Tensor:
    """ComfyUI's merge into the effective weight, in float64 where ComfyUI can (OFT and BOFT take float32 alone)."""
    import comfy.lora

    dtype = torch.float32 if any("oft" in getattr(patch[1], "name", "") for patch in patches) else torch.float64
    weight = small_flux.effective(layer)["weight"].to(dtype)
    return comfy.lora.calculate_weight(patches, weight, "w", intermediate_dtype=dtype).double()


def attach(linear, patches) -> None:
    from comfyui_svdquant.svdq_core.host.adapters import fits_beside

    assert all(map(fits_beside, patches))
    linear.set_patches("w", patches, torch.empty(0))


@settings(max_examples=120, deadline=None)
@given(patches=patch_lists(ADDITIVE + OTHERS))
def test_equals_the_merged_weight(patches):
    """On a W4A16 layer, which does not round its input: the exact product with the merged weight."""
    linear, layer = make_linear("awq")
    attach(linear, patches)
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2))
    wanted = x.double() @ merged(layer, patches).t() + layer.bias.double()
    assert error_db(linear(x), wanted) < -90
    if all(patch[0] == 0 for patch in patches):
        assert linear.adapters is None and torch.equal(linear(x), make_linear("awq")[0](x))


@settings(max_examples=60, deadline=None)
@given(patches=patch_lists(ADDITIVE), fmt=st.sampled_from(["int4", "nvfp4", "int8"]), unsigned=st.booleans())
def test_adds_to_every_format(patches, fmt, unsigned):
    """What a layer with 4-bit activations gives, plus the exact product with the difference of the weights."""
    linear, layer = make_linear(fmt, unsigned)
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(2))
    attach(linear, patches)
    delta = merged(layer, patches) - small_flux.effective(layer)["weight"].double()
    assert error_db(linear(x), layer.forward(x.double()) + x.double() @ delta.t()) < -60


@settings(max_examples=40, deadline=None)
@given(patches=patch_lists(["lora", "dora", "oft", "boft"]), unsigned=st.booleans())
def test_output_adapters_leave_the_bias_alone(patches, unsigned):
    """On inputs that 4-bit activations hold exactly, also where the layer shifts them: W' x + b."""
    linear, layer = make_linear("int4", unsigned)
    low, high = (0, 15) if unsigned else (-7, 7)
    codes = torch.randint(low, high + 1, (6, K), generator=torch.Generator().manual_seed(3))
    codes[:, ::64] = high  # every group's largest code
    smoothed = codes * 0.25
    x = smoothed * layer.smooth_factor.float() - (GELU_SHIFT if unsigned else 0)
    attach(linear, patches)
    wanted = x.double() @ merged(layer, patches).t() + small_flux.effective(layer)["bias"].double()
    assert error_db(linear(x), wanted) < -50  # λ and bias are bf16, so x/λ is not exactly a code


def test_what_cannot_stay_beside():
    """Merges, other slices, and functions of the difference are left to ComfyUI's way."""
    from comfyui_svdquant.svdq_core.host.adapters import fits_beside

    lora = make_value("lora", N, K, None, 0)
    assert fits_beside((0.5, lora, 1.0, None, None))
    assert not fits_beside((0.5, lora, 0.7, None, None))
    assert not fits_beside((0.5, lora, 1.0, None, lambda delta: delta.flip(0)))
    assert not fits_beside((1.0, [(torch.zeros(N, K), None)], 1.0, None, None))
    assert not fits_beside((1.0, ("set", (torch.zeros(N, K),)), 1.0, None, None))
    assert not fits_beside((1.0, ("diff", (torch.zeros(N, K), {"pad_weight": True})), 1.0, None, None))
    assert not fits_beside((1.0, make_value("oft", N, 64, None, 0), 1.0, OFFSETS["columns"], None))
    assert not fits_beside((1.0, make_value("dora columns", 48, K, None, 0), 1.0, OFFSETS["rows"], None))


@pytest.mark.parametrize("kind", [*ADDITIVE, "dora", "oft", "boft"])
def test_wrong_shapes_are_left_out(kind, caplog):
    """As in ComfyUI, with a line in the log that names the weight."""
    linear, _ = make_linear("int4")
    x = torch.randn(3, K)
    plain = linear(x)
    patches = [(1.0, make_value(kind, 2 * N, 2 * K, None, 0), 1.0, None, None)]
    linear.set_patches("double_blocks.3.img_mlp.0.weight", patches, torch.empty(0))
    assert torch.equal(linear(x), plain)
    assert "does not fit double_blocks.3.img_mlp.0.weight" in caplog.text


def test_boft_without_alpha():
    """No constraint, as an alpha of 0 means. (ComfyUI's merge stops at the missing number.)"""
    results = []
    for alpha in (None, 0.0):
        linear, _ = make_linear("int4")
        value = make_value("boft", N, K, None, 0)
        value.weights = (*value.weights[:2], alpha, None)
        attach(linear, [(0.7, value, 1.0, None, None)])
        results.append(linear(torch.ones(2, K)))
    assert torch.equal(*results) and error_db(results[0], make_linear("int4")[0](torch.ones(2, K))) > -30


def test_half_precision():
    """In bf16 and fp16 the branch has the model's dtype, and is as exact as that allows."""
    for dtype, limit in ((torch.bfloat16, -40), (torch.float16, -55)):
        linear, layer = make_linear("awq")
        patches = [(0.7, make_value("lora", N, K, 8.0, 0), 1.0, None, None)]
        linear.set_patches("w", patches, torch.empty(0, dtype=dtype))
        assert linear.adapters.branch.up.dtype == dtype
        x = torch.randn(5, K).to(dtype)
        wanted = x.double() @ merged(layer, patches).t() + layer.bias.double()
        assert error_db(linear(x).double(), wanted) < limit


def test_high_rank_loha_is_reduced():
    """Two factors of rank 20 make rank 400: reduced to 128, with the share of energy that this keeps."""
    from comfy.weight_adapter.loha import LoHaAdapter
    from comfyui_svdquant.svdq_core.host.adapters import REDUCED_RANK, build

    g = torch.Generator().manual_seed(0)
    n = k = 512
    factors = tensor(g, n, 20), tensor(g, 20, k), tensor(g, n, 20), tensor(g, 20, k)
    value = LoHaAdapter(set(), (factors[0], factors[1], 5.0, factors[2], factors[3], None, None, None))
    adapters = build("w", [(0.5, value, 1.0, None, None)], lambda: pytest.fail("no weight is needed"), (n, k), g_like())
    exact = 0.5 * 5.0 / 20 * (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    assert adapters.branch.up.shape == (n, REDUCED_RANK)
    lost = (exact - adapters.branch.up @ adapters.branch.down).square().sum() / exact.square().sum()
    best = torch.linalg.svdvals(exact)[REDUCED_RANK:].square().sum() / exact.square().sum()
    assert abs(float(lost) - (1 - adapters.energy)) < 1e-3 and float(lost) < 1.02 * float(best)


def g_like() -> Tensor:
    return torch.empty(0)


@given(r1=st.integers(1, 5), r2=st.integers(1, 5), seed=st.integers(0, 99))
def test_loha_is_low_rank(r1, r2, seed):
    g = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((9, r1), (r1, 7), (9, r2), (r2, 7)))
    branch = loha(a, b, c, d)
    assert branch.up.shape == (9, r1 * r2)
    assert torch.allclose(branch.up @ branch.down, (a @ b) * (c @ d))


def test_reduce_of_low_rank_keeps_all():
    delta = torch.randn(60, 5) @ torch.randn(5, 80)
    branch, energy = reduce(delta, 5)
    assert energy > 0.99999 and error_db(branch.up @ branch.down, delta) < -80
    assert reduce(torch.zeros(6, 8), 2)[1] == 1.0


def test_join_keeps_the_order_around_what_does_not_add():
    """A LoRA after a rotation must not be rotated: it stays out of the branch."""
    from comfyui_svdquant.svdq_core.adapters import Rotation

    first, last = (LowRank(torch.randn(6, 2), torch.randn(2, 8)) for _ in range(2))
    adapters = join([first, Rotation(lambda y: -y, 6), last], torch.empty(0))
    assert torch.equal(adapters.branch.up, first.up) and len(adapters.others) == 2
    weight, x = torch.randn(6, 8), torch.randn(3, 8)
    found = adapters(lambda r: r @ (weight + first.up @ first.down).t(), x)
    assert torch.allclose(found, x @ (-(weight + first.up @ first.down) + last.up @ last.down).t(), atol=1e-5)
    assert join([], torch.empty(0)) is None

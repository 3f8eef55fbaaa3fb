"""Norms and activations that the quantizer of the next linear computes: as tensors, in the choice, and in ComfyUI."""

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from comfyui_svdquant.svdq_core import backends, benchmark, implementations
from comfyui_svdquant.svdq_core.deferred import Deferred, deferred, gated_silu, gelu, plain
from comfyui_svdquant.svdq_core.formats import get_format
from torch import Tensor

import small_flux
from narrow import read_widths
from sampling import error_db, load
from test_families import FAMILIES

pytestmark = pytest.mark.usefixtures("cpu_kernels", "nothing_remembered")
F = torch.nn.functional


@pytest.fixture
def force(monkeypatch):
    def to(name: str) -> None:
        monkeypatch.setattr(backends, "FORCED", name)
        backends.forget()

    return to


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that ran, and the shapes of their inputs."""
    calls, run = [], backends.run

    def counted(implementation, x, *layers):
        calls.append((implementation.name, (x.numel() // x.shape[-1], x.shape[-1])))
        return run(implementation, x, *layers)

    monkeypatch.setattr(backends, "run", counted)
    return calls


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def modulated(x: Tensor, mult: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Deferred as ComfyUI's apply_mod says it, and computed."""
    return torch.addcmul(shift, Deferred(x), mult), torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), mult)


def rms(x: Tensor, weight: Tensor) -> Deferred:
    return Deferred(x, eps=1e-5, weight=weight.float())


# ---- as tensors


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_the_tensor_that_torch_makes(mode):
    with mode():
        x, wide = random(2, 5, 64), random(2, 5, 192, seed=1)[..., 64:]
        found, wanted = modulated(x, random(2, 1, 64, seed=2), random(2, 1, 64, seed=3))
        after = F.gelu(wide, approximate="tanh")
        pairs = [(Deferred(x), F.layer_norm(x, (64,), eps=1e-6)), (found, wanted), (gelu(wide), after)]
        pairs += [(torch.cat((x, gelu(wide)), dim), torch.cat((x, after), dim)) for dim in (2, -1)]
        gate, tail = wide.chunk(2, -1)
        gated = F.silu(gate) * tail
        pairs += [
            (gated_silu(gate, tail), gated),
            (torch.cat((x, gated_silu(gate, tail)), 2), torch.cat((x, gated), 2)),
        ]
        weight, mult = random(64, seed=4), random(2, 1, 64, seed=5)
        normed = F.rms_norm(x, (64,), weight, 1e-5)
        pairs += [(rms(x, weight), normed), (rms(x, weight) * mult, normed * mult)]
        for lazy, tensor in pairs:
            assert isinstance(lazy, Deferred) and lazy.shape == tensor.shape and lazy.dtype == tensor.dtype
            assert lazy.computed is None
            assert torch.equal(lazy[:, 1:].float().abs(), tensor[:, 1:].float().abs())
            assert torch.equal(F.linear(lazy, torch.eye(tensor.shape[-1]).bfloat16()), tensor)
            assert lazy.value() is lazy.value() and lazy.before == ""
            assert "Deferred" not in type(lazy + 1).__name__ and torch.equal(1 + lazy, 1 + tensor)


def test_what_is_written_to_it_stays():
    """As ComfyUI modulates parts of the tokens: in place, in slices."""
    x = random(1, 6, 64)
    lazy, wanted = Deferred(x), F.layer_norm(x, (64,), eps=1e-6)
    for tensor in (lazy, wanted):
        tensor[:, 0:3] *= 2
        tensor[:, 3:6] += 1
    assert torch.equal(lazy.value(), wanted) and lazy.before == ""
    shift = random(1, 1, 64)
    assert torch.equal(torch.addcmul(shift, lazy, shift), torch.addcmul(shift, wanted, shift))


ROWS = [(random(2, 1, 64), random(1, 1, 64)), (random(2, 5, 64), random(2, 5, 64)), (random(64), random(64))]
ROWS += [(random(2, 1, 64).float(), random(2, 1, 64).float())]


@pytest.mark.parametrize("rows", ROWS)
def test_a_modulation_that_kernels_do_not_know_is_computed(rows):
    found, wanted = modulated(random(2, 5, 64), *rows)
    assert not isinstance(found, Deferred) and torch.equal(found, wanted)


@pytest.mark.parametrize("by", [random(2, 5, 64), random(64), random(2, 1, 64).float(), 2.0, "modulated", "again"])
def test_a_product_that_kernels_do_not_know_is_computed(by):
    """Of a norm with weights, and of one without."""
    x, weight, mult, shift = random(2, 5, 64), random(64, seed=1), random(2, 1, 64, seed=2), random(2, 1, 64, seed=3)
    normed = F.rms_norm(x, (64,), weight, 1e-5)
    if by == "modulated":
        found, wanted = torch.addcmul(shift, rms(x, weight), mult), torch.addcmul(shift, normed, mult)
    elif by == "again":
        found, wanted = rms(x, weight) * mult * mult, normed * mult * mult
    else:
        found, wanted = rms(x, weight) * by, normed * by
        without = Deferred(x) * by
        assert not isinstance(without, Deferred) and torch.equal(without, F.layer_norm(x, (64,), eps=1e-6) * by)
    assert not isinstance(found, Deferred) and torch.equal(found, wanted)


def test_a_cat_that_kernels_do_not_know_is_computed():
    x, wide = random(1, 5, 64), random(1, 5, 64, seed=1)
    after = F.gelu(wide, approximate="tanh")
    for tensors, dim in (
        ((x, gelu(wide)), 1),
        ((gelu(wide), x), 2),
        ((x, gelu(wide), x), 2),
        ((gelu(wide), gelu(wide)), 2),
    ):
        wanted = torch.cat([after if isinstance(t, Deferred) else t for t in tensors], dim)
        found = torch.cat(tensors, dim)
        assert not isinstance(found, Deferred) and torch.equal(found, wanted)


# ---- the choice

READ = ["triton-w4a4", "triton-w4a8-int8", "triton-w4a8-fp8", "triton-widened-int8", "triton-widened-fp8"]


def inputs(k: int) -> list[tuple[Deferred, Tensor]]:
    """Modulated norms (2, 8, k), [x | GELU], [x | gated SiLU]; with what is closest to them: computed in float32, and
    rounded once."""
    x, mult, shift = random(2, 8, k), random(2, 1, k, seed=1) + 1, random(2, 1, k, seed=2)
    normed = torch.addcmul(shift.float(), F.layer_norm(x.float(), (k,), eps=1e-6), mult.float()).bfloat16()
    joined = torch.cat((x[..., :64], gelu(x[..., 64:])), 2)
    gate, tail = random(2, 8, 2 * (k - 64), seed=3).chunk(2, -1)
    gated = torch.cat((x[..., :64], (F.silu(gate.float()) * tail.float()).bfloat16()), 2)
    scaled = (F.rms_norm(x.float(), (k,), shift[0, 0].float(), 1e-5) * mult.float()).bfloat16()
    return [
        (modulated(x, mult, shift)[0], normed),
        (rms(x, shift[0, 0]) * mult, scaled),
        (joined, Deferred(x[..., :64], x[..., 64:]).value()),
        (torch.cat((x[..., :64], gated_silu(gate, tail)), 2), gated),
    ]


@pytest.mark.parametrize(
    "fmt, name", [("int4", name) for name in READ] + [("int8", "triton-w8a8"), ("nvfp4", "triton-nvfp4")]
)
def test_kernels_of_every_format_read_it(force, ran, fmt, name):
    force(name)
    layer, _ = backends.random_layer(get_format(fmt), 1, 256, 128, torch.device("cpu"), torch.bfloat16, 16)
    for (x, value), before in zip(inputs(256), ("norm", "rms", "gelu", "silu")):
        found = backends.linear(x, layer)
        assert ran[-1] == (f"{name}-after-{before}", (16, 256)) and x.computed is None
        wanted = backends.linear(value, layer)
        assert ran[-1] == (name, (16, 256)) and found.shape == (2, 8, 128) and found.dtype == torch.bfloat16
        assert error_db(found, wanted.double()) < -36


@pytest.mark.parametrize("fmt, name", [("int4", "torch"), ("awq", "triton-w4a16")])
def test_others_take_its_value(force, ran, fmt, name):
    force(name)
    layer, _ = backends.random_layer(get_format(fmt), 1, 256, 128, torch.device("cpu"), torch.bfloat16, 0)
    for x, _ in inputs(256):
        found = backends.linear(x, layer)
        assert ran[-1] == (name, (16, 256)) and torch.equal(found, backends.linear(x.value(), layer))


def test_where_it_fails_the_same_kernels_take_its_value(force, ran, monkeypatch, caplog):
    force("triton-w4a4")
    layer, _ = backends.random_layer(get_format("int4"), 1, 256, 128, torch.device("cpu"), torch.bfloat16, 0)

    def broken(x):
        return (x, {}) if not isinstance(x, Deferred) else exec("raise RuntimeError('no such instruction')")

    monkeypatch.setattr(implementations, "operands", broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            x, _ = inputs(256)[0]
            assert torch.equal(backends.linear(x, layer), backends.linear(x.value(), layer))
    assert [name for name, _ in ran].count("triton-w4a4-after-norm") == 1
    assert ran[-1][0] == "triton-w4a4"
    (message,) = [r.getMessage() for r in caplog.records]
    assert "triton-w4a4-after-norm is not used on cpu (RuntimeError: no such instruction)" in message
    assert message.endswith("It goes on without what comes before its input.")


@pytest.mark.parametrize(("name", "computed"), [("triton-w4a4", 0), ("torch", 1)])
@pytest.mark.parametrize("before", ["norm", "gelu"])
def test_times_are_taken_with_what_stands_before(force, monkeypatch, name, computed, before):
    """`svdquant bench`: an implementation that reads it is not charged for it, others are."""
    force(name)
    counts, compute = [], Deferred.compute
    monkeypatch.setattr(Deferred, "compute", lambda self: counts.append(self.before) or compute(self))
    monkeypatch.setattr(benchmark, "median_ms", lambda run, gpu: counts.clear() or run().shape[0])
    layer, x = backends.random_layer(get_format("int4"), 5, 256, 128, torch.device("cpu"), torch.bfloat16, 16)
    implementation = implementations.IMPLEMENTATIONS["int4", name]
    assert benchmark.time_of(implementation, layer, benchmark.input_of(x, before)) == 5
    assert counts == [before] * computed
    assert benchmark.sixteen_bit(layer, benchmark.input_of(x, before))().shape == (5, 128)


def test_inputs_of_the_bench():
    """Every row that `svdquant bench` times on a GPU has an input of its shape."""
    for fmt, m, k, n in [*benchmark.rows(True, None, "int4"), *benchmark.rows(True, 1, "int4")]:
        before = benchmark.BEFORE.get((k, n), "") if fmt != "awq" else ""
        x = benchmark.input_of(torch.zeros(m, k, device="meta"), before)()
        assert isinstance(x, Deferred) == bool(before) and x.shape == plain(x).shape == (m, k)


def test_float32_and_empty_inputs(force):
    force("triton-w4a4")
    layer, _ = backends.random_layer(get_format("int4"), 1, 256, 128, torch.device("cpu"), torch.bfloat16, 16)
    x = torch.randn(1, 3, 256)
    assert torch.equal(backends.linear(gelu(x), layer), backends.linear(F.gelu(x, approximate="tanh"), layer))
    assert backends.linear(gelu(x.bfloat16()[:, :0]), layer).shape == (1, 0, 128)


# ---- in ComfyUI


@pytest.fixture(scope="module")
def bf16_model(host, small_flux_files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "triton")
        return load(small_flux_files["int4"], torch.bfloat16)


@pytest.fixture(scope="module")
def flux2_model(host, tmp_path_factory):
    sd = small_flux.random_flux2()
    path = small_flux.write(tmp_path_factory.mktemp("flux2") / "int4.safetensors", sd, small_flux.quantize(sd))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "triton")
        return load(path, torch.bfloat16)


def test_without_a_gpu_the_blocks_are_comfyuis(host, small_flux_files):
    blocks = load(small_flux_files["int4"], torch.bfloat16).model.diffusion_model.single_blocks
    assert torch.cuda.is_available() or type(blocks[0]).__module__ == "comfy.ldm.flux.layers"


def inputs_of(block) -> tuple:
    """Few tokens, for a block of either kind, image and text or both in one; FLUX.2's are given their modulations."""
    from comfy.ldm.flux.layers import EmbedND

    pe = EmbedND(128, 10000, [16, 56, 56])(torch.zeros(1, 9, 3))
    tokens = (random(1, 9, 256),) if hasattr(block, "linear1") else (random(1, 6, 256), random(1, 3, 256, seed=2))
    own = getattr(block, "modulation", True)
    flux2 = own is None or own is False  # Wan's is a tensor
    return *tokens, random(1, 1, 12 * 256, seed=1) if flux2 else random(1, 256, seed=1), pe


def outputs_of(block, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if hasattr(block, "feed_forward"):
        return outputs_of_z_image(block, dtype)
    if not hasattr(block, "modulation") or isinstance(block.modulation, Tensor):
        return outputs_of_others(block, dtype)
    *tokens, vec, pe = (t.to(dtype, copy=True) for t in inputs_of(block))  # blocks write to their inputs
    with torch.no_grad():
        found = block(*tokens, vec if block.modulation else modulations(block, vec), pe.float())
    return torch.cat(found, 1) if isinstance(found, tuple) else found


def outputs_of_others(block, dtype: torch.dtype) -> Tensor:
    """The same for Qwen-Image's blocks, and for Wan's, whose modulation is a tensor."""
    from comfy.ldm.flux.layers import EmbedND

    img, txt, vec, pe = (t.to(dtype) for t in inputs_of(block))
    with torch.no_grad():
        if hasattr(block, "modulation"):
            pe = EmbedND(128, 10000, [44, 42, 42])(torch.zeros(1, 6, 3))
            return block(img, vec.reshape(1, 1, 1, 256).repeat(1, 1, 6, 1), pe, txt)
        return torch.cat(block(img, txt, None, vec, pe.to(dtype)), 1)


def outputs_of_z_image(block, dtype: torch.dtype, *, rows: Tensor | None = None, **named: Any) -> Tensor:
    """The same for Z-Image's, of which some have no modulation."""
    from comfy.ldm.flux.layers import EmbedND

    x, rows = random(1, 9, 256).to(dtype), random(1, 256, seed=1) if rows is None else rows
    pe = EmbedND(128, 256, [32, 48, 48])(torch.zeros(1, 9, 3)).movedim(1, 2)
    with torch.no_grad():
        return block(x, None, pe, rows.to(dtype) if block.modulation else None, **named)


def modulations(block, vec: Tensor) -> Any:
    """What FLUX.2's shared modulations give a block, from ``vec (1, 1, 12 * 256)``."""
    from comfy.ldm.flux.layers import ModulationOut

    one, two, three, four = (ModulationOut(*part.chunk(3, -1)) for part in vec.chunk(4, -1))
    return one if hasattr(block, "linear1") else ((one, two), (three, four))


ALONE = {"{}-after-norm": 4, "{}-after-gelu": 2, "{}": 2}  # qkv and mlp.0, mlp.2, proj; of image and text
FUSED = {"{}-after-norm": 2, "{}": 2, "{}-mlp-after-norm": 2}
SINGLE = {"{}-after-norm": 1, "{}-after-gelu": 1}  # linear1, linear2


BLOCKS = [("triton-w4a4", "double", FUSED), ("triton-w4a4", "double", ALONE), ("triton-w4a4", "single", SINGLE)]
BLOCKS += [("triton-widened-int8", "single", SINGLE)]


@pytest.mark.parametrize(("name", "kind", "wanted"), BLOCKS)
def test_blocks(bf16_model, force, ran, monkeypatch, name, kind, wanted):
    """What comes after a norm or a GELU reads it, what comes after attention does not, and the result is as good."""
    monkeypatch.setattr(backends, "MAX_SCRATCH", 0 if wanted is ALONE else backends.MAX_SCRATCH)
    check_block(getattr(bf16_model.model.diffusion_model, f"{kind}_blocks")[0], force, ran, monkeypatch, name, wanted)


GATED = {
    "double": {"{}-after-norm": 4, "{}-after-silu": 2, "{}": 2},
    "single": {"{}-after-norm": 1, "{}-after-silu": 1},
}


@pytest.mark.parametrize("kind", GATED)
def test_blocks_of_flux2(flux2_model, force, ran, monkeypatch, kind):
    """The same norms; gated SiLUs instead of GELUs."""
    block = getattr(flux2_model.model.diffusion_model, f"{kind}_blocks")[0]
    check_block(block, force, ran, monkeypatch, "triton-w4a4", GATED[kind])


OTHERS = {  # q, k and v of each stream read its norm
    "qwen_image": {"{}-after-norm": 6, "{}": 2, "{}-mlp-after-norm": 2},
    "wan": {"{}-after-norm": 3, "{}": 3, "{}-mlp-after-norm": 1},  # the cross-attention has a norm with weights
}


def model_of(name: str, folder) -> Any:
    """A family's model."""
    family = next(family for family in FAMILIES if family.recipe.name == name)
    sd = family.make()
    path = small_flux.write(folder / "int4.safetensors", sd, small_flux.quantize(sd))
    with read_widths():
        return load(path, torch.bfloat16).model.diffusion_model


def block_of(name: str, folder) -> Any:
    """The first block of it."""
    model = model_of(name, folder)
    return (model.transformer_blocks if name == "qwen_image" else model.blocks)[0]


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_of_other_families(host, force, ran, monkeypatch, tmp_path, name):
    force("triton-w4a4")
    check_block(block_of(name, tmp_path), force, ran, monkeypatch, "triton-w4a4", OTHERS[name])


@pytest.mark.parametrize("name", OTHERS)
def test_modulations_by_token(host, force, tmp_path, name):
    """Qwen-Image-Edit gives reference pictures their own, Wan 2.2 5B every frame; the same for all gives the same."""
    from comfy.ldm.flux.layers import EmbedND

    force("triton-widened-int8")
    block = block_of(name, tmp_path)
    img, txt, vec, pe = (t.bfloat16() for t in inputs_of(block))
    with torch.no_grad():
        if name == "wan":
            rows, pe = random(1, 6, 6, 256, seed=5), EmbedND(128, 10000, [44, 42, 42])(torch.zeros(1, 6, 3))
            inputs = rows, rows[:, :1].repeat(1, 6, 1, 1), rows[:, :1]
            found, same, one = (block(img, e, pe, txt) for e in inputs)
        else:
            inputs = (torch.cat([vec, random(1, 256, seed=6)]), 3), (vec.repeat(2, 1), 3), (vec, None)
            found, same, one = (torch.cat(block(img, txt, None, temb, pe, i), 1) for temb, i in inputs)
    assert error_db(same, one.double()) < -30 < error_db(found, one.double())


@pytest.fixture(scope="module")
def z_image(host, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FORCED", "triton")
        return model_of("z_image", tmp_path_factory.mktemp("z_image"))


@pytest.mark.parametrize("blocks", ["layers", "context_refiner"])
def test_blocks_of_z_image(z_image, force, ran, monkeypatch, blocks):
    """Norms with weights, with a modulation and without: qkv, w1 and w3 read them, w2 the gated SiLU."""
    wanted = {"{}-after-rms": 3, "{}-after-silu": 1, "{}": 1}
    check_block(z_image.get_submodule(blocks)[0], force, ran, monkeypatch, "triton-w4a4", wanted)


def test_modulation_of_parts_of_the_tokens_of_z_image(z_image, force, ran, monkeypatch):
    """Reference pictures have that of time zero, which ComfyUI writes into slices of the norm: the same one for all
    gives the same bits. In fp16 nothing else is deferred."""
    force("triton-w4a4")
    block, rows = z_image.layers[0], random(1, 256, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("comfyui_svdquant.svdq_core.host.fuse.deferring", lambda: False)
        whole = outputs_of(block, torch.float16)
    same, other = (
        outputs_of_z_image(block, torch.float16, rows=torch.cat([rows, zero]), timestep_zero_index=[(3, 9)])
        for zero in (rows, random(1, 256, seed=5))
    )
    assert torch.equal(same, whole) and not torch.equal(other, whole)
    assert not any("-after-" in name for name, _ in ran)


def test_norms_with_weights(z_image, force, monkeypatch):
    """Those in front of linears, with the weight as ComfyUI casts and patches it."""
    force("triton-w4a4")
    block, x = z_image.layers[0], random(1, 5, 256)
    for functions in ([], [lambda weight: 2 * weight]):
        monkeypatch.setattr(block.attention_norm1, "weight_function", functions)
        wanted = block.attention_norm1(x)
        with deferred(), torch.no_grad():
            found = block.attention_norm1(x)
            assert type(block.attention_norm2(x)) is Tensor and type(block.ffn_norm1(x.float())) is Tensor
        assert type(wanted) is Tensor and isinstance(found, Deferred) and torch.equal(found.value(), wanted)
    with deferred(), torch.enable_grad():
        assert type(block.ffn_norm1(x)) is Tensor


def test_fp16_of_z_image_is_clamped(z_image, force, ran):
    """As ComfyUI has it: a gated SiLU that is too large for fp16 is the largest number."""
    force("triton-w4a4")
    block, big = z_image.layers[0], torch.full((1, 3, 256), 300.0)
    with deferred():
        assert isinstance(block.feed_forward._forward_silu_gating(big.bfloat16(), big.bfloat16()), Deferred)
        clamped = block.feed_forward._forward_silu_gating(big.half(), big.half())
    assert type(clamped) is Tensor and torch.equal(clamped, torch.full_like(clamped, 65504))
    outputs_of(block, torch.float16)
    counts = Counter(name for name, _ in ran)
    assert counts["triton-w4a4-after-rms"] >= 3 and not counts["triton-w4a4-after-silu"]


def check_block(block, force, ran, monkeypatch, name: str, wanted: dict[str, int]) -> None:
    force(name)
    outputs_of(block)
    ran.clear()  # of the checks
    found = outputs_of(block)
    counts = Counter(called for called, _ in ran if called != "torch")  # torch: the modulation
    assert counts == {key.format(name): count for key, count in wanted.items()}
    with monkeypatch.context() as patch:
        patch.setattr("comfyui_svdquant.svdq_core.host.fuse.deferring", lambda: False)
        patch.setattr("comfyui_svdquant.svdq_core.host.ops.deferring", lambda: False)
        ran.clear()
        before = outputs_of(block)
        assert not any(f"after-{each}" in called for called, _ in ran for each in ("norm", "rms", "silu"))
    if name == "triton-w4a4":  # a last digit of bf16 moves 4-bit codes
        exact = outputs_of(block, torch.float32).double()
        assert error_db(found, exact) < error_db(before, exact) + 2
    else:
        assert error_db(found, before.double()) < -30


def test_nothing_is_deferred_outside_of_blocks(bf16_model, force):
    """Who calls a norm himself may keep the result while its input changes."""
    force("triton-w4a4")
    block = bf16_model.model.diffusion_model.single_blocks[0]
    x = random(1, 5, 256)
    assert type(block.pre_norm(x)) is Tensor and type(block.mlp_act(x)) is Tensor
    with deferred():
        assert isinstance(block.pre_norm(x), Deferred) and isinstance(block.mlp_act(x), Deferred)
        assert type(block.pre_norm(x.float())) is Tensor
    assert type(block.pre_norm(x)) is Tensor


def test_gated_silus_outside_of_blocks_and_with_hooks(flux2_model, force, ran):
    """The same for FLUX.2's, which have a module within."""
    force("triton-w4a4")
    block, heard, x = flux2_model.model.diffusion_model.single_blocks[0], [], random(1, 5, 512)
    assert type(block.mlp_act(x)) is Tensor
    with deferred():
        assert isinstance(block.mlp_act(x), Deferred) and type(block.mlp_act(x.float())) is Tensor
    handle = block.mlp_act.gate_fn.register_forward_hook(lambda module, args, out: heard.append(type(out)))
    outputs_of(block)
    handle.remove()
    assert heard == [Tensor] and not any("-after-" in name for name, _ in ran)


def test_a_forward_of_another_plugin_gets_tensors(bf16_model, force, ran, monkeypatch):
    from comfy.ldm.flux.layers import SingleStreamBlock

    force("triton-w4a4")
    block, norms = bf16_model.model.diffusion_model.single_blocks[0], []

    def forward(self, x, vec, pe):
        norms.append(self.pre_norm(x))
        return x

    monkeypatch.setattr(SingleStreamBlock, "forward", forward)
    outputs_of(block)
    assert [type(norm) for norm in norms] == [Tensor]


def test_hooks_get_tensors(bf16_model, force, ran):
    """Even those that keep one while the block writes to what it was made of."""
    from comfy.ldm.flux.layers import SingleStreamBlock

    force("triton-w4a4")
    block, kept = bf16_model.model.diffusion_model.single_blocks[0], []
    plain = outputs_of(block)
    ran.clear()
    handle = block.pre_norm.register_forward_hook(lambda module, args, out: kept.append((out, args[0].clone())))
    found = outputs_of(block)
    handle.remove()
    (norm, x), *_ = kept
    assert type(norm) is Tensor and torch.equal(norm, F.layer_norm(x, (256,), eps=1e-6))
    assert [name for name, _ in ran if name != "torch"] == ["triton-w4a4", "triton-w4a4"]
    assert error_db(found, plain.double()) < -15
    block.forward = SingleStreamBlock.forward.__get__(block)  # as nodes replace it: nothing is deferred
    ran.clear()
    assert torch.equal(outputs_of(block), found)
    del block.forward
    assert not any("-after-" in name for name, _ in ran)


def test_modulation_of_parts_of_the_tokens(bf16_model, force):
    """Reference images have a modulation of their own, which ComfyUI writes into slices of the norm."""
    force("triton-widened-int8")
    block = bf16_model.model.diffusion_model.single_blocks[0]
    x, vec, pe = inputs_of(block)
    both = torch.cat([vec, vec]).unsqueeze(0)
    with torch.no_grad():
        whole = block(x.clone(), vec, pe)
        parts = block(x.clone(), both, pe, modulation_dims=[(0, 4, 0), (4, 9, 1)])
    assert error_db(parts, whole.double()) < -30


def test_lora_on_the_branch_and_beside(bf16_model, force, ran):
    from comfy.weight_adapter.lora import LoRAAdapter
    from comfy.weight_adapter.oft import OFTAdapter

    force("triton-w4a4")
    block = bf16_model.model.diffusion_model.single_blocks[0]
    x, vec, pe = inputs_of(block)
    lora = LoRAAdapter(set(), (torch.randn(256, 8) / 8, torch.randn(8, 1280) / 32, None, None, None, None))
    rotation = OFTAdapter(set(), (torch.randn(4, 64, 64) / 64, None, None, None))
    with torch.no_grad():
        plain = block(x.clone(), vec, pe)
        try:
            block.linear2.set_patches("w", [(1.0, lora, 1.0, None, None)], x)
            assert not torch.equal(block(x.clone(), vec, pe), plain)
            assert ran[-1][0] == "triton-w4a4-after-gelu"
            block.linear2.set_patches("w", [(1.0, rotation, 1.0, None, None)], x)
            assert not torch.equal(block(x.clone(), vec, pe), plain)
            assert ran[-1][0] == "triton-w4a4"
        finally:
            block.linear2.drop_adapters()
        assert torch.equal(block(x.clone(), vec, pe), plain)


def test_compiled_in_pieces(bf16_model, force, ran):
    """On the CPU ComfyUI's attention breaks the graph of a block: its pieces are traced within the block's forward."""
    force("triton-w4a4")
    block = bf16_model.model.diffusion_model.single_blocks[0]
    exact = outputs_of(block)
    ran.clear()
    torch.compiler.reset()
    found = outputs_of(torch.compile(block, backend="eager"))
    assert [name for name, _ in ran if name != "torch"] == ["triton-w4a4", "triton-w4a4"]
    assert error_db(found, exact.double()) < -15

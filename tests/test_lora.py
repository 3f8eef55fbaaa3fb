"""LoRA in the runtime: on the low-rank branch of a 4-bit FLUX in a real ComfyUI, by ComfyUI's own nodes.

The reference is `small_flux.twin` (exact 4-bit arithmetic in ComfyUI's 16-bit model), where the quantized linears
have the LoRA in their branches as the formula says, and ComfyUI patches the 16-bit ones. The arithmetic of both is
the same to the last bit: otherwise one activation that rounds the other way would grow into another picture.
"""

from pathlib import Path

import pytest
import torch
from comfyui_svdquant.svdq_core import QuantizedLinear, SVDQuantError
from safetensors.torch import save_file
from torch import Tensor

import small_flux
from sampling import (
    assert_equal_tensors,
    assert_same,
    conditioning,
    denoised,
    error_db,
    load,
    loaded,
    quantized_weights,
    sample,
    save,
)

pytestmark = pytest.mark.usefixtures("host")

# Split q, k, v and pieces of the single blocks (diffusers' names), unsigned activations, W4A16, and a 16-bit layer.
# key in the file: layer, rows, columns (slices of the weight)
LAYERS = {
    "transformer.transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", (256, 512), (0, 256)),
    "transformer.transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", (512, 768), (0, 256)),
    "lora_unet_double_blocks_1_img_mlp_2": ("double_blocks.1.img_mlp.2", (0, 256), (0, 1024)),
    "transformer.single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", (768, 1792), (0, 256)),
    "lora_unet_single_blocks_1_linear1": ("single_blocks.1.linear1", (0, 1792), (0, 256)),
    "transformer.single_transformer_blocks.1.proj_out": ("single_blocks.1.linear2", (0, 256), (0, 1280)),
    "diffusion_model.single_blocks.1.modulation.lin": ("single_blocks.1.modulation.lin", (0, 768), (0, 256)),
    "lora_unet_txt_in": ("txt_in", (0, 256), (0, 128)),
}
BRANCHED = {layer for layer, _, _ in LAYERS.values()} - {"txt_in"}
RANK, ALPHA = 8, 4.0


@pytest.fixture(scope="module")
def loras(host) -> dict[str, dict[str, Tensor]]:
    """Two LoRA files where LoraLoader finds them, and what is in them."""
    return {name: write_lora(name, seed) for seed, name in enumerate(("one", "two"))}


def lora_folder() -> Path:
    import folder_paths

    folder = Path(folder_paths.models_dir) / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("loras", str(folder))
    return folder


def write_lora(name: str, seed: int, keys: tuple[str, ...] = (*LAYERS,)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sd = {}
    for key in keys:
        _, rows, columns = LAYERS[key]
        n, k = rows[1] - rows[0], columns[1] - columns[0]
        sd[f"{key}.lora_down.weight"] = torch.randn(RANK, k, generator=generator) / k**0.5
        sd[f"{key}.lora_up.weight"] = torch.randn(n, RANK, generator=generator)
        sd[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(sd, lora_folder() / f"{name}.safetensors")
    return sd


def with_lora(model, name: str, strength: float = 1.0):
    """ComfyUI's own node."""
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{name}.safetensors", strength)[0]


WEIGHTS = {key.removesuffix(".weight"): tuple(t.shape) for key, t in small_flux.state_dict(2, 2).items()}


@pytest.fixture(scope="module")
def reference(host, small_flux_files, loras):
    """reference(one=0.5, ...): the twin with those LoRAs, strengths by name."""

    def build(**strengths: float):
        twin = small_flux.twin(small_flux_files["bf16"], small_flux_files["int4"])
        layers = small_flux.quantized_layers(small_flux_files["int4"])
        for name, strength in strengths.items():
            twin = with_lora(twin, name, strength)
            for key, (layer, rows, columns) in LAYERS.items():
                if layer in layers:
                    widen(layers[layer], loras[name], key, strength, rows, columns)
        return small_flux.computing(twin, layers)

    return build


def widen(layer: QuantizedLinear, lora: dict[str, Tensor], key: str, strength: float, rows, columns) -> None:
    """``proj_down' = [proj_down, A]``, ``proj_up' = [proj_up, s B]`` with zeros outside the slice."""
    n, k = layer.shape
    up, down = torch.zeros(n, RANK), torch.zeros(k, RANK)
    up[slice(*rows)] = strength * ALPHA / RANK * lora[f"{key}.lora_up.weight"]
    down[slice(*columns)] = lora[f"{key}.lora_down.weight"].t()
    layer.proj_up = up if layer.proj_up is None else torch.cat([layer.proj_up, up], dim=1)
    layer.proj_down = down if layer.proj_down is None else torch.cat([layer.proj_down, down], dim=1)


# ---- attach, change, remove ------------------------------------------------------------------------------


def test_lora_and_back(model, reference, loras):
    """Clones with different LoRAs take turns; the 4-bit weights are never touched, and without one all is as it was."""
    plain, weights = sample(model), quantized_weights(model)
    results = {}
    for name in ("one", "two", "one"):
        wanted, found = sample(reference(**{name: 0.8})), sample(with_lora(model, name, 0.8))
        assert error_db(wanted, plain) > -20, "this LoRA does nothing"
        assert_same(found, wanted)
        assert torch.equal(results.setdefault(name, found), found)
        assert_equal_tensors(quantized_weights(model), weights)
    assert torch.equal(sample(model), plain)
    assert not any(getattr(m, "adapters", None) for m in model.model.modules())


@pytest.mark.parametrize("strength", [-1.0, 0.5, 1.5])
def test_strength(model, reference, loras, strength):
    """Of four pictures, since an activation halfway between two codes may fall either way, by the order of additions on
    this CPU, and then its picture differs by -35 dB."""
    found, wanted = (sample(m, batch=4) for m in (with_lora(model, "one", strength), reference(one=strength)))
    errors = sorted(error_db(f, w) for f, w in zip(found, wanted, strict=True))
    assert errors[1] < -70 and errors[-1] < -20


def test_strength_zero_is_no_lora(model, loras):
    """LoraLoader passes the model on; other nodes may add patches of strength 0."""
    plain, patched = sample(model), with_lora(model, "one", 1.0)
    for key, patches in patched.patches.items():
        patched.patches[key] = [(0.0, *patch[1:]) for patch in patches]
    assert torch.equal(sample(patched), plain)


def test_two_loras(model, reference, loras):
    both = with_lora(with_lora(model, "one", 0.5), "two", -0.75)
    assert_same(sample(both), sample(reference(one=0.5, two=-0.75)))


@pytest.mark.parametrize("name", ["blocks", "one"])
def test_clones_take_turns_without_moving_a_weight(model, loras, monkeypatch, name):
    """Attaching and changing a LoRA unloads nothing, also one that patches a 16-bit layer; the codes stay in place."""
    from comfy.model_patcher import ModelPatcher

    if name == "blocks":
        write_lora(name, 5, tuple(key for key, (layer, _, _) in LAYERS.items() if layer in BRANCHED))
    plain = sample(model)
    places = [m.weight.data_ptr() for m in model.model.modules() if getattr(m, "quantized", False)]
    unpatch, unpatched = ModelPatcher.unpatch_model, []

    def spy(self, device_to=None, unpatch_weights=True):
        unpatched.append(unpatch_weights)
        return unpatch(self, device_to, unpatch_weights)

    monkeypatch.setattr(ModelPatcher, "unpatch_model", spy)
    weak, strong = with_lora(model, name, 0.3), with_lora(model, name, 1.0)
    assert (weak.patches_uuid == model.patches_uuid) == (name == "blocks")
    assert weak.clone_has_same_weights(weak.clone()) and not weak.clone_has_same_weights(strong)
    first = sample(weak), sample(strong)
    assert torch.equal(sample(weak), first[0]) and torch.equal(sample(strong), first[1])
    assert torch.equal(sample(model), plain) and error_db(first[0], first[1]) > -40
    assert unpatched and not any(unpatched)
    assert places == [m.weight.data_ptr() for m in model.model.modules() if getattr(m, "quantized", False)]


def test_unload_and_reload(model, loras):
    import comfy.model_management

    patched = with_lora(model, "one")
    first = sample(patched)
    comfy.model_management.unload_all_models()
    assert not any(getattr(m, "adapters", None) for m in model.model.modules()), "adapters stay on the GPU"
    assert torch.equal(sample(patched), first)


def test_weights_leave_room_for_the_lora(model, loras):
    """With memory for exactly the model: without a LoRA all of it is loaded, with one as much less as that takes."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    room = model.model_size() + 1
    for patcher, complete in ((model, True), (with_lora(model, "one"), False)):
        patcher.partially_load(patcher.load_device, room)
        used = sum(m.adapters.nbytes for m in model.model.modules() if getattr(m, "adapters", None))
        assert (used == 0) == complete and model.model.model_lowvram == (not complete)
        assert model.model.model_loaded_weight_memory + used <= room
        patcher.detach()


def test_out_of_memory_while_attaching(model, reference, loras, monkeypatch):
    """ComfyUI gets to see it, and the next run is right."""
    from comfyui_svdquant.svdq_core.host import adapters

    patched, join, calls = with_lora(model, "one"), adapters.join, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return join(*args)

    monkeypatch.setattr(adapters, "join", fail)
    with pytest.raises(torch.OutOfMemoryError):
        sample(patched)
    assert not any(getattr(m, "adapters", None) for m in model.model.modules())
    assert_same(sample(patched), sample(reference(one=1.0)))


def test_failure_while_patching_16_bit_weights(model, loras, monkeypatch):
    first, second = with_lora(model, "one"), with_lora(model, "two")
    wanted = sample(second), sample(first)
    with monkeypatch.context() as patch:
        patch.setattr("comfy.lora.calculate_weight", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(second)
    assert torch.equal(sample(first), wanted[1]) and torch.equal(sample(second), wanted[0])


def test_weight_wrappers_come_and_go(model, loras):
    """They change the same identifier of ComfyUI's that patches do, but need a load."""
    plain = sample(model)
    wrapped = model.clone()
    wrapped.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight * 2)
    different = sample(wrapped)
    assert error_db(different, plain) > -20
    assert torch.equal(sample(model), plain) and torch.equal(sample(wrapped), different)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_compute_dtype(model, loras, dtype):
    """ModelComputeDtype with what joins the branch and with what stays beside it."""
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    save_file(lokr_file(), lora_folder() / "lokr.safetensors")
    both = with_lora(with_lora(model, "one", 0.5), "lokr")
    (changed,) = ModelComputeDtype().patch(both, dtype)
    wanted = sample(both, steps=1)
    assert error_db(sample(changed, steps=1), wanted) < -10
    adapters = model.model.quantized_linears["diffusion_model.double_blocks.1.img_mlp.2.weight"].adapters
    assert adapters.others and adapters.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert torch.equal(sample(both, steps=1), wanted)


def lokr_file() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    key = "diffusion_model.double_blocks.1.img_mlp.2"
    return {
        f"{key}.lokr_w1": torch.randn(8, 8, generator=generator) / 8,
        f"{key}.lokr_w2": torch.randn(32, 128, generator=generator) / 32,
    }


def test_compiled_blocks_as_object_patches(model, loras):
    """What KJNodes' compile node does: the blocks are replaced while the model runs, and with them module names."""
    two = with_lora(model, "two")
    wanted = sample(two), sample(two, positive=hooked("one"))
    assert error_db(*wanted) > -20
    compiled = two.clone()
    for name in ("double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"):
        block = compiled.get_model_object(f"diffusion_model.{name}")
        compiled.add_object_patch(f"diffusion_model.{name}", torch.compile(block, backend="eager"))
    assert error_db(sample(compiled), wanted[0]) < -70
    quantized = {key for key, patches in compiled.patches.items() if compiled.stays_beside(key)}
    assert len(quantized) == len(BRANCHED)
    from comfyui_svdquant.svdq_core.host.lora import add_lora

    again = model.clone()  # while the compiled blocks are in place: ComfyUI's own node finds no names now
    lora = add_lora(again, lora_folder() / "two.safetensors", 1.0, 128)
    assert not lora.unused and again.patches.keys() == two.patches.keys()
    hook = sample(compiled, positive=hooked("one", (0.0, 0.0)))  # a hook of strength 0: the static LoRA stays
    assert error_db(hook, wanted[0]) < -70


# ---- low VRAM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, 2e6, 1e30])
def test_partly_loaded(model, reference, loras, memory):
    """With few or no weights on the device; one 16-bit layer takes ComfyUI's own patches."""
    with loaded(reference(one=1.0), 1e30) as each:
        wanted = denoised(each)
    with loaded(with_lora(model, "one"), memory) as each:
        assert each.model.lowvram_patch_counter <= 1
        assert_same(denoised(each), wanted)
        each.partially_unload(each.offload_device, 1e30)
        assert_same(denoised(each), wanted)


@pytest.fixture(scope="module")
def expected(model, reference, loras):
    """One call of the model, plain and with a LoRA, as normal loading gives it."""
    results = []
    for each in (model, reference(one=1.0)):
        with loaded(each, 1e30):
            results.append(denoised(each))
    return results


def test_dynamic_vram(expected, dynamic_vram, small_flux_files, loras):
    """Quantized weights that are on the device stay there when a LoRA comes and goes."""
    plain, patched = expected
    write_lora("blocks", 0, tuple(key for key, (layer, _, _) in LAYERS.items() if layer in BRANCHED))
    model = load(small_flux_files["int4"])
    assert model.is_dynamic()
    layer = model.model.diffusion_model.double_blocks[1].img_mlp[2]
    text, was = model.model.diffusion_model.txt_in, None
    for name in (None, "one", None, "blocks", None):
        each = with_lora(model, name) if name else model
        assert each.is_dynamic()
        before = getattr(layer, "_v_signature", None), getattr(text, "_v_signature", None)
        each.partially_load(each.load_device)
        if before[0] is not None:
            assert layer._v_signature == 1, "a quantized weight is copied in again"
            assert (text._v_signature is None) == ((each is not model and name == "one") or was == "one")
        was = name
        for _ in range(2):
            if name == "one":
                assert_same(denoised(each), patched)
            elif name is None:
                assert torch.equal(denoised(each), plain)
    model.unpatch_model(model.offload_device)


def test_delegate_of_dynamic_vram_keeps_the_class(dynamic_vram, small_flux_files):
    """What ComfyUI makes for hooks and torch.compile."""
    from comfyui_svdquant.svdq_core.host.patcher import BesidePatcher

    delegate = load(small_flux_files["int4"]).get_non_dynamic_delegate()
    assert isinstance(delegate, BesidePatcher) and not delegate.is_dynamic()


# ---- hooks -----------------------------------------------------------------------------------------------


def hooked(name: str, *keyframes: tuple[float, float]) -> list:
    """A conditioning with a LoRA hook; keyframes are (strength, from which share of the steps on)."""
    import comfy.hooks
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(lora_folder() / f"{name}.safetensors"))
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for strength, start in keyframes:
            group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(conditioning(), hooks)


def test_lora_hook(model, loras):
    """The whole time: as LoraLoader. On the positive prompt alone: the other stays without."""
    plain, patched = sample(model), sample(with_lora(model, "one"))
    assert_same(sample(model.clone(), positive=hooked("one")), patched)
    one_step = {"steps": 1, "cfg": 3.0}
    mixed = sample(model.clone(), positive=hooked("one"), **one_step)
    positive = sample(with_lora(model, "one"), steps=1)
    negative = sample(model, steps=1, positive=conditioning(seed=1))
    assert_same(mixed, negative + 3 * (positive - negative))
    assert torch.equal(sample(model), plain)


def test_hooks_take_turns_without_making_adapters_again(model, loras, monkeypatch):
    from comfyui_svdquant.svdq_core.host import ops

    build, made = ops.build, []
    monkeypatch.setattr(ops, "build", lambda key, *args: made.append(key) or build(key, *args))
    sample(with_lora(model, "two"), steps=6, cfg=3.0, positive=hooked("one"))
    assert made and max(map(made.count, made)) <= 3  # "two" alone, "one" and "two", and "two" again after sampling
    linears = model.model.quantized_linears.values()
    assert all(len(linear.kept) <= 1 for linear in linears), "adapters of hooks stay on the GPU"


def test_scheduled_lora(model, loras):
    """Two steps: the LoRA comes after the first. So the first is the plain model's, the second the other's."""
    steps = []

    def record(patcher):
        patcher.set_model_sampler_post_cfg_function(
            lambda args: steps.append(args["denoised"].clone()) or args["denoised"]
        )
        return patcher

    sample(record(model.clone()))
    sample(record(model.clone()), positive=hooked("one", (0.0, 0.0), (1.0, 0.4)))
    plain, scheduled = steps[:2], steps[2:]
    assert torch.equal(plain[0], scheduled[0]) and error_db(scheduled[1], plain[1]) > -40
    steps.clear()
    sample(record(model.clone()), positive=hooked("one", (1.0, 0.0), (0.0, 0.4)))
    sample(record(with_lora(model, "one")))
    assert_same(steps[0], steps[2])
    assert error_db(steps[1], steps[3]) > -40


# ---- together with others --------------------------------------------------------------------------------


def test_merge_of_a_model_with_lora(model, small_flux_files, reference, loras):
    """A merge cannot stay beside the codes: the layer is 16 bit for as long, the LoRA in it."""
    import comfy.sd
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    other = comfy.sd.load_diffusion_model(str(small_flux_files["other"]))
    every = tuple(small_flux.quantized_layers(small_flux_files["int4"]))
    twin = small_flux.twin(small_flux_files["bf16"], small_flux_files["int4"], every)
    plain = sample(model)
    results = [sample(ModelMergeSimple().merge(with_lora(each, "one", 0.5), other, 0.6)[0]) for each in (model, twin)]
    assert_same(*results)
    results = [sample(with_lora(ModelMergeSimple().merge(each, other, 0.6)[0], "one", 0.5)) for each in (model, twin)]
    assert_same(*results)
    assert torch.equal(sample(model), plain)


def test_bias_and_norm_differences(model, small_flux_files):
    """They take ComfyUI's path: also the bias of a layer that shifts its input."""
    generator = torch.Generator().manual_seed(3)
    names = ("double_blocks.1.img_mlp.2", "single_blocks.0.linear1")
    sd = {f"diffusion_model.{name}.diff_b": torch.randn(WEIGHTS[name][0], generator=generator) for name in names}
    norm = "double_blocks.0.img_attn.norm.key_norm.weight"
    sd[f"diffusion_model.{norm.removesuffix('.weight')}.w_norm"] = torch.randn(128, generator=generator)
    save_file(sd, lora_folder() / "biases.safetensors")
    layers = small_flux.quantized_layers(small_flux_files["int4"])
    before = model.model.diffusion_model.get_parameter(norm).clone()
    for memory in (1e30, 1):
        with loaded(with_lora(model, "biases", 0.7), memory) as each:
            for name in names:
                x = torch.randn(3, WEIGHTS[name][1], generator=generator)
                wanted = layers[name].forward(x) + 0.7 * sd[f"diffusion_model.{name}.diff_b"]
                found = each.model.diffusion_model.get_submodule(name)(x)
                assert error_db(found, wanted) < -55  # the bias is kept in bf16
            if memory > 1:
                found = each.model.diffusion_model.get_parameter(norm) - before
                assert_same(found, 0.7 * sd[f"diffusion_model.{norm.removesuffix('.weight')}.w_norm"])


def test_bypass_loader(model, loras):
    """ComfyUI's LoraLoaderBypass wraps the linears; what it cannot do (slices) is left out of the file."""
    import comfy.sd

    keys = ("lora_unet_double_blocks_1_img_mlp_2", "lora_unet_single_blocks_1_linear1")
    sd = write_lora("whole", 8, keys)
    results = []
    for each in (comfy.sd.load_bypass_lora_for_models(model, None, sd, 0.8, 0)[0], with_lora(model, "whole", 0.8)):
        with loaded(each, 1e30):
            modules = [each.model.diffusion_model.get_submodule(LAYERS[key][0]) for key in keys]
            results.append([m(torch.arange(2.0 * m.in_features).view(2, -1).sin()) for m in modules])
    for bypass, branch in zip(*results):
        assert_same(branch, bypass)


def test_shape_that_does_not_fit(model, loras, caplog):
    """As in ComfyUI: named in the log, and the rest applies."""
    key = "lora_unet_single_blocks_1_linear1"
    wrong = write_lora("wrong", 0, (key,))
    wrong[f"{key}.lora_down.weight"] = torch.randn(RANK, 100)
    save_file(wrong, lora_folder() / "wrong.safetensors")
    assert torch.equal(sample(with_lora(model, "wrong")), sample(model))
    assert "single_blocks.1.linear1.weight" in caplog.text and "(1792, 100)" in caplog.text


def test_full_size_difference(model, caplog):
    """Reduced to rank 128; the log says how much of it that keeps. 16-bit layers take it whole."""
    generator = torch.Generator().manual_seed(4)
    layer, n, k = "single_blocks.1.linear1", 1792, 256
    low = torch.randn(n, 100, generator=generator) @ torch.randn(100, k, generator=generator) / k
    save_file({f"diffusion_model.{layer}.diff": low}, lora_folder() / "diff.safetensors")
    save_file({f"diffusion_model.{layer}.diff": low + torch.randn(n, k) / 16}, lora_folder() / "full.safetensors")
    u, s, v = torch.linalg.svd(low, full_matrices=False)
    sd = {f"diffusion_model.{layer}.lora_A.weight": (s[:100, None] * v[:100]).contiguous()}
    sd |= {f"diffusion_model.{layer}.lora_B.weight": u[:, :100].contiguous()}
    save_file(sd, lora_folder() / "low.safetensors")
    assert error_db(sample(with_lora(model, "diff", 0.6)), sample(with_lora(model, "low", 0.6))) < -50
    assert "rank 128" not in caplog.text
    caplog.clear()
    sample(with_lora(model, "full"))
    assert "rank 128" in caplog.text and layer in caplog.text and "100.0 %" not in caplog.text


def test_model_save(model, small_flux_files, loras):
    """A LoRA is saved with the model: as a wider branch, or where the format has none in a 16-bit layer."""
    patched = with_lora(model, "one", 0.5)
    wanted = sample(patched)
    path = save(patched, "with_lora")
    before, after = small_flux.quantized_layers(small_flux_files["int4"]), small_flux.quantized_layers(path)
    modulation = "single_blocks.1.modulation.lin"
    assert before.keys() - after.keys() == {modulation}
    changed = {name for name, layer in after.items() if layer.rank > before[name].rank}
    assert changed == BRANCHED - {modulation}
    delta = after["double_blocks.0.img_attn.qkv"].dequantized_weight()
    delta -= before["double_blocks.0.img_attn.qkv"].dequantized_weight()
    for key, (layer, rows, _) in LAYERS.items():
        if layer == "double_blocks.0.img_attn.qkv":
            product = loras["one"][f"{key}.lora_up.weight"] @ loras["one"][f"{key}.lora_down.weight"]
            assert error_db(delta[slice(*rows)], 0.5 * ALPHA / RANK * product) < -45  # bf16 on disk
    assert not delta[:256].any()
    key = "diffusion_model.single_blocks.1.modulation.lin"
    product = loras["one"][f"{key}.lora_up.weight"] @ loras["one"][f"{key}.lora_down.weight"]
    merged = before[modulation].dequantized_weight() + 0.5 * ALPHA / RANK * product
    again = load(path)
    assert_same(again.model.diffusion_model.get_submodule(modulation).weight.float(), merged)
    assert error_db(sample(again), wanted) < -10  # a few activations round the other way
    with loaded(patched, 1) as each:
        offloaded = each.model_state_dict_for_saving()
    assert offloaded["diffusion_model.single_blocks.1.linear2.proj_up"].shape == (256, 16 + RANK)


def test_model_save_of_nvfp4(host, small_flux_files, loras):
    """Its scales are in 8 bit, its branch is not."""
    patched = with_lora(load(small_flux_files["nvfp4"]), "one", 0.5)
    wanted, path = sample(patched), save(patched, "nvfp4_with_lora")
    layer = small_flux.quantized_layers(path)["single_blocks.1.linear2"]
    assert (layer.rank, layer.proj_down.dtype, layer.proj_up.dtype) == (16 + RANK, torch.bfloat16, torch.bfloat16)
    assert error_db(sample(load(path)), wanted) < -10


def test_summary(host):
    """What the report says: counts, what was reduced, and the unused keys."""
    from comfyui_svdquant.svdq_core.host.lora import LoraPatches

    unused = ["lora_te1_x.alpha", *(f"strange_{i}" for i in range(6))]
    kinds = {"lora": 3, "diff": 1}
    lora = LoraPatches("f.safetensors", {}, kinds, 20, unused, ["a", "b"], ["layer"], [0.99, 0.913])
    assert lora.summary().splitlines() == [
        "f.safetensors: 13 of 20 keys apply (3 lora, 1 diff).",
        "Reduced to low rank: 2 full-size updates, keeping at least 91.3 % of their energy. A higher rank keeps more.",
        "Given more than once, used once: a, b",
        "In 16 bit while it is applied: 1 layers, layer first.",
        "For the text encoder: 1 keys. Apply them with Load LoRA and its CLIP.",
        "Of no layer of this model: 6 keys, strange_0, strange_1, strange_2, strange_3, strange_4, strange_5",
    ]


# ---- compiled --------------------------------------------------------------------------------------------


def test_linear_with_lora_compiles_without_graph_breaks(host):
    from comfyui_svdquant.svdq_core.formats import FORMATS
    from comfyui_svdquant.svdq_core.host.ops import SVDQuantOps

    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(2))
    layer = small_flux.quantize_layer(weight, weight[:, 0], FORMATS["int4"])
    linear = SVDQuantOps.Linear(128, 192, dtype=torch.float32)
    linear.load_state_dict(layer.state_dict())
    up, down = torch.randn(192, 8), torch.randn(8, 128)
    linear.set_patches("w", [lora_patch(up, down, 0.5)], torch.empty(0))
    compiled = torch.compile(linear, fullgraph=True)
    for tokens in (5, 9):
        x = torch.randn(2, tokens, 128)
        assert error_db(compiled(x), layer.forward(x) + 0.5 * x @ down.t() @ up.t()) < -30


def lora_patch(up: Tensor, down: Tensor, strength: float):
    from comfy.weight_adapter.lora import LoRAAdapter

    return (strength, LoRAAdapter(set(), (up, down, None, None, None, None)), 1.0, None, None)


def test_compiled_model(loras, tmp_path):
    """TorchCompileModel with a LoRA, after it and before it."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    sd = small_flux.state_dict(double=1, single=1)
    model = load(small_flux.write(tmp_path / "int4.safetensors", sd, small_flux.quantize(sd)))
    wanted = sample(with_lora(model, "one"))
    for order, backend in (("before", "inductor"), ("after", "aot_eager")):
        torch.compiler.reset()
        each = with_lora(model, "one") if order == "before" else model
        each = TorchCompileModel.execute(each, backend).result[0]
        each = with_lora(each, "one") if order == "after" else each
        assert error_db(sample(each), wanted) < -15


def test_quantized_linear_is_refused_by_hooks_that_are_no_lora(model, small_flux_files):
    """Model-as-LoRA hooks hold whole weights, which cannot be put beside the codes."""
    import comfy.hooks
    import comfy.sd

    other = comfy.sd.load_diffusion_model(str(small_flux_files["other"]))
    hooks = comfy.hooks.create_hook_model_as_lora(other.model_state_dict(), None, 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(), hooks)
    plain = sample(model)
    with pytest.raises(SVDQuantError, match="only LoRAs can be scheduled"):
        sample(model.clone(), positive=positive)
    assert torch.equal(sample(model), plain)

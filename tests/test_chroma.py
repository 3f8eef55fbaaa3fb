"""Chroma: FLUX.1's blocks, and one network for all modulations. A small random model of ComfyUI's class."""

from pathlib import Path

import pytest
import torch
from comfyui_svdquant.svdq_core.checkpoint import describe_file
from comfyui_svdquant.svdq_core.recipes import CHROMA, FLUX, find_recipe, plan_model
from safetensors.torch import save_file

import small_flux
from sampling import assert_same, error_db, load, sample

WIDTH, GUIDANCE = 256, 64


@pytest.fixture(scope="module")
def narrow(host):
    """ComfyUI reads all of Chroma's widths from its file but two, of the network for the modulations."""
    import comfy.model_detection as detection

    comfyuis = detection.detect_unet_config

    def detect(*args, **kwargs):
        found = comfyuis(*args, **kwargs)
        if found and found.get("image_model") == "chroma":
            found |= {"out_dim": WIDTH, "hidden_dim": GUIDANCE}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "detect_unet_config", detect)
        yield host


@pytest.fixture(scope="module")
def files(narrow, tmp_path_factory) -> dict[str, Path]:
    """A random model, and what the quantizer makes of it after ComfyUI has sampled with it."""
    from comfyui_svdquant.svdq_core.host.calibrate import CalibrationSettings, blank_conditioning
    from comfyui_svdquant.svdq_core.host.model import ModelSource
    from comfyui_svdquant.svdq_core.host.quantize import quantize_model
    from comfyui_svdquant.svdq_core.quantize import Job

    folder = tmp_path_factory.mktemp("chroma")
    found = {form: folder / f"{form}.safetensors" for form in ("bf16", "int4")}
    save_file(small_flux.random_chroma(WIDTH, GUIDANCE), found["bf16"])
    source = ModelSource(narrow.sd.load_diffusion_model(str(found["bf16"])))
    prompts, settings = [blank_conditioning(source, i) for i in range(2)], CalibrationSettings(steps=2, size=64)
    report = quantize_model(source, prompts, found["int4"], Job("int4", "fast", 16), settings, lambda event: None)
    assert len(report.layers) == 12 and report.mean_error_db < -12
    return found


def test_what_is_quantized():
    sd = small_flux.random_chroma()
    recipe, groups = plan_model({key: tuple(t.shape) for key, t in sd.items()}, "m")
    assert recipe is CHROMA
    assert {g.kind for g in groups} == {"w4a4"} and sum(g.after_gelu for g in groups) == 2
    quantized = {f"{name}.weight" for g in groups for name in g.names}
    kept = {key.split(".")[0] for key in sd if key.endswith(".weight") and key not in quantized}
    assert kept == {"img_in", "txt_in", "distilled_guidance_layer", "final_layer"}
    assert find_recipe(small_flux.random_flux(), "m") is FLUX


def test_what_a_file_is(files):
    info = describe_file(files["int4"])
    assert info.text == "an SVDQuant file of Chroma (svdquant_w4a4)"
    assert (info.details["release"], info.details["blocks"]) == (None, (1, 2))


def test_samples(narrow, files):
    """What the file says, to the last bits, and near the model that it was made from, as far as random ones are."""
    found = sample(load(files["int4"], torch.float32))
    assert_same(found, sample(small_flux.twin(files["bf16"], files["int4"])))
    assert -60 < error_db(found, sample(narrow.sd.load_diffusion_model(str(files["bf16"])))) < -5


LORA = {  # FLUX's blocks, and the network for the modulations: the layer, and its weight's shape
    "transformer.single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", (WIDTH, 5 * WIDTH)),
    "base_model.model.double_blocks.0.img_attn.proj": ("double_blocks.0.img_attn.proj", (WIDTH, WIDTH)),
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj", (GUIDANCE, 64)),
}


def test_lora(narrow, files, tmp_path):
    from comfyui_svdquant.svdq_core.host.lora import add_lora

    generator, tensors, file = torch.Generator().manual_seed(1), {}, tmp_path / "lora.safetensors"
    layers = small_flux.quantized_layers(files["int4"])
    for key, (name, (n, k)) in LORA.items():
        down, up = torch.randn(4, k, generator=generator) / k**0.5, torch.randn(n, 4, generator=generator)
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if layer := layers.get(name):
            layer.proj_up, layer.proj_down = (
                torch.cat([layer.proj_up, up], 1),
                torch.cat([layer.proj_down, down.t()], 1),
            )
    save_file(tensors, file)
    twin = small_flux.computing(small_flux.twin(files["bf16"], files["int4"]), layers)
    model = load(files["int4"], torch.float32)
    plain, with_lora = sample(model), model.clone()
    report = add_lora(with_lora, file, 1.0, 16)
    assert (report.unused, report.in_16_bit, report.keys) == ([], [], len(tensors))
    add_lora(twin, file, 1.0, 16)  # for the layer that is in 16 bit
    assert_same(sample(with_lora), sample(twin))
    assert error_db(sample(with_lora), plain) > -20

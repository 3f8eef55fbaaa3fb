"""FLUX.2: a recipe and two tables of names; the rest is what FLUX.1 has. Small random models of ComfyUI's own class."""

from pathlib import Path

import pytest
import torch
from comfyui_svdquant.svdq_core.recipes import FLUX, FLUX2, facts_of, find_recipe, plan_model
from safetensors.torch import save_file
from torch import Tensor

import small_flux
from host.prompts import prompt, run, sixteen_bit_loader, template_up_to_the_vae
from host.server import ComfyServer
from sampling import assert_same, error_db, load, sample
from test_quantize_node import graph, our_events, written

SIZE = 128  # pixels of the calibration: 8 x 8 tokens
FILE = "flux2_int4.safetensors"


@pytest.fixture(scope="module")
def sd() -> dict[str, Tensor]:
    return small_flux.random_flux2()


@pytest.fixture(scope="module")
def bf16(sd, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flux2") / "flux2_bf16.safetensors"
    save_file(sd, path)
    return path


@pytest.fixture(scope="module")
def int4(server: ComfyServer, bf16: Path) -> Path:
    """What SVDQuant Quantize makes of it on a running ComfyUI, with nothing but the model connected."""
    server.add_model(bf16)
    since = len(server.events.seen)
    server.run(graph("flux2_bf16", file_name="flux2_int4", size=SIZE))
    events = [e.data for e in our_events(server, since)]
    assert sum(e["stage"] == "solve" for e in events) == 12 and events[-1]["stage"] == "done"
    assert any(e.get("preview") for e in events), "pictures of the calibration"
    return written(server, "flux2_int4")


# ---- names -------------------------------------------------------------------------------------------------


def test_what_is_quantized(sd):
    """The linears of the blocks; the modulations are shared by all of them, and stay."""
    recipe, groups = plan_model({key: tuple(t.shape) for key, t in sd.items()}, "m")
    assert recipe is FLUX2 and find_recipe(small_flux.random_flux(), "m") is FLUX
    assert {g.kind for g in groups} == {"w4a4"} and not any(g.after_gelu for g in groups)
    quantized = {f"{name}.weight" for g in groups for name in g.names}
    kept = {key.split(".")[0] for key in sd if key.endswith(".weight") and key not in quantized}
    modulations = {"double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"}
    assert kept == {"img_in", "txt_in", "time_in", "guidance_in", "final_layer"} | modulations


@pytest.mark.parametrize(
    ("width", "double", "single", "release"),
    [(6144, 8, 48, "dev"), (4096, 8, 24, "klein 9B"), (3072, 5, 20, "klein 4B"), (3072, 5, 21, None)],
)
def test_releases(width, double, single, release):
    shapes = {key: (width, 128) for key in FLUX2.keys}
    shapes |= {f"double_blocks.{i}.img_attn.qkv.weight": (3 * width, width) for i in range(double)}
    shapes |= {f"single_blocks.{i}.linear1.weight": (9 * width, width) for i in range(single)}
    assert facts_of(shapes, FLUX2)["release"] == release


# ---- quantize, load, sample ----------------------------------------------------------------------------------


def test_on_a_server(server: ComfyServer, int4: Path):
    """Quantized, chosen in the loader, sampled; and what the loader's panel says of the file."""
    found = run(server, prompt(FILE))
    wanted = run(server, prompt("") | {"model": sixteen_bit_loader("flux2_bf16.safetensors")})
    assert found.shape == wanted.shape == (1, 128, 4, 4)
    assert -60 < error_db(found, wanted) < -12
    facts = server.get(f"/svdquant/file?name={FILE}")
    assert (facts["model"], facts["blocks"], facts["ranks"]) == ("FLUX.2", [1, 2], [16])


def test_the_template_samples(server: ComfyServer, int4: Path):
    """All but its text encoder and VAE, whose weights are not at hand."""
    nodes = template_up_to_the_vae(server, "text_to_image_flux2")
    by_type = {node["class_type"]: id for id, node in nodes.items()}
    nodes[by_type["SVDQuantLoader"]]["inputs"]["unet_name"] = FILE
    nodes[by_type["CLIPLoader"]] = {"class_type": "DemoTextEncoderLoader", "inputs": {}}
    for name in ("EmptyFlux2LatentImage", "Flux2Scheduler"):
        nodes[by_type[name]]["inputs"] |= {"width": SIZE, "height": SIZE}
    found = run(server, nodes)
    assert found.shape == (1, 128, SIZE // 16, SIZE // 16) and 0.1 < found.std() < 10


def test_calibration_is_as_large_as_asked(host, bf16):
    """FLUX.2's latents are half as wide as the latents of an empty picture in ComfyUI."""
    from comfyui_svdquant.svdq_core.host.calibrate import CalibrationSettings, blank_conditioning, calibrate
    from comfyui_svdquant.svdq_core.host.model import ModelSource

    source = ModelSource(host.sd.load_diffusion_model(str(bf16)))
    seen = []
    (layer,) = source.modules(["img_in"]).values()
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])):
        calibrate(source, [blank_conditioning(source, 0)], CalibrationSettings(steps=1, size=SIZE), lambda event: None)
    assert set(seen) == {(SIZE // 16) ** 2}


def test_arithmetic(host, bf16, int4):
    """The loaded model computes what the file says, to the last bits."""
    assert_same(sampled(load(int4, torch.float32)), sampled(small_flux.twin(bf16, int4)))


def sampled(model) -> Tensor:
    return sample(model, latent=torch.zeros(1, 128, 4, 4))


# ---- LoRA -----------------------------------------------------------------------------------------------------

LORA = {  # in the dialects that trainers write: the layer, and the rows of its weight
    "transformer.transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", (256, 512)),
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": ("single_blocks.0.linear1", (0, 2304)),
    "base_model.model.double_blocks.0.txt_mlp.0": ("double_blocks.0.txt_mlp.0", (0, 1536)),
    "single_blocks.1.linear2": ("single_blocks.1.linear2", (0, 256)),
    "lora_unet_double_blocks_0_img_mlp_2": ("double_blocks.0.img_mlp.2", (0, 256)),
}


def test_lora_joins_the_branch(host, bf16, int4, tmp_path):
    from comfyui_svdquant.svdq_core.host.lora import add_lora
    from comfyui_svdquant.svdq_core.host.preview import preview_lora

    generator, file = torch.Generator().manual_seed(1), tmp_path / "lora.safetensors"
    layers, tensors = small_flux.quantized_layers(int4), {}
    for key, (name, (first, last)) in LORA.items():
        n, k = layers[name].shape
        down, up = torch.randn(4, k, generator=generator) / k**0.5, torch.zeros(n, 4)
        up[first:last] = torch.randn(last - first, 4, generator=generator)
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up[first:last].contiguous()}
        layers[name] = layers[name].widened(up, down)
    save_file(tensors, file)
    twin = small_flux.computing(small_flux.twin(bf16, int4), layers)
    model = load(int4, torch.float32)
    plain, with_lora = sampled(model), model.clone()
    report = add_lora(with_lora, file, 1.0, 16)
    assert (report.unused, report.in_16_bit) == ([], []) and report.keys == len(tensors)
    assert preview_lora(file, int4)[0].keys == len(tensors)
    assert_same(sampled(with_lora), sampled(twin))
    assert error_db(sampled(with_lora), plain) > -20 and torch.equal(sampled(model), plain)

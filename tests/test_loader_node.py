"""SVDQuant Loader in a running ComfyUI, with ComfyUI's own nodes around it."""

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_flux
from host.prompts import insert, prompt, run, sixteen_bit_loader, with_activations
from host.server import HTTP, ComfyServer, PromptError
from sampling import error_db


@pytest.fixture(scope="module")
def comfyui(server: ComfyServer, small_flux_files: dict[str, Path], tmp_path_factory) -> ComfyServer:
    """The server, with the small FLUX in every form as small_<form>.safetensors."""
    folder = tmp_path_factory.mktemp("models")
    for form, path in small_flux_files.items():
        server.add_model(Path(shutil.copy(path, folder / f"small_{form}.safetensors")))
    return server


def test_what_the_ui_shows(comfyui: ComfyServer):
    info = comfyui.object_info("SVDQuantLoader")
    assert (info["display_name"], info["category"]) == ("SVDQuant Loader", "SVDQuant")
    assert info["output"] == ["MODEL"] and info["output_name"] == ["model"]
    assert info["description"] and "nunchaku" in info["search_aliases"]
    widgets = info["input"]["required"] | info["input"]["optional"]
    assert list(widgets) == ["unet_name", "dtype", "activations"]  # in the order of saved workflows
    assert all(options["tooltip"] for _, options in widgets.values())
    assert list(info["input"]["optional"]) == ["activations"], "prompts saved before it was there go on working"
    assert widgets["activations"][1]["options"] == ["auto", "4 bit", "8 bit"]
    assert widgets["activations"][1]["default"] == "auto"
    assert widgets["dtype"][1]["options"] == ["auto", "bf16", "fp16"] and widgets["dtype"][1]["default"] == "auto"
    assert "small_int4.safetensors" in widgets["unet_name"][1]["options"]


def test_help_page_is_served(comfyui: ComfyServer):
    with HTTP.open(f"{comfyui.url}/extensions/ComfyUI-SVDQuant/docs/SVDQuantLoader.md") as answer:
        page = answer.read().decode()
    assert page.startswith("# SVDQuant Loader")
    assert all(f"**{name}**" in page for name in ("unet_name", "dtype", "activations", "model"))


@pytest.mark.parametrize(
    ("fmt", "dtype"), [("int4", "auto"), ("int4", "bf16"), ("int4", "fp16"), ("nvfp4", "auto"), ("int8", "auto")]
)
def test_samples(comfyui: ComfyServer, fmt: str, dtype: str):
    unet = sixteen_bit_loader("small_bf16.safetensors")
    wanted = run(comfyui, prompt("", cfg=2.0) | {"model": unet})
    found = run(comfyui, prompt(f"small_{fmt}.safetensors", dtype, cfg=2.0))
    assert found.shape == wanted.shape == (1, 16, 8, 8)
    assert -60 < error_db(found, wanted) < -6
    log = [line for line in comfyui.log().splitlines() if "model weight dtype" in line][-1]
    assert {"auto": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype] in log


def test_activations(comfyui: ComfyServer):
    """Another way to run an INT4 file; W8A8 and NVFP4 files have one."""
    for fmt, same in (("int4", False), ("int8", True), ("nvfp4", True)):
        without = run(comfyui, prompt(f"small_{fmt}.safetensors"))
        four, eight = (run(comfyui, with_activations(f"small_{fmt}.safetensors", a)) for a in ("4 bit", "8 bit"))
        assert torch.equal(four, without) and torch.equal(eight, four) == same
    with pytest.raises(PromptError, match="not in"):
        comfyui.run(with_activations("small_int4.safetensors", "2 bit"))


def test_free_and_reload(comfyui: ComfyServer):
    """/free drops the model and the results; the next run loads it again and makes the same bits."""
    graph = prompt("small_int4.safetensors")
    first = run(comfyui, graph)
    loads = comfyui.log().count("model weight dtype")
    comfyui.free(unload_models=True, free_memory=True)
    assert torch.equal(run(comfyui, graph), first)
    assert comfyui.log().count("model weight dtype") == loads + 1


def test_unload_keeps_the_model(comfyui: ComfyServer):
    """/free with unload_models alone: the model goes to the CPU and comes back."""
    first = run(comfyui, prompt("small_int4.safetensors"))
    comfyui.free(unload_models=True)
    graph = prompt("small_int4.safetensors")
    graph["save"]["inputs"]["filename_prefix"] = "again"
    graph["latent"]["inputs"]["batch_size"] = 2
    assert run(comfyui, graph).shape[0] == 2
    graph["latent"]["inputs"]["batch_size"] = 1
    assert torch.equal(run(comfyui, graph), first)


def test_changed_file_is_loaded_again(comfyui: ComfyServer, small_flux_files: dict[str, Path]):
    target = comfyui.base / "models/diffusion_models/changing.safetensors"
    graph, results = prompt("changing.safetensors"), {}
    for fmt in ("int4", "nvfp4", "int4"):
        copy = target.with_suffix(".part")
        shutil.copy(small_flux_files[fmt], copy)
        os.replace(copy, target)
        found = run(comfyui, graph)
        assert torch.equal(results.setdefault(fmt, found), found)
    assert not torch.equal(results["int4"], results["nvfp4"])


def test_only_offered_names_are_found(comfyui: ComfyServer, small_flux_files: dict[str, Path]):
    outside = comfyui.base / "outside.safetensors"
    shutil.copy(small_flux_files["int4"], outside)
    names = ("gone.safetensors", "../../outside.safetensors", str(outside), "", "..\\..\\outside.safetensors")
    for name in names:
        with pytest.raises(PromptError, match="no such file in models/diffusion_models. Refresh") as caught:
            comfyui.run(prompt(name))
        assert (caught.value.exception_type, caught.value.node_id) == ("custom_validation_failed", "model")
    with pytest.raises(PromptError, match="not in"):
        comfyui.run(prompt("small_int4.safetensors", dtype="fp8"))


def lora_file(path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    sd = {}
    for key, n, k in (
        ("lora_unet_double_blocks_1_img_mlp_2", 256, 1024),
        ("lora_unet_double_blocks_0_txt_mod_lin", 1536, 256),
        ("transformer.single_transformer_blocks.0.attn.to_v", 256, 256),
    ):
        sd[f"{key}.lora_down.weight"] = torch.randn(8, k, generator=generator) / k**0.5
        sd[f"{key}.lora_up.weight"] = 2 * torch.randn(n, 8, generator=generator) / 8**0.5
    save_file(sd, path)
    return path


REFUSED = {
    "bf16.safetensors": (lambda path, files: shutil.copy(files["bf16"], path), "16-bit.*Load Diffusion Model"),
    "lora.safetensors": (lambda path, files: lora_file(path), "a LoRA.*LoRA"),
    "truncated.safetensors": (
        lambda path, files: path.write_bytes(files["int4"].read_bytes()[:-1000]),
        "truncated or damaged",
    ),
    "empty.safetensors": (lambda path, files: path.write_bytes(b""), "the file is empty"),
    "gguf.safetensors": (lambda path, files: path.write_bytes(b"GGUF" + bytes(64)), "GGUF.*ComfyUI-GGUF"),
    "incomplete.safetensors": (
        lambda path, files: save_file(
            {k: t for k, t in load_file(files["int4"]).items() if k != "single_blocks.0.linear1.smooth_factor"}, path
        ),
        r"single_blocks\.0\.linear1\.smooth_factor is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_what_the_file_is(comfyui: ComfyServer, small_flux_files: dict[str, Path], name: str):
    make, message = REFUSED[name]
    file = f"refused_{name}".replace("bf16", "16bit")
    make(comfyui.base / "models/diffusion_models" / file, small_flux_files)
    with pytest.raises(PromptError, match=f"(?s){message}") as caught:
        comfyui.run(prompt(file))
    assert caught.value.exception_type.endswith("SVDQuantError") and file in caught.value.message


def with_controlnet(graph: dict) -> dict:
    control = {
        "net": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "small_controlnet.safetensors"}},
        "hint": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0xFF8000}},
        "control": {
            "class_type": "ControlNetApplyAdvanced",
            "inputs": {
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "control_net": ["net", 0],
                "image": ["hint", 0],
                "strength": 0.7,
                "start_percent": 0.0,
                "end_percent": 1.0,
            },
        },
    }
    inputs = {"positive": ["control", 0], "negative": ["control", 1]}
    sampler = {"class_type": "KSampler", "inputs": graph["sampler"]["inputs"] | inputs}
    return graph | control | {"sampler": sampler}


def with_image(graph: dict) -> dict:
    """Image to image: encode a picture with the VAE and keep some of it."""
    picture = {"width": 64, "height": 64, "batch_size": 1, "color": 0x2080FF}
    image = {
        "picture": {"class_type": "EmptyImage", "inputs": picture},
        "vae": {"class_type": "DemoVAELoader", "inputs": {}},
        "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["vae", 0]}},
    }
    sampler = {"class_type": "KSampler", "inputs": graph["sampler"]["inputs"] | {"denoise": 0.6}}
    return graph | image | {"sampler": sampler}


def with_easycache(graph: dict) -> dict:
    sampler = {"class_type": "KSampler", "inputs": graph["sampler"]["inputs"] | {"steps": 8}}
    widgets = {"reuse_threshold": 1.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    return insert(graph | {"sampler": sampler}, "EasyCache", **widgets)


def with_skipped_layers(graph: dict) -> dict:
    layers = {"double_layers": "1", "single_layers": "0", "start_percent": 0.0, "end_percent": 1.0}
    return insert(graph, "SkipLayerGuidanceDiT", **layers, scale=2.0, rescaling_scale=0.0)


@pytest.fixture(scope="module")
def patch_files(comfyui: ComfyServer, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("patches")
    comfyui.add_model(small_flux.write_controlnet(folder / "small_controlnet.safetensors"), "controlnet")


@pytest.mark.parametrize("patch", [with_controlnet, with_image, with_easycache, with_skipped_layers])
def test_builtin_nodes(comfyui: ComfyServer, patch_files, patch):
    """What the nodes make of the 4-bit model is what they make of its exact arithmetic."""
    quantized = prompt("small_int4.safetensors", cfg=2.0)
    inputs = {"sixteen_bit": "small_bf16.safetensors", "quantized": "small_int4.safetensors"}
    reference = quantized | {"model": {"class_type": "SVDQuantTestTwin", "inputs": inputs}}
    wanted = run(comfyui, patch(reference))
    assert error_db(run(comfyui, patch(quantized)), wanted) < -70
    assert error_db(run(comfyui, quantized), wanted) > -20, "this patch does nothing"


def test_own_folder(comfy, small_flux_files: dict[str, Path], monkeypatch):
    """models/svdquant is listed if it is there; diffusion_models comes first for a name in both."""
    import folder_paths

    folders = {name: Path(folder_paths.models_dir) / name for name in ("diffusion_models", "svdquant")}
    for folder, files in zip(folders.values(), (("both", "one"), ("both", "own"))):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(small_flux_files["int4"], folder / f"{file}.safetensors")
    (folders["svdquant"] / "notes.txt").write_text("no model")
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "diffusion_models", ([str(folders["diffusion_models"])], {".safetensors"})
    )
    loader = importlib.reload(importlib.import_module("comfyui_svdquant.nodes.loader"))
    assert loader.model_files() == {
        "both.safetensors": "diffusion_models",
        "one.safetensors": "diffusion_models",
        "own.safetensors": "svdquant",
    }
    assert loader.find_model("both.safetensors") == folders["diffusion_models"] / "both.safetensors"
    assert loader.SVDQuantLoader.validate_inputs("own.safetensors") is True
    assert loader.SVDQuantLoader.validate_inputs(None) is True
    shutil.rmtree(folders["svdquant"])

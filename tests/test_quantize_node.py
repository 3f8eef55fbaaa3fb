"""SVDQuant Quantize on a real ComfyUI, over HTTP and websocket."""

import hashlib
import json

import numpy as np
import pytest
import torch
from comfyui_svdquant import svdq_core
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import DEMO
from host.prompts import sixteen_bit_loader
from host.server import ComfyServer, PromptError
from small_flux import random_flux

LORA_KEY = "double_blocks.0.img_attn.qkv"
BAD_NAMES = ["../x", "/abs", "//host/x", "\\\\host\\share\\x", "C:\\x", "a/../../b"]
BAD_NAMES += ["con", "", "x?", "a/nul.safetensors", "x."]


@pytest.fixture(scope="module")
def models(server, tmp_path_factory):
    """Random FLUX models that the demo's text encoder fits, in the server's folders."""
    folder = tmp_path_factory.mktemp("models")
    small = random_flux(single=2, context=128)
    save_file(small, folder / "quantize_me.safetensors")
    save_file(random_flux(hidden=256, depth=2, single=2, context=128), folder / "quantize_me_longer.safetensors")
    save_file(random_flux(in_features=384, context=128, guidance=True), folder / "fill.safetensors")
    for name in ("quantize_me", "quantize_me_longer", "fill"):
        server.add_model(folder / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(5)
    lora = {
        f"diffusion_model.{LORA_KEY}.lora_A.weight": torch.randn(4, 128, generator=generator),
        f"diffusion_model.{LORA_KEY}.lora_B.weight": torch.randn(384, 4, generator=generator) * 0.05,
    }
    save_file(lora, folder / "strong.safetensors")
    server.add_model(folder / "strong.safetensors", "loras")
    return small


def graph(model="quantize_me", **changes):
    """UNETLoader → Quantize → Loader; the chart is looked at."""
    widgets = dict(file_name="q", preset="fast", format="int4", rank=16, steps=2, max_prompts=3, size=128,
                   ram_limit_gb=1.0, seed=0)  # fmt: skip
    return {
        "1": sixteen_bit_loader(f"{model}.safetensors"),
        "2": {"class_type": "SVDQuantQuantize", "inputs": {"model": ["1", 0], **widgets, **changes}},
    }


def written(server, name):
    return server.base / "models" / "diffusion_models" / f"{name}.safetensors"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def our_events(server, since):
    return [e for e in server.events.seen[since:] if e.type.startswith("svdquant.")]


def made(path):
    return json.loads(svdq_core.read_checkpoint(path)[1]["svdquant"])


def test_prompts_to_file_to_loader_to_sample(server, models):
    """The whole graph in one prompt, and everything it says on the way."""
    since = len(server.events.seen)
    prompts = "large red star on blue\n# a comment\n\nsmall green ring on white\nlarge blue heart on black"
    prompt = graph(file_name="folder/whole", conditioning=["4", 0]) | {
        "3": {"class_type": "DemoTextEncoderLoader", "inputs": {}},
        "4": {"class_type": "SVDQuantPrompts", "inputs": {"clip": ["3", 0], "prompts": prompts}},
        "5": {"class_type": "SVDQuantLoader", "inputs": {"unet_name": ["2", 0], "dtype": "auto"}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 0], "text": "large red star on blue"}},
        "7": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "8": {"class_type": "KSampler", "inputs": {"model": ["5", 0], "positive": ["6", 0], "negative": ["6", 0],
              "latent_image": ["7", 0], "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
              "scheduler": "simple", "denoise": 1.0}},
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["8", 0], "filename_prefix": "whole"}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["2", 2], "filename_prefix": "chart"}},
    }  # fmt: skip
    history = server.run(prompt)
    path = server.base / "models" / "diffusion_models" / "folder" / "whole.safetensors"
    assert path.exists() and history["outputs"]["9"]["latents"]
    chart = np.asarray(Image.open(server.images(history)[-1]).convert("RGB"))
    assert chart.shape == (420, 1024, 3) and len(np.unique(chart.reshape(-1, 3), axis=0)) > 3
    assert "smaller than 16 bit" in history["outputs"]["2"]["text"][0]

    events = [e for e in our_events(server, since) if e.data["node"] == "2"]
    calibrate = [e.data for e in events if e.type == "svdquant.calibrate"]
    assert [(e["prompt"], e["step"]) for e in calibrate] == [(p, s) for p in (1, 2, 3) for s in (1, 2)]
    assert {(e["prompts"], e["steps"]) for e in calibrate} == {(3, 2)}
    solve = [e.data for e in events if e.type == "svdquant.solve"]
    assert [e["index"] for e in solve] == list(range(1, 17)) and {e["total"] for e in solve} == {16}
    for field in ("name", "alpha", "error_db", "bytes", "bytes_16bit", "total_bytes", "eta", "rank", "node", "file"):
        assert all(field in e for e in solve), field
    assert (events[0].type, events[-1].type) == ("svdquant.start", "svdquant.done")
    assert events[-1].data["bytes"] == path.stat().st_size
    progress = [e.data["value"] for e in server.events.seen[since:] if e.type == "progress" and e.data["node"] == "2"]
    assert progress == sorted(progress) and progress[-1] == 1000 and len(progress) > 2  # ComfyUI sends some
    info = made(path)
    assert info["calibration"] == {"kind": "sampled", "prompts": 3, "sampler": "euler", "scheduler": "simple",
                                   "steps": 2, "size": 128, "seed": 0, "ram_limit": 2**30}  # fmt: skip
    assert info["source"]["file"] == "quantize_me.safetensors" and len(info["source"]["sha256"]) == 64


def test_the_same_job_again_ends_at_once_and_another_replaces_it(server, models):
    server.run(graph(file_name="again"))
    before = digest(written(server, "again")), written(server, "again").stat().st_mtime_ns
    server.free(unload_models=True, free_memory=True)
    since = len(server.events.seen)
    history = server.run(graph(file_name="again"))
    assert (digest(written(server, "again")), written(server, "again").stat().st_mtime_ns) == before
    assert not [e for e in our_events(server, since) if e.type in ("svdquant.calibrate", "svdquant.solve")]
    assert "kept from an earlier run" in history["outputs"]["2"]["text"][0]
    server.run(graph(file_name="again", rank=32))
    assert made(written(server, "again"))["rank"] == 32
    written(server, "again").unlink()
    server.run(graph(file_name="again", rank=32))
    assert written(server, "again").exists(), "a deleted file must be made again"


def test_clip_alone_uses_the_built_in_prompts(server, models):
    since = len(server.events.seen)
    prompt = graph(file_name="clip", clip=["3", 0], max_prompts=40, steps=1)
    prompt["3"] = {"class_type": "DemoTextEncoderLoader", "inputs": {}}
    server.run(prompt)
    prompts = {e.data["prompts"] for e in our_events(server, since) if e.type == "svdquant.calibrate"}
    assert prompts == {36}


def test_one_wire_is_enough(server, models):
    server.run(graph(file_name="wire"))
    assert made(written(server, "wire"))["calibration"]["prompts"] == 3


def test_loras_are_baked_in(server, models):
    prompt = graph(file_name="lora", preset="balanced")
    prompt["3"] = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": "strong.safetensors",
                   "strength_model": 0.8}}  # fmt: skip
    prompt["2"]["inputs"]["model"] = ["3", 0]
    server.run(prompt)
    lora = load_file(server.base / "models" / "loras" / "strong.safetensors")
    a, b = (lora[f"diffusion_model.{LORA_KEY}.lora_{c}.weight"] for c in "AB")
    original = models[f"{LORA_KEY}.weight"].float()
    merged = original + 0.8 * b @ a
    got = svdq_core.QuantizedLinear.from_state_dict(svdq_core.read_checkpoint(written(server, "lora"))[0], LORA_KEY)
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(1))
    exact = x @ merged.t() + models[f"{LORA_KEY}.bias"].float()

    def db(y):
        return float(10 * torch.log10((y - exact).square().sum() / exact.square().sum()))

    assert db(got(x)) < -14 < -6 < db(x @ original.t())
    assert made(written(server, "lora"))["source"]["patched_weights"] == 1


def test_fill_model_with_its_wide_input(server, models):
    """Quantized, loaded and sampled: ComfyUI feeds the 384 input features from the noise, an image and a mask."""
    text = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 0], "text": "large red star on blue"}}
    latent = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    sampler = {"model": ["5", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["7", 0], "seed": 1}
    sampler |= {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    prompt = graph("fill", file_name="fill_q") | {
        "3": {"class_type": "DemoTextEncoderLoader", "inputs": {}},
        "5": {"class_type": "SVDQuantLoader", "inputs": {"unet_name": ["2", 0], "dtype": "auto"}},
        "6": text,
        "7": latent,
        "8": {"class_type": "KSampler", "inputs": sampler},
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["8", 0], "filename_prefix": "fill"}},
    }
    (saved,) = server.run(prompt)["outputs"]["9"]["latents"]
    sample = load_file(server.base / saved["type"] / saved["subfolder"] / saved["filename"])["latent_tensor"]
    assert sample.shape == (1, 16, 8, 8) and torch.isfinite(sample).all()
    assert svdq_core.read_checkpoint(written(server, "fill_q"))[0]["img_in.weight"].shape == (128, 384)


@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_other_formats_load_too(server, models, format):
    prompt = graph(file_name=f"as_{format}", format=format)
    prompt["5"] = {"class_type": "SVDQuantLoader", "inputs": {"unet_name": ["2", 0], "dtype": "auto"}}
    prompt["6"] = {"class_type": "ModelSave", "inputs": {"model": ["5", 0], "filename_prefix": f"saved_{format}"}}
    server.run(prompt)
    assert made(written(server, f"as_{format}"))["format"] == format


def test_interrupt_takes_seconds_keeps_the_work_and_resumes_identically(server, models):
    job = dict(model="quantize_me_longer", preset="best")
    server.run(graph(**job, file_name="undisturbed"))
    since = len(server.events.seen)
    prompt_id = server.queue(graph(**job, file_name="interrupted"))
    server.events.wait(lambda e: e.type == "svdquant.solve" and e.data["index"] == 12, 120, since)
    server.interrupt()
    with pytest.raises(PromptError, match="interrupted"):
        server.wait(prompt_id)
    solved = [e.data["index"] for e in our_events(server, since) if e.type == "svdquant.solve"]
    assert max(solved) < 20, "stopped after the layer it was at, or one of the next"
    server.events.wait(lambda e: e.type == "svdquant.stopped", 10, since)
    assert not written(server, "interrupted").exists()
    kept = written(server, "interrupted").with_name("interrupted.safetensors.parts")
    assert len(list(kept.glob("*.part"))) >= 11 and len(list(kept.glob("*.calibration"))) == 1
    assert not server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"][0].count(kept.name)
    since = len(server.events.seen)
    history = server.run(graph(**job, file_name="interrupted"))
    assert not [e for e in our_events(server, since) if e.type == "svdquant.calibrate"], "calibration was kept"
    assert "kept from an earlier run" in history["outputs"]["2"]["text"][0]
    a, b = (svdq_core.read_checkpoint(written(server, n))[0] for n in ("undisturbed", "interrupted"))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert not kept.exists()


def test_a_killed_server_resumes_too(comfy_path, tmp_path):
    save_file(random_flux(hidden=256, depth=2, single=2, context=128), tmp_path / "quantize_me_longer.safetensors")
    one_thread = {"OMP_NUM_THREADS": "1"}  # waiting threads starve a busy CPU
    with ComfyServer(packs=[DEMO / "comfy_nodes"], base=tmp_path / "base", env=one_thread) as own:
        own.add_model(tmp_path / "quantize_me_longer.safetensors")
        job = graph("quantize_me_longer", file_name="killed", preset="best")
        own.queue(job)
        own.events.wait(lambda e: e.type == "svdquant.solve" and e.data["index"] == 10, 120)
        own.kill()
        own.start()
        history = own.run(job)
        assert "kept from an earlier run" in history["outputs"]["2"]["text"][0]
        fresh = own.run(graph("quantize_me_longer", file_name="fresh", preset="best"))
        assert "kept" not in fresh["outputs"]["2"]["text"][0]
        a, b = (svdq_core.read_checkpoint(written(own, n))[0] for n in ("killed", "fresh"))
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/abs",
        "//host/x",
        "\\\\host\\share\\x",
        "C:\\x",
        "a/../../b",
        "con",
        "",
        "x?",
        "a/nul.safetensors",
        "x.",
    ],
)
def test_names_never_leave_the_models_folder(server, models, name):
    before = {p for p in server.base.rglob("*.safetensors")}
    with pytest.raises(PromptError, match="give a plain name"):
        server.run(graph(file_name=name))
    assert {p for p in server.base.rglob("*.safetensors")} == before


def test_other_files_are_never_overwritten(server, models):
    with pytest.raises(PromptError, match="exists and is a 16-bit diffusion model.*not overwritten"):
        server.run(graph(file_name="quantize_me"))
    server.run(graph(file_name="mine"))
    before = digest(written(server, "mine"))
    with pytest.raises(PromptError, match=r"made from another model \(quantize_me.safetensors\).*not overwritten"):
        server.run(graph("fill", file_name="mine"))
    assert digest(written(server, "mine")) == before


def test_fingerprint_of_flux_sized_weights(comfy):
    """Index arithmetic in float32 runs past the end of weights above 2**24 elements, which every FLUX has."""
    from comfyui_svdquant.svdq_core.host.model import hash_nested

    weight = torch.zeros(21504, 3072, dtype=torch.bfloat16)
    seen = []
    hash_nested(weight, seen.append)
    weight[-1, -1] = 1
    hash_nested(weight, seen.append)
    assert seen[0] != seen[1] and len(seen[0]) == 128


def test_a_4_bit_model_is_refused(server, models):
    server.run(graph(file_name="source4"))
    prompt = graph(file_name="twice")
    prompt["1"] = {"class_type": "SVDQuantLoader", "inputs": {"unet_name": "source4.safetensors", "dtype": "auto"}}
    with pytest.raises(PromptError, match="in 4 bit already"):
        server.run(prompt)


def test_prompts_node_refuses_an_empty_text(server, models):
    prompt = graph(file_name="none", conditioning=["4", 0])
    prompt["3"] = {"class_type": "DemoTextEncoderLoader", "inputs": {}}
    prompt["4"] = {"class_type": "SVDQuantPrompts", "inputs": {"clip": ["3", 0], "prompts": " \n# only a comment"}}
    with pytest.raises(PromptError, match="holds no prompt"):
        server.run(prompt)


def test_every_widget_and_output_has_a_tooltip(server):
    for node in ("SVDQuantQuantize", "SVDQuantPrompts", "SVDQuantLoader"):
        info = server.object_info(node)
        assert info["category"] == "SVDQuant" and info["description"]
        for group in ("required", "optional"):
            for name, spec in info["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), f"{node}.{name}"
        assert all(info["output_tooltips"]) and all(info["output_name"])


def test_default_prompts_are_many_and_different(server):
    text = server.object_info("SVDQuantPrompts")["input"]["required"]["prompts"][1]["default"]
    lines = [line for line in text.splitlines() if line]
    assert len(set(lines)) == len(lines) >= 32

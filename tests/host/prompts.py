"""The prompt that most tests of nodes post: text to latent with a small FLUX."""

import json

from safetensors.torch import load_file
from torch import Tensor

from .install import ROOT
from .server import ComfyServer
from .workflow import to_prompt


def prompt(file: str, dtype: str = "auto", cfg: float = 1.0, steps: int = 2, denoise: float = 1.0) -> dict:
    """Text to latent with a 64×64 picture; node ids are names."""
    loader = {"class_type": "SVDQuantLoader", "inputs": {"unet_name": file, "dtype": dtype}}
    clip = {"clip": ["clip", 0]}
    return {
        "model": loader,
        "clip": {"class_type": "DemoTextEncoderLoader", "inputs": {}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {**clip, "text": "large red star on blue"}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {**clip, "text": "small"}},
        "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": 1,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": denoise,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "latent"}},
    }


def with_activations(file: str, activations: str, **options: float) -> dict:
    graph = prompt(file, **options)
    graph["model"]["inputs"]["activations"] = activations
    return graph


def run(server: ComfyServer, graph: dict) -> Tensor:
    """The latent that a prompt saves."""
    (saved,) = server.run(graph)["outputs"]["save"]["latents"]
    return load_file(server.base / saved["type"] / saved["subfolder"] / saved["filename"])["latent_tensor"]


def template_up_to_the_vae(server: ComfyServer, name: str) -> dict:
    """A workflow of ours as a prompt that saves its latent, for models whose VAE is not at hand."""
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))
    nodes = to_prompt(saved, server.get("/object_info"))
    after = ("VAELoader", "VAEDecode", "CreateVideo", "SaveImage", "SaveVideo")
    (decode,) = (node for node in nodes.values() if node["class_type"] == "VAEDecode")
    save = {"samples": decode["inputs"]["samples"], "filename_prefix": name}
    kept = {id: node for id, node in nodes.items() if node["class_type"] not in after}
    return kept | {"save": {"class_type": "SaveLatent", "inputs": save}}


def insert(graph: dict, class_type: str, **inputs) -> dict:
    """The same prompt with a node between the model and the sampler."""
    node = {"class_type": class_type, "inputs": {"model": graph["sampler"]["inputs"]["model"], **inputs}}
    sampler = {"class_type": "KSampler", "inputs": graph["sampler"]["inputs"] | {"model": [class_type, 0]}}
    return graph | {class_type: node, "sampler": sampler}


CALIBRATION = """\
large red circle on white
small green star on black
large blue heart on yellow
small white square on red
large purple triangle on green
small yellow moon on blue"""


def quantize_prompt(preset: str) -> dict:
    """SVDQuant Quantize on the demo model, with few prompts and steps."""
    widgets = {"file_name": f"demo_{preset}", "preset": preset, "format": "int4", "rank": 32, "steps": 6}
    widgets |= {"max_prompts": 6, "size": 128, "ram_limit_gb": 1.0, "seed": 0}
    return {
        "model": sixteen_bit_loader(),
        "clip": {"class_type": "DemoTextEncoderLoader", "inputs": {}},
        "prompts": {"class_type": "SVDQuantPrompts", "inputs": {"clip": ["clip", 0], "prompts": CALIBRATION}},
        "quantize": {
            "class_type": "SVDQuantQuantize",
            "inputs": {"model": ["model", 0], "conditioning": ["prompts", 0], **widgets},
        },
    }


def sixteen_bit_loader(file: str = "demo_flux.safetensors") -> dict:
    return {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}

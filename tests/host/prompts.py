"""The prompt that most tests of nodes post: text to latent with a small FLUX."""

from safetensors.torch import load_file
from torch import Tensor

from .server import ComfyServer


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


def run(server: ComfyServer, graph: dict) -> Tensor:
    """The latent that a prompt saves."""
    (saved,) = server.run(graph)["outputs"]["save"]["latents"]
    return load_file(server.base / saved["type"] / saved["subfolder"] / saved["filename"])["latent_tensor"]


def insert(graph: dict, class_type: str, **inputs) -> dict:
    """The same prompt with a node between the model and the sampler."""
    node = {"class_type": class_type, "inputs": {"model": graph["sampler"]["inputs"]["model"], **inputs}}
    sampler = {"class_type": "KSampler", "inputs": graph["sampler"]["inputs"] | {"model": [class_type, 0]}}
    return graph | {class_type: node, "sampler": sampler}

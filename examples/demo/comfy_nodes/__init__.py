"""Two ComfyUI nodes that load the demo's text encoder and autoencoder. Used by the demo and the tests only.

Link this folder into ComfyUI's custom_nodes (then the files next to it are found through the link), or copy it
there together with text.py, pictures.py, autoencoder.py and models/.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import comfy.model_management
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

_HERE = Path(__file__).resolve().parent


def _demo_folder() -> Path:
    for folder in (_HERE, _HERE.parent):
        if (folder / "autoencoder.py").is_file():
            return folder
    raise FileNotFoundError(f"the SVDQuant demo's files are neither in {_HERE} nor in the folder above it")


def _demo_module(name: str) -> types.ModuleType:
    """Import a module of the demo folder under a name that cannot collide with another custom node's."""
    package = types.ModuleType("svdquant_demo_files")
    package.__path__ = [str(_demo_folder())]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


class DemoCLIP:
    """What ComfyUI's text encode nodes ask of a CLIP."""

    def __init__(self) -> None:
        self.text = _demo_module("text")

    def clone(self) -> DemoCLIP:
        return self

    def tokenize(self, text: str, **_: object) -> dict[str, list]:
        tokens = self.text.tokenize(text)
        return {"l": tokens, "t5xxl": tokens}  # CLIPTextEncodeFlux picks its prompts out of these two

    def encode_from_tokens(
        self, tokens: dict[str, list], return_pooled: bool = False, return_dict: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]:
        context, pooled = self.text.encode(tokens["t5xxl"])
        if return_dict:
            return {"cond": context, "pooled_output": pooled}
        return (context, pooled) if return_pooled else context

    def encode_from_tokens_scheduled(self, tokens: dict[str, list], add_dict: dict | None = None, **_: object) -> list:
        """A ComfyUI conditioning: context (1, L, 128) and pooled_output (1, 128)."""
        context, pooled = self.encode_from_tokens(tokens, return_pooled=True)
        return [[context, {"pooled_output": pooled, **(add_dict or {})}]]


class DemoVAE:
    """What ComfyUI's nodes ask of a VAE. It is small enough to run on the CPU everywhere."""

    latent_channels = 16
    latent_dim = 2
    downscale_ratio = upscale_ratio = 8

    def __init__(self) -> None:
        load = _demo_module("autoencoder").load_autoencoder
        self.model = load(_demo_folder() / "models" / "demo_autoencoder.safetensors")

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) in 0..1 -> latent (B, 16, H // 8, W // 8); like ComfyUI's VAE it crops what is left over."""
        ratio = self.downscale_ratio
        height, width = (size // ratio * ratio for size in pixels.shape[1:3])
        top, left = ((size % ratio) // 2 for size in pixels.shape[1:3])
        pixels = pixels[:, top : top + height, left : left + width, :3]
        latent = self.model.encode(pixels.movedim(-1, 1).float().cpu())
        return latent.to(comfy.model_management.intermediate_device())

    def decode(self, samples: Tensor, **_: object) -> Tensor:
        """Latent (B, 16, H, W) -> pixels (B, 8 H, 8 W, 3) in 0..1."""
        pixels = self.model.decode(samples.float().cpu())
        return pixels.movedim(1, -1).to(comfy.model_management.intermediate_device())

    # Nothing here needs tiles.
    def encode_tiled(self, pixels: Tensor, **_: object) -> Tensor:
        return self.encode(pixels)

    def decode_tiled(self, samples: Tensor, **_: object) -> Tensor:
        return self.decode(samples)

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def temporal_compression_decode(self) -> None:
        return None

    def throw_exception_if_invalid(self) -> None:
        pass


class DemoTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DemoTextEncoderLoader",
            display_name="Load Demo Text Encoder",
            category="SVDQuant/demo",
            description='The demo model\'s text encoder. Prompts look like "large red star on blue top left".',
            inputs=[],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(DemoCLIP())


class DemoVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DemoVAELoader",
            display_name="Load Demo VAE",
            category="SVDQuant/demo",
            description="The demo model's autoencoder: 8x smaller, 16 channels, made for 128x128 pictures.",
            inputs=[],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(DemoVAE())


class DemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DemoTextEncoderLoader, DemoVAELoader]


async def comfy_entrypoint() -> DemoExtension:
    return DemoExtension()

"""Give a small FLUX the activation outliers of a big one, without changing what it computes.

    python outliers.py models/demo_flux.safetensors hard.safetensors

Big transformers have a few channels hundreds of times larger than the rest, and those make 4 bit hard; a small
model trained for an hour has none. Here some channels of every modulated LayerNorm and of every v are made
`scale` times larger, and the next linear's columns smaller by the same power of two, which is exact in floating
point: unquantized, the model draws the same pictures, up to rounding.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor


def add_outliers(
    weights: dict[str, Tensor], scale: float = 64, fraction: float = 0.03, seed: int = 0
) -> dict[str, Tensor]:
    """A copy of `weights` (ComfyUI's FLUX names) in which `fraction` of the channels, at least one, are outliers.

    Every layer has its own channels. Keys, shapes and dtypes stay as they are.
    """
    if scale <= 0 or math.frexp(scale)[0] != 0.5:
        raise ValueError(f"scale must be a power of two, not {scale}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    width = weights["img_in.weight"].shape[0]
    generator = torch.Generator().manual_seed(seed)

    def pick() -> Tensor:
        return torch.randperm(width, generator=generator)[: max(1, round(fraction * width))]

    def grow_modulated(lin: str, shift: int, reader: str) -> None:
        """Chunk `shift` of the modulation is the shift, the next one the scale that LayerNorm's output takes."""
        channels = pick()
        for rows in (shift * width + channels, (shift + 1) * width + channels):
            weights[f"{lin}.weight"][rows] *= scale
            weights[f"{lin}.bias"][rows] *= scale
        # The blocks multiply by 1 + scale, so the 1 grows too. In fp32: (s - 1) + s b would lose b's low bits.
        bias = weights[f"{lin}.bias"]
        bias[rows] = (bias[rows].float() + (scale - 1)).to(bias.dtype)
        weights[f"{reader}.weight"][:, channels] /= scale

    def grow_values(channels: Tensor, qkv: str, reader: str) -> None:
        """v is the third `width` rows of qkv. Attention mixes tokens, not channels, so `reader` gets v's channels."""
        weights[f"{qkv}.weight"][2 * width + channels] *= scale
        if f"{qkv}.bias" in weights:
            weights[f"{qkv}.bias"][2 * width + channels] *= scale
        weights[f"{reader}.weight"][:, channels] /= scale

    for block in _blocks(weights, "double_blocks"):
        joint = pick()  # text and image tokens attend to each other, so they share v's channels
        for stream in ("img", "txt"):
            prefix = f"{block}.{stream}"
            grow_modulated(f"{prefix}_mod.lin", 0, f"{prefix}_attn.qkv")
            grow_modulated(f"{prefix}_mod.lin", 3, f"{prefix}_mlp.0")
            grow_values(joint, f"{prefix}_attn.qkv", f"{prefix}_attn.proj")
    for block in _blocks(weights, "single_blocks"):
        grow_modulated(f"{block}.modulation.lin", 0, f"{block}.linear1")
        grow_values(pick(), f"{block}.linear1", f"{block}.linear2")
    return weights


def _blocks(weights: dict[str, Tensor], kind: str) -> list[str]:
    return sorted({".".join(name.split(".")[:2]) for name in weights if name.startswith(f"{kind}.")})


def add_outliers_to_file(source: Path, target: Path, scale: float = 64, fraction: float = 0.03, seed: int = 0) -> None:
    """Write the hard variant of `source` to `target`; a reader never sees half a file."""
    with safetensors.safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    metadata["outliers"] = f"scale {scale:g}, fraction {fraction:g}, seed {seed}"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(add_outliers(weights, scale, fraction, seed), part, metadata)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--scale", type=float, default=64, help="a power of two")
    parser.add_argument("--fraction", type=float, default=0.03, help="share of the channels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    add_outliers_to_file(options.source, options.target, options.scale, options.fraction, options.seed)


if __name__ == "__main__":
    main()

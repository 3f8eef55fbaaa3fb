"""What a layer's inputs look like: channel maxima and a token reservoir, in bounded memory.

Pure torch: forward pre-hooks on the linears of any model. Who drives the model is the caller's business
(``host/calibrate.py`` does it with ComfyUI's sampler).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import open_safetensors, write_checkpoint
from .errors import SVDQuantError

DEFAULT_RAM_LIMIT = 4 * 2**30  # bytes for the token reservoirs of a whole model
MAX_TOKENS = 2048


@dataclass
class Samples:
    """Per linear: ``tokens`` maps its name to raw inputs ``(T, K)`` bf16, ``absmax`` to channel maxima ``(K,)``."""

    tokens: dict[str, Tensor] = field(default_factory=dict)
    absmax: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write as safetensors: ``<layer>`` and ``<layer>.absmax``."""
        tensors = dict(self.tokens) | {f"{name}.absmax": t for name, t in self.absmax.items()}
        write_checkpoint(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Read activations back (memory-mapped); :class:`SVDQuantError` names what is wrong with the file."""
        with open_safetensors(path):
            pass
        samples = cls()
        for key, tensor in load_file(path).items():
            if key.endswith(".absmax"):
                samples.absmax[key.removesuffix(".absmax")] = tensor
            elif tensor.dim() == 2 and tensor.is_floating_point():
                samples.tokens[key] = tensor
            else:
                raise SVDQuantError(
                    f"{path}: {key} must be a float matrix (tokens, in_features), found {tuple(tensor.shape)} "
                    f"of {tensor.dtype}. Expected a calibration file: one tensor per linear, named like the layer."
                )
        return samples


def tokens_within(ram_limit: int, widths: list[int]) -> int:
    """Tokens per layer that fit ``ram_limit`` bytes when every linear (of these in_features) keeps them in bf16."""
    return max(1, min(MAX_TOKENS, ram_limit // max(1, 2 * sum(widths))))


class ActivationCollector:
    """Watch the inputs of ``layers`` (name → linear) while a model runs; use as a context manager.

    Each forward contributes one chunk of tokens drawn at random, ``tokens // expected_calls`` of them, so the
    reservoir is spread over prompts and timesteps. Chunks beyond the capacity replace earlier ones at random
    (reservoir sampling, Vitter 1985), so an underestimated number of calls stays fair. The same seed and the
    same inputs give the same samples.
    """

    def __init__(self, layers: dict[str, nn.Module], tokens: int, expected_calls: int, seed: int = 0) -> None:
        self.layers = layers
        self.chunk = max(1, tokens // max(1, expected_calls))
        self.capacity = max(1, tokens // self.chunk)
        self.seed = seed
        self.chunks: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.absmax: dict[str, Tensor] = {}
        self.calls: dict[str, int] = dict.fromkeys(layers, 0)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "ActivationCollector":
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_pre_hook(self.hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def hook(self, name: str):  # type: ignore[no-untyped-def]
        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.collect(name, args[0].detach())

        return collect

    def collect(self, name: str, x: Tensor) -> None:
        """Take in one input ``(..., K)`` of a layer."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return  # a layer for pictures, and no picture
        absmax = rows.abs().amax(dim=0).float()
        self.absmax[name] = torch.maximum(self.absmax[name], absmax) if name in self.absmax else absmax
        call = self.calls[name]
        self.calls[name] = call + 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + call)
        slot = call if call < self.capacity else int(torch.randint(call + 1, (), generator=generator))
        if slot >= self.capacity:
            return
        picks = torch.randint(rows.shape[0], (min(self.chunk, rows.shape[0]),), generator=generator)
        chunk = rows[picks.to(rows.device)].to("cpu", torch.bfloat16)
        chunks = self.chunks[name]
        if slot < len(chunks):
            chunks[slot] = chunk
        else:
            chunks.append(chunk)

    def samples(self) -> Samples:
        """What was seen; :class:`SVDQuantError` names a layer that never ran."""
        silent = [name for name, chunks in self.chunks.items() if not chunks]
        if silent:
            raise SVDQuantError(
                f"Calibration never ran {silent[0]} ({len(silent)} such layers). A patch that skips blocks is in the "
                "way: remove it; or a prompt or a picture that the model reads is missing: connect it as conditioning."
            )
        return Samples(
            {name: torch.cat(self.chunks.pop(name)) for name in list(self.chunks)},
            {name: t.cpu() for name, t in self.absmax.items()},
        )

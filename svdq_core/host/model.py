"""A loaded ComfyUI MODEL as the quantizer's source: weights one by one, patches baked in."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..checkpoint import model_config, read_header, tensor_bytes
from ..errors import SVDQuantError
from ..families import find_recipe, plan_model
from ..recipes import LayerGroup, Recipe
from .layout import is_quantized

PREFIX = "diffusion_model."
LTX = ("ltxv", "ltxav")  # ComfyUI reads what they are from their files' metadata; names of its own
PLAIN = (bool, int, float, str, list, tuple, dict)
SAMPLED_VALUES = 64  # per tensor, for a fingerprint that does not read the whole model


class ModelSource:
    """The diffusion model of a MODEL; every tensor with its LoRAs and merges applied, in 16 bit on the CPU.

    Raises :class:`SVDQuantError` for a MODEL that is an SVDQuant one already.
    """

    def __init__(self, model: ModelPatcher) -> None:
        self.model = model
        self.name = f"this model ({type(model.model).__name__})"
        self.parameters: dict[str, Tensor] = dict(model.model.diffusion_model.named_parameters())
        for key, parameter in self.parameters.items():
            if is_quantized(parameter):
                raise SVDQuantError(
                    f"{key}: this MODEL is in 4 bit already. Connect the 16-bit model it was made from."
                )
            if not parameter.is_floating_point():
                raise SVDQuantError(
                    f"{key}: this MODEL holds packed {parameter.dtype} weights (a GGUF file, perhaps), which cannot be "
                    "read here. Connect the 16-bit model it was made from."
                )
        self.parameters |= saved_buffers(model.model.diffusion_model)
        self.origin: dict[str, Any] = {"model": type(model.model).__name__, "patched_weights": len(model.patches)}
        self.config: dict[str, str] = {}
        if path := file_of(model):
            self.origin["file"] = path.name
            if path.suffix.lower() in (".safetensors", ".sft"):
                self.config = model_config(read_header(path)[1])
        elif (built := model.model.model_config.unet_config).get("image_model") in LTX:  # another plugin's loader
            plain = {k: v for k, v in built.items() if isinstance(v, PLAIN) and k != "image_model"}
            self.config = {"config": json.dumps({"transformer": plain})}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {k: tuple(p.shape) for k, p in self.parameters.items()}

    def tensor(self, key: str) -> Tensor:
        full = PREFIX + key
        current, _, convert = get_key_weight(self.model.model, full)
        weight = self.unpatched(full, current)
        if convert is not None:
            weight = convert(weight)
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        weight = weight.detach().cpu()
        patches = self.model.patches.get(full)
        if not patches:
            return weight
        wanted = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        device = comfy.model_management.get_torch_device()
        patched = comfy.lora.calculate_weight(patches, weight.to(device, torch.float32, copy=True), full)
        return patched.to("cpu", wanted)

    def unpatched(self, full_key: str, current: Tensor) -> Tensor:
        """The weight without patches: loaded models are patched in place, and ComfyUI keeps the original."""
        backup = self.model.backup.get(full_key)
        return current if backup is None else backup.weight

    @property
    def recipe(self) -> Recipe:
        return find_recipe(self.parameters, self.name)

    def groups(self) -> list[LayerGroup]:
        """The recipe's groups for this model."""
        return plan_model(self.shapes(), self.name)[1]

    def modules(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """The linears themselves."""
        return {name: self.model.model.diffusion_model.get_submodule(name) for name in names}

    def fingerprint(self) -> bytes:
        """Tells models and their patches apart by a sample of every tensor (the whole would take a minute)."""
        digest = hashlib.sha256()
        for key, parameter in self.parameters.items():
            full = PREFIX + key
            raw = self.unpatched(full, parameter)
            digest.update(repr((key, tuple(raw.shape))).encode())
            hash_nested(raw, digest.update)
            hash_nested(self.model.patches.get(full, []), digest.update)
        return digest.digest()


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds besides the parameters; a name may be all there is to it, by which ComfyUI knows a variant."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def hash_nested(value: Any, update: Callable[[bytes], Any]) -> None:
    """Feed a sample of every tensor inside a patch (tuples, lists, adapters) to a hash."""
    if isinstance(value, QuantizedTensor):
        value = value._qdata
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        count = min(SAMPLED_VALUES, flat.numel())
        picks = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)  # exact: int64
        update(bytes(tensor_bytes(flat[picks])))
    elif isinstance(value, list | tuple):
        for item in value:
            hash_nested(item, update)
    elif isinstance(value, dict):
        hash_nested([item for name in sorted(value, key=str) for item in (str(name), value[name])], update)
    elif hasattr(value, "weights"):  # comfy.weight_adapter objects
        hash_nested(value.weights, update)
    elif isinstance(value, comfy.clip_vision.Output):  # its repr tells an address only
        hash_nested(vars(value), update)
    elif not callable(value):
        update(repr(value).encode())


def file_of(model: ModelPatcher) -> Path | None:
    """The file a MODEL was loaded from, as far as ComfyUI remembers it."""
    arguments = (model.cached_patcher_init or (None, ()))[1]
    candidates = [Path(a) for a in arguments if isinstance(a, str)]
    return next((path for path in candidates if path.is_file()), None)

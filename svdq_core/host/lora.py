"""A LoRA file as patches of a model, with a report of what applies: no key is dropped without a word."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.model_base import LTXAV, LTXV, BaseModel, HunyuanImage21, HunyuanVideo
from comfy.model_management import get_torch_device, throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..dialects import HUNYUAN_NAMES, renamed_by
from ..errors import SVDQuantError
from ..families import match_recipe
from ..lora_checks import describe_adapters
from ..lora_files import foreign_architecture, read_lora
from .adapters import Offset, check, difference, fits_beside, reduced, translate
from .layout import is_quantized

CACHED_FILES = 8
TENCENT_NAMES = tuple((comfyuis, theirs) for theirs, comfyuis in HUNYUAN_NAMES)
NOT_LOADED = "lora key not loaded: "
MAIN_KEYS = (  # one for each way to say what happens to a weight
    *(".lora_up.weight", "_lora.up.weight", ".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"),
    *(
        ".lora_B",
        ".lokr_w1",
        ".lokr_w1_a",
        ".hada_w1_a",
        ".a1.weight",
        ".oft_blocks",
        ".diff",
        ".set_weight",
        ".w_norm",
    ),
)
TEXT_ENCODER = re.compile(r"(lora_te\d?_|lora_prior_te_|text_encoders?[._]|t5xxl|clip_[lgh])")


@dataclass
class LoraPatches:
    """What a LoRA file does to a model: ``patches`` for ``add_patches``, and what is worth telling."""

    name: str
    patches: dict[Any, Any]
    kinds: dict[str, int]
    keys: int
    unused: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)  # keys of layers that the file has more than once
    in_16_bit: list[str] = field(default_factory=list)  # quantized layers whose patch cannot stay beside
    energies: list[float] = field(default_factory=list)

    def reduction(self) -> str:
        """What reducing full-size updates keeps, which only their numbers tell; empty if there were none."""
        if not self.energies:
            return ""
        return (
            f"Reduced to low rank: {len(self.energies)} full-size updates, keeping at least "
            f"{100 * min(self.energies):.1f} % of their energy. A higher rank keeps more."
        )

    def summary(self) -> str:
        """In words."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        lines = [f"{self.name}: {self.keys - len(self.unused)} of {self.keys} keys apply ({kinds})."]
        if reduction := self.reduction():
            lines.append(reduction)
        if self.twice:
            lines.append(f"Given more than once, used once: {', '.join(self.twice)}")
        if self.in_16_bit:
            lines.append(f"In 16 bit while it is applied: {len(self.in_16_bit)} layers, {self.in_16_bit[0]} first.")
        text = [key for key in self.unused if TEXT_ENCODER.match(key)]
        rest = [key for key in self.unused if not TEXT_ENCODER.match(key)]
        if text:
            lines.append(f"For the text encoder: {len(text)} keys. Apply them with Load LoRA and its CLIP.")
        if rest:
            lines.append(f"Of no layer of this model: {len(rest)} keys, {', '.join(rest)}")
        return "\n".join(lines)


def add_lora(model: ModelPatcher, path: Path, strength: float, rank: int) -> LoraPatches:
    """Add a file's patches to ``model``; the same errors as :func:`load_lora`."""
    with original_modules(model):
        lora = load_lora(model, path, rank)
        model.add_patches(lora.patches, strength)
    return lora


@contextmanager
def original_modules(model: ModelPatcher) -> Iterator[None]:
    """While a model with compiled blocks is loaded, its weights have other names; within, they have their own."""
    replaced = {name: comfy.utils.set_attr(model.model, name, m) for name, m in model.object_patches_backup.items()}
    try:
        yield
    finally:
        for name, module in replaced.items():
            comfy.utils.set_attr(model.model, name, module)


def load_lora(model: ModelPatcher, path: Path, rank: int) -> LoraPatches:
    """The patches of a file for ``model``. Updates of quantized layers that have no low rank get ``rank``.

    :class:`SVDQuantError` for a file that cannot be read, is for another architecture or for other layer sizes.
    """
    lora = match_keys(read_cached(path), model.model, path.name)
    progress = None
    for index, target in enumerate(lora.patches):
        throw_exception_if_processing_interrupted()
        key, weight, beside = check_patch(lora, target, model.model)
        if is_quantized(weight) and not beside:
            lora.in_16_bit.append(key)
        elif is_quantized(weight):
            lora.patches[target], energy = reduced(lora.patches[target], rank, get_torch_device())
            if energy is not None:
                progress = progress or comfy.utils.ProgressBar(len(lora.patches))
                progress.update_absolute(index + 1)
                lora.energies.append(energy)
    return lora


def match_keys(tensors: dict[str, Tensor], model: BaseModel, name: str) -> LoraPatches:
    """What the file ``name`` with these tensors patches in ``model``, by the names of the keys alone.

    :class:`SVDQuantError` if that is nothing.
    """
    key_map = with_other_names(with_narrow_kv(comfy.lora.model_lora_keys_unet(model, {}), model), model)
    converted = comfy.lora_convert.convert_lora(dict(tensors))
    with keys_not_loaded() as unused:
        patches = comfy.lora.load_lora(converted, key_map)
    if not patches:
        raise SVDQuantError(f"{name}: {why_nothing_applies([*tensors], model)}")
    left_out = set(unused)
    kinds = describe_adapters({key: tensor for key, tensor in converted.items() if key not in left_out})
    return LoraPatches(name, patches, kinds, len(tensors), unused, given_twice(converted, key_map))


def with_narrow_kv(key_map: dict[str, Any], model: BaseModel) -> dict[str, Any]:
    """ComfyUI's map of a NextDiT takes keys and values for as wide as queries; Lumina 2's are narrower."""
    for name, target in key_map.items():
        if isinstance(target, tuple) and target[0].endswith(".attention.qkv.weight"):
            key, (dim, start, width) = target
            narrow = (comfy.utils.get_attr(model, key).shape[0] - width) // 2
            if start:
                key_map[name] = key, (dim, width if start == width else width + narrow, narrow)
    return key_map


def with_other_names(key_map: dict[str, Any], model: BaseModel) -> dict[str, Any]:
    """ComfyUI's map with what it lacks of the names that musubi-tuner and diffusers write."""
    prefix, out = "diffusion_model.", dict(key_map)
    layers = {name.removeprefix(prefix): target for name, target in key_map.items() if name.startswith(prefix)}
    if isinstance(model, LTXV | LTXAV):
        out |= {f"transformer.{name}": target for name, target in layers.items()}
    if isinstance(model, HunyuanVideo | HunyuanImage21):
        width, theirs = model.model_config.unet_config["hidden_size"], {}
        for name, target in layers.items():
            theirs[renamed_by(TENCENT_NAMES, f"{name}.").removesuffix(".")] = target
            if name.endswith("_attn.qkv"):  # since 1.5 each for itself
                attention = name.removesuffix(".qkv")
                theirs |= {f"{attention}_{c}": (target, (0, i * width, width)) for i, c in enumerate("qkv")}
        for name, target in theirs.items():
            plain = name.replace(".", "_")
            out |= dict.fromkeys((f"{prefix}{name}", f"transformer.{name}", f"lora_unet_{plain}"), target)
        for key, target in comfy.utils.flux_to_diffusers(model.model_config.unet_config, prefix).items():
            if key.startswith(("transformer_blocks.", "single_transformer_blocks.")) and key.endswith(".weight"):
                name = key.removesuffix(".weight")
                plain = name.replace(".", "_")
                out |= dict.fromkeys(
                    (name, f"transformer.{name}", f"lora_transformer_{plain}", f"lycoris_{plain}"), target
                )
    return out


def check_patch(lora: LoraPatches, target: Any, model: BaseModel) -> tuple[str, Tensor, bool]:
    """The key of a patched weight, that weight, and whether the patch can stay beside it; see :func:`check_shape`."""
    key, offset = (target, None) if isinstance(target, str) else target[:2]
    weight, value = comfy.utils.get_attr(model, key), lora.patches[target]
    beside = fits_beside((1.0, value, 1.0, offset, None))
    check_shape(lora.name, key, value, weight, offset, beside)
    return key, weight, beside


def read_cached(path: Path) -> dict[str, Tensor]:
    """The file's tensors; another strength or a switch back does not read it again."""
    stat = path.stat()
    return read_version(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=CACHED_FILES)
def read_version(path: Path, modified: int, size: int) -> dict[str, Tensor]:
    """The tensors of a file as it was at that time."""
    return read_lora(path)[0]


@contextmanager
def keys_not_loaded() -> Iterator[list[str]]:
    """Collect the keys that ComfyUI logs as not loaded, a line each, instead of logging them."""
    keys: list[str] = []
    thread = threading.get_ident()  # another one may be at the same

    def collect(record: logging.LogRecord) -> bool:
        message = record.getMessage() if record.thread == thread else ""
        if message.startswith(NOT_LOADED):
            keys.append(message.removeprefix(NOT_LOADED))
        return not message.startswith(NOT_LOADED)

    logger = logging.getLogger()
    logger.addFilter(collect)
    try:
        yield keys
    finally:
        logger.removeFilter(collect)


def given_twice(tensors: dict[str, Tensor], key_map: dict[str, Any]) -> list[str]:
    """Keys that mean a weight which another key means, too: ComfyUI takes one of them."""
    found: dict[Any, list[str]] = {}
    for key in tensors:
        for name in (key.removesuffix(end) for end in MAIN_KEYS if key.endswith(end)):
            if name in key_map:
                found.setdefault(key_map[name], []).append(key)
    return [key for keys in found.values() if len(keys) > 1 for key in keys]


def why_nothing_applies(keys: list[str], model: BaseModel) -> str:
    """In plain words."""
    name = type(model).__name__
    if all(TEXT_ENCODER.match(key) for key in keys):
        return "this LoRA is for the text encoder alone. Apply it with Load LoRA and its CLIP."
    recipe = match_recipe({name for name, _ in model.diffusion_model.named_parameters()})
    if (family := foreign_architecture(keys)) and not (recipe and recipe.title in family):
        return f"this LoRA is for {family}, the model is {name}. Choose a LoRA made for this model."
    return f"none of its {len(keys)} keys belongs to this model ({name}). The first are: {', '.join(sorted(keys)[:4])}."


def check_shape(name: str, key: str, value: Any, weight: Tensor | None, offset: Offset, beside: bool) -> None:
    """Raise :class:`SVDQuantError` for a patch that is made for a weight of another shape.

    Adapters are checked where they fit ``beside`` a weight; others are ComfyUI's business.
    """
    made = f"{name}: {key} does not fit: "
    advice = "This LoRA was made for a model of another size or kind."
    if weight is None:
        raise SVDQuantError(f"{made}this layer of the model has none. {advice}")
    part, meta = [*weight.shape], torch.device("meta")
    if offset is not None:
        part[offset[0]] = offset[2]
    tensor = value[1][0] if isinstance(value, tuple) and value[0] == "set" else difference(value)
    try:
        if tensor is not None:
            check(tensor.shape, tuple(part))
        elif len(part) == 2 and beside:
            translate(value, 1.0, (part[0], part[1]), lambda: torch.empty(part, device=meta), meta)
    except (RuntimeError, ValueError, IndexError) as error:
        raise SVDQuantError(f"{made}{error}. {advice}") from None

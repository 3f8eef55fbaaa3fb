"""What a LoRA file will do to a model, told from the headers of both files: no weight is read, no model is built.

The counts are those of the report after a run, because the same functions count (:mod:`.lora`).
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import comfy.model_detection
import torch
from comfy.model_base import BaseModel
from torch import Tensor, nn

from ..checkpoint import read_header
from ..dialects import DIFFUSERS_FLUX, to_comfy_names
from ..errors import SVDQuantError
from ..families import FLUX_BLOCKS, FLUX_WIDTH
from ..formats import by_disk_name
from ..linear import layer_config
from ..lora_checks import adapter_ranks
from ..lora_files import read_lora
from .lora import LoraPatches, check_patch, match_keys


def preview_lora(path: Path, model: Path | None) -> tuple[LoraPatches, list[int]]:
    """What the LoRA file patches in the model file, and its ranks; without a model, in FLUX.1 by the keys' names.

    :class:`SVDQuantError` for what the LoRA nodes would refuse, as far as headers tell.
    """
    tensors = read_lora(path, data=False)[0]
    if model is None:
        return match_keys(tensors, flux_outline(), path.name), adapter_ranks(tensors)
    stat = model.stat()
    base, quantized = outline(model, stat.st_mtime_ns, stat.st_size)
    lora = match_keys(tensors, base, path.name)
    for target in lora.patches:
        key, _, beside = check_patch(lora, target, base)
        if key in quantized and not beside:
            lora.in_16_bit.append(key)
    return lora, adapter_ranks(tensors)


@lru_cache(maxsize=2)
def outline(path: Path, modified: int, size: int) -> tuple[BaseModel, set[str]]:
    """ComfyUI's model class for a file as it was at that time, with weights on the meta device, and the keys of its
    quantized weights."""
    tensors, metadata = read_header(path)
    sd = to_comfy_names(tensors, str(path))
    with silence():
        config = comfy.model_detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None:
        raise SVDQuantError(f"{path.name}: ComfyUI does not know this architecture. A newer ComfyUI may.")
    quantized = set()
    for layer in [key.removesuffix("comfy_quant") for key in sd if key.endswith(".comfy_quant")]:
        fmt = by_disk_name(str(layer_config(sd, layer).get("format")))
        if fmt is not None and f"{layer}weight" in sd:
            sd[f"{layer}weight"] = torch.empty(fmt.logical_shape(sd[f"{layer}weight"]), device="meta")
            quantized.add(f"diffusion_model.{layer}weight")
    return base_model(config, sd), quantized


@lru_cache(maxsize=1)
def flux_outline() -> BaseModel:
    """FLUX.1 with the names of its weights, and no shapes."""
    depth, single = FLUX_BLOCKS
    sd = {
        f"{name.replace('{i}', str(i))}.{end}": torch.empty(0, device="meta")
        for name in DIFFUSERS_FLUX
        for i in range(1 if "{i}" not in name else depth if name.startswith("double") else single)
        for end in (("weight",) if name.endswith("_norm") else ("weight", "bias"))
    }
    shape = {"depth": depth, "depth_single_blocks": single, "hidden_size": FLUX_WIDTH}
    config = comfy.model_detection.model_config_from_unet_config(
        {"image_model": "flux", "guidance_embed": True, "in_channels": 16, **shape}
    )
    return base_model(config, sd)


def base_model(config: "comfy.supported_models_base.BASE", sd: Mapping[str, Tensor]) -> BaseModel:
    """ComfyUI's class for a config; in place of the diffusion model, modules that hold ``sd`` and compute nothing."""
    config.unet_config["disable_unet_model_creation"] = True
    with silence():
        model = config.get_model({}, "")
    model.diffusion_model = nn.Module()
    for key, tensor in sd.items():
        module = model.diffusion_model
        *path, name = key.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for module in model.diffusion_model.modules():
        if not hasattr(module, "bias"):
            module.register_parameter("bias", None)  # as in real layers without one
    return model


@contextmanager
def silence() -> Iterator[None]:
    """No word in the log from this thread about a model that nobody asked to load."""
    thread = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno > logging.INFO

    logger = logging.getLogger()
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)

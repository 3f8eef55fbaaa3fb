"""An SVDQuant file as a ComfyUI model."""

import os
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ..checkpoint import parameters, read_checkpoint
from ..errors import SVDQuantError
from .fuse import fuse
from .layout import set_activations
from .ops import SVDQuantOps
from .patcher import adopt


def lazy_piece(cls: Any, caster: Any, state_dict_key: str, tensor: Tensor) -> Any:
    return torch.nn.Parameter.__new__(cls, tensor, requires_grad=False)


# ModelSave's placeholder for a weight that is not loaded asks for gradients, which torch refuses for int8 codes.
if hasattr(comfy.model_patcher, "LazyCastingParamPiece"):
    comfy.model_patcher.LazyCastingParamPiece.__new__ = lazy_piece


def load_svdquant(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    activations: str = "auto",
    disable_dynamic: bool = False,
) -> Any:
    """The ``ModelPatcher`` of an SVDQuant file, computing in ``dtype``.

    None takes the dtype that ComfyUI would choose for the same model in 16 bit. ``activations`` is one of
    ``ACTIVATIONS``: what an INT4 file's linears round their inputs to.
    """
    path = str(path)
    bar = comfy.utils.ProgressBar(1)
    state_dict, metadata = read_checkpoint(path, bar.update_absolute)
    if not any(key.endswith(".comfy_quant") for key in state_dict):
        raise SVDQuantError(f"{path}: not quantized. Load it with Load Diffusion Model.")
    config = comfy.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    if config is None:
        raise SVDQuantError(f"{path}: ComfyUI does not know this architecture. A newer ComfyUI may.")
    weight_dtype = dtype or comfy.model_management.unet_dtype(
        model_params=parameters(state_dict),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=sixteen_bit_dtype(state_dict),
    )
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state_dict,
        model_options={"custom_operations": SVDQuantOps, "dtype": weight_dtype},
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    # For quantized files ComfyUI ignores the weights' dtype here; a 16-bit file's rules are wanted.
    compute_dtype = dtype or comfy.model_management.unet_manual_cast(
        weight_dtype, patcher.load_device, config.supported_inference_dtypes
    )
    patcher.model.manual_cast_dtype = compute_dtype or weight_dtype
    patcher.cached_patcher_init = (load_svdquant, (path, dtype, activations))
    patcher = adopt(patcher)
    for linear in patcher.model.quantized_linears.values():
        set_activations(linear.weight, activations)
    fuse(patcher.model.diffusion_model)
    return patcher


def sixteen_bit_dtype(state_dict: dict[str, Tensor]) -> torch.dtype | None:
    """The float dtype of most elements that are not codes."""
    floats = {key: t for key, t in state_dict.items() if t.is_floating_point()}
    return comfy.utils.weight_dtype(floats)

"""One ComfyUI ``QuantizedTensor`` per quantized linear: codes, scales, λ and branch move and copy as one."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)
from torch import Tensor

from .. import backends
from ..errors import SVDQuantError
from ..formats import FORMATS, GELU_SHIFT
from ..linear import QuantizedLinear

LAYOUT = "SVDQuantLayout"
BRANCH = ("smooth_factor", "proj_down", "proj_up")


@dataclass(frozen=True)
class SVDQuantParams(BaseLayoutParams):
    """What a weight has beside its codes; tensors keep the names and dtypes of the file.

    ``orig_dtype`` is the model's compute dtype and ``orig_shape`` is (N, K), or (K, N) once ``transposed``.
    ``scale``, ``scale_2`` and ``zero`` are the file's ``weight_scale``, ``weight_scale_2`` and ``weight_zero``.
    ``activations`` is what the user asked for and no part of the file.
    """

    fmt: str
    act_unsigned: bool = False
    scale_2: Tensor | None = None
    zero: Tensor | None = None
    smooth_factor: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    transposed: bool = False
    activations: str = "auto"

    def _tensor_fields(self) -> list[str]:
        optional = ("scale_2", "zero", *BRANCH)
        return ["scale", *(name for name in optional if getattr(self, name) is not None)]

    def scales(self) -> dict[str, Tensor]:
        """The format's own tensors beside ``weight``, by their suffix on disk."""
        names = ("scale", "scale_2", "zero")
        return {f"_{name}": getattr(self, name) for name in names if getattr(self, name) is not None}


class SVDQuantLayout(QuantizedLayout):
    """Natural layout of the file format, for every format in ``FORMATS``."""

    Params = SVDQuantParams
    QUANTIZES_INPUT = False  # the forward rounds its input itself

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        raise SVDQuantError("An SVDQuant weight needs calibration: quantize the model with SVDQuant Quantize.")

    @classmethod
    def dequantize(cls, qdata: Tensor, params: SVDQuantParams) -> Tensor:
        """The effective weight (N, K) in ``orig_dtype``: residual / λ plus branch."""
        return as_linear(qdata, params).dequantized_weight().to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: SVDQuantParams) -> dict[str, Tensor]:
        """By suffix of ``<layer>.weight``. λ and the branch are named beside it, so the linear writes them."""
        return {"": qdata, **params.scales()}


def as_linear(qdata: Tensor, params: SVDQuantParams, bias: Tensor | None = None) -> QuantizedLinear:
    """The layer that a quantized tensor stands for."""
    return QuantizedLinear(
        fmt=FORMATS[params.fmt],
        tensors={f"weight{suffix}": t for suffix, t in {"": qdata, **params.scales()}.items()},
        bias=bias,
        act_unsigned=params.act_unsigned,
        **{name: getattr(params, name) for name in BRANCH},
    )


def layer_of(weight: QuantizedTensor, bias: Tensor | None) -> QuantizedLinear:
    """:func:`as_linear` of a weight, and the same one as long as weight and bias are: it keeps what is found out."""
    qdata, params = weight._qdata, weight._params
    if torch.compiler.is_compiling():
        return as_linear(qdata, params, bias)
    kept = weight.__dict__.get("svdquant")
    if kept is None or kept[0] is not qdata or kept[1] is not params or kept[2] is not bias:
        kept = weight.__dict__["svdquant"] = (qdata, params, bias, as_linear(qdata, params, bias))
    return kept[3]


def as_tensor(layer: QuantizedLinear, dtype: torch.dtype) -> QuantizedTensor:
    """The layer's weight as ComfyUI holds it; ``dtype`` is what the model computes in."""
    params = SVDQuantParams(
        scale=layer.tensors["weight_scale"],
        orig_dtype=dtype,
        orig_shape=layer.shape,
        fmt=layer.fmt.name,
        act_unsigned=layer.act_unsigned,
        scale_2=layer.tensors.get("weight_scale_2"),
        zero=layer.tensors.get("weight_zero"),
        **{name: getattr(layer, name) for name in BRANCH},
    )
    return QuantizedTensor(layer.tensors["weight"], LAYOUT, params)


def set_activations(weight: QuantizedTensor, activations: str) -> None:
    """Round the inputs of this weight, and of the copies that ComfyUI will make of it, to so many bits."""
    weight._params = replace(weight._params, activations=activations)


def is_quantized(weight: Any) -> bool:
    """Whether this is a weight of ours (a Parameter that wraps one is, too)."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT


def shift_bias(weight: QuantizedTensor) -> Tensor | None:
    """What the shift of unsigned activations adds to the output, (N,) float32; None without a shift.

    The stored bias is that much too small, so whoever runs the dequantized weight must add it.
    """
    params = weight._params
    if not params.act_unsigned:
        return None
    residual = replace(params, proj_down=None, proj_up=None, orig_dtype=torch.float32)
    return SVDQuantLayout.dequantize(weight._qdata, residual).sum(dim=1) * GELU_SHIFT


def linear(x: Any, weight: Any, bias: Tensor | None) -> Tensor:
    """``x (..., K)`` through the quantized ``weight``; computed and returned in x's dtype."""
    if not is_quantized(weight) or weight._params.transposed:
        return torch.nn.functional.linear(*dequantize_args((x, weight, bias)))
    return backends.linear(dequantize_args(x), layer_of(weight, bias), weight._params.activations)


def transpose(weight: QuantizedTensor) -> QuantizedTensor:
    """``weight.t()`` without touching the data."""
    params = weight._params
    flipped = replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(weight._qdata, LAYOUT, flipped)


def product(x: Any, weight: Any, bias: Tensor | None) -> Tensor:
    """``x @ weight + bias``: quantized where ``weight`` is one of ours, transposed."""
    if is_quantized(weight) and weight._params.transposed:
        return linear(x, transpose(weight), bias)
    x, weight, bias = dequantize_args((x, weight, bias))
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def widen(weight: QuantizedTensor, up: Tensor, down: Tensor) -> QuantizedTensor:
    """``weight + up down`` with ``up (N, R)``, ``down (R, K)``: both join the branch, in their dtype."""
    params = weight._params
    wider = as_linear(weight._qdata, params).widened(up, down)
    return QuantizedTensor(weight._qdata, LAYOUT, replace(params, proj_down=wider.proj_down, proj_up=wider.proj_up))


def handle_linear(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return linear(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))


def handle_t(weight: QuantizedTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QuantizedTensor:
    return transpose(weight)


def handle_mm(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return product(args[0], args[1], None)


def handle_addmm(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if is_quantized(args[0]) and not kwargs:
        return widen(*args)
    if kwargs:  # beta and alpha have no quantized form
        return torch.addmm(*dequantize_args(args), **kwargs)
    return product(args[1], args[2], args[0])


# Importing this file twice, under two package names, registers the later copy for both: they are the same.
register_layout_class(LAYOUT, SVDQuantLayout)
register_layout_op(torch.ops.aten.linear.default, SVDQuantLayout)(handle_linear)
register_layout_op(torch.ops.aten.t.default, SVDQuantLayout)(handle_t)
register_layout_op(torch.ops.aten.mm.default, SVDQuantLayout)(handle_mm)
register_layout_op(torch.ops.aten.matmul.default, SVDQuantLayout)(handle_mm)
register_layout_op(torch.ops.aten.addmm.default, SVDQuantLayout)(handle_addmm)

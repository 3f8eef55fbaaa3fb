"""The operations class that ComfyUI builds a model with: its own ops, and a Linear that reads 4-bit layers."""

from typing import Any

import comfy.lora
import comfy.ops
import torch
from comfy.ops import cast_bias_weight, run_every_op, uncast_bias_weight
from torch import Tensor, nn

from .. import backends
from ..adapters import Adapters, LowRank
from ..deferred import Deferred, deferring, plain
from ..errors import SVDQuantError
from ..linear import QuantizedLinear
from .adapters import Patch, build, signature
from .layout import as_linear, as_tensor, is_quantized, layer_of, shift_bias

DISK_NAMES = ("weight_scale", "weight_scale_2", "weight_zero", "smooth_factor", "proj_down", "proj_up", "comfy_quant")


class Linear(comfy.ops.manual_cast.Linear):
    """ComfyUI's linear, with a ``weight (N, K)`` that is quantized where the file's is.

    Nothing is allocated before the state dict comes. ``bias (N,)`` is kept as the file has it: where the layer
    shifts its input (``act_unsigned``) that suits the quantized weight only, and :meth:`plain_bias` gives the
    one for a dequantized or patched weight.
    """

    weight: Any
    bias: Any

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        nn.Module.__init__(self)  # torch's own would allocate the 16-bit weight
        self.in_features, self.out_features = in_features, out_features
        self.has_bias, self.load_device = bias, device
        self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.quantized = False  # whether the file has this layer in 4 bit, whatever patches make of it
        self.shift: Tensor | None = None
        self.weight_patch: Any = None
        self.adapters: Adapters | None = None
        self.patches: list[Patch] = []
        self.kept: dict[Any, tuple[list[Patch], Adapters | None]] = {}

    def __getattr__(self, name: str) -> Any:
        """ComfyUI takes every key of the state dict for an attribute when it merges models."""
        if name in DISK_NAMES and is_quantized(self._parameters.get("weight")):
            return self.disk_tensors()[name]
        return super().__getattr__(name)

    def disk_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The quantized layer in the names and dtypes of the file format."""
        return as_linear(self.weight._qdata, self.weight._params, self.bias).state_dict(prefix)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, bias = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}bias")
        known = {"weight", "bias"}
        if weight is None:
            raise SVDQuantError(f"{prefix}weight is missing. The file is incomplete.")
        if f"{prefix}comfy_quant" in state_dict:
            weight = as_tensor(QuantizedLinear.from_state_dict(state_dict, prefix), self.weight_comfy_model_dtype)
            known |= {*DISK_NAMES}
            self.quantized = True
        else:
            if bias is None and self.has_bias:
                missing_keys.append(f"{prefix}bias")
            if not local_metadata.get("assign_to_params_buffers", False):  # dynamic VRAM casts on the way
                weight = weight.to(self.weight_comfy_model_dtype)
                bias = None if bias is None else bias.to(self.bias_comfy_model_dtype)
        if tuple(weight.shape) != (self.out_features, self.in_features):
            wanted = (self.out_features, self.in_features)
            raise SVDQuantError(f"{prefix}weight: this model needs {wanted}, the file has {tuple(weight.shape)}.")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                setattr(self, name, nn.Parameter(tensor.to(device=self.load_device), requires_grad=False))
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k.removeprefix(prefix) not in known]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if is_quantized(self.weight):
            destination.update(self.disk_tensors(prefix))
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if self.shift is not None:  # patched: saved as a 16-bit layer
                destination[f"{prefix}bias"] = self.plain_bias(self.bias, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear":
        """``.to()``: torch would exchange ``weight.data``, which a quantized weight has not."""
        for name, param in self._parameters.items():
            if param is not None and (moved := fn(param)) is not param:
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        run_every_op()
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")  # torch's way takes 1 µs
        if self.at_hand(x, weight, bias):  # ComfyUI would find that out in 20 µs
            return self.adapted(self.adapters, x, weight, bias) if self.adapters else product(x, weight, bias)
        quantized = is_quantized(weight)
        weight, bias, stream = cast_bias_weight(
            self,
            dtype=weight.dtype if quantized else x.dtype,
            device=x.device,
            bias_dtype=x.dtype,
            offloadable=True,
            compute_dtype=x.dtype,
        )
        if quantized and self.weight_patch is not None:
            weight = self.weight_patch(weight.dequantize())
        if not is_quantized(weight):
            weight, bias = weight.to(x.dtype), self.plain_bias(bias, x)
        y = self.adapted(self.adapters, x, weight, bias) if self.adapters else product(x, weight, bias)
        uncast_bias_weight(self, weight, bias, stream)
        return y

    def at_hand(self, x: Tensor, weight: Any, bias: Any) -> bool:
        """Whether the layer's weight is quantized, and it and the bias are where x is, to be used as they are."""
        if not is_quantized(weight) or weight.device != x.device or self.weight_patch is not None:
            return False
        if self.weight_function or self.bias_function or "_v" in self.__dict__:  # dynamic VRAM's place for both
            return False
        return bias is None or (bias.device == x.device and bias.dtype == x.dtype)

    # Adapters: LoRA and its kin beside the 4-bit weight.

    def set_patches(self, key: str, patches: list[Patch], like: Tensor, keep: int = 1) -> bool:
        """Take the place of all adapters; those for ``patches`` are made on ``like``'s device, in its dtype.

        Adapters of the last ``keep`` lists are at hand: the same patches again cost nothing. True if some were made.
        """
        made_of = (signature(patches), like.device, like.dtype)
        new = made_of not in self.kept
        if new:
            shape = (self.out_features, self.in_features)
            made = build(key, patches, lambda: self.effective_weight(like.device), shape, like) if patches else None
            self.kept[made_of] = (patches, made)  # the patches, too: an id is one as long as its object lives
        self.kept[made_of] = self.kept.pop(made_of)  # the last one used is the last one to go
        self.patches, self.adapters = self.kept[made_of]
        for old in list(self.kept)[:-keep]:
            del self.kept[old]
        return new and bool(patches)

    def drop_adapters(self) -> None:
        """Free their memory."""
        self.patches, self.adapters = [], None
        self.kept.clear()

    def adapted(self, adapters: Adapters, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """:meth:`forward` with adapters; low rank is part of the weight's own branch."""
        adapters = adapters.to(x)
        if not adapters.others:
            return product(x, weight, bias, adapters.filled)
        x = plain(x)
        outside = None  # a bias that is not adapted with the weight's output
        if not adapters.additive:
            outside = self.plain_bias(bias, x) if is_quantized(weight) else bias

        def f(rows: Tensor) -> Tensor:
            y = product(rows, weight, bias, adapters.filled)
            return y if outside is None else y - outside

        y = adapters(f, x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if outside is None else y + outside

    def effective_weight(self, device: torch.device) -> Tensor:
        """(N, K) float32 on ``device``, without adapters."""
        weight = self.weight.to(device)  # as codes
        return as_linear(weight._qdata, weight._params).dequantized_weight()

    def wider_branch(self) -> dict[str, Tensor] | None:
        """The branch with the adapters in it, by its names on disk; None where they, or the format, do not allow it."""
        params, adapters = self.weight._params, self.adapters
        if adapters is None or adapters.branch is None or adapters.others or params.proj_down is None:
            return None
        up, down = (t.to("cpu", params.proj_down.dtype) for t in (adapters.branch.up, adapters.branch.down))
        wider: Any = torch.addmm(self.weight.cpu(), up, down)
        return {name: getattr(wider._params, name).contiguous() for name in ("proj_down", "proj_up")}

    def merged(self) -> dict[str, Tensor]:
        """The layer with its adapters in 16 bit; its bias only where it is not as on disk."""
        weight = comfy.lora.calculate_weight(self.patches, self.effective_weight(torch.device("cpu")), "")
        bias = self.plain_bias(self.bias, self.bias)
        return {"weight": weight.to(self.weight.dtype), **({} if self.shift is None else {"bias": bias})}

    # Merges and other patches that cannot stay beside: the 4-bit weight is never requantized. The layer holds a
    # 16-bit weight instead, and ComfyUI keeps the 4-bit one to put back.

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """What a patch is added to: the effective weight, in the dtype asked for."""
        return weight.dequantize() if is_quantized(weight) else weight

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """Take a patched weight, in 16 bit."""
        patched = weight.to(self.weight.dtype)
        if is_quantized(self.weight):
            if return_weight:
                raise SVDQuantError("Cannot save a merge with a 4-bit layer that is not loaded. Merge 16-bit models.")
            if inplace_update:
                raise SVDQuantError("This hook cannot patch a 4-bit layer: only LoRAs can be scheduled on it.")
            self.shift = shift_bias(self.weight)
        elif inplace_update:
            self.weight.data.copy_(patched)
            return None
        if return_weight:
            return patched
        self.weight = nn.Parameter(patched, requires_grad=False)
        return None

    def plain_bias(self, bias: Tensor | None, like: Tensor) -> Tensor | None:
        """The bias (N,) of a layer that does not shift its input, on ``like``'s device and in its dtype."""
        if is_quantized(self.weight) and self.shift is None:
            self.shift = shift_bias(self.weight)
        if self.shift is None:
            return bias
        shift = self.shift.to(like.device)
        return (shift if bias is None else bias + shift).to(like.dtype)

    def convert_bias(self, bias: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """What a patch of the bias is added to."""
        plain = self.plain_bias(bias, bias)
        assert plain is not None
        return plain

    def set_bias(
        self,
        bias: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """Take a patched bias: the reverse of :meth:`convert_bias`."""
        stored = bias if self.shift is None else bias - self.shift.to(bias.device)
        stored = stored.to(self.bias.dtype)
        if return_weight:
            return stored
        if inplace_update:
            self.bias.data.copy_(stored)
        else:
            self.bias = nn.Parameter(stored, requires_grad=False)
        return None

    @property
    def weight_lowvram_function(self) -> Any:
        """Under dynamic VRAM ComfyUI would requantize a patched weight; ``forward`` patches a quantized one."""
        return None if is_quantized(self.weight) else self.weight_patch

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch: Any) -> None:
        self.weight_patch = patch


def product(x: Tensor, weight: Any, bias: Tensor | None, branch: LowRank | None = None) -> Tensor:
    """``x (..., K)`` times ``weight (N, K)``, quantized or not, and with what else is in the branch.

    A deferred x reaches the quantizer as it is. torch.compile and autograd have to see torch's own functions, whose way
    through the weight's class costs the host 40 µs.
    """
    if is_quantized(weight) and not (torch.compiler.is_compiling() or backends.wants_gradient(x)):
        layer = layer_of(weight, bias)
        if branch is not None:
            layer = layer.widened(branch.up, branch.down)
        return backends.linear(x, layer, weight._params.activations)
    if branch is not None:
        weight = torch.addmm(weight, branch.up, branch.down)
    return nn.functional.linear(x, weight, bias)


class LayerNorm(comfy.ops.manual_cast.LayerNorm):
    """ComfyUI's norm; one without weights may be computed by the quantizer of the linear that comes after it."""

    def forward(self, x: Tensor) -> Tensor:
        if not (deferring() and self.weight is None and self.bias is None and len(self.normalized_shape) == 1):
            return super().forward(x)
        if not backends.may_fuse(x):
            return super().forward(x)
        run_every_op()
        return Deferred(x, eps=self.eps)


class SVDQuantOps(comfy.ops.manual_cast):
    """``model_options["custom_operations"]`` for a model with quantized linears."""

    Linear = Linear
    LayerNorm = LayerNorm

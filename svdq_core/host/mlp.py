"""``mlp.0 -> GELU -> mlp.2`` of a 4-bit model as one op, where nothing else has to see what is between them."""

from typing import Any

import torch
from comfy.ops import run_every_op
from torch import Tensor, nn

from .. import backends
from ..linear import QuantizedLinear
from .layout import as_linear, is_quantized
from .ops import Linear


class MLP(nn.Sequential):
    """ComfyUI's own ``nn.Sequential`` of a linear, GELU (tanh) and a linear, with another class.

    Keys, children and hooks stay what they are. Wherever anything but 4-bit weights and low-rank branches takes part,
    on the CPU, and for weights that are not on the input's device (offloaded, or under dynamic VRAM) it runs its
    children one after the other, as always.
    """

    def forward(self, x: Tensor) -> Tensor:
        children: Any = self
        first, gelu, second = children
        if not (backends.may_fuse(x) and alone(first, x) and alone(second, x) and unhooked(gelu)):
            return super().forward(x)
        run_every_op()
        activations = first.weight._params.activations
        return backends.mlp(x, layer_of(first, x), layer_of(second, x), activations)


def fuse(model: nn.Module) -> None:
    """Make every such ``nn.Sequential`` of a loaded model an :class:`MLP`."""
    for module in model.modules():
        if type(module) is nn.Sequential and len(module) == 3:
            first, gelu, second = module
            linears = isinstance(first, Linear) and isinstance(second, Linear)
            if linears and type(gelu) is nn.GELU and gelu.approximate == "tanh":
                module.__class__ = MLP


def alone(linear: Linear, x: Tensor) -> bool:
    """Whether the output is that of a 4-bit weight on x's device and its branch, and of nothing else."""
    weight, adapters = linear.weight, linear.adapters
    if not is_quantized(weight) or weight._params.fmt != "int4":
        return False
    if weight.device != x.device or (linear.bias is not None and linear.bias.device != x.device):
        return False
    patched = linear.weight_patch is not None or linear.weight_function or linear.bias_function
    beside = adapters is not None and (adapters.branch is None or adapters.others)
    return unhooked(linear) and not patched and not beside


def unhooked(module: nn.Module) -> bool:
    """Whether calling it is running its class' forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def layer_of(linear: Linear, x: Tensor) -> QuantizedLinear:
    """The linear with its adapters in the branch."""
    weight: Any = linear.weight
    if linear.adapters is not None:
        branch = linear.adapters.to(x).branch
        assert branch is not None
        weight = torch.addmm(weight, branch.up, branch.down)
    return as_linear(weight._qdata, weight._params, linear.bias)

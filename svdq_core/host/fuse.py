"""What the linears of a loaded 4-bit model take over from the modules around them, in the model's own forward.

``mlp.0 -> GELU -> mlp.2`` is one op where nothing else has to see what is between them; in FLUX's blocks, norms and
GELUs are :mod:`deferred <..deferred>` to the quantizer of the linear that comes next.
"""

from typing import Any

import comfy.ldm.flux.layers as flux
import torch
from comfy.ops import run_every_op
from torch import Tensor, nn

from .. import backends
from ..deferred import deferred, deferring, gelu
from ..linear import QuantizedLinear
from .layout import layer_of
from .ops import Linear


class MLP(nn.Sequential):
    """ComfyUI's own ``nn.Sequential`` of a linear, GELU (tanh) and a linear, with another class.

    Keys, children and hooks stay what they are. Wherever anything but 4-bit weights and low-rank branches takes part,
    on the CPU, and for weights that are not on the input's device (offloaded, or under dynamic VRAM) it runs its
    children one after the other, as always.
    """

    def forward(self, x: Tensor) -> Tensor:
        children: Any = self
        first, between, second = children
        if not (backends.may_fuse(x) and alone(first, x) and alone(second, x) and unhooked(between)):
            return super().forward(x)
        run_every_op()
        activations = first.weight._params.activations
        return backends.mlp(x, adapted(first, x), adapted(second, x), activations)


class GELU(nn.GELU):
    """GELU (tanh), computed by the quantizer of the linear that comes after it."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x) if deferring() and backends.may_fuse(x) else super().forward(x)


class Block(nn.Module):
    """In front of a block of ComfyUI's that uses every norm and GELU at once: they may be deferred while it runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        comfyuis: Any = super().forward
        if torch.compiler.is_compiling() or not uses_at_once(self, comfyuis):  # a compiler fuses them itself
            return comfyuis(*args, **kwargs)
        with deferred():
            return comfyuis(*args, **kwargs)


class DoubleStreamBlock(Block, flux.DoubleStreamBlock):
    """Image and text."""


class SingleStreamBlock(Block, flux.SingleStreamBlock):
    """Both in one."""


def uses_at_once(block: nn.Module, forward: Any) -> bool:
    """Whether nobody else can get hold of a norm, and keep it while what it was made of is written to.

    That is, the forward is ComfyUI's, and there are no hooks on what is in the block.
    """
    code = getattr(forward, "__code__", None)
    if code is None or code.co_filename != flux.MLPEmbedder.__init__.__code__.co_filename:
        return False
    parts = list(block._modules.values())
    for module in parts:  # of which there are 29, at every call: block.modules() takes three times as long
        if module is not None:
            if not unhooked(module):
                return False
            parts.extend(module._modules.values())
    return True


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    flux.DoubleStreamBlock: DoubleStreamBlock,
    flux.SingleStreamBlock: SingleStreamBlock,
}


def fuse(model: nn.Module) -> None:
    """Give the modules of a loaded model these classes; keys, children and hooks stay what they are."""
    for module in model.modules():
        if type(module) is nn.Sequential and len(module) == 3:
            first, between, second = module
            if isinstance(first, Linear) and isinstance(second, Linear) and is_gelu(between):
                module.__class__ = MLP
        block = BLOCKS.get(type(module))
        if block is not None and backends.on_gpu():
            module.__class__ = block
            for child in module.modules():
                if is_gelu(child):
                    child.__class__ = GELU


def is_gelu(module: nn.Module) -> bool:
    return type(module) in (nn.GELU, GELU) and module.approximate == "tanh"


def alone(linear: Linear, x: Tensor) -> bool:
    """Whether the output is that of a 4-bit weight on x's device and its branch, and of nothing else."""
    weight = linear.weight
    if not (linear.at_hand(x, weight, linear.bias) and weight._params.fmt == "int4" and unhooked(linear)):
        return False
    adapters = linear.adapters
    return adapters is None or (adapters.branch is not None and not adapters.others)


def unhooked(module: nn.Module) -> bool:
    """Whether calling it is running its class' forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def adapted(linear: Linear, x: Tensor) -> QuantizedLinear:
    """The linear with its adapters in the branch."""
    layer = layer_of(linear.weight, linear.bias)
    if linear.adapters is None:
        return layer
    branch = linear.adapters.to(x).filled
    assert branch is not None
    return layer.widened(branch.up, branch.down)

"""What the linears of a loaded 4-bit model take over from the modules around them, in the model's own forward.

``mlp.0 -> GELU -> mlp.2`` is one op where nothing else has to see what is between them; in blocks that are known,
norms, GELUs and gated SiLUs are :mod:`deferred <..deferred>` to the quantizer of the linear that comes next.
"""

from typing import Any

import comfy.ldm.flux.layers as flux
import comfy.ldm.lumina.model as lumina
import comfy.ldm.qwen_image.model as qwen
import comfy.ldm.wan.model as wan
import comfy.ops
import torch
from comfy.ops import cast_bias_weight, run_every_op, uncast_bias_weight
from torch import Tensor, nn

from .. import backends
from ..deferred import Deferred, deferred, deferring, gated_silu, gelu
from ..linear import QuantizedLinear
from .layout import layer_of
from .ops import Linear


class FusedMLP(nn.Module):
    """In front of ComfyUI's module of a linear, GELU (tanh) and a linear.

    Keys, children and hooks stay what they are. Wherever anything but 4-bit weights and low-rank branches takes part,
    on the CPU, and for weights that are not on the input's device (offloaded, or under dynamic VRAM) it runs its
    children one after the other, as always.
    """

    def parts(self) -> tuple[Linear, Linear, tuple[nn.Module, ...]]:
        """Both linears, and what is between them."""
        children: Any = self
        first, between, second = children
        return first, second, (between,)

    def forward(self, x: Any) -> Any:
        comfyuis: Any = super().forward
        first, second, between = self.parts()
        if not (backends.may_fuse(x) and alone(first, x) and alone(second, x) and all(map(unhooked, between))):
            return comfyuis(x)
        run_every_op()
        activations = first.weight._params.activations
        return backends.mlp(x, adapted(first, x), adapted(second, x), activations)


class MLP(FusedMLP, nn.Sequential):
    """FLUX.1's and Wan's."""


class FeedForward(FusedMLP, qwen.FeedForward):
    """Qwen-Image's, whose first linear is within its GELU."""

    def parts(self) -> tuple[Linear, Linear, tuple[nn.Module, ...]]:
        children: Any = self.net
        first, between, second = children
        return first.proj, second, (first, between)


class GELU(nn.GELU):
    """GELU (tanh), computed by the quantizer of the linear that comes after it."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x) if deferring() and backends.may_fuse(x) else super().forward(x)


class SiLUActivation(flux.SiLUActivation):
    """The same for FLUX.2's gated SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        if not (deferring() and backends.may_fuse(x)):
            return super().forward(x)
        return gated_silu(*x.chunk(2, dim=-1))


class GatedFeedForward(lumina.FeedForward):
    """The same for Z-Image's and Lumina's, whose halves come from two linears. In fp16 ComfyUI clamps the result."""

    def _forward_silu_gating(self, x1: Tensor, x3: Tensor) -> Tensor:
        if deferring() and backends.may_fuse(x1) and backends.may_fuse(x3) and x1.dtype != torch.float16:
            return gated_silu(x1, x3)
        return super()._forward_silu_gating(x1, x3)


class RMSNorm(comfy.ops.manual_cast.RMSNorm):
    """Z-Image's and Lumina's norms in front of linears, likewise; not where the weight may want a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not (deferring() and backends.may_fuse(x)) or torch.is_grad_enabled():
            return super().forward(x)
        run_every_op()
        weight, bias, stream = cast_bias_weight(self, x, offloadable=True)
        found = Deferred(x, eps=self.eps, weight=weight.float())  # a copy: ComfyUI may need the weight's place
        uncast_bias_weight(self, weight, bias, stream)
        return found


class Block(nn.Module):
    """In front of a block of ComfyUI's that uses every norm and activation at once: they may be deferred meanwhile.

    ``beside`` is another class of ComfyUI's file: a forward that somebody exchanged is not from there.
    """

    beside: type[nn.Module] = flux.MLPEmbedder

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


class QwenImageTransformerBlock(Block, qwen.QwenImageTransformerBlock):
    """Image and text, with norms that three linears read."""

    beside = qwen.LastLayer


class WanAttentionBlock(Block, wan.WanAttentionBlock):
    """A video, which looks at the text; its norms are read by three linears, too."""

    beside = wan.Head


class JointTransformerBlock(Block, lumina.JointTransformerBlock):
    """Z-Image's and Lumina's."""

    beside = lumina.FinalLayer


def uses_at_once(block: Block, forward: Any) -> bool:
    """Whether nobody else can get hold of a norm, and keep it while what it was made of is written to.

    That is, the forward is ComfyUI's, and there are no hooks on what is in the block.
    """
    code = getattr(forward, "__code__", None)
    if code is None or code.co_filename != block.beside.__init__.__code__.co_filename:
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
    qwen.QwenImageTransformerBlock: QwenImageTransformerBlock,
    wan.WanAttentionBlock: WanAttentionBlock,
    lumina.JointTransformerBlock: JointTransformerBlock,
}


def fuse(model: nn.Module) -> None:
    """Give the modules of a loaded model these classes; keys, children and hooks stay what they are."""
    for module in model.modules():
        if type(module) is nn.Sequential and len(module) == 3:
            first, between, second = module
            if isinstance(first, Linear) and isinstance(second, Linear) and is_gelu(between):
                module.__class__ = MLP
        if type(module) is qwen.FeedForward:
            module.__class__ = FeedForward
        block = BLOCKS.get(type(module))
        if block is not None and backends.on_gpu():
            module.__class__ = block
            if block is JointTransformerBlock:
                module.attention_norm1.__class__ = module.ffn_norm1.__class__ = RMSNorm
            for child in module.modules():
                if is_gelu(child):
                    child.__class__ = GELU
                elif type(child) is flux.SiLUActivation:
                    child.__class__ = SiLUActivation
                elif type(child) is lumina.FeedForward:
                    child.__class__ = GatedFeedForward


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

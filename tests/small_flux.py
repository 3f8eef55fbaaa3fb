"""Small random models of ComfyUI's FLUX class, and the 4-bit twin of one: what most tests run on.

The twin is quantized by plain rounding: the tests compare a quantized model with its own exact arithmetic.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from comfyui_svdquant.svdq_core import QuantizedLinear, read_checkpoint
from comfyui_svdquant.svdq_core.checkpoint import quantization_metadata, write_checkpoint
from comfyui_svdquant.svdq_core.families import plan_model
from comfyui_svdquant.svdq_core.formats import GELU_SHIFT, Format, get_format
from comfyui_svdquant.svdq_core.quantize import format_of
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, CONTEXT, POOLED = 256, 128, 128


class Weights(dict[str, Tensor]):
    """A random state dict. The weights are of sensible size, with a few large input channels, so that every layer
    matters to the output."""

    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__()
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def linear(self, name: str, n: int, k: int, bias: bool = True) -> None:
        weight = torch.randn(n, k, generator=self.generator) / k**0.5
        weight[:, torch.randint(k, (4,), generator=self.generator)] *= 4
        self[f"{name}.weight"] = weight.to(self.dtype)
        if bias:
            self[f"{name}.bias"] = (torch.randn(n, generator=self.generator) * 0.1).to(self.dtype)

    def norms(self, prefix: str) -> None:
        for which in ("query", "key"):
            scale = 1 + torch.randn(128, generator=self.generator) * 0.1
            self[f"{prefix}.{which}_norm.scale"] = scale.to(self.dtype)


def random_flux(
    hidden: int = 128,
    depth: int = 1,
    single: int = 1,
    in_features: int = 64,
    context: int = 64,
    seed: int = 0,
    guidance: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """A state dict with black-forest-labs/flux's names; `in_features` is 64 (text to image) to 384 (Fill)."""
    sd = Weights(seed, dtype)
    sd.linear("img_in", hidden, in_features)
    sd.linear("txt_in", hidden, context)
    embedders = {"time_in": 256, "vector_in": context} | ({"guidance_in": 256} if guidance else {})
    for name, width in embedders.items():
        sd.linear(f"{name}.in_layer", hidden, width)
        sd.linear(f"{name}.out_layer", hidden, hidden)
    for i in range(depth):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{i}.{stream}"
            sd.linear(f"{prefix}_mod.lin", 6 * hidden, hidden)
            sd.linear(f"{prefix}_attn.qkv", 3 * hidden, hidden)
            sd.linear(f"{prefix}_attn.proj", hidden, hidden)
            sd.linear(f"{prefix}_mlp.0", 4 * hidden, hidden)
            sd.linear(f"{prefix}_mlp.2", hidden, 4 * hidden)
            sd.norms(f"{prefix}_attn.norm")
    for i in range(single):
        prefix = f"single_blocks.{i}"
        sd.linear(f"{prefix}.modulation.lin", 3 * hidden, hidden)
        sd.linear(f"{prefix}.linear1", 7 * hidden, hidden)
        sd.linear(f"{prefix}.linear2", hidden, 5 * hidden)
        sd.norms(f"{prefix}.norm")
    if single:  # a ControlNet has neither single blocks nor a last layer
        sd.linear("final_layer.linear", 64, hidden)
        sd.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return sd


def random_flux2(hidden: int = 256, depth: int = 1, single: int = 2, context: int = CONTEXT) -> dict[str, Tensor]:
    """The same for FLUX.2: no biases, gated MLPs, modulations that all blocks share."""
    sd = Weights(0, torch.bfloat16)
    widths = {"img_in": (hidden, 128), "txt_in": (hidden, context), "final_layer.linear": (128, hidden)}
    for name in ("time_in", "guidance_in"):
        widths |= {f"{name}.in_layer": (hidden, 256), f"{name}.out_layer": (hidden, hidden)}
    widths |= {f"double_stream_modulation_{stream}.lin": (6 * hidden, hidden) for stream in ("img", "txt")}
    widths |= {"single_stream_modulation.lin": (3 * hidden, hidden)}
    widths |= {"final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    for prefix in (f"double_blocks.{i}.{stream}" for i in range(depth) for stream in ("img", "txt")):
        widths |= {f"{prefix}_attn.qkv": (3 * hidden, hidden), f"{prefix}_attn.proj": (hidden, hidden)}
        widths |= {f"{prefix}_mlp.0": (6 * hidden, hidden), f"{prefix}_mlp.2": (hidden, 3 * hidden)}
        sd.norms(f"{prefix}_attn.norm")
    for prefix in (f"single_blocks.{i}" for i in range(single)):
        widths |= {f"{prefix}.linear1": (9 * hidden, hidden), f"{prefix}.linear2": (hidden, 4 * hidden)}
        sd.norms(f"{prefix}.norm")
    for name, (n, k) in widths.items():
        sd.linear(name, n, k, bias=False)
    return sd


def random_chroma(hidden: int = 256, guidance: int = 64, context: int = CONTEXT) -> dict[str, Tensor]:
    """The same for Chroma: FLUX's blocks without modulations, which a network of its own makes (``guidance`` wide)."""
    sd = random_flux(hidden, 1, 2, context=context)
    left_out = ("time_in", "vector_in", "final_layer.adaLN_modulation")
    kept = {key: t for key, t in sd.items() if not key.startswith(left_out) and "mod" not in key}
    net = Weights(1, torch.bfloat16)
    net.linear("in_proj", guidance, 64)
    net.linear("out_proj", hidden, guidance)
    for i in range(5):
        net.linear(f"layers.{i}.in_layer", guidance, guidance)
        net.linear(f"layers.{i}.out_layer", guidance, guidance)
        net[f"norms.{i}.scale"] = torch.ones(guidance, dtype=torch.bfloat16)
    return kept | {f"distilled_guidance_layer.{key}": tensor for key, tensor in net.items()}


def activations(state_dict: dict[str, Tensor], tokens: int = 96, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs with a few large channels for every linear of the blocks, named like a calibration file."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, weight in state_dict.items():
        if "blocks." in key and key.endswith(".weight") and weight.dim() == 2:
            x = torch.randn(tokens, weight.shape[1], generator=generator)
            x[:, torch.randint(weight.shape[1], (4,), generator=generator)] *= 30
            out[key.removesuffix(".weight")] = x.bfloat16()
    return out


def state_dict(
    double: int = 2, single: int = 4, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random weights of the demo's shape."""
    return random_flux(HIDDEN, double, single, context=CONTEXT, seed=seed, dtype=dtype)


def quantize(sd: dict[str, Tensor], fmt: str = "int4") -> dict[str, QuantizedLinear]:
    """Every linear of the recipe, by rounding: a random λ and branch, and the residual that suits them."""
    layers = {}
    for group in plan_model({key: tuple(t.shape) for key, t in sd.items()}, "small FLUX")[1]:
        for name in group.names:
            weight = sd[f"{name}.weight"]
            bias = sd.get(f"{name}.bias", torch.zeros(weight.shape[0]))
            target = format_of(group, get_format(fmt))
            layers[name] = quantize_layer(weight, bias, target, group.after_gelu)
    return layers


def quantize_layer(
    weight: Tensor, bias: Tensor, fmt: Format, unsigned: bool = False, rank: int = 16
) -> QuantizedLinear:
    """One layer; ``unsigned`` shifts its input, and the stored bias takes back what that adds."""
    w, dtype = weight.float(), torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    if not fmt.has_branch:
        return QuantizedLinear(fmt, fmt.solve(w, torch.ones(w.shape[1]), dtype), bias=bias.to(dtype))
    generator = torch.Generator().manual_seed(w.numel())
    smooth = (torch.rand(w.shape[1], generator=generator) + 0.5).to(dtype)
    down = (torch.randn(w.shape[1], rank, generator=generator) / w.shape[1] ** 0.5).to(dtype)
    up = (torch.randn(w.shape[0], rank, generator=generator) / max(rank, 1) ** 0.5).to(dtype)
    residual = (w - up.float() @ down.float().t()) * smooth.float()
    codes, scales = fmt.round_weight(residual, dtype)
    tensors = fmt.pack(codes, scales, dtype, fmt.tensor_scale(residual))
    added = (fmt.unpack(tensors, torch.float32) / smooth.float()).sum(dim=1) * GELU_SHIFT if unsigned else 0
    return QuantizedLinear(fmt, tensors, smooth, down, up, (bias.float() - added).to(dtype), unsigned)


def write(path: Path, sd: dict[str, Tensor], layers: dict[str, QuantizedLinear]) -> Path:
    """A 16-bit file (no layers) or a quantized one."""
    tensors = {k: t for k, t in sd.items() if k.rsplit(".", 1)[0] not in layers}
    for name, layer in layers.items():
        tensors |= layer.state_dict(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, tensors, quantization_metadata(layers, {}) if layers else {})
    return path


def write_controlnet(path: Path) -> Path:
    """An XLabs-style FLUX ControlNet: two double blocks, their residuals, and a hint encoder."""
    sd = state_dict(double=2, single=0, seed=5)
    generator = torch.Generator().manual_seed(6)
    h = HIDDEN
    for name, n, k in (("pos_embed_input", h, 64), ("controlnet_blocks.0", h, h), ("controlnet_blocks.1", h, h)):
        sd[f"{name}.weight"] = torch.randn(n, k, generator=generator) / k**0.5
        sd[f"{name}.bias"] = torch.zeros(n)
    for i in range(8):
        channels = 3 if i == 0 else 16
        sd[f"input_hint_block.{2 * i}.weight"] = torch.randn(16, channels, 3, 3, generator=generator) / channels**0.5
        sd[f"input_hint_block.{2 * i}.bias"] = torch.zeros(16)
    save_file(sd, path)
    return path


def quantized_layers(path: Path) -> dict[str, QuantizedLinear]:
    """The quantized layers of a file."""
    sd, _ = read_checkpoint(path)
    names = [k.removesuffix(".comfy_quant") for k in sd if k.endswith(".comfy_quant")]
    return {name: QuantizedLinear.from_state_dict(sd, name) for name in names}


def effective(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Weight and bias of the 16-bit linear that a layer approximates; written from the format's definition."""
    residual = layer.fmt.unpack(layer.tensors, torch.float32)
    if layer.smooth_factor is not None:
        residual = residual / layer.smooth_factor.float()
    bias = layer.bias.float() + (GELU_SHIFT * residual.sum(dim=1) if layer.act_unsigned else 0)
    branch = 0 if layer.proj_up is None else layer.proj_up.float() @ layer.proj_down.float().t()
    return {"weight": residual + branch, "bias": bias}


def twin(bf16: Path, quantized: Path, plain: Collection[str] = ()) -> Any:
    """A 16-bit file loaded by ComfyUI, computing a quantized file's exact results.

    The linears named in ``plain`` get the effective weight instead, for patches of weights.
    """
    import comfy.sd

    model, layers = comfy.sd.load_diffusion_model(str(bf16)), quantized_layers(quantized)
    for name in layers.keys() & plain:
        module = model.model.diffusion_model.get_submodule(name)
        for key, value in effective(layers.pop(name)).items():
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    return computing(model, layers)


def computing(model: Any, layers: dict[str, QuantizedLinear]) -> Any:
    """The model, whose linears of these names compute what the layers do from now on."""
    for name, layer in layers.items():
        model.model.diffusion_model.get_submodule(name).forward = layer.forward
    return model

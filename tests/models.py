"""Small random models of ComfyUI's FLUX class, for tests that need no trained weights."""

import torch
from torch import Tensor


def random_flux(
    hidden: int = 128,
    depth: int = 1,
    single: int = 1,
    in_features: int = 64,
    context: int = 64,
    seed: int = 0,
    guidance: bool = False,
) -> dict[str, Tensor]:
    """A bf16 state dict with black-forest-labs/flux's names; `in_features` is 64 (text to image) to 384 (Fill)."""
    generator = torch.Generator().manual_seed(seed)
    sd: dict[str, Tensor] = {}

    def linear(name: str, n: int, k: int) -> None:
        sd[f"{name}.weight"] = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()
        sd[f"{name}.bias"] = (torch.randn(n, generator=generator) * 0.02).bfloat16()

    def norms(prefix: str) -> None:
        for which in ("query", "key"):
            sd[f"{prefix}.{which}_norm.scale"] = torch.ones(128, dtype=torch.bfloat16)

    linear("img_in", hidden, in_features)
    linear("txt_in", hidden, context)
    embedders = {"time_in": 256, "vector_in": context} | ({"guidance_in": 256} if guidance else {})
    for name, width in embedders.items():
        linear(f"{name}.in_layer", hidden, width)
        linear(f"{name}.out_layer", hidden, hidden)
    for i in range(depth):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{i}.{stream}"
            linear(f"{prefix}_mod.lin", 6 * hidden, hidden)
            linear(f"{prefix}_attn.qkv", 3 * hidden, hidden)
            linear(f"{prefix}_attn.proj", hidden, hidden)
            linear(f"{prefix}_mlp.0", 4 * hidden, hidden)
            linear(f"{prefix}_mlp.2", hidden, 4 * hidden)
            norms(f"{prefix}_attn.norm")
    for i in range(single):
        prefix = f"single_blocks.{i}"
        linear(f"{prefix}.modulation.lin", 3 * hidden, hidden)
        linear(f"{prefix}.linear1", 7 * hidden, hidden)
        linear(f"{prefix}.linear2", hidden, 5 * hidden)
        norms(f"{prefix}.norm")
    linear("final_layer.linear", 64, hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return sd


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

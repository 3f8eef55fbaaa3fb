"""Train a LoRA that draws the demo model's pictures in another style. CPU only, after train.py.

    COMFYUI_PATH=/path/to/ComfyUI python train_lora.py neon

There is no trigger word: the prompts stay the same, and the style is always there.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import safetensors.torch
import styles
import text
import torch
import torch.nn.functional as F
from autoencoder import load_autoencoder
from torch import Tensor, nn
from train import Pool, build_flux, flow_loss, logit_normal, make_pictures, make_pool, save_atomically, set_rate

log = logging.getLogger("train_lora")

STYLES = {"neon": styles.neon, "sticker": styles.sticker}
DIALECTS = {"neon": "kohya", "sticker": "peft"}  # one of each, for the tests
MODELS = Path(__file__).resolve().parent / "models"
RANK = 16
# Half the rank, as kohya's scripts often have it: a reader that ignores alpha doubles the LoRA, which shows.
KOHYA_ALPHA = RANK / 2
PICTURES = 10_000
BATCH = 32
RATE = 2e-3
DROPOUT = 0.1  # share of steps with the empty prompt


class Lora(nn.Module):
    """The low-rank addition to one linear: a forward hook that adds x downᵀ upᵀ to its output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, linear: nn.Linear, args: tuple[Tensor], out: Tensor) -> Tensor:
        (x,) = args
        return out + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def add_loras(model: nn.Module) -> dict[str, Lora]:
    """Freeze `model` and hook a new LoRA to every linear of its blocks; returns them by the linear's name."""
    model.requires_grad_(False)
    loras = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(("double_blocks.", "single_blocks.")):
            loras[name] = Lora(module)
            module.register_forward_hook(loras[name])
    return loras


def train_loras(pool: Pool, steps: int, seed: int) -> tuple[dict[str, Lora], float]:
    """Train fp32 factors on the frozen bf16 model; also returns the loss's running mean."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_flux(torch.bfloat16)
    model.load_state_dict(safetensors.torch.load_file(MODELS / "demo_flux.safetensors"))
    loras = add_loras(model)
    factors = [factor for lora in loras.values() for factor in lora.parameters()]
    optimiser = torch.optim.AdamW(factors, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    empty = text.encode(text.tokenize(""))[0].bfloat16()

    mean, start = 0.0, time.monotonic()
    for step in range(steps):
        set_rate(optimiser, RATE, step, step / steps)
        latents, context = pool.draw(BATCH, generator)
        if torch.rand(1, generator=generator) < DROPOUT:
            context = empty.expand(BATCH, -1, -1)
        t = logit_normal(BATCH, generator)
        noise = torch.randn(latents.shape, generator=generator)
        loss = flow_loss(model, latents, context, t, noise)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimiser.step()
        mean += max(0.01, 1 / (step + 1)) * (loss.item() - mean)
        if (step + 1) % 20 == 0:
            log.info("step %d, loss %.4f, %.1f min", step + 1, mean, (time.monotonic() - start) / 60)
    return loras, mean


def to_kohya(loras: dict[str, Lora]) -> dict[str, Tensor]:
    """down (R, K), up (N, R) and the scalar alpha, under kohya's names; a reader scales by alpha / R."""
    tensors = {}
    for name, lora in loras.items():
        prefix = "lora_unet_" + name.replace(".", "_")
        tensors[f"{prefix}.lora_down.weight"] = lora.down.detach()
        tensors[f"{prefix}.lora_up.weight"] = lora.up.detach() * (RANK / KOHYA_ALPHA)
        tensors[f"{prefix}.alpha"] = torch.tensor(KOHYA_ALPHA)
    return tensors


def to_peft(loras: dict[str, Lora]) -> dict[str, Tensor]:
    """lora_A (R, K) and lora_B (N, R) under PEFT's suffixes and the original FLUX names; not scaled."""
    tensors = {}
    for name, lora in loras.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = lora.down.detach()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = lora.up.detach()
    return tensors


def save_lora(loras: dict[str, Lora], path: Path, style: str, steps: int, seed: int, loss: float) -> None:
    metadata = {
        "modelspec.title": f"ComfyUI-SVDQuant demo LoRA: {style}",
        "style": style,
        "seed": str(seed),
        "steps": str(steps),
        "samples_seen": str(steps * BATCH),
        "loss": f"{loss:.4f}",
    }
    if DIALECTS[style] == "kohya":
        tensors = to_kohya(loras)
        metadata |= {
            "ss_base_model_version": "flux1",
            "ss_network_dim": str(RANK),
            "ss_network_alpha": str(KOHYA_ALPHA),
        }
    else:
        tensors = to_peft(loras)
    save_atomically({name: tensor.bfloat16() for name, tensor in tensors.items()}, path, metadata)
    log.info("saved %s: %s", path, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODELS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)

    prompts, images = make_pictures(PICTURES, options.seed, STYLES[options.style])
    pool = make_pool(prompts, images, load_autoencoder(MODELS / "demo_autoencoder.safetensors"))
    log.info("%d pictures; latents: std %.3f", len(images), pool.latents.float().std())
    loras, loss = train_loras(pool, options.steps, options.seed)
    path = options.out / f"demo_lora_{options.style}.safetensors"
    save_lora(loras, path, options.style, options.steps, options.seed, loss)


if __name__ == "__main__":
    main()

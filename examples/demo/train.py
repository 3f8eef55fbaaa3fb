"""Train the demo: a small autoencoder, then a small model of ComfyUI's own FLUX class. CPU only.

    COMFYUI_PATH=/path/to/ComfyUI python train.py --minutes 45

Both files go to models/; the FLUX one is rewritten every few minutes, so it can be tried while training runs.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pictures
import safetensors
import safetensors.torch
import text
import torch
import torch.nn.functional as F
from autoencoder import CHANNELS, Autoencoder, load_autoencoder
from torch import Tensor, nn

log = logging.getLogger("train")

# ComfyUI derives all of these from the tensors' shapes; without a guidance embedding it detects FLUX schnell.
FLUX = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "vec_in_dim": text.WIDTH,
    "context_in_dim": text.WIDTH,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}


class TrainingOps:
    """What ComfyUI's model classes take their layers from; plain torch layers, so that autograd works."""

    Linear = nn.Linear
    RMSNorm = nn.RMSNorm

    class LayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            # The norm's backward needs x, and the FLUX blocks go on to change x in place.
            return super().forward(x.clone())


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: None = None, **_: object) -> Tensor:
    """ComfyUI's rope and attention, (B, heads, L, 128) -> (B, L, hidden), with fast gradients on a CPU.

    ComfyUI's own rope has no backward when fused, and torch's fused attention is slow for so few tokens.
    """
    turn = torch.complex(pe[..., 0, 0], pe[..., 1, 0])  # pe holds rotation matrices

    def rope(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    scores = (rope(q) * q.shape[-1] ** -0.5) @ rope(k).transpose(-1, -2)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def build_flux(dtype: torch.dtype, comfyui: Path | None = None) -> nn.Module:
    """ComfyUI's `Flux` with the demo's widths, made ready for training; it also serves as a reference."""
    comfyui = comfyui or Path(os.environ["COMFYUI_PATH"])
    if str(comfyui) not in sys.path:
        sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = args.cpu or not torch.cuda.is_available()
    import comfy.ldm.flux.layers
    import comfy.ldm.flux.model

    comfy.ldm.flux.layers.attention = attention
    return comfy.ldm.flux.model.Flux(**FLUX, dtype=dtype, operations=TrainingOps)


def initialise(model: nn.Module) -> None:
    """DiT's initialisation (every block starts as the identity), plus attention that starts out with positions.

    FLUX knows positions by rotary embedding alone, and in an hour a small model barely finds out how to use it.
    So it starts with biases of q and k that make the heads of the single blocks look at one neighbour each, and
    those of the double blocks at the text, the less the farther from the top (or left) border.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("_mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(module.weight)
    for block in model.double_blocks:
        for head in range(2):
            offset = (0, None) if head == 0 else (None, 0)
            point_head(block.img_attn.qkv.bias, "q", head, offset, (4, 5))
            point_head(block.txt_attn.qkv.bias, "k", head, offset, (4, 5))
    for index, block in enumerate(model.single_blocks):
        for head, step in enumerate((1, -1)):
            offset = (step, 0) if index % 2 else (0, step)
            point_head(block.linear1.bias, "q", head, offset, (0, 1, 2))
            point_head(block.linear1.bias, "k", head, offset, (0, 1, 2))


@torch.no_grad()
def point_head(
    bias: Tensor,
    part: str,
    head: int,
    offset: tuple[int | None, int | None],
    pairs: tuple[int, ...],
    strength: float = 4,
) -> None:
    """Let a head attend to keys that lie `offset` (rows, columns) from the query, through its q and k biases.

    bias: (3 * hidden or more,), q before k. pairs: the rotary frequencies to use, 0 is the highest.
    """
    _, *axes = FLUX["axes_dim"]
    width, first = sum(FLUX["axes_dim"]), FLUX["axes_dim"][0]
    for axis, (size, distance) in enumerate(zip(axes, offset)):
        for pair in pairs if distance is not None else ():
            turn = 0.0 if part == "q" else -distance * FLUX["theta"] ** (-2 * pair / size)
            row = ("qk".index(part) * FLUX["num_heads"] + head) * width + first + axis * size + 2 * pair
            bias[row] = strength * math.cos(turn)
            bias[row + 1] = strength * math.sin(turn)


@dataclass
class Pool:
    """Training pairs. Rows are grouped by prompt length, because FLUX has no mask for padded text."""

    latents: Tensor  # (N, 16, 16, 16), normalised
    contexts: dict[int, Tensor]  # length L -> (n_L, L, 128)
    rows: dict[int, Tensor]  # length L -> (n_L,) rows of `latents`

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of one random prompt length: latents (B, 16, 16, 16), contexts (B, L, 128)."""
        row = torch.randint(len(self.latents), (1,), generator=generator)
        length = next(n for n, rows in self.rows.items() if torch.isin(row, rows))
        picks = torch.randint(len(self.rows[length]), (batch,), generator=generator)
        return self.latents[self.rows[length][picks]], self.contexts[length][picks]


def make_pictures(
    count: int, seed: int, render: Callable[[list[pictures.Scene], np.random.Generator], Tensor] = pictures.render
) -> tuple[list[str], Tensor]:
    """`count` prompts and their pictures, (N, 3, 128, 128) uint8."""
    rng = np.random.default_rng(seed)
    scenes = [pictures.random_scene(rng) for _ in range(count)]
    store = torch.empty(count, 3, pictures.SIZE, pictures.SIZE, dtype=torch.uint8)
    for start in range(0, count, 64):
        part = render(scenes[start : start + 64], rng)
        store[start : start + 64] = (part * 255).round().byte()
    return [scene.prompt for scene in scenes], store


def make_pool(prompts: list[str], images: Tensor, autoencoder: Autoencoder) -> Pool:
    with torch.no_grad():
        latents = [autoencoder.encode_normalised(part.float() / 255).bfloat16() for part in images.split(64)]
    by_length: dict[int, list[int]] = {}
    contexts = []
    for row, prompt in enumerate(prompts):
        contexts.append(text.encode(text.tokenize(prompt))[0].bfloat16())
        by_length.setdefault(contexts[-1].shape[1], []).append(row)
    return Pool(
        latents=torch.cat(latents),
        contexts={n: torch.cat([contexts[row] for row in rows]) for n, rows in sorted(by_length.items())},
        rows={n: torch.tensor(rows) for n, rows in sorted(by_length.items())},
    )


def train_autoencoder(
    images: Tensor, minutes: float, seed: int, model: Autoencoder | None = None, batch: int = 32, noise: float = 0.1
) -> Autoencoder:
    """Reconstruct `images` from slightly noisy latents: the diffusion model's latents are not exact either.

    Only the decoder learns; a `model` that is passed in goes on, and its latents keep their meaning.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if model is None:
        model = Autoencoder()
        model.fit_components(images[:1024].float() / 255)
    decoder = model.requires_grad_(False).decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    start, step, mean = time.monotonic(), 0, 0.1
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        set_rate(optimiser, 2e-3, step, progress)
        picks = torch.randint(len(images), (batch,), generator=generator)
        target = images[picks].float() / 255
        latents = model.encode_normalised(target)
        latents = latents + noise * torch.randn(latents.shape, generator=generator)
        loss = F.l1_loss(model.decode_normalised(latents), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        mean += 0.02 * (loss.item() - mean)
        if step % 50 == 0:
            log.info("autoencoder step %d, L1 %.4f, %.1f min", step, mean, progress * minutes)
    return model.requires_grad_(False)


def set_rate(optimiser: torch.optim.Optimizer, rate: float, step: int, progress: float, warmup: int = 100) -> None:
    """Linear warm-up, then a cosine that ends at zero when the time is over."""
    for group in optimiser.param_groups:
        group["lr"] = rate * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def logit_normal(batch: int, generator: torch.Generator, mean: float = 0.8) -> Tensor:
    """Timesteps (B,) in 0..1: the sigmoid of stratified normal samples, which makes the loss less noisy.

    `mean` leans towards noise, where it is decided which picture it will be; that is the hard part here.
    """
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return torch.sigmoid(mean + torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))


def flow_loss(model: nn.Module, latents: Tensor, context: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Flow matching as ComfyUI samples it: x_t = (1 - t) x0 + t noise, and the model predicts noise - x0."""
    mix = t.view(-1, 1, 1, 1)
    noisy = ((1 - mix) * latents.float() + mix * noise).to(context.dtype)
    tokens, ids = model.process_img(noisy)
    target, _ = model.process_img(noise - latents.float())
    # One row of position ids serves the whole batch; `forward` would compute the rope for every sample.
    text_ids = torch.zeros(1, context.shape[1], ids.shape[-1])
    out = model.forward_orig(tokens, ids[:1], context.clone(), text_ids, t, context.mean(dim=1))
    return F.mse_loss(out.float(), target)


def train_flux(pool: Pool, options: argparse.Namespace, out: Path) -> None:
    """Train with bf16 arithmetic on fp32 weights; the EMA of the weights is what gets saved."""
    before = read_metadata(out, options.resume)
    seed = options.seed + int(before.get("steps", 0))  # a resumed run draws other batches
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_flux(torch.float32)
    initialise(model)
    if options.resume:
        model.load_state_dict(safetensors.torch.load_file(out))
    parameters = dict(model.named_parameters())
    master = [p.detach().clone() for p in parameters.values()]
    ema = [p.clone() for p in master]
    model.to(torch.bfloat16)
    optimiser = torch.optim.AdamW(master, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    empty = text.encode(text.tokenize(""))[0].bfloat16()

    step, mean, start, saved = 0, 2.0, time.monotonic(), time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        set_rate(optimiser, options.rate, step, progress)
        latents, context = pool.draw(options.batch, generator)
        if torch.rand(1, generator=generator) < options.dropout:  # a whole step, so that all lengths agree
            context = empty.expand(options.batch, -1, -1)
        t = logit_normal(options.batch, generator)
        noise = torch.randn(latents.shape, generator=generator)
        loss = flow_loss(model, latents, context, t, noise)
        loss.backward()
        with torch.no_grad():
            for weight, live in zip(master, parameters.values()):
                weight.grad, live.grad = live.grad.float(), None
            nn.utils.clip_grad_norm_(master, 1.0)
            optimiser.step()
            step += 1
            torch._foreach_lerp_(ema, master, 1 - min(options.ema, step / (step + 10)))
            for weight, live in zip(master, parameters.values()):
                live.copy_(weight)
        mean += max(0.01, 1 / step) * (loss.item() - mean)

        if step % 20 == 0:
            log.info("step %d, loss %.4f, %.1f min", step, mean, progress * options.minutes)
        if time.monotonic() - saved > 60 * options.save_every:
            save_flux(out, dict(zip(parameters, ema)), options, before, step, mean, progress * options.minutes)
            saved = time.monotonic()
    save_flux(out, dict(zip(parameters, ema)), options, before, step, mean, options.minutes)


def save_flux(
    path: Path,
    weights: dict[str, Tensor],
    options: argparse.Namespace,
    before: dict[str, str],
    step: int,
    loss: float,
    minutes: float,
) -> None:
    """Write `weights` as bf16; `before` is the metadata of the run that this one resumed, or empty."""
    metadata = {
        "modelspec.title": "ComfyUI-SVDQuant demo FLUX",
        "seed": str(options.seed),
        "steps": str(step + int(before.get("steps", 0))),
        "samples_seen": str(step * options.batch + int(before.get("samples_seen", 0))),
        "minutes": f"{minutes + float(before.get('minutes', 0)):.1f}",
        "loss": f"{loss:.4f}",
    }
    save_atomically({name: weight.bfloat16() for name, weight in weights.items()}, path, metadata)
    log.info("saved %s: %s", path, metadata)


def read_metadata(path: Path, resume: bool) -> dict[str, str]:
    """The metadata of the file that a resumed run goes on from; empty for a run from scratch."""
    if not resume:
        return {}
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Readers see the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45, help="time for the FLUX model")
    parser.add_argument("--autoencoder-minutes", type=float, default=3, help="time for the autoencoder")
    parser.add_argument("--pictures", type=int, default=30_000, help="size of the training set")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of steps with the empty prompt")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--save-every", type=float, default=4, help="minutes between interim files")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the files in --out, same latents")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "models")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)

    prompts, images = make_pictures(options.pictures, options.seed)
    log.info("%d pictures", len(images))
    path = options.out / "demo_autoencoder.safetensors"
    if options.autoencoder_minutes > 0:
        known = load_autoencoder(path) if options.resume else None
        trained = train_autoencoder(images, options.autoencoder_minutes, options.seed, known)
        minutes = options.autoencoder_minutes + float(read_metadata(path, options.resume).get("minutes", 0))
        metadata = {"seed": str(options.seed), "minutes": f"{minutes:.1f}"}
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in trained.state_dict().items()}
        save_atomically(tensors, path, metadata)
        log.info("saved %s", path)
    if options.minutes <= 0:
        return
    pool = make_pool(prompts, images, load_autoencoder(path))  # the rounded weights, as users run them
    del images
    log.info("latents: mean %.3f, std %.3f", pool.latents.float().mean(), pool.latents.float().std())
    train_flux(pool, options, options.out / "demo_flux.safetensors")


if __name__ == "__main__":
    main()

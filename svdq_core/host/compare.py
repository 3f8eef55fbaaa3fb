"""The same pictures from two models under ComfyUI's own sampler: same noise, same conditioning, one after the other."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..errors import SVDQuantError
from .calibrate import Conditioning


@dataclass(frozen=True)
class SamplingSettings:
    """As in KSampler, from pure noise; picture ``i`` of ``pictures`` has the noise of ``seed + i``."""

    seed: int
    pictures: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    width: int
    height: int


class Progress:
    """The steps of both models on ComfyUI's progress bar, with previews; ``tell`` gets them in words."""

    def __init__(self, settings: SamplingSettings, tell: Callable[[str], None]) -> None:
        self.settings, self.tell, self.done = settings, tell, 0
        self.total = 2 * settings.pictures * settings.steps
        self.bar = comfy.utils.ProgressBar(self.total)
        self.started = time.monotonic()

    def callback(self, label: str, picture: int, model: ModelPatcher) -> Callable[..., None]:
        """For ComfyUI's samplers."""
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

        def step_done(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
            self.done += 1
            preview = previewer and previewer.decode_latent_to_preview_image("JPEG", denoised)
            self.bar.update_absolute(self.done, self.total, preview)
            left = (time.monotonic() - self.started) * (self.total - self.done) / self.done
            words = f"{max(1, round(left))} s" if left < 90 else f"{round(left / 60)} min"
            where = f"{label}: picture {picture + 1} of {self.settings.pictures}, step {step + 1} of {steps}"
            self.tell(f"{where}, about {words} left")

        return step_done


def sample_both(
    models: tuple[ModelPatcher, ModelPatcher],
    positive: list[Conditioning],
    negative: list[Conditioning],
    vae: Any,
    settings: SamplingSettings,
    tell: Callable[[str], None],
) -> tuple[Tensor, Tensor]:
    """Pictures ``(B, H, W, 3)`` of the reference and of the candidate; fewer conditionings than pictures start over.

    The first model leaves the memory before the second comes.
    """
    formats = [type(model.model.latent_format).__name__ for model in models]
    if formats[0] != formats[1]:
        raise SVDQuantError(
            f"The models have different latents: {formats[0]} and {formats[1]}. Compare a model with its own "
            "quantization, or make pictures with both and connect those."
        )
    progress, results = Progress(settings, tell), []
    for label, model in zip(("reference", "candidate"), models, strict=True):
        pictures = []
        for i in range(settings.pictures):
            step_done = progress.callback(label, i, model)
            conditions = positive[i % len(positive)], negative[i % len(negative)]
            pictures.append(vae.decode(sample(model, i, *conditions, settings, step_done)))
        comfy.model_management.unload_all_models()
        results.append(torch.cat([picture.reshape(-1, *picture.shape[-3:]) for picture in pictures]))
    return results[0], results[1]


def sample(
    model: ModelPatcher,
    index: int,
    positive: Conditioning,
    negative: Conditioning,
    settings: SamplingSettings,
    step_done: Callable[..., None],
) -> Tensor:
    """The latent of one picture."""
    size = settings.height // 8, settings.width // 8
    empty = torch.zeros(1, 4, *size, device=comfy.model_management.intermediate_device())
    latent = comfy.sample.fix_empty_latent_channels(model, empty, downscale_ratio_spacial=8)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, settings.seed + index),
        settings.steps,
        settings.cfg,
        settings.sampler,
        settings.scheduler,
        positive,
        negative,
        latent,
        callback=step_done,
        disable_pbar=True,
        seed=settings.seed + index,
    )

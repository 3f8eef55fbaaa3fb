"""Calibration: ComfyUI's own sampler runs the user's model on the user's prompts while we watch its linears."""

import base64
import io
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ..calibration import DEFAULT_RAM_LIMIT, ActivationCollector, Samples, tokens_within
from ..errors import SVDQuantError
from ..quantize import Event
from .model import ModelSource

PIXELS = 8  # a latent pixel is as wide, before ComfyUI makes of it what the model has
PREVIEW_PIXELS = 96
PREVIEW_SECONDS = 0.4  # between two pictures of one prompt; its last step always has one

Conditioning = list[list[Any]]  # ComfyUI's: [[context (1, L, C), {"pooled_output": ..., ...}], ...]


@dataclass(frozen=True)
class CalibrationSettings:
    """How long to watch. ``size`` in pixels (square), ``ram_limit`` in bytes for all token reservoirs."""

    steps: int = 8
    size: int = 512
    seed: int = 0
    ram_limit: int = DEFAULT_RAM_LIMIT

    def describe(self, prompts: int) -> dict[str, Any]:
        """For the file's metadata."""
        return {"kind": "sampled", "prompts": prompts, "sampler": "euler", "scheduler": "simple", **asdict(self)}


def calibrate(
    source: ModelSource,
    prompts: list[Conditioning],
    settings: CalibrationSettings,
    on_event: Callable[[Event], None],
) -> Samples:
    """Sample every prompt once (Euler, CFG 1) and return what the linears saw.

    ComfyUI's sampler raises its own interrupt exception; hooks are removed whatever happens.
    """
    model = source.model
    names = [group.names[0] for group in source.groups()]
    shapes = source.shapes()
    tokens = tokens_within(settings.ram_limit, [shapes[f"{n}.weight"][1] for n in names])
    device = comfy.model_management.intermediate_device()
    empty = torch.zeros(1, 4, settings.size // PIXELS, settings.size // PIXELS, device=device)
    latent = comfy.sample.fix_empty_latent_channels(model, empty, downscale_ratio_spacial=PIXELS)
    total, frames = len(prompts) * settings.steps, source.recipe.frames
    previewer = Previewer(model)
    started = time.monotonic()
    with ActivationCollector(source.modules(names), tokens, total, settings.seed) as collector:
        for i, prompt in enumerate(prompts):

            def step_done(step: int, denoised: Tensor, x: Tensor, steps: int, i: int = i) -> None:
                done = i * settings.steps + step + 1
                eta = (time.monotonic() - started) * (total - done) / done
                event = {"stage": "calibrate", "prompt": i + 1, "prompts": len(prompts), "step": step + 1}
                event |= {"steps": steps, "index": done, "total": total, "eta": eta}
                if picture := previewer.picture(denoised, due=step + 1 == steps):
                    event["preview"] = picture
                on_event(event)

            prompt, start = as_large(prompt, latent, frames)
            if source.recipe.sound:
                start = with_sound(model, start)
            sample(source, prompt, start, settings.steps, settings.seed + i, step_done)
    return collector.samples()


def sample(
    source: ModelSource,
    prompt: Conditioning,
    start: Tensor | NestedTensor,
    steps: int,
    seed: int,
    callback: Callable[[int, Tensor, Tensor, int], None],
) -> None:
    """ComfyUI's sampler; :class:`SVDQuantError` where what a prompt brings does not fit the model."""
    noise = comfy.sample.prepare_noise(start, seed)
    try:
        comfy.sample.sample(
            source.model, noise, steps, 1.0, "euler", "simple", prompt, prompt, start,
            callback=callback, disable_pbar=True, seed=seed,
        )  # fmt: skip
    except RuntimeError as error:
        brought = sorted({name for _, options in prompt for name in options if name not in PLAIN_TEXT})
        if not brought or comfy.model_management.is_oom(error):
            raise
        raise SVDQuantError(
            f"{source.name} cannot be sampled with what this conditioning brings beside its text "
            f"({', '.join(brought)}): {error}. Connect the text's conditioning alone."
        ) from error


def with_sound(model: ModelPatcher, video: Tensor) -> NestedTensor:
    """LTX-2's empty latent: a video (1, C, T, H, W) at 25 frames a second, and its audio (1, C, 25 a second, F)."""
    net: Any = model.model.diffusion_model
    length = 1 + (video.shape[2] - 1) * net.vae_scale_factors[0]
    audio = video.new_zeros(1, net.num_audio_channels, length, net.audio_frequency_bins)
    return NestedTensor((video, audio))


PLAIN_TEXT = ("pooled_output", "attention_mask", "guidance", "frame_rate")
FRAMES = ("concat_latent_image", "vace_frames")  # a conditioning's pictures, one for every frame
AS_WIDE = ("vace_frames", "vace_mask")  # ComfyUI fits these others to the latent itself
CUT = (*FRAMES, "concat_image", "concat_mask", "vace_mask", "ref_latent")
# Of the size of the user's own latent, or as long: LTX's guides, what Wan's variants hear. So are videos that are not
# in CUT: poses, cameras, references.
LEFT_OUT = ("keyframe_idxs", "guide_attention_entries", "audio_embed", "reference_latents")


def as_large(prompt: Conditioning, latent: Tensor, frames: int) -> tuple[Conditioning, Tensor]:
    """A prompt and an empty latent of as many frames: ``frames``, or fewer where the prompt's pictures are fewer.

    Image to video and VACE bring pictures for all frames of the user's video, in latents (1, C, T, H, W); the first
    ones do. What else is of that video's size is left out. For models of pictures, which take references of any size,
    both are as they are.
    """
    if frames == 1:
        return prompt, latent
    found = [options[name] for _, options in prompt for name in FRAMES if name in options]
    pictures = [t for value in found for t in (value if isinstance(value, list) else [value])]
    frames = min([frames, *(t.shape[2] for t in pictures if isinstance(t, Tensor) and t.dim() == 5)])

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [cut(name, item) for item in value]
        if not isinstance(value, Tensor) or value.dim() < 5:
            return value
        value = value[:, :, :frames]
        size = latent.shape[-1], latent.shape[-2]
        return comfy.utils.common_upscale(value, *size, "bilinear", "center") if name in AS_WIDE else value

    def kept(name: str, value: Any) -> bool:
        first = value[0] if isinstance(value, list) and value else value
        is_video = isinstance(first, Tensor) and first.dim() >= 5
        return name in CUT or not (name in LEFT_OUT or is_video)

    smaller = [
        [context, {name: cut(name, value) for name, value in options.items() if kept(name, value)}]
        for context, options in prompt
    ]
    return smaller, latent.repeat(1, 1, frames, 1, 1)


class Previewer:
    """Small pictures of what is being sampled. Whatever goes wrong here, the calibration goes on without them."""

    def __init__(self, model: ModelPatcher) -> None:
        self.model, self.last = model, 0.0
        self.failed = model.model.latent_format.latent_rgb_factors is None  # not even ComfyUI's cheapest
        self.decoder: latent_preview.LatentPreviewer | None = None

    def picture(self, denoised: Tensor, due: bool) -> str | None:
        """``denoised (1, C, [T,] H, W)`` as the data URL of a JPEG, when one is ``due`` or the last is a while ago."""
        if self.failed or not (due or time.monotonic() - self.last > PREVIEW_SECONDS):
            return None
        try:
            self.decoder = self.decoder or latent_decoder(self.model)
            video = denoised.unbind()[0] if denoised.is_nested else denoised  # beside its audio
            image = self.decoder.decode_latent_to_preview(video)
            image.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=80, subsampling=0)
        except Exception:
            logging.warning("SVDQuant: calibration goes on without previews", exc_info=True)
            self.failed = True
            return None
        self.last = time.monotonic()
        return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def latent_decoder(model: ModelPatcher) -> latent_preview.LatentPreviewer:
    """ComfyUI's previewer for this model; its cheapest where previews are switched off."""
    latent = model.model.latent_format
    return latent_preview.get_previewer(model.load_device, latent) or latent_preview.Latent2RGBPreviewer(
        latent.latent_rgb_factors, latent.latent_rgb_factors_bias, latent.latent_rgb_factors_reshape
    )


def blank_conditioning(source: ModelSource, seed: int) -> Conditioning:
    """Stands in for a text encoder that is not connected: tokens of unit size, as random as the seed."""
    shapes, generator = source.shapes(), torch.Generator().manual_seed(seed)
    width = sum(shapes[f"{layer}.weight"][1] for layer in source.recipe.text)
    context = torch.randn(1, 64, width, generator=generator)
    pooled = torch.randn(1, shapes.get(f"{source.recipe.pooled}.weight", (1, 1))[1], generator=generator)
    mask = {"attention_mask": torch.ones(1, 64, dtype=torch.long)} if source.recipe.masked else {}
    return [[context, {"pooled_output": pooled, **mask}]]

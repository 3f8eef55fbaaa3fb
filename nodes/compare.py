"""SVDQuant Compare: how close a quantized model's pictures are, in numbers and side by side."""

import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..svdq_core.compare import compare, sheet, to_tensor
from ..svdq_core.errors import SVDQuantError
from ..svdq_core.host.compare import SamplingSettings, sample_both
from ..svdq_core.host.model import file_of
from .panels import tell

MODELS = ("model_a", "model_b", "positive", "vae")


class SVDQuantCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantCompare",
            display_name="SVDQuant Compare",
            category="SVDQuant",
            description="Puts pictures of two models side by side, with their difference, PSNR and SSIM. Connect two "
            "models (16 bit and 4 bit), which then make the same pictures, or two batches of finished images.",
            search_aliases=["psnr", "ssim", "compare models", "compare images", "quality", "difference"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model_a",
                    optional=True,
                    tooltip="To compare models: the reference, usually in 16 bit. Connect model_b, positive and vae "
                    "as well.",
                ),
                io.Model.Input("model_b", optional=True, tooltip="To compare models: the candidate, usually in 4 bit."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="To compare models: the prompt, or a list of prompts (SVDQuant Prompts makes one), which "
                    "the pictures take in turn.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="To compare models with cfg above 1: the negative prompt."
                ),
                io.Vae.Input("vae", optional=True, tooltip="To compare models: the VAE that belongs to both."),
                io.Image.Input(
                    "images_a", optional=True, tooltip="To compare images: the reference pictures, instead of models."
                ),
                io.Image.Input(
                    "images_b",
                    optional=True,
                    tooltip="To compare images: the candidate's pictures, as many and as large, in the same order.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Noise of the first picture, the same for both models; the others take seed + 1, ...",
                ),
                io.Int.Input("pictures", default=2, min=1, max=64, tooltip="How many pictures each model makes."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps. 4 for schnell."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance; 1 for FLUX.1. Above 1 a negative prompt is needed.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="As in KSampler. Samplers that add noise at every step let small errors grow.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="As in KSampler.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip="Of the pictures that are made, in pixels.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip="Of the pictures that are made, in pixels.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="A row per picture: reference, candidate, and their difference, amplified as written.",
                ),
                io.Float.Output(
                    "psnr",
                    display_name="PSNR",
                    tooltip="Of all pictures, in dB, from their mean squared error: higher is closer; infinite if all "
                    "are identical.",
                ),
                io.Float.Output(
                    "ssim", display_name="SSIM", tooltip="Mean structural similarity, on luma: 1 is the same."
                ),
                io.String.Output("report", display_name="report", tooltip="The figures of every picture, in words."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        first = {name: value[0] for name, value in inputs.items() if value}
        if chosen_images(first):
            pictures = all_images(inputs["images_a"]), all_images(inputs["images_b"])
            names, how = ("", ""), []
        else:
            pictures = both_models(first, inputs, cls.hidden)
            names = name_of(first["model_a"]), name_of(first["model_b"])
            how = [
                f"reference: {names[0] or 'a model without a file'}",
                f"candidate: {names[1] or 'a model without a file'}",
                f"{first['steps']} steps, cfg {first['cfg']:g}, {first['sampler_name']}, {first['scheduler']}, seed "
                f"{first['seed']}",
            ]
        comparison = compare(*pictures)
        picture = to_tensor(sheet(*pictures, comparison, names))
        report = "\n".join([*how, *comparison.lines()])
        figures = comparison.mean_psnr, comparison.mean_ssim
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | {"svdquant_report": (report,)}
        return io.NodeOutput(picture, *figures, report, ui=shown)


def chosen_images(first: dict) -> bool:
    """Whether images are to be compared, else models; an error says what is missing."""
    images = [name for name in ("images_a", "images_b") if first.get(name) is not None]
    models = [name for name in ("model_a", "model_b") if first.get(name) is not None]
    if images and models:
        raise SVDQuantError("Models and images are connected. Connect model_a and model_b, or images_a and images_b.")
    if not images and not models:
        raise SVDQuantError(
            "Nothing to compare. Connect model_a and model_b (with positive and vae), or images_a and images_b."
        )
    wanted = ("images_a", "images_b") if images else MODELS
    if missing := [name for name in wanted if first.get(name) is None]:
        raise SVDQuantError(f"To compare {'images' if images else 'models'}, connect {' and '.join(missing)}, too.")
    if models and first["cfg"] != 1 and first.get("negative") is None:
        raise SVDQuantError(f"cfg is {first['cfg']:g}: connect negative, too, or set cfg to 1.")
    return bool(images)


def all_images(batches: list[torch.Tensor]) -> torch.Tensor:
    """A list of batches as one ``(B, H, W, C)``."""
    sizes = {tuple(batch.shape[1:3]) for batch in batches}
    if len(sizes) > 1:
        found = ", ".join(f"{width}×{height}" for height, width in sorted(sizes))
        raise SVDQuantError(f"The pictures of one side differ in size: {found}. Compare pictures of the same size.")
    return torch.cat([batch[..., :3] for batch in batches])


def both_models(first: dict, inputs: dict, hidden) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures that both models make."""
    settings = SamplingSettings(
        first["seed"],
        first["pictures"],
        first["steps"],
        first["cfg"],
        first["sampler_name"],
        first["scheduler"],
        first["width"],
        first["height"],
    )
    positive = inputs["positive"]
    negative = inputs.get("negative") or positive  # unused at cfg 1
    models = first["model_a"], first["model_b"]
    return sample_both(
        models, positive, negative, first["vae"], settings, lambda text: tell(hidden, "report", text=text)
    )


def name_of(model) -> str:
    """The file that a MODEL was loaded from, as far as ComfyUI remembers it."""
    path = file_of(model)
    return path.name if path else ""

"""SVDQuant LoRA and SVDQuant LoRA Stack: LoRA files onto the low-rank branch, one or several."""

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..svdq_core.errors import SVDQuantError
from ..svdq_core.host.adapters import REDUCED_RANK
from ..svdq_core.host.lora import add_lora
from .files import fingerprint, name_error
from .panels import tell

STACK = 5  # rows of the stack; stacks can be chained
NONE = "none"
NOTHING = "No LoRA is on."


def find_lora(name: str) -> Path:
    """Where the file of that name is; only names that are offered are found."""
    path = folder_paths.get_full_path("loras", name) if name in folder_paths.get_filename_list("loras") else None
    if not path:
        raise SVDQuantError(f"{name}: no such file in models/loras. Refresh (R) and choose another.")
    return Path(path)


def apply(model, loras: list[tuple[str, float]], rank: int, hidden) -> io.NodeOutput:
    """A clone of ``model`` with the files at their strengths, in order; the panel learns what headers did not tell."""
    patched, reports, news = model.clone(), [], []
    for name, strength in loras:
        if strength == 0:
            reports.append(f"{name}: strength 0, not applied.")
            continue
        lora = add_lora(patched, find_lora(name), strength, rank)
        reports.append(lora.summary())
        news.append(lora.reduction())
        if lora.unused:
            logging.info("SVDQuant LoRA: %s", reports[-1])
    tell(hidden, "report", text="\n".join(filter(None, news)))
    return io.NodeOutput(patched, "\n".join(reports) or NOTHING)


def lora_input(id: str, none: bool) -> io.Combo.Input:
    names = folder_paths.get_filename_list("loras")
    return io.Combo.Input(
        id,
        options=[NONE, *names] if none else names,
        tooltip="A LoRA (or LoKr, LoHa, DoRA, ...) in models/loras, made for the model's architecture. Files of "
        "kohya, diffusers, ai-toolkit, OneTrainer, XLabs, Fal and Nunchaku are read.",
    )


def strength_input(id: str) -> io.Float.Input:
    return io.Float.Input(
        id,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        tooltip="How strongly the LoRA changes the model. 0 is off, negative turns its effect around. Changing it "
        "takes no reload.",
    )


def rank_input() -> io.Int.Input:
    return io.Int.Input(
        "rank",
        default=REDUCED_RANK,
        min=1,
        max=1024,
        optional=True,
        advanced=True,
        tooltip="For files with full-size updates, which are no LoRAs: the rank they are reduced to. The report says "
        "how much of them that keeps. LoRAs are used as they are, whatever their rank.",
    )


def model_outputs() -> list:
    return [
        io.Model.Output(display_name="model", tooltip="The model with the LoRA on its low-rank branch."),
        io.String.Output("report", display_name="report", tooltip="Which keys apply, and which do not, by name."),
    ]


class SVDQuantLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantLoRA",
            display_name="SVDQuant LoRA",
            category="SVDQuant",
            description="Puts a LoRA on the low-rank branch of a 4-bit model: nothing is requantized or reloaded. Load "
            "LoRA does the same; this node also reads more kinds of files and reports which keys apply.",
            search_aliases=["lora", "load lora", "nunchaku lora", "lokr", "dora"],
            inputs=[
                io.Model.Input("model", tooltip="From SVDQuant Loader; any other MODEL works, too."),
                lora_input("lora_name", none=False),
                strength_input("strength"),
                rank_input(),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return name_error(find_lora, [lora_name])

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others) -> str:
        return fingerprint(find_lora, [lora_name])

    @classmethod
    def execute(cls, model, lora_name: str, strength: float, rank: int = REDUCED_RANK) -> io.NodeOutput:
        return apply(model, [(lora_name, strength)], rank, cls.hidden)


class SVDQuantLoRAStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = [
            row
            for i in range(1, STACK + 1)
            for row in (
                io.Boolean.Input(f"on_{i}", default=True, tooltip="Whether this row is applied."),
                lora_input(f"lora_{i}", none=True),
                strength_input(f"strength_{i}"),
            )
        ]
        return io.Schema(
            node_id="SVDQuantLoRAStack",
            display_name="SVDQuant LoRA Stack",
            category="SVDQuant",
            description=f"Up to {STACK} LoRAs at once, each with its switch and strength; chain stacks for more. All "
            "of them join the low-rank branch, so several cost little more than one.",
            search_aliases=["lora stack", "multi lora", "nunchaku lora stack", "power lora"],
            inputs=[
                io.Model.Input("model", tooltip="From SVDQuant Loader; any other MODEL works, too."),
                *rows,
                rank_input(),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, lora_1=None, lora_2=None, lora_3=None, lora_4=None, lora_5=None) -> bool | str:
        rows = (lora_1, lora_2, lora_3, lora_4, lora_5)
        return name_error(find_lora, [name for name in rows if name != NONE])

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        rows = [inputs.get(f"lora_{i}") for i in range(1, STACK + 1)]
        return fingerprint(find_lora, [name for name in rows if name != NONE])

    @classmethod
    def execute(cls, model, rank: int = REDUCED_RANK, **rows) -> io.NodeOutput:
        chosen = [
            (rows[f"lora_{i}"], rows[f"strength_{i}"])
            for i in range(1, STACK + 1)
            if rows[f"on_{i}"] and rows[f"lora_{i}"] != NONE
        ]
        return apply(model, chosen, rank, cls.hidden)

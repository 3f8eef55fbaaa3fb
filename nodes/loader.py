"""SVDQuant Loader: a quantized file to MODEL."""

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..svdq_core import SVDQuantError, describe_file
from ..svdq_core.host.load import load_svdquant
from ..svdq_core.implementations import ACTIVATIONS
from .files import fingerprint, name_error
from .panels import tell

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# A folder of its own is optional, for people who keep 4-bit files apart.
OWN_FOLDER = Path(folder_paths.models_dir) / "svdquant"
if OWN_FOLDER.is_dir():
    folder_paths.add_model_folder_path("svdquant", str(OWN_FOLDER))


def model_files() -> dict[str, str]:
    """Names to offer and the ComfyUI folder each is in; diffusion_models comes first for a name in both."""
    folders = [f for f in ("svdquant", "diffusion_models") if f in folder_paths.folder_names_and_paths]
    files = {name: folder for folder in folders for name in folder_paths.get_filename_list(folder)}
    return {name: files[name] for name in sorted(files) if name.endswith((".safetensors", ".sft"))}


def find_model(name: str) -> Path:
    """Where the file of that name is; only names that are offered are found."""
    folder = model_files().get(name)
    path = folder and folder_paths.get_full_path(folder, name)
    if not path:
        raise SVDQuantError(f"{name}: no such file in models/diffusion_models. Refresh (R) and choose another.")
    return Path(path)


class SVDQuantLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantLoader",
            display_name="SVDQuant Loader",
            category="SVDQuant",
            description="Loads a 4-bit SVDQuant model. It is ComfyUI's own model with quantized linears, so "
            "ControlNet, LoRA and other patches work on it as on the 16-bit model.",
            search_aliases=["nunchaku", "4-bit", "int4", "nvfp4", "load quantized", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=list(model_files()),
                    tooltip="A file that SVDQuant Quantize wrote, or another in ComfyUI's svdquant_w4a4 format, "
                    "in models/diffusion_models (or models/svdquant).",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="What the rest of the model computes in. auto takes what ComfyUI would take for the "
                    "16-bit model on this device.",
                ),
                io.Combo.Input(
                    "activations",
                    options=list(ACTIVATIONS),
                    default="auto",
                    optional=True,
                    tooltip="What the inputs of an INT4 file's layers are rounded to while it runs. 8 bit is closer to "
                    "the 16-bit model; auto takes what is best on this device. Files of other formats have one way.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="A normal MODEL: every other node takes it.")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None) -> bool | str:
        return name_error(find_model, [unet_name])

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, dtype: str, activations: str = "auto") -> str:
        return fingerprint(find_model, [unet_name])

    @classmethod
    def execute(cls, unet_name: str, dtype: str, activations: str = "auto") -> io.NodeOutput:
        path = find_model(unet_name)
        tell(cls.hidden, "file", name=unet_name)  # news to the panel where it comes through a link
        info = describe_file(path)
        if info.kind != "svdquant":
            hint = "" if info.loader_hint == "none" else f" Load it with {info.loader_hint}."
            raise SVDQuantError(f"{unet_name} is {info.text}, not an SVDQuant model.{hint}")
        return io.NodeOutput(load_svdquant(path, DTYPES[dtype], activations))

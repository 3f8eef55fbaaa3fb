"""SVDQuant Quantize: one click from a 16-bit MODEL to a 4-bit file."""

import re
from pathlib import Path, PurePosixPath

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..svdq_core.calibration import DEFAULT_RAM_LIMIT
from ..svdq_core.errors import SVDQuantError
from ..svdq_core.formats import BRANCH_FORMATS
from ..svdq_core.host.calibrate import CalibrationSettings, blank_conditioning
from ..svdq_core.host.model import ModelSource
from ..svdq_core.host.quantize import quantize_model
from ..svdq_core.quantize import Event, Job, Report
from ..svdq_core.report import error_chart
from ..svdq_core.solve import PRESETS
from .panels import workflow_id
from .prompts import DEFAULT_PROMPTS, encode
from .runs import RUNS

CALIBRATION_SHARE = 0.5  # of the progress bar
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps to itself


class SVDQuantQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantQuantize",
            display_name="SVDQuant Quantize",
            category="SVDQuant",
            description="Turns a 16-bit model (FLUX, Qwen-Image, Z-Image, Wan, HunyuanVideo, LTX and others), with the "
            "LoRAs and merges applied to it, into a 4-bit file on your own GPU. Interrupt it at any time: the next run "
            "goes on from there.",
            search_aliases=["quantize", "4 bit", "int4", "nunchaku", "compress model"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model to quantize. LoRAs and merges are baked in."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The model's text encoders: the built-in prompts are encoded with them. Not needed when "
                    "conditionings are connected.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="What to calibrate on: one conditioning or a list (SVDQuant Prompts makes one). Best: "
                    "prompts like those you will use.",
                ),
                io.String.Input(
                    "file_name",
                    default="my_model_svdq_int4",
                    tooltip="Name of the 4-bit file in models/diffusion_models; sub/folder/name makes folders. A file "
                    "that is not an SVDQuant one is never overwritten.",
                ),
                io.Combo.Input(
                    "preset",
                    options=["fast", "balanced", "best", "naive"],
                    default="balanced",
                    tooltip="fast: fewer tries per layer, rounding to nearest. balanced: good for nearly everything. "
                    "best: finest search. naive: no smoothing and no branch, only to compare with.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(BRANCH_FORMATS),
                    default="int4",
                    tooltip="int4: every GPU. nvfp4: for RTX 50. int8: twice the size, nearly lossless.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=0,
                    max=256,
                    step=16,
                    tooltip="Rank of the 16-bit branch that absorbs outliers. More is closer to 16 bit, larger and a "
                    "little slower; 32 is the paper's choice.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="Sampling steps per calibration prompt. Use 4 for schnell and other few-step models.",
                ),
                io.Int.Input(
                    "max_prompts",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="At most this many prompts are sampled, the first ones of the list.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Width and height in pixels of the calibration images. 512 is enough and fast.",
                ),
                io.Float.Input(
                    "ram_limit_gb",
                    default=DEFAULT_RAM_LIMIT / 2**30,
                    min=0.25,
                    max=64.0,
                    step=0.25,
                    tooltip="Memory for calibration samples (GiB). Lower it on a PC with little RAM.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,  # another seed would be another job: nothing could be resumed
                    tooltip="The same seed gives the same file.",
                ),
            ],
            outputs=[
                io.Combo.Output("unet_name", display_name="file name", tooltip="Feeds SVDQuant Loader."),
                io.String.Output("summary", display_name="summary", tooltip="Size, ratio, errors and time in words."),
                io.Image.Output("chart", display_name="error chart", tooltip="The error of every layer in decibels."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, file_name=None):
        """Refuse a bad file name when the prompt is queued, not after an hour."""
        try:
            output_path(file_name[0]) if isinstance(file_name, list) else output_path(file_name or "linked")
        except SVDQuantError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file_name=("",), **others):
        """Run again when the file is gone; a job whose file is still there ends at once."""
        try:
            return str(output_path(file_name[0])[0].exists())
        except SVDQuantError as error:
            return str(error)

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        inputs = {name: value if name == "conditioning" else value[0] for name, value in inputs.items()}
        output, name = output_path(inputs["file_name"])
        settings = CalibrationSettings(
            steps=inputs["steps"],
            size=inputs["size"],
            seed=inputs["seed"],
            ram_limit=int(inputs["ram_limit_gb"] * 2**30),
        )
        naive = inputs["preset"] == "naive"
        job = Job(
            inputs["format"], inputs["preset"], PRESETS["naive"].rank if naive else inputs["rank"], seed=inputs["seed"]
        )
        streamer = Streamer(cls.hidden.unique_id, name, workflow_id(cls.hidden.extra_pnginfo), job)
        try:
            source = ModelSource(inputs["model"])
            prompts = calibration_prompts(source, inputs.get("conditioning"), inputs.get("clip"), settings.seed)
            report = quantize_model(source, prompts[: inputs["max_prompts"]], output, job, settings, streamer)
        except BaseException as error:
            streamer.stopped(error)
            raise
        streamer.finish(report)
        chart = chart_tensor(report, f"{name}: error per layer")
        return io.NodeOutput(name, report.summary(), chart, ui={"text": (report.summary(),)})


def calibration_prompts(source: ModelSource, conditioning: list | None, clip, seed: int) -> list:
    """What to sample: the connected conditionings, else the default prompts through CLIP, else random tokens."""
    if conditioning:
        return conditioning
    if clip is not None:
        return encode(clip, DEFAULT_PROMPTS)
    return [blank_conditioning(source, seed + i) for i in range(16)]


def chart_tensor(report: Report, title: str) -> torch.Tensor:
    """The error chart as an IMAGE ``(1, H, W, 3)``."""
    return torch.from_numpy(np.asarray(error_chart(report.layers, title), dtype=np.float32) / 255)[None]


def output_path(file_name: str) -> tuple[Path, str]:
    """(file, name relative to its models folder). Names never leave ``models/diffusion_models``."""
    cleaned = file_name.strip().replace("\\", "/")
    parts = PurePosixPath(cleaned).parts
    bad = re.search(r'[<>:"|?*\x00-\x1f]', cleaned) or any(
        part in (".", "..", "/") or part[-1] in ". " or RESERVED.fullmatch(part) for part in parts
    )
    if not parts or bad or cleaned.startswith("/"):  # "//host/share" too: pathlib takes it for a root
        raise SVDQuantError(
            f"File name '{file_name}': give a plain name such as my_model_svdq_int4, without drive, '..' or special "
            "characters. It is written to models/diffusion_models."
        )
    name = cleaned if cleaned.endswith(".safetensors") else f"{cleaned}.safetensors"
    folders = [Path(p) for p in folder_paths.get_folder_paths("diffusion_models")]
    root = next((f for f in folders if f.name == "diffusion_models"), folders[0])
    return root / name, str(Path(name))


class Streamer:
    """Sends every event to ComfyUI's progress bar and, as ``svdquant.*`` websocket events, to the node's panel."""

    def __init__(self, node_id: str, name: str, workflow: str | None, job: Job) -> None:
        context = get_executing_context()
        self.run = {"node": node_id, "workflow": workflow, "prompt_id": context and context.prompt_id, "file": name}
        self.bar = comfy.utils.ProgressBar(1000, node_id=node_id)
        self.bytes_16bit = self.bytes = 0
        self.send("start", {"format": job.fmt, "preset": job.preset, "rank": job.rank})

    def __call__(self, event: Event) -> None:
        stage = event["stage"]
        if stage == "calibrate":
            self.progress(CALIBRATION_SHARE * event["index"] / event["total"])
        elif stage == "solve":
            self.bytes_16bit += event["bytes_16bit"]
            self.bytes += event["bytes"]
            event = event | {"total_bytes": self.bytes, "total_bytes_16bit": self.bytes_16bit}
            self.progress(CALIBRATION_SHARE + (1 - CALIBRATION_SHARE) * event["index"] / event["total"])
        self.send(stage, event)

    def finish(self, report: Report) -> None:
        """The run is over. A job that was finished before has sent no layer: its file's report has them."""
        self.progress(1.0)
        data = {"summary": report.summary(), "bytes": report.bytes, "bytes_16bit": report.bytes_16bit}
        data |= {"mean_error_db": report.mean_error_db, "kept": report.resumed}
        self.send("done", data if self.bytes else data | {"layers": report.layers})

    def stopped(self, error: BaseException) -> None:
        """The user interrupted the run, or it failed."""
        interrupted = isinstance(error, comfy.model_management.InterruptProcessingException)
        self.send("stopped", {"reason": str(error) or type(error).__name__, "interrupted": interrupted})

    def progress(self, share: float) -> None:
        self.bar.update_absolute(int(1000 * share))

    def send(self, stage: str, data: Event) -> None:
        event = RUNS.add({**self.run, **data, "stage": stage})
        PromptServer.instance.send_sync(f"svdquant.{stage}", event)

"""Files: read any dialect into ComfyUI's key names, say what a file is, write atomically. safetensors only."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .dialects import strip_prefix, to_comfy_names
from .errors import SVDQuantError
from .families import facts_of, family_of, match_recipe
from .formats import by_disk_name
from .linear import QuantizedLinear, layer_config
from .nunchaku_files import Progress, family_in, is_nunchaku, marks_of, no_progress, refusal
from .recipes import plan

TOOL = "comfyui-svdquant 0.3.0"
METADATA_KEY = "svdquant"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
TEXT_ENCODERS = ("text_model.", "encoder.block.", "shared.weight")
READ_WITH_HEADER = (".comfy_quant", ".reshape_weight")  # small tensors that say what others are


def read_checkpoint(
    path: str | os.PathLike[str], progress: Progress = no_progress
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``(state_dict, metadata)`` of a model file, with ComfyUI's key names whatever the file's dialect.

    Tensors are memory-mapped, so a 24 GB file costs no memory until its tensors are used; those of a file in Nunchaku's
    format are made in memory, and ``progress`` gets how many layers are done, and of how many. Quantized layers are
    checked; :class:`SVDQuantError` says which key is missing or malformed, or why the file cannot be read.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
    state_dict = load_file(path)
    marks = marks_of(metadata) if is_nunchaku(state_dict) else {}
    state_dict = to_comfy_names(state_dict, str(path), progress) | marks
    for key in [k for k in state_dict if k.endswith(".comfy_quant")]:
        try:
            prefix = key.removesuffix("comfy_quant")
            if by_disk_name(layer_config(state_dict, prefix).get("format", "")):
                QuantizedLinear.from_state_dict(state_dict, prefix)
        except SVDQuantError as error:
            raise SVDQuantError(f"{path}: {error}") from None
    recipe = match_recipe(state_dict)
    if recipe is not None and any(k.endswith(".comfy_quant") for k in state_dict):
        plan(recipe, layer_shapes(state_dict), str(path))  # raises for an incomplete file
    return state_dict, metadata


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``(tensors, metadata)`` of a file without its data: tensors are on the meta device, in the file's own names.

    Read are single numbers (a LoRA's alphas) and the small tensors of :data:`READ_WITH_HEADER`.
    """
    tensors: dict[str, Tensor] = {}
    with open_safetensors(Path(path)) as file:
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            shape = part.get_shape()
            if math.prod(shape) == 1 or key.endswith(READ_WITH_HEADER):
                tensors[key] = file.get_tensor(key)
            else:
                dtype = TORCH_DTYPES.get(part.get_dtype(), torch.uint8)
                tensors[key] = torch.empty(shape, dtype=dtype, device="meta")
        return tensors, dict(file.metadata() or {})


def layer_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Stored weight shapes by layer name."""
    return {k.removesuffix(".weight"): tuple(t.shape) for k, t in tensors.items() if k.endswith(".weight")}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, or :class:`SVDQuantError` saying what the file is instead."""
    if not path.is_file():
        raise SVDQuantError(f"{path}: no such file.")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SVDQuantError(f"{path}: {why_unreadable(path, str(error))}") from None
    with file:
        yield file


def why_unreadable(path: Path, error: str) -> str:
    """Plain words for a file that safetensors refuses."""
    with path.open("rb") as file:
        head = file.read(9)
    size = path.stat().st_size
    if size == 0:
        return "the file is empty. Download it again."
    if head[:4] == b"GGUF":
        return "a GGUF file. Load it with 'Unet Loader (GGUF)' from ComfyUI-GGUF."
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "a pickled PyTorch file (.pt/.ckpt). Pickle can run code, so it is never read here; use a .safetensors."
    if int.from_bytes(head[:8], "little") < 100_000_000 and head[8:] == b"{":  # a header's length, then JSON
        return f"truncated or damaged ({size} bytes; {error}). Download or quantize it again."
    return f"not a safetensors file ({error})."


def quantization_info(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The ``svdquant`` JSON of a file's metadata (recipe, rank, per-layer α and error, ...), empty if absent."""
    with suppress(ValueError):
        info = json.loads(metadata.get(METADATA_KEY, "{}"))
        if isinstance(info, dict):
            return info
    return {}


@dataclass
class FileInfo:
    """What a file is. ``kind`` is one word, ``text`` a sentence, ``loader_hint`` which node loads it."""

    kind: str
    text: str
    loader_hint: str
    details: dict[str, Any] = field(default_factory=dict)


def describe_file(path: str | os.PathLike[str]) -> FileInfo:
    """Say what a model file is from its header alone; :class:`SVDQuantError` if it cannot be read at all."""
    path = Path(path)
    tensors, metadata = read_header(path)
    details: dict[str, Any] = {"bytes": path.stat().st_size, "tensors": len(tensors)}
    maker = ", made by Nunchaku" if is_nunchaku(tensors) else ""
    if maker and not any(key.startswith(TEXT_ENCODERS) for key in tensors):
        if family_in(strip_prefix(tensors)) is None:
            hint = "Nunchaku's own loader, or quantize the 16-bit model here"
            return FileInfo("nunchaku", refusal(), hint, details)
        tensors = to_comfy_names(tensors, str(path))
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    layers = [k.removesuffix("comfy_quant") for k in tensors if k.endswith(".comfy_quant")]
    try:
        formats = sorted({str(layer_config(tensors, layer).get("format")) for layer in layers})
        if any(by_disk_name(f) for f in formats):
            info, recipe = quantization_info(metadata), family_title(tensors)
            details |= {"formats": formats, "layers": len(layers), "svdquant": info, "model": recipe}
            details |= model_facts(to_comfy_names(tensors, str(path)))
            text = f"an SVDQuant file of {recipe} ({', '.join(formats)}){maker}"
            return FileInfo("svdquant", text, "SVDQuant Loader", details)
    except SVDQuantError as error:
        raise SVDQuantError(f"{path}: {error}") from None
    dtypes = {DTYPES[t.dtype] for t in tensors.values()}
    kind, text, hint = classify(list(tensors), shapes, dtypes, bool(layers))
    return FileInfo(kind, text, hint, details)


def model_facts(sd: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a quantized model tell, in ComfyUI's names: its size, its branches' ranks, which release."""
    ranks = {int(t.shape[-1]) for key, t in sd.items() if key.endswith(".proj_down")}
    facts = {"parameters": parameters(sd), "ranks": sorted(ranks)}
    recipe = match_recipe(sd)
    return facts | (facts_of({k: tuple(t.shape) for k, t in sd.items()}, recipe) if recipe else {})


def parameters(sd: Mapping[str, Tensor]) -> int:
    """How many weights a quantized model has in 16 bit: codes count as what they stand for, scales and branches not."""
    layers = tuple(key.removesuffix("comfy_quant") for key in sd if key.endswith(".comfy_quant"))
    count = sum(t.numel() for key, t in sd.items() if key.endswith(".bias") or not key.startswith(layers))
    for layer in layers:
        fmt, codes = by_disk_name(str(layer_config(sd, layer).get("format"))), sd.get(f"{layer}weight")
        if codes is not None:
            count += codes.numel() if fmt is None else math.prod(fmt.logical_shape(codes))
    return count


def family_title(keys: Iterable[str]) -> str:
    """The recipe's title, a known family's name, or 'an unknown model'."""
    names = {k.removeprefix("model.diffusion_model.").removeprefix("diffusion_model.") for k in keys}
    if recipe := match_recipe(names):
        return recipe.title
    return family_of(names) or "an unknown model"


def classify(
    keys: list[str], shapes: Mapping[str, tuple[int, ...]], dtypes: set[str], other_quant: bool
) -> tuple[str, str, str]:
    """(kind, sentence, loader) of a file that is not an SVDQuant one."""
    if any(".lora_" in k or k.endswith((".lokr_w1", ".hada_w1_a", ".oft_blocks", ".alpha")) for k in keys):
        return "lora", "a LoRA", "SVDQuant LoRA or Load LoRA"
    if any(k.startswith(("conditioner.", "cond_stage_model.", "text_encoders.")) for k in keys):
        return "checkpoint", "a full checkpoint with text encoders and VAE", "Load Checkpoint"
    if any(k.startswith(("decoder.", "first_stage_model.decoder.")) for k in keys):
        return "vae", "a VAE", "Load VAE"
    if any(k.startswith(TEXT_ENCODERS) for k in keys):
        return "text_encoder", "a text encoder", "Load CLIP"
    if any(k.startswith(("controlnet_", "control_model.")) for k in keys):
        return "controlnet", "a ControlNet", "Load ControlNet Model"
    family = family_title(keys)
    if family == "an unknown model" and not any("blocks." in k for k in keys):
        return "unknown", f"no diffusion model that is known here (first keys: {', '.join(sorted(keys)[:4])})", "none"
    eight_bit = other_quant or any(d.startswith("F8") for d in dtypes)
    precision = "an 8-bit or otherwise quantized" if eight_bit else "a 16-bit"
    return "diffusion_model", f"{precision} diffusion model ({family})", "Load Diffusion Model"


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write safetensors to a temporary name in the same folder, then rename: never a half-written file.

    ``check`` may raise between tensors to interrupt. What a killed run left is overwritten by the next.
    """
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size + 2**20:
            raise SVDQuantError(
                f"{path.parent}: not enough disk space. The file needs {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB "
                "are free. Make room and run again; the layers solved so far are kept."
            )
        try:
            stream_safetensors(temporary, tensors, metadata, check)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except PermissionError as error:
        raise SVDQuantError(
            f"{path}: cannot be written ({error.strerror}). Either the folder is write-protected, or a loaded model "
            "still uses the file (Windows): unload the models or choose another name. Solved layers are kept."
        ) from None


def stream_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], check: Callable[[], None]
) -> None:
    """safetensors' own writer first copies every tensor into memory, which a 12B model's file cannot afford:
    the same format, one tensor at a time (8 bytes of header length, JSON header, raw little-endian data)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))  # wide dtypes first keeps data aligned
    offset = 0
    for key in order:
        tensor = tensors[key]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            check()
            file.write(tensor_bytes(tensors[key]))
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor; no copy for a contiguous one on the CPU."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def file_sha256(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file in hex, read in blocks; ``check`` may raise to interrupt (24 GB take half a minute)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            check()
            digest.update(block)
    return digest.hexdigest()


def model_config(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of a model file's metadata that ComfyUI reads: some variants differ in nothing else."""
    return {"config": metadata["config"]} if "config" in metadata else {}


def quantization_metadata(layers: Mapping[str, QuantizedLinear], info: dict[str, Any]) -> dict[str, str]:
    """File metadata: ``_quantization_metadata`` as in ComfyUI's QUANTIZATION.md, and our own JSON."""
    formats = {name: {"format": layer.fmt.disk_name} for name, layer in layers.items()}
    return {
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats}),
        METADATA_KEY: json.dumps({"tool": TOOL, **info}),
    }


def sixteen_bit(tensor: Tensor, float32: bool = False) -> Tensor:
    """Tensors that stay unquantized: floats that are not of 16 bit (or ``float32``) as bf16, all else as it is."""
    kept = (torch.bfloat16, torch.float16, *((torch.float32,) if float32 else ()))
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.dtype not in kept else tensor

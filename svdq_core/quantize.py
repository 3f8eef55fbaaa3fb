"""Quantize a whole model, one group of layers at a time, so that it can be killed and resumed at any point.

Peak memory on the device is one layer's: see ``docs/memory.md``. Weights come one by one from a source
(a memory-mapped file, or a loaded ComfyUI model with its patches), results go to ``<output>.parts/`` at once.
"""

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .calibration import Samples
from .checkpoint import (
    TOOL,
    describe_file,
    model_config,
    open_safetensors,
    quantization_info,
    quantization_metadata,
    read_checkpoint,
    sixteen_bit,
    tensor_bytes,
    write_checkpoint,
)
from .errors import SVDQuantError
from .families import plan_model
from .formats import Format, get_format
from .linear import QuantizedLinear
from .recipes import W4A4, W4A16, W8A8, LayerGroup
from .solve import PRESETS, SolveSettings, solve_shared_input

Event = dict[str, Any]


class Source(Protocol):
    """Where 16-bit tensors come from, under ComfyUI's key names."""

    name: str  # for messages and metadata
    origin: dict[str, Any]  # what is written about the source into the file
    config: dict[str, str]  # of the source's metadata, what ComfyUI reads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by key, without loading anything."""
        ...

    def tensor(self, key: str) -> Tensor:
        """One tensor, with patches applied, on the CPU."""
        ...


class FileSource:
    """A 16-bit model file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.state_dict, metadata = read_checkpoint(path)
        if any(k.endswith(".comfy_quant") for k in self.state_dict):
            raise SVDQuantError(f"{path}: is quantized already. Give the 16-bit model it was made from.")
        scaled = [k for k in self.state_dict if k.endswith(("scale_weight", "weight_scale", "scaled_fp8"))]
        if scaled or "_quantization_metadata" in metadata:
            raise SVDQuantError(
                f"{path}: holds scaled 8-bit weights{f' ({scaled[0]})' if scaled else ''}. Give the 16-bit model, or "
                "load this file in ComfyUI and use SVDQuant Quantize."
            )
        self.name = str(path)
        self.origin: dict[str, Any] = {"file": path.name}
        self.config = model_config(metadata)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {k: tuple(t.shape) for k, t in self.state_dict.items()}

    def tensor(self, key: str) -> Tensor:
        return self.state_dict[key]


@dataclass(frozen=True)
class Job:
    """What to do. ``rank`` None means the format's own; ``preset`` is a key of ``PRESETS``."""

    fmt: str = "int4"
    preset: str = "balanced"
    rank: int | None = None
    residual: str | None = None
    seed: int = 0

    def settings(self) -> SolveSettings:
        """The solver settings, or :class:`SVDQuantError` for values that make no sense."""
        if self.preset not in PRESETS:
            raise SVDQuantError(f"Unknown preset '{self.preset}'. Choose one of: {', '.join(PRESETS)}.")
        if self.rank is not None and self.rank < 0:
            raise SVDQuantError(f"The rank must be 0 or more, found {self.rank}.")
        settings = replace(PRESETS[self.preset], seed=self.seed)
        if self.residual is not None:
            settings = replace(settings, residual=self.residual)
        if self.rank is not None:
            settings = replace(settings, rank=self.rank)
        return settings


@dataclass
class Report:
    """What came out: per layer ``name, format, alpha, rank, error_db, act_unsigned, bytes_16bit, bytes``."""

    path: Path
    layers: list[Event] = field(default_factory=list)
    bytes_16bit: int = 0
    bytes: int = 0
    seconds: float = 0.0
    resumed: int = 0

    @classmethod
    def of_file(cls, path: Path, metadata: dict[str, str]) -> "Report":
        """The report of a file that was quantized earlier, from its metadata."""
        layers = [{"name": n, **r} for n, r in quantization_info(metadata).get("layers", {}).items()]
        report = cls(path, layers, bytes=path.stat().st_size, resumed=len(layers))
        saved = sum(layer["bytes_16bit"] - layer["bytes"] for layer in layers)
        report.bytes_16bit = report.bytes + saved
        return report

    @property
    def mean_error_db(self) -> float:
        """Mean over the layers in the chosen format, in dB (the others have another kind of error)."""
        errors = [layer["error_db"] for layer in self.layers if layer["kind"] == W4A4]
        return sum(errors) / max(1, len(errors))

    def summary(self) -> str:
        """Plain words for the user."""
        worst = max(self.layers, key=lambda layer: layer["error_db"])
        kept = f", {self.resumed} of them kept from an earlier run" if self.resumed else ""
        return (
            f"{self.path.name}: {self.bytes / 2**20:.1f} MiB, "
            f"{self.bytes_16bit / max(1, self.bytes):.2f}× smaller than 16 bit ({self.bytes_16bit / 2**20:.1f} MiB)\n"
            f"{len(self.layers)} layers in {self.seconds:.0f} s{kept}\n"
            f"mean layer error {self.mean_error_db:.1f} dB, worst {worst['error_db']:.1f} dB in {worst['name']}"
        )


def quantize(
    source: Source,
    samples: Samples | None,
    output: Path,
    job: Job,
    *,
    device: torch.device | str = "cpu",
    calibration: dict[str, Any] | None = None,
    job_key: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    check: Callable[[], None] = lambda: None,
) -> Report:
    """Quantize ``source`` into ``output``; events tell of every layer, ``check`` may raise to interrupt.

    Layers that an earlier run with the same inputs and settings solved are read from ``<output>.parts/``; the
    result is identical to an uninterrupted run's. ``calibration`` and ``job_key`` (what tells this job from
    others) are written into the file's metadata.
    """
    started = time.monotonic()
    fmt, settings = get_format(job.fmt), job.settings()
    shapes = source.shapes()
    recipe, groups = plan_model(shapes, source.name)
    weights = {name: shapes[f"{name}.weight"] for group in groups for name in group.names}
    groups = [g for g in groups if fits(g, weights, fmt, on_event)]
    parts = parts_folder(output)
    parts.mkdir(parents=True, exist_ok=True)
    report = Report(output)
    layers: dict[str, QuantizedLinear] = {}
    costs = [sum(weights[n][0] * weights[n][1] + weights[n][1] ** 2 for n in g.names) for g in groups]
    digest = hashlib.sha256()
    spent, solved_cost = 0.0, 0
    for i, group in enumerate(groups):
        check()
        began = time.monotonic()
        solved, resumed = solve_group(source, group, samples, fmt, settings, parts, torch.device(device), digest, check)
        report.resumed += resumed
        if not resumed:  # layers of an earlier run say nothing about the speed of this one
            spent, solved_cost = spent + time.monotonic() - began, solved_cost + costs[i]
        eta = spent / max(1, solved_cost) * sum(costs[i + 1 :])
        for name, layer in zip(group.names, solved, strict=True):
            layers[name] = layer
            n, k = weights[name]
            record = layer_record(name, layer, group.kind, n, k)
            report.layers.append(record)
            progress = {"index": len(layers), "total": count(groups), "eta": eta, "kept": bool(resumed)}
            on_event({"stage": "solve", **progress, **record})
    on_event({"stage": "write", "path": str(output)})
    info = {
        "recipe": recipe.name,
        "format": fmt.name,
        "rank": fmt.default_rank if settings.rank is None else settings.rank,
        "preset": job.preset,
        "seed": job.seed,
        "source": source.origin | {"weights_sha256": digest.hexdigest()},
        "calibration": calibration or {"kind": "weight statistics only"},
        "job_key": job_key,
        "layers": {r["name"]: {k: v for k, v in r.items() if k != "name"} for r in report.layers},
    }
    assemble(source, shapes, layers, output, info, check)
    del layers, solved, layer, samples
    gc.collect()  # the parts are memory-mapped, and Windows deletes no mapped file
    shutil.rmtree(parts, ignore_errors=True)
    report.bytes = output.stat().st_size
    report.bytes_16bit = sum(2 * product(s) for s in shapes.values())
    report.seconds = time.monotonic() - started
    return report


def refuse_overwriting(output: Path, source: Source) -> None:
    """Only a 4-bit file of the same source may be replaced; :class:`SVDQuantError` says what is in the way.

    Sources are told apart by ``origin["key"]``.
    """
    if not output.exists():
        return
    info = describe_file(output)
    if info.kind != "svdquant":
        raise SVDQuantError(f"{output.name} exists and is {info.text}: it is not overwritten. Choose another name.")
    made_from = info.details["svdquant"].get("source", {})
    if made_from.get("key") != source.origin["key"]:
        raise SVDQuantError(
            f"{output.name} exists and was made from another model ({made_from.get('file', 'unknown')}): it is not "
            "overwritten. Choose another name, or delete that file."
        )


def parts_folder(output: Path) -> Path:
    """Where the work of an unfinished quantization lies; its files have no model suffix, so nothing lists them."""
    return output.with_name(output.name + ".parts")


def count(groups: list[LayerGroup]) -> int:
    """Linears in all groups."""
    return sum(len(g.names) for g in groups)


def product(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    return int(torch.Size(shape).numel())


def format_of(group: LayerGroup, fmt: Format) -> Format:
    """The format of a group's layers where the chosen one is ``fmt``."""
    return get_format({W4A16: "awq", W8A8: "int8"}[group.kind]) if group.kind != W4A4 else fmt


def fits(
    group: LayerGroup, weights: Mapping[str, tuple[int, ...]], fmt: Format, on_event: Callable[[Event], None]
) -> bool:
    """Whether the format's groups divide the layer's input; a layer that does not fit stays 16 bit and says so."""
    size = format_of(group, fmt).group
    k = weights[group.names[0]][1]
    if k % (size or 2) == 0:
        return True
    on_event({"stage": "skip", "name": group.names[0], "reason": f"{k} input features are not a multiple of {size}"})
    return False


def layer_record(name: str, layer: QuantizedLinear, kind: str, n: int, k: int) -> Event:
    """What the events, the report and the file's metadata say of one layer."""
    return {
        "name": name,
        "kind": kind,
        "format": layer.fmt.disk_name,
        "alpha": layer.info.get("alpha"),
        "rank": layer.rank,
        "error_db": round(layer.info["error_db"], 3),
        "act_unsigned": layer.act_unsigned,
        "bytes_16bit": 2 * n * k + (0 if layer.bias is None else 2 * n),
        "bytes": layer.nbytes,
    }


def solve_group(
    source: Source,
    group: LayerGroup,
    samples: Samples | None,
    fmt: Format,
    settings: SolveSettings,
    parts: Path,
    device: torch.device,
    digest: Any,
    check: Callable[[], None],
) -> tuple[list[QuantizedLinear], int]:
    """Solve one group, or read it back if these very inputs were solved before; (layers, how many were read)."""
    keys = source.shapes()
    weights = [source.tensor(f"{n}.weight") for n in group.names]
    biases = [source.tensor(f"{n}.bias") if f"{n}.bias" in keys else None for n in group.names]
    x, absmax = shared_samples(samples, group, source.name)
    fmt = format_of(group, fmt)
    key = hashlib.sha256(repr((TOOL, device.type, group, fmt.name, asdict(settings))).encode())
    for tensor in (*weights, *biases):
        if tensor is not None:
            content = tensor_bytes(tensor)
            key.update(content)
            digest.update(content)
    for tensor in (x, absmax):
        key.update(b"none" if tensor is None else tensor_bytes(tensor))
    part = parts / f"{key.hexdigest()[:32]}.part"
    kept = read_part(part, group)
    if kept is not None:
        return kept, len(kept)
    try:
        layers = solve_shared_input(
            [w.to(device) for w in weights],
            None if x is None else x.to(device),
            [None if b is None else b.to(device) for b in biases],
            fmt,
            settings,
            group.after_gelu,
            check,
            absmax,
        )
        solved = [to_cpu(layer) for layer in layers]
    except SVDQuantError as error:
        raise SVDQuantError(f"{source.name}: {group.names[0]}: {error}") from None
    except torch.OutOfMemoryError:
        raise SVDQuantError(
            f"{source.name}: the GPU's memory ran out while solving {group.names[0]} {tuple(weights[0].shape)}. Close "
            "other programs that use the GPU and run again: the layers solved so far are kept."
        ) from None
    tensors = {k: t for n, layer in zip(group.names, solved, strict=True) for k, t in layer.state_dict(n).items()}
    write_checkpoint(part, tensors, {n: json.dumps(q.info) for n, q in zip(group.names, solved, strict=True)})
    return read_part(part, group) or solved, 0  # read back, so that memory holds no more than one group


def to_cpu(layer: QuantizedLinear) -> QuantizedLinear:
    """A layer like this with its tensors on the CPU."""
    parts: dict[str, Any] = {name: tensor.cpu() for name, tensor in layer.parts.items()}
    tensors = {name: parts.pop(name) for name in layer.tensors}
    return replace(layer, tensors=tensors, **parts)


def read_part(part: Path, group: LayerGroup) -> list[QuantizedLinear] | None:
    """Layers of an earlier run, or None if there are none (a damaged part is solved again)."""
    if not part.is_file():
        return None
    try:
        with open_safetensors(part) as file:
            metadata = file.metadata()
        tensors = load_file(part)
        layers = [QuantizedLinear.from_state_dict(tensors, name) for name in group.names]
        for name, layer in zip(group.names, layers, strict=True):
            layer.info = json.loads(metadata[name])
        return layers
    except (SVDQuantError, SafetensorError, KeyError, ValueError):
        return None


def shared_samples(samples: Samples | None, group: LayerGroup, where: str) -> tuple[Tensor | None, Tensor | None]:
    """Tokens and channel maxima of a group's input (its members saw the same one)."""
    if samples is None:
        return None, None
    name = next((n for n in group.names if n in samples.tokens), None)
    if name is None:
        raise SVDQuantError(
            f"{where}: the calibration has no activations of {group.names[0]}. It was made for another model; "
            f"it holds {', '.join(list(samples.tokens)[:3]) or 'nothing'}, ..."
        )
    tokens, absmax = samples.tokens[name], samples.absmax.get(name)
    if absmax is not None and absmax.shape != tokens.shape[1:]:
        raise SVDQuantError(
            f"{where}: the calibration's {name}.absmax is {tuple(absmax.shape)}, its tokens are {tuple(tokens.shape)}."
        )
    return tokens, absmax


def assemble(
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    layers: dict[str, QuantizedLinear],
    output: Path,
    info: dict[str, Any],
    check: Callable[[], None],
) -> None:
    """Write the final file: quantized layers, and everything else in 16 bit.

    Convolutions may stay in float32: they are small, and ComfyUI computes Wan's first one in it.
    """
    quantized = {f"{name}.{end}" for name in layers for end in ("weight", "bias")}
    convolutions = {key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) > 3}
    tensors = {
        key: sixteen_bit(source.tensor(key), key.rpartition(".")[0] in convolutions).cpu()
        for key in shapes
        if key not in quantized
    }
    for name, layer in layers.items():
        tensors |= layer.state_dict(name)
    write_checkpoint(output, tensors, source.config | quantization_metadata(layers, info), check)

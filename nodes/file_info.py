"""What a chosen file is, before it is loaded: GET /svdquant/file and GET /svdquant/lora, for the panels on the nodes.

Both take names that the widgets offer, and read headers only (milliseconds, whatever the file's size).
"""

import asyncio
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web

from ..svdq_core.checkpoint import describe_file
from ..svdq_core.errors import SVDQuantError
from ..svdq_core.formats import by_disk_name
from ..svdq_core.host.lora import TEXT_ENCODER
from ..svdq_core.host.preview import preview_lora
from ..svdq_core.quantize import Report
from .loader import find_model
from .lora import find_lora

Info = dict[str, Any]
NAMED = 4  # unused keys that are named


async def get_file(request: web.Request) -> web.Response:
    """What the model file ``name`` is."""
    return await answer(model_file, request.query.get("name", ""))


async def get_lora(request: web.Request) -> web.Response:
    """How many keys of the LoRA ``name`` apply to the model file ``model``, or without one to FLUX.1."""
    return await answer(lora_file, request.query.get("name", ""), request.query.get("model"))


async def answer(describe: Callable[..., Info], *names: str | None) -> web.Response:
    """``describe(*names)`` off the event loop; 404 with a message for a name that is not offered."""
    try:
        info = await asyncio.to_thread(describe, *names)
    except SVDQuantError as error:
        return web.json_response({"error": str(error)}, status=404)
    return web.json_response(info, headers={"Cache-Control": "no-store"})


def model_file(name: str) -> Info:
    return {"name": name} | model_info(*version(find_model(name)))


def lora_file(name: str, model: str | None) -> Info:
    lora = version(find_lora(name))
    return {"name": name, "model": model} | lora_info(*lora, *(version(find_model(model)) if model else (None, 0, 0)))


def version(path: Path) -> tuple[Path, int, int]:
    """A file as it is now: its answers are kept until it changes."""
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=64)
def model_info(path: Path, modified: int, size: int) -> Info:
    """What the loader's panel shows; ``error`` for a file that it does not load."""
    facts: Info = {"bytes": size, "modified": modified / 1e9}
    try:
        info = describe_file(path)
    except SVDQuantError as error:
        return facts | {"error": without_folder(error, path)}
    if info.kind != "svdquant":
        hint = "" if info.loader_hint == "none" else f" Load it with {info.loader_hint}."
        return facts | {"error": f"This is {info.text}, not an SVDQuant model.{hint}"}
    details = info.details
    facts |= {key: details.get(key) for key in ("model", "release", "blocks", "parameters", "ranks")}
    facts["format"] = ", ".join(fmt.name for fmt in map(by_disk_name, details["formats"]) if fmt and fmt.has_branch)
    return facts | {"bytes_16bit": 2 * details["parameters"]} | made(path, details["svdquant"])


def made(path: Path, info: Info) -> Info:
    """How the file was made, from the metadata that SVDQuant Quantize writes; nothing for files of other tools."""
    records = info.get("layers")
    layers = [
        {"name": str(name), "kind": str(record.get("kind")), "error_db": float(record["error_db"])}
        for name, record in (records if isinstance(records, dict) else {}).items()
        if isinstance(record, dict) and is_number(record.get("error_db"))
    ]
    if not layers:
        return {}
    source, calibration = info.get("source"), info.get("calibration")
    return {
        "layers": layers,
        "mean_error_db": Report(path, layers).mean_error_db,
        "source": source.get("file") if isinstance(source, dict) else None,
        "calibration": calibration if isinstance(calibration, dict) else {},
        "preset": info.get("preset"),
        "tool": info.get("tool"),
    }


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@lru_cache(maxsize=256)
def lora_info(path: Path, modified: int, size: int, model: Path | None, model_modified: int, model_size: int) -> Info:
    """What the LoRA nodes' panels show; ``error`` for a file that they would refuse."""
    try:
        lora, ranks = preview_lora(path, model)
    except SVDQuantError as error:
        return {"bytes": size, "error": without_folder(error, path, *([model] if model else []))}
    text = [key for key in lora.unused if TEXT_ENCODER.match(key)]
    rest = [key for key in lora.unused if not TEXT_ENCODER.match(key)]
    return {
        "bytes": size,
        "keys": lora.keys,
        "applied": lora.keys - len(lora.unused),
        "text_encoder": len(text),
        "unused": len(rest),
        "unused_names": rest[:NAMED],
        "kinds": lora.kinds,
        "ranks": ranks,
        "twice": len(lora.twice),
        "in_16_bit": len(lora.in_16_bit),
    }


def without_folder(error: SVDQuantError, *paths: Path) -> str:
    """The message without folders, which are nobody's business in a browser, and without the first file's name."""
    text = str(error)
    for path in paths:
        text = text.replace(str(path), path.name)
    text = text.removeprefix(f"{paths[0].name}: ")
    return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text  # no key's name

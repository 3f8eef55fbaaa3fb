"""Which implementation runs a quantized linear: measured if it was, by reasoning if not, and only if it is right.

On the CPU and in float32 that is plain torch (:func:`.linear.linear_forward`), traced by torch.compile like any torch
code. In bf16 and fp16 on a GPU every linear is one opaque op, ``svdquant::linear``, and the choice is made in it: no
graph break, and nothing of it is traced. Where nobody traces, the op is left out: it costs the host 50 µs.

The environment variable SVDQUANT_BACKEND takes a library (``torch``, ``triton``, ``kitchen``) or a name out of
:data:`.implementations.IMPLEMENTATIONS`, or the beginning of one up to a dash, in place of the choice.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import triton_kernels
from ..triton_kernels.tiles import FEW, MEASURED, SOME, size_class
from .checkpoint import TOOL
from .deferred import Deferred, gelu, plain, rows
from .formats import AWQ, FORMATS, Format
from .implementations import (
    FUSED_MLP,
    IMPLEMENTATIONS,
    Implementation,
    capturing,
    mlp_scratch,
    taking,
    torch_linear,
    torch_mlp,
)
from .linear import QuantizedLinear, linear_forward
from .tape import Tape, aligned, case_of, record


def begins_with(name: str, beginning: str) -> bool:
    """Whether ``beginning`` is an implementation's name, or the beginning of it up to a dash."""
    return f"{name}-".startswith(f"{beginning}-")


def forced_by(value: str) -> str:
    """What SVDQUANT_BACKEND asks for; nothing, and a word in the log, if no name begins so."""
    value, names = value.strip().lower(), sorted({name for _, name in IMPLEMENTATIONS})
    if value and not any(begins_with(name, value) for name in names):
        logging.warning(
            "SVDQuant: SVDQUANT_BACKEND=%s is ignored: it takes torch, triton, kitchen or one of %s.",
            value, ", ".join(names),
        )  # fmt: skip
        return ""
    return value


FORCED = forced_by(os.environ.get("SVDQUANT_BACKEND", ""))

# ---- the shipped order -----------------------------------------------------------------------------------

# By reasoning (docs/kernels.md), not by measurement: published rates of the matrix units, and the work beside them.
# comfy-kitchen's CUDA kernels use INT4 units; Triton has no int4 product. sm80 has them, too, but too few float units
# to scale their results in time.
INT4_FIRST = {"sm86", "sm87", "sm89"}
TCGEN05 = {"sm100", "sm101", "sm103"}  # Triton reaches it with fp8 only, and sm103 has few int8 units


def fp8_first(arch: str, size: int, k: int) -> bool:
    """On Hopper Triton waits for each step's int8 products, but for fp8 ones only in long rows (`columns_at_once`)."""
    return arch in TCGEN05 or (arch == "sm90" and not size and k <= triton_kernels.EXACT_SUMS)


def shipped_order(arch: str, fmt: str, size: int, k: int) -> list[str]:
    """Names of ``fmt``'s implementations, expected fastest first, on ``arch``, for a :func:`size_class` of tokens."""
    if fmt == "awq" and size != FEW:
        return ["torch"]  # the kernels read the weight anew for every token; unpacking pays off for many
    if fmt != "int4":
        return [name for f, name in IMPLEMENTATIONS if f == fmt]
    kinds = ("fp8", "int8") if fp8_first(arch, size, k) else ("int8", "fp8")
    ways = ("w4a8", "widened") if size else ("widened", "w4a8")  # for few tokens, widening first costs most
    eight = [f"triton-{way}-{kind}" for kind in kinds for way in ways]
    if arch in INT4_FIRST:
        return ["kitchen-w4a4", *eight, "triton-w4a4", "torch", "torch-w4a8"]
    return [*eight, "triton-w4a4", "kitchen-w4a4", "torch", "torch-w4a8"]


@cache
def device_arch(device: torch.device) -> str:
    """``sm90``, ``gfx942``, ...; ``cpu`` for anything without CUDA or ROCm."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm{properties.major}{properties.minor}"


# ---- what was measured -----------------------------------------------------------------------------------


def measurements_file() -> Path:
    """Where ``svdquant bench`` writes: the user's cache folder."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "svdquant" / "measured.json"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def device_key(device: torch.device) -> str:
    """What measured times are valid for: the device and every version that matters."""
    libraries = ("torch", "triton", "triton-windows", "comfy-kitchen")
    versions = [f"{each} {found}" for each in libraries if (found := installed_version(each))]
    return "; ".join([f"{device_name(device)} ({device_arch(device)})", *versions, TOOL, f"kernels {kernels_hash()}"])


def kernels_hash() -> str:
    """Of the sources of the kernels: they change between versions, too."""
    kernels = sorted(Path(triton_kernels.__file__).parent.glob("*.py"))
    sources = [*kernels, Path(__file__).with_name("implementations.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


def installed_version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


Times = dict[str, float]  # milliseconds by implementation; where tiles are stored beside them, values by name


def read_measurements(path: Path) -> dict[str, dict[str, Times]]:
    """Times by device key and shape key; nothing, and a word in the log, if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(device): {str(shape): {str(n): float(ms) for n, ms in times.items()} for shape, times in shapes.items()}
            for device, shapes in content.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logging.warning("SVDQuant: %s cannot be read (%s): not used. svdquant bench writes it anew.", path, error)
        return {}


def store_measurements(device: torch.device, measured: Mapping[str, Mapping[str, float]]) -> Path:
    """Add times of ``device``, or tiles, and use them from now on."""
    path = measurements_file()
    content = read_measurements(path)
    content.setdefault(device_key(device), {}).update({key: dict(values) for key, values in measured.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)
    forget()
    return path


def shape_key(fmt: str, size: int, k: int, n: int) -> str:
    return f"{fmt} {size} {k} {n}"


@cache
def measured_times(device: torch.device) -> dict[str, Times]:
    """By shape key; tiles that were measured are the kernels' from here on."""
    found = read_measurements(measurements_file()).get(device_key(device), {})
    for key, values in found.items():
        tiled = re.fullmatch(r"tiles (.+) ([0-9]+) ([0-9]+) ([0-9]+)", key)  # see tiles_key
        if tiled:
            place = (device, tiled[1], int(tiled[2]), int(tiled[3]), int(tiled[4]))
            MEASURED[place] = tuple((name, int(value)) for name, value in values.items())
    return found


def tiles_key(kernel: str, size: int, k: int, n: int) -> str:
    return f"tiles {kernel} {size} {k} {n}"


def nearest_times(device: torch.device, fmt: str, size: int, k: int, n: int) -> Times:
    """Times of the measured shape that is nearest, of the same format and size class; empty if there is none."""
    found: tuple[float, Times] = math.inf, {}
    for key, times in measured_times(device).items():
        shape = re.fullmatch(rf"{fmt} {size} ([1-9][0-9]*) ([1-9][0-9]*)", key)  # see shape_key
        if shape:
            distance = sum(abs(math.log(int(a) / b)) for a, b in zip(shape.groups(), (k, n)))
            found = min(found, (distance, times), key=lambda each: each[0])
    return found[1]


# ---- the choice ------------------------------------------------------------------------------------------


@cache
def ranked(
    device: torch.device, fmt: str, activations: str, size: int, k: int, n: int, forced: str
) -> tuple[Implementation, ...]:
    """The implementations to try in turn, of those that are wanted and can run; the last is plain torch.

    What was measured goes by its time, in front of what was not.
    """
    arch, times = device_arch(device), nearest_times(device, fmt, size, k, n)
    names = sorted(shipped_order(arch, fmt, size, k), key=lambda name: times.get(name, math.inf))  # stable
    every = [IMPLEMENTATIONS[fmt, name] for name in names]
    if forced or arch == "cpu":
        every = [i for i in every if begins_with(i.name, forced or "torch")]
    wanted = [i for i in every if fmt != "int4" or activations in ("auto", i.activations)] or every
    usable = [i for i in wanted if i.why_not(arch) is None and i.takes(k, n)]
    usable.append(IMPLEMENTATIONS[fmt, "torch-w4a8" if (fmt, activations) == ("int4", "8 bit") else "torch"])
    plain = next(index for index, i in enumerate(usable) if i.library == "torch")
    return tuple(usable[: plain + 1])


REJECTED: dict[tuple[Any, ...], str] = {}  # why an implementation is not used, by what it failed on
RIGHT: set[tuple[Any, ...]] = set()  # what passed its check
SAID: set[tuple[Any, ...]] = set()  # what the log has already
LAST_USED: dict[torch.device, str] = {}  # of the compiled implementations: a GPU reports an error later
CHOSEN: dict[tuple[Any, ...], Implementation | None] = {}  # what ran last, by case; None: two layers one by one
TAPES: dict[tuple[Any, ...], Tape | None] = {}  # how that was done; None where it cannot be written down


def forget() -> None:
    """Choose anew: the measured times, or a test's conditions, have changed."""
    for cached in (ranked, measured_times):
        cached.cache_clear()
    for memory in (REJECTED, RIGHT, SAID, LAST_USED, CHOSEN, TAPES, MEASURED):
        memory.clear()


def working(x: Tensor, layer: QuantizedLinear, activations: str) -> Iterator[Implementation]:
    """What to run ``x (..., K)`` with, best first: right on a small layer, and never failed on such a shape."""
    shape = shape_class(x, layer, activations)
    for implementation in ranked(x.device, *shape, FORCED):
        if implementation.library != "torch":
            if rejected(spot(implementation, activations, x, layer)) or not_captured(implementation, x.device):
                continue
            if not is_right(implementation, x.device, x.dtype, layer.act_unsigned, shape[2]):
                continue
        announce(implementation, x.device, shape)
        yield implementation


def rejected(key: tuple[Any, ...]) -> bool:
    """Whether an implementation failed on ``key``, or on its device whatever the layer."""
    return key in REJECTED or key[:2] in REJECTED


def not_captured(implementation: Implementation, device: torch.device) -> bool:
    """comfy-kitchen may keep buffers between calls; a graph must not have them in common with what runs beside it."""
    return implementation.library == "kitchen" and capturing(device)


def say_once(level: int, message: str, *about: Any) -> None:
    if (message, *about) not in SAID:
        SAID.add((message, *about))
        logging.log(level, message, *about)


def announce(chosen: Implementation, device: torch.device, shape: tuple[str, str, int, int, int]) -> None:
    """Say what runs, and what does not for which reason, at the first choice for a format."""
    fmt, activations = shape[:2]
    if (device, fmt, activations) in SAID or capturing(device):
        return
    SAID.add((device, fmt, activations))
    passed = skipped(chosen, device, shape)
    names = {reason: [name for name in passed if passed[name] == reason] for reason in passed.values()}
    reasons = "".join(f"; not {', '.join(those)}: {reason}" for reason, those in names.items())
    level, warned = logging.INFO, set(passed.values()) & set(REJECTED.values())
    if FORCED and passed and not warned and not begins_with(chosen.name, FORCED):
        level, reasons = logging.WARNING, f", although SVDQUANT_BACKEND asks for {FORCED}{reasons}"
    elif device.type == "cuda" and chosen.library == "torch" and "Triton is not installed" in passed.values():
        level = logging.WARNING
        reasons += ". On Windows install triton-windows; until then quantized layers run slower than 16-bit ones"
    logging.log(
        level, "SVDQuant: %s (activations: %s) runs through %s on %s%s.",
        fmt, activations, chosen.name, device_name(device), reasons,
    )  # fmt: skip


def skipped(chosen: Implementation, device: torch.device, shape: tuple[str, str, int, int, int]) -> dict[str, str]:
    """Why not, by name, of what is wanted and comes before ``chosen`` in the shipped order."""
    fmt, activations, size, k, n = shape
    arch, reasons = device_arch(device), {}
    for name in shipped_order(arch, fmt, size, k):
        implementation = IMPLEMENTATIONS[fmt, name]
        if name == chosen.name:
            break
        if not begins_with(name, FORCED or name) or (
            not FORCED and fmt == "int4" and activations not in ("auto", implementation.activations)
        ):
            continue
        failed = [reason for key, reason in REJECTED.items() if key[:2] == (implementation, device)]
        reason = (
            implementation.why_not(arch)
            or (None if implementation.takes(k, n) else f"{n} outputs")
            or [*failed, None][0]
        )
        if reason:
            reasons[name] = reason
    return reasons


def shape_class(x: Tensor, layer: QuantizedLinear, activations: str) -> tuple[str, str, int, int, int]:
    """What the choice for ``x (..., K)`` depends on, beside the device."""
    n, k = layer.shape
    return layer.fmt.name, activations, size_class(x.numel() // k), k, n


def choice(x: Tensor, layer: QuantizedLinear, activations: str = "auto") -> Implementation:
    """What :func:`linear` takes for ``x (..., K)``."""
    expect_one_device(x, layer)
    return next(working(x, layer, activations))


def expect_one_device(x: Tensor, layer: QuantizedLinear) -> None:
    """:class:`ValueError` that names what is elsewhere: it must not look like a failure of the implementations."""
    if x.device in layer.ready:
        return
    for name, tensor in layer.parts.items():
        if tensor.device != x.device:
            raise ValueError(
                f"SVDQuant: the input of a quantized linear is on {x.device}, but its {name} is on {tensor.device}. "
                "A node has moved one of them: load the model again, and leave that node out."
            )
    layer.ready[x.device] = True


def run_linear(x: Tensor, layer: QuantizedLinear, activations: str) -> Tensor:
    """``x (..., K)``, perhaps deferred, through the best implementation that works; ``(..., N)``."""
    expect_one_device(x, layer)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], layer.shape[0])
    case, given = case_of(x, (layer,), layer.fmt.name, activations, FORCED)
    if (found := again(case, given, activations, x, layer)) is not None:
        return found
    for implementation in working(x, layer, activations):
        found = first_that_works(ways(implementation, x, layer.act_unsigned), case, activations, x, layer)
        if found is not None:
            return found
    raise AssertionError("plain torch is always the last")


def first_that_works(
    candidates: Iterable[Implementation], case: tuple[Any, ...], activations: str, x: Tensor, *layers: QuantizedLinear
) -> Tensor | None:
    """Its result, and it is the choice from now on; None if all have failed on such shapes, or do now."""
    for way in candidates:
        if rejected(spot(way, activations, x, *layers)):
            continue
        if (found := attempt(way, activations, x, *layers)) is not None:
            remember(case, way, x.device)
            return found
    return None


def spot(way: Implementation, activations: str, x: Tensor, *layers: QuantizedLinear) -> tuple[Any, ...]:
    """What a failure of ``way`` holds for."""
    return way, x.device, x.dtype, tuple(shape_class(x, layer, activations) for layer in layers)


def attempt(way: Implementation, activations: str, x: Tensor, *layers: QuantizedLinear) -> Tensor | None:
    """Its result; None if it failed, after a word in the log: plain torch's errors are raised."""
    k, n = layers[0].shape[1], layers[-1].shape[0]
    try:
        return run(way, x, *layers).reshape(*x.shape[:-1], n)
    except Exception as error:
        if way.library == "torch":
            raise
        reject(spot(way, activations, x, *layers), error, f" for {k} inputs and {n} outputs")
    return None


MOST_CASES = 5000  # a model has about 20 for every size of picture


def remember(case: tuple[Any, ...], way: Implementation | None, device: torch.device) -> None:
    """It is the choice from now on; a graph is captured with less to choose from."""
    if capturing(device):
        return
    if len(CHOSEN) >= MOST_CASES:
        CHOSEN.clear()
        TAPES.clear()
    CHOSEN[case] = way


def again(
    case: tuple[Any, ...], given: list[Tensor], activations: str, x: Tensor, *layers: QuantizedLinear
) -> Tensor | None:
    """What was chosen for such a case, once more; None if nothing was, or it failed."""
    way = CHOSEN.get(case)
    if way is None or not_captured(way, x.device):
        return None
    tape = TAPES.get(case)
    if tape is not None and not (tape.derives and met_before(layers)):
        found = played(case, tape, given)
        if found is not None:
            LAST_USED[x.device] = way.name
            return found
    if case in TAPES or not recordable(way, x, given):
        return attempt(way, activations, x, *layers)
    derived = sum(len(layer.derived) for layer in layers)
    found, written = record(lambda: attempt(way, activations, x, *layers), given)
    if found is not None:
        derives = derived != sum(len(layer.derived) for layer in layers)
        TAPES[case] = written and replace(written, derives=derives)
    return found


def met_before(layers: tuple[QuantizedLinear, ...]) -> bool:
    """Whether these very layers come again, so that what follows from their weights is worth keeping.

    Weights that are on their way from the CPU are others at every call.
    """
    met = all("met" in layer.ready for layer in layers)
    for layer in layers:
        layer.ready["met"] = True
    return met


def recordable(way: Implementation, x: Tensor, given: list[Tensor]) -> bool:
    """Whether all that it does is to launch our kernels on a GPU, and nobody else listens, and it may wait for that."""
    if way.library != "triton" or not x.is_cuda or (isinstance(x, Deferred) and not way.before):
        return False
    here = torch.cuda.current_device() == x.device.index and aligned(tensor.data_ptr() for tensor in given)
    return here and torch._C._len_torch_dispatch_stack() == 0 and not capturing(x.device)


def played(case: tuple[Any, ...], tape: Tape, given: list[Tensor]) -> Tensor | None:
    """Its result; None if it has to go the long way, which says what is wrong."""
    if torch.cuda.current_device() != given[0].device.index:
        return None
    try:
        return tape.play(given)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        TAPES[case] = None
        return None


def ways(implementation: Implementation, x: Tensor, unsigned: bool) -> Iterator[Implementation]:
    """With what stands before the input in its kernels, where it does that and is right with it, and without."""
    before = x.before if isinstance(x, Deferred) else ""
    way = taking(implementation, before) if before else None
    if way and is_right(way, x.device, x.dtype, unsigned, size_class(x.numel() // x.shape[-1])):
        yield way
    yield implementation


def run(implementation: Implementation, x: Tensor, *layers: QuantizedLinear) -> Tensor:
    """``implementation.run`` for an ``x (..., K)``: (M, N). What is not its failure is raised as what it is.

    A lack of memory is ComfyUI's business: it unloads models and tries again. After some errors a process cannot use
    its GPU any more, so nothing else is worth a try.
    """
    if implementation.library != "torch":
        LAST_USED[x.device] = implementation.name
    try:
        return implementation.run(x if implementation.before else rows(x), *layers)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if OUT_OF_MEMORY.search(str(error)):
            raise torch.OutOfMemoryError(str(error)) from error
        if is_fatal(error):
            raise FatalError(
                f"SVDQuant: the GPU reported an error after which this process cannot use it any more "
                f"({describe(error)}). The kernels used last were {LAST_USED.get(x.device, 'torch')}. Restart ComfyUI "
                f"with the environment variable SVDQUANT_BACKEND=torch, and please report it."
            ) from error
        raise


class FatalError(RuntimeError):
    """The GPU is lost to this process."""


# As torch, Triton, cuBLAS and HIP say it.
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED", re.IGNORECASE)
FATAL = re.compile(
    r"illegal (memory|instruction|address)|misaligned|unspecified launch|device-side assert", re.IGNORECASE
)
HARMLESS = re.compile(r"no kernel image|invalid (argument|configuration|device function)|not supported", re.IGNORECASE)
ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", ())  # since torch 2.8


def is_fatal(error: RuntimeError) -> bool:
    """Whether the GPU answers every later call with the same error."""
    if isinstance(error, ACCELERATOR_ERROR):
        return HARMLESS.search(str(error)) is None
    return FATAL.search(str(error)) is not None


def fails_everywhere(error: Exception) -> bool:
    """Whether it would fail on every layer: a library, a compiler or a part of them is missing or broken."""
    compiles = type(error).__name__ in ("CompilationError", "PTXASError") or "PassManager::run" in str(error)
    missing = isinstance(error, (ImportError, FileNotFoundError, subprocess.CalledProcessError))
    return compiles or missing or "C compiler" in str(error)


def reject(key: tuple[Any, ...], failure: Exception | str, where: str = "") -> None:
    """Do not use an implementation again in this process, for ``key`` or at all, and say so once."""
    if isinstance(failure, (torch.OutOfMemoryError, FatalError)):
        raise failure
    if isinstance(failure, Exception) and fails_everywhere(failure):
        key, where = key[:2], ""
    REJECTED[key] = failure if isinstance(failure, str) else describe(failure)
    TAPES.clear()
    implementation, device = key[:2]
    logging.warning(
        "SVDQuant: %s is not used on %s%s (%s). %s.",
        implementation.name, device_name(device), where, REJECTED[key],
        "It goes on without what comes before its input" if implementation.before else "The next in order is used",
    )  # fmt: skip


def describe(error: Exception) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


# ---- trust -----------------------------------------------------------------------------------------------


CHECKED = {FEW: (13, 384), SOME: (72, 384), 0: (1500, 3072)}  # (M, N) by size class: kernels have tiles for each
CHECKED_K, CHECKED_RANK = 1024, 32  # many steps of a pipelined loop, and the rank of most files
LINE_DB = 10.0  # how much worse than a whole result one row or column of it may be


def is_right(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, unsigned: bool, size: int
) -> bool:
    """Whether it gives plain torch's result on a random layer; tried once per device, size class and process."""
    key = (implementation, device, dtype, unsigned, size)
    if key in RIGHT:
        return True
    if rejected(key):
        return False
    if capturing(device):
        say_once(logging.WARNING, NOT_WHILE_CAPTURING, implementation.name)
        return False
    if implementation.library == "triton":
        say_once(logging.INFO, "SVDQuant: compiling kernels for %s, once.", device_name(device))
    try:
        reason: Exception | str | None = check(*key)
    except Exception as error:
        reason = error
    if reason is not None:
        reject(key, reason)
        return False
    RIGHT.add(key)
    return True


NOT_WHILE_CAPTURING = (
    "SVDQuant: %s is not used in a CUDA graph that is captured before the first run without one: it is unchecked."
)


def check(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, unsigned: bool, size: int
) -> str | None:
    """Why it is not right on this device, in words; None if it is within its tolerance."""
    fmt, (m, n), k, rank = FORMATS[implementation.fmt], CHECKED[size], CHECKED_K, CHECKED_RANK
    mlp, before = implementation.run is FUSED_MLP.run, implementation.before
    layer, x = random_layer(fmt, m, k, n, device, dtype, rank, unsigned and not mlp)
    x, wanted = in_front(x, before) if before else (x, x)
    if mlp:
        second, _ = random_layer(fmt, m, n, k, device, dtype, rank, unsigned)
        result = torch_mlp(wanted, layer, second)
        return compare(run(implementation, x, layer, second), result, implementation.tolerance_db)
    grid = "int8" if implementation.fmt == "int4" and implementation.activations == "8 bit" else None
    return compare(run(implementation, x, layer), torch_linear(wanted, layer, grid), implementation.tolerance_db)


def in_front(x: Tensor, before: str) -> tuple[Deferred, Tensor]:
    """An input (M, K) with something in front that is made of x, and what it stands for, rounded once."""
    k = x.shape[1]
    if before in ("gelu", "silu"):
        head, tail = x.chunk(2, 1)  # whole blocks of columns on both sides, as in FLUX
        if before == "gelu":
            gate, after = None, torch.nn.functional.gelu(tail.float(), approximate="tanh")
        else:
            gate, after = head, torch.nn.functional.silu(head.float()) * tail.float()
        return Deferred(head, tail, gate=gate), torch.cat([head, after.to(x.dtype)], 1)
    mult, shift = x[:1] + 1, x[-1:].clone()
    if before == "rms":
        weight = (1 + shift[0] / 8).float()
        normed = torch.nn.functional.rms_norm(x.float(), (k,), weight, 1e-6)
        return Deferred(x, None, mult, weight=weight), (normed * mult.float()).to(x.dtype)
    normed = torch.nn.functional.layer_norm(x.float(), (k,), eps=1e-6)
    return Deferred(x, None, mult, shift), torch.addcmul(shift.float(), normed, mult.float()).to(x.dtype)


def compare(found: Tensor, wanted: Tensor, tolerance_db: float) -> str | None:
    """What is not right about a result ``(M, N)``, as a whole or in its worst row or column, in words."""
    if found.shape != wanted.shape:
        return f"a result of shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    power = wanted.float().square().mean()
    error = (found.float() - wanted.float()).square() / power
    means = {"result": error.mean(), "worst row": error.mean(1).max(), "worst column": error.mean(0).max()}
    for what, mean in means.items():
        db, allowed = 10 * math.log10(mean.item() or 1e-30), tolerance_db + (LINE_DB if what != "result" else 0)
        if not db <= allowed:  # NaN, too
            return f"its {what} is {db:.0f} dB off plain torch's, {allowed:.0f} dB are allowed"
    return None


def random_layer(
    fmt: Format, m: int, k: int, n: int, device: torch.device, dtype: torch.dtype, rank: int, unsigned: bool = False
) -> tuple[QuantizedLinear, Tensor]:
    """A layer ``(n, k)`` of random weights and an input ``(m, k)`` for it, the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    w, x, bias = random(n, k) / k**0.5, random(m, k).to(dtype), random(n).to(dtype)
    if unsigned:
        x = torch.nn.functional.gelu(x, approximate="tanh")
    if isinstance(fmt, AWQ):
        return QuantizedLinear(fmt, fmt.solve(w, torch.ones(k, device=device), dtype), bias=bias), x
    codes, scales = fmt.round_weight(w, dtype)
    tensors = fmt.pack(codes, scales, dtype, fmt.tensor_scale(w))
    smooth = (random(k).abs() + 0.5).to(dtype)
    down, up = (random(k, rank) / k**0.5).to(dtype), (random(n, rank) / max(rank, 1) ** 0.5).to(dtype)
    return QuantizedLinear(fmt, tensors, smooth, down, up, bias, unsigned), x


# ---- the linear ------------------------------------------------------------------------------------------


def linear(x: Tensor, layer: QuantizedLinear, activations: str = "auto") -> Tensor:
    """``x (..., K)`` of any float dtype, perhaps deferred, through ``layer``; ``(..., N)`` in x's dtype.

    ``activations`` is one of :data:`.implementations.ACTIVATIONS`; ``auto`` is 4 bit in plain torch.
    """
    if isinstance(x, Deferred) and x.before and may_fuse(x):
        return run_linear(x, layer, activations)
    x = plain(x)
    if x.dtype not in (torch.bfloat16, torch.float16) or (x.device.type != "cuda" and not FORCED):
        grid = FORMATS["int8"] if activations == "8 bit" and layer.fmt.name == "int4" else None
        return linear_forward(
            x, layer.fmt, layer.tensors, layer.smooth_factor, layer.proj_down, layer.proj_up, layer.bias,
            layer.act_unsigned, x.dtype, grid,
        )  # fmt: skip
    if seen_by_nobody(x):
        return run_linear(x, layer, activations)
    t = layer.tensors
    return opaque_linear(
        x, t["weight"], t["weight_scale"], t.get("weight_scale_2"), t.get("weight_zero"), layer.smooth_factor,
        layer.proj_down, layer.proj_up, layer.bias, layer.fmt.name, layer.act_unsigned, activations,
    )  # fmt: skip


@torch.library.custom_op("svdquant::linear", mutates_args=())
def opaque_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor | None,
    weight_zero: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    fmt: str,
    act_unsigned: bool,
    activations: str,
) -> Tensor:
    """:func:`linear` as one op; the tensors of the layer by their names on disk."""
    extra = {"weight_scale_2": weight_scale_2, "weight_zero": weight_zero}
    tensors = {"weight": weight, "weight_scale": weight_scale} | {k: t for k, t in extra.items() if t is not None}
    layer = QuantizedLinear(FORMATS[fmt], tensors, smooth_factor, proj_down, proj_up, bias, act_unsigned)
    return run_linear(x, layer, activations)


def seen_by_nobody(x: Tensor) -> bool:
    """Whether no compiler, tracer, mode or gradient would have to see an op, which costs the host 50 µs more."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return type(x) is Tensor and not traced and not wants_gradient(x)


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd follows what is done with x."""
    return torch.is_grad_enabled() and x.requires_grad


@opaque_linear.register_fake
def opaque_linear_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# ---- two linears with GELU between -----------------------------------------------------------------------


MAX_SCRATCH = 64 << 20  # bytes


def run_mlp(x: Tensor, first: QuantizedLinear, second: QuantizedLinear, activations: str) -> Tensor:
    """``x (..., K)``: fused where both layers take our W4A4 kernel, else one after the other."""
    for layer in (first, second):
        expect_one_device(x, layer)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], second.shape[0])
    case, given = case_of(x, (first, second), "int4", activations, FORCED)
    if (found := again(case, given, activations, x, first, second)) is not None:
        return found
    if CHOSEN.get(case, FUSED_MLP) is not None and may_be_one(x, first, second, activations):
        size, unsigned = size_class(x.numel() // x.shape[-1]), second.act_unsigned
        fused = (w for w in ways(FUSED_MLP, x, unsigned) if is_right(w, x.device, x.dtype, unsigned, size))
        if (found := first_that_works(fused, case, activations, x, first, second)) is not None:
            return found
    remember(case, None, x.device)
    return run_linear(gelu(run_linear(x, first, activations)), second, activations)


def may_be_one(x: Tensor, first: QuantizedLinear, second: QuantizedLinear, activations: str) -> bool:
    """Whether both layers would take our W4A4 kernel, and what the fused one needs is not too much."""
    ours = all(choice(x, layer, activations).name == "triton-w4a4" for layer in (first, second))
    return ours and mlp_scratch(x.numel() // x.shape[-1], first, second) < MAX_SCRATCH


def on_gpu() -> bool:
    """Whether inputs may come that :func:`may_fuse`."""
    return torch.cuda.is_available() or bool(FORCED)


def may_fuse(x: Tensor) -> bool:
    """Whether :func:`mlp` takes an input: what :func:`linear` would give to its op, without a gradient."""
    return x.dtype in (torch.bfloat16, torch.float16) and (x.is_cuda or bool(FORCED)) and not wants_gradient(x)


def mlp(x: Tensor, first: QuantizedLinear, second: QuantizedLinear, activations: str) -> Tensor:
    """``second(GELU(first(x)))`` of two INT4 layers as one op, for an ``x (..., K)`` of which :func:`may_fuse`."""
    if isinstance(x, Deferred) and x.before:
        return run_mlp(x, first, second, activations)
    x = plain(x)
    if seen_by_nobody(x):
        return run_mlp(x, first, second, activations)
    return opaque_mlp(
        x, parts(first), parts(second), first.bias, second.bias,
        first.act_unsigned, second.act_unsigned, activations,
    )  # fmt: skip


def parts(layer: QuantizedLinear) -> list[Tensor]:
    """The tensors that every INT4 layer has, in the order of :func:`from_parts`."""
    rest = (layer.smooth_factor, layer.proj_down, layer.proj_up)
    return [layer.tensors["weight"], layer.tensors["weight_scale"], *(t for t in rest if t is not None)]


def from_parts(tensors: list[Tensor], bias: Tensor | None, unsigned: bool) -> QuantizedLinear:
    weight, weight_scale, smooth_factor, proj_down, proj_up = tensors
    codes = {"weight": weight, "weight_scale": weight_scale}
    return QuantizedLinear(FORMATS["int4"], codes, smooth_factor, proj_down, proj_up, bias, unsigned)


@torch.library.custom_op("svdquant::mlp", mutates_args=())
def opaque_mlp(
    x: Tensor,
    first: list[Tensor],
    second: list[Tensor],
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    first_unsigned: bool,
    second_unsigned: bool,
    activations: str,
) -> Tensor:
    """:func:`mlp` as one op."""
    layers = from_parts(first, first_bias, first_unsigned), from_parts(second, second_bias, second_unsigned)
    return run_mlp(x, *layers, activations)


@opaque_mlp.register_fake
def opaque_mlp_shape(x: Tensor, first: list[Tensor], second: list[Tensor], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], second[0].shape[0])

"""Which implementation runs a quantized linear: measured if it was, by reasoning if not, and only if it is right.

On the CPU and in float32 that is plain torch (:func:`.linear.linear_forward`), traced by torch.compile like any torch
code. In bf16 and fp16 on a GPU every linear is one opaque op, ``svdquant::linear``, and the choice is
made in it: no graph break, and nothing of it is traced.

The environment variable SVDQUANT_BACKEND takes a library (``torch``, ``triton``, ``kitchen``) or a name out of
:data:`.implementations.IMPLEMENTATIONS`, or the beginning of one up to a dash, in place of the choice.
"""

import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import TOOL
from .formats import AWQ, FORMATS, Format
from .implementations import FUSED_MLP, IMPLEMENTATIONS, Implementation, torch_linear, torch_mlp
from .linear import QuantizedLinear, linear_forward

FORCED = os.environ.get("SVDQUANT_BACKEND", "")

# ---- the shipped order -----------------------------------------------------------------------------------

# By reasoning (docs/kernels.md), not by measurement: published rates of the matrix units, and the work beside them.
# comfy-kitchen's CUDA kernels use INT4 units; Triton has no int4 product. sm80 has them, too, but too few float units
# to scale their results in time.
INT4_FIRST = {"sm86", "sm87", "sm89"}
FP8_BEFORE_INT8 = {"sm100", "sm101", "sm103"}  # Triton reaches tcgen05 with fp8 only, and sm103 has few int8 units
FEW, SOME = 16, 512  # tokens: a GEMM is bound by reading the weight up to about SOME, so widening it first costs most


def shipped_order(arch: str, fmt: str, size: int) -> list[str]:
    """Names of ``fmt``'s implementations, expected fastest first, on ``arch``, for a :func:`size_class` of tokens."""
    if fmt == "awq" and size == 0:
        return ["torch"]  # the kernels are for a token or a few; unpacking pays off for many
    if fmt != "int4":
        return [name for f, name in IMPLEMENTATIONS if f == fmt]
    kinds = ("fp8", "int8") if arch in FP8_BEFORE_INT8 else ("int8", "fp8")
    ways = ("w4a8", "widened") if size else ("widened", "w4a8")
    eight = [f"triton-{way}-{kind}" for kind in kinds for way in ways]
    if arch in INT4_FIRST:
        return ["kitchen-w4a4", *eight, "triton-w4a4", "torch", "torch-w4a8"]
    return [*eight, "triton-w4a4", "kitchen-w4a4", "torch", "torch-w4a8"]


def size_class(m: int) -> int:
    """Tokens in classes: FEW, SOME, or 0 for more."""
    return FEW if m <= FEW else SOME if m <= SOME else 0


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


@cache
def device_key(device: torch.device) -> str:
    """What measured times are valid for: the device and every version that matters."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    libraries = ("torch", "triton", "triton-windows", "comfy-kitchen")
    versions = [f"{each} {found}" for each in libraries if (found := installed_version(each))]
    return "; ".join([f"{name} ({device_arch(device)})", *versions, TOOL])


def installed_version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


Times = dict[str, float]  # milliseconds by implementation


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


def store_measurements(device: torch.device, measured: dict[str, Times]) -> Path:
    """Add times of ``device``, and use them from now on."""
    path = measurements_file()
    content = read_measurements(path)
    content.setdefault(device_key(device), {}).update(measured)
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
    """By shape key."""
    return read_measurements(measurements_file()).get(device_key(device), {})


def nearest_times(device: torch.device, fmt: str, size: int, k: int, n: int) -> Times:
    """Times of the measured shape that is nearest, of the same format and size class; empty if there is none."""
    found: tuple[float, Times] = math.inf, {}
    for key, times in measured_times(device).items():
        f, s, *shape = key.split()
        if (f, s) == (fmt, str(size)):
            distance = sum(abs(math.log(float(a) / b)) for a, b in zip(shape, (k, n)))
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
    names = sorted(shipped_order(arch, fmt, size), key=lambda name: times.get(name, math.inf))  # stable
    every = [IMPLEMENTATIONS[fmt, name] for name in names]
    if forced or arch == "cpu":
        every = [i for i in every if f"{i.name}-".startswith(f"{forced or 'torch'}-")]
    wanted = [i for i in every if fmt != "int4" or activations in ("auto", i.activations)] or every
    usable = [i for i in wanted if i.why_not(arch) is None and i.takes(k, n)]
    usable.append(IMPLEMENTATIONS[fmt, "torch-w4a8" if (fmt, activations) == ("int4", "8 bit") else "torch"])
    plain = next(index for index, i in enumerate(usable) if i.library == "torch")
    return tuple(usable[: plain + 1])


REJECTED: dict[tuple[Any, ...], str] = {}  # why an implementation is not used, by what it failed on
RIGHT: set[tuple[Any, ...]] = set()  # what passed its check


def forget() -> None:
    """Choose anew: the measured times, or a test's conditions, have changed."""
    for cached in (ranked, measured_times):
        cached.cache_clear()
    REJECTED.clear()
    RIGHT.clear()


def working(x: Tensor, layer: QuantizedLinear, activations: str) -> Iterator[Implementation]:
    """What to run ``x (M, K)`` with, best first: right on a small layer, and never failed on such a shape."""
    shape = shape_class(x, layer, activations)
    for implementation in ranked(x.device, *shape, FORCED):
        if implementation.library == "torch":
            yield implementation
            return
        failed = (implementation, x.device, x.dtype, shape) in REJECTED
        if not failed and is_right(implementation, x.device, x.dtype, layer.act_unsigned, size_class(x.shape[0])):
            yield implementation


def shape_class(x: Tensor, layer: QuantizedLinear, activations: str) -> tuple[str, str, int, int, int]:
    """What the choice for ``x (M, K)`` depends on, beside the device."""
    n, k = layer.shape
    return layer.fmt.name, activations, size_class(x.shape[0]), k, n


def choice(x: Tensor, layer: QuantizedLinear, activations: str = "auto") -> Implementation:
    """What :func:`linear` takes for ``x (M, K)``."""
    return next(working(x, layer, activations))


def run_linear(x: Tensor, layer: QuantizedLinear, activations: str) -> Tensor:
    """``x (M, K)`` through the best implementation that works."""
    for implementation in working(x, layer, activations):
        if implementation.library == "torch":
            return implementation.run(x, layer)
        try:
            return implementation.run(x, layer)
        except torch.OutOfMemoryError:
            raise  # ComfyUI's business: it unloads models and tries again
        except Exception as error:
            n, k = layer.shape
            key = (implementation, x.device, x.dtype, shape_class(x, layer, activations))
            reject(key, describe(error), f" for {k} inputs and {n} outputs")
    raise AssertionError("plain torch is always the last")


def reject(key: tuple[Any, ...], reason: str, where: str = "") -> None:
    """Do not use an implementation again in this process, and say so once."""
    REJECTED[key] = reason
    implementation, device = key[:2]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    logging.warning(
        "SVDQuant: %s is not used on %s%s (%s). The next in order is used.",
        implementation.name, name, where, reason,
    )  # fmt: skip


def describe(error: Exception) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


# ---- trust -----------------------------------------------------------------------------------------------


CHECKED = {FEW: (3, 384), SOME: (72, 384), 0: (1500, 3072)}  # (M, N) by size class: kernels have tiles for each


def is_right(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, unsigned: bool, size: int
) -> bool:
    """Whether it gives plain torch's result on a random layer; tried once per device, size class and process."""
    key = (implementation, device, dtype, unsigned, size)
    if key in RIGHT:
        return True
    if key in REJECTED or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False  # a graph that is being captured cannot wait for a result
    reason = check(*key)
    if reason is not None:
        reject(key, reason)
        return False
    RIGHT.add(key)
    return True


def check(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, unsigned: bool, size: int
) -> str | None:
    """Why it is not right on this device, in words; None if it is within its tolerance."""
    fmt, (m, n) = FORMATS[implementation.fmt], CHECKED[size]
    if implementation is FUSED_MLP:
        first, x = random_layer(fmt, m, 256, n, device, dtype, rank=24)
        second, _ = random_layer(fmt, m, n, 256, device, dtype, rank=40, unsigned=unsigned)
        return compare(implementation, (x, first, second), torch_mlp(x, first, second))
    layer, x = random_layer(fmt, m, 256, n, device, dtype, rank=24, unsigned=unsigned)
    grid = "int8" if implementation.fmt == "int4" and implementation.activations == "8 bit" else None
    return compare(implementation, (x, layer), torch_linear(x, layer, grid))


def compare(implementation: Implementation, arguments: tuple[Any, ...], wanted: Tensor) -> str | None:
    """What is not right about its result, in words."""
    try:
        found = implementation.run(*arguments).float()
        if found.shape != wanted.shape:
            return f"a result of shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
        error = float(10 * ((found - wanted).square().sum() / wanted.float().square().sum()).log10())
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        return describe(failure)
    if not error <= implementation.tolerance_db:  # NaN, too
        return f"its result is {error:.0f} dB off plain torch's, {implementation.tolerance_db:.0f} dB are allowed"
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
    """``x (..., K)`` of any float dtype through ``layer``; ``(..., N)`` in x's dtype.

    ``activations`` is one of :data:`.implementations.ACTIVATIONS`; ``auto`` is 4 bit in plain torch.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or (x.device.type != "cuda" and not FORCED):
        grid = FORMATS["int8"] if activations == "8 bit" and layer.fmt.name == "int4" else None
        return linear_forward(
            x, layer.fmt, layer.tensors, layer.smooth_factor, layer.proj_down, layer.proj_up, layer.bias,
            layer.act_unsigned, x.dtype, grid,
        )  # fmt: skip
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
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    return run_linear(rows, layer, activations).reshape(*x.shape[:-1], weight.shape[0])


@opaque_linear.register_fake
def opaque_linear_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# ---- two linears with GELU between -----------------------------------------------------------------------


def run_mlp(x: Tensor, first: QuantizedLinear, second: QuantizedLinear, activations: str) -> Tensor:
    """``x (M, K)``: fused where both layers take our W4A4 kernel, else one after the other."""
    shapes = shape_class(x, first, activations), shape_class(x, second, activations)
    key = (FUSED_MLP, x.device, x.dtype, shapes)
    ours = all(choice(x, layer, activations).name == "triton-w4a4" for layer in (first, second))
    size = size_class(x.shape[0])
    if ours and key not in REJECTED and is_right(FUSED_MLP, x.device, x.dtype, second.act_unsigned, size):
        try:
            return FUSED_MLP.run(x, first, second)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reject(key, describe(error), f" for {first.shape[1]}, {first.shape[0]} and {second.shape[0]} features")
    hidden = torch.nn.functional.gelu(run_linear(x, first, activations), approximate="tanh")
    return run_linear(hidden, second, activations)


def may_fuse(x: Tensor) -> bool:
    """Whether :func:`mlp` takes an input: what :func:`linear` would give to its op, without a gradient."""
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    return x.dtype in (torch.bfloat16, torch.float16) and (x.is_cuda or bool(FORCED)) and not wants_gradient


def mlp(x: Tensor, first: QuantizedLinear, second: QuantizedLinear, activations: str) -> Tensor:
    """``second(GELU(first(x)))`` of two INT4 layers as one op, for an ``x (..., K)`` of which :func:`may_fuse`."""
    return opaque_mlp(
        x, parts(first), parts(second), first.bias, second.bias, first.act_unsigned, second.act_unsigned, activations
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
    rows, n = x.reshape(-1, x.shape[-1]), second[0].shape[0]
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n)
    layers = from_parts(first, first_bias, first_unsigned), from_parts(second, second_bias, second_unsigned)
    return run_mlp(rows, *layers, activations).reshape(*x.shape[:-1], n)


@opaque_mlp.register_fake
def opaque_mlp_shape(x: Tensor, first: list[Tensor], second: list[Tensor], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], second[0].shape[0])

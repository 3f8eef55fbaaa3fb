"""Time the whole quantized linear against torch's 16-bit one, in one run, at FLUX.1's shapes; measure the choice."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends
from .deferred import Deferred, plain
from .formats import get_format
from .implementations import IMPLEMENTATIONS, Implementation
from .linear import QuantizedLinear
from .tuning import tune

FLUX_SHAPES = ((3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072))  # (K, N)
BEFORE = {shape: "gelu" if shape[1] == 3072 else "norm" for shape in FLUX_SHAPES if shape != (3072, 3072)}
MODULATION_SHAPES = ((3072, 18432), (3072, 9216))
RANK = 32


def rows(gpu: bool, tokens: int | None, fmt: str) -> list[tuple[str, int, int, int]]:
    """(format, M, K, N) to time: all tokens of a picture; for a GPU's choice also those of the text, and modulation."""
    many = [(fmt, tokens or (4608 if gpu else 256), k, n) for k, n in FLUX_SHAPES]
    if not gpu or tokens:
        return many
    return [*many, *((fmt, 512, k, n) for k, n in FLUX_SHAPES[:4]), *(("awq", 1, k, n) for k, n in MODULATION_SHAPES)]


def bench(device: torch.device, tokens: int | None, fmt: str = "int4", tiles: bool = False) -> None:
    """Print milliseconds, ratios and the choice per shape. The baseline is ``torch.nn.functional.linear``, in 16 bit.

    On a GPU every implementation is timed, with what FLUX has before the linear, and so is the baseline; from then on
    the fastest of the right ones runs there. ``tiles``: with the fastest tiles for our kernels, which takes minutes.
    """
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; {str(dtype).removeprefix('torch.')}")
    print(f"{'':5} {'M':>5} {'K':>6} {'N':>6} {'16 bit':>10} {'quantized':>12} {'speed-up':>9}  implementation")
    for each, m, k, n in rows(gpu, tokens, fmt):
        layer, x = backends.random_layer(get_format(each), m, k, n, device, dtype, RANK)
        before = input_of(x, BEFORE.get((k, n), "") if gpu and each != "awq" else "")
        baseline = median_ms(sixteen_bit(layer, before), gpu)
        times = measure(layer, before) if gpu else {}
        if times and tiles:
            backends.store_measurements(device, found_tiles(layer, before, times))
            times = measure(layer, before)
        if times:
            backends.store_measurements(device, {backends.shape_key(each, backends.size_class(m), k, n): times})
        ms = median_ms(lambda before=before, layer=layer: backends.linear(before(), layer), gpu)  # type: ignore[misc]
        choice = backends.choice(x, layer).name
        print(f"{each:5} {m:5} {k:6} {n:6} {baseline:7.2f} ms {ms:9.2f} ms {baseline / ms:8.2f}x  {choice}", flush=True)
        for name, ms in sorted(times.items(), key=lambda item: item[1]):
            print(f"{'':36} {ms:9.2f} ms {baseline / ms:8.2f}x  {name} alone")
    if gpu:
        print(f"The choice is stored in {backends.measurements_file()}.")


def input_of(x: Tensor, before: str) -> Callable[[], Tensor]:
    """Makes the input (M, K) of a linear as FLUX has it: x, or what comes of x by norm and modulation or by GELU."""
    if before == "norm":
        return lambda: Deferred(x, None, x[:1], x[-1:])
    if before == "gelu":
        head = 3072 if x.shape[1] == 15360 else 0
        return lambda: Deferred(x[:, :head], x[:, head:])
    return lambda: x


def measure(layer: QuantizedLinear, before: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds of every implementation that can run the layer on the input's device and gives the right result."""
    (n, k), x = layer.shape, before()
    backends.measured_times(x.device)  # with the tiles that are stored
    size, arch, times = backends.size_class(x.shape[0]), backends.device_arch(x.device), {}
    for implementation in IMPLEMENTATIONS.values():
        if implementation.fmt != layer.fmt.name or implementation.why_not(arch) or not implementation.takes(k, n):
            continue
        if backends.is_right(implementation, x.device, x.dtype, layer.act_unsigned, size):
            times[implementation.name] = time_of(implementation, layer, before)
    return {name: ms for name, ms in times.items() if ms is not None}


IN_REACH = 2.0  # times the fastest: what tiles may make up for


def found_tiles(
    layer: QuantizedLinear, before: Callable[[], Tensor], times: dict[str, float]
) -> dict[str, dict[str, int]]:
    """The fastest tiles for the kernels of our implementations that are not far from the fastest."""
    found: dict[str, dict[str, int]] = {}
    x, fmt = before(), layer.fmt.name
    for name, ms in times.items():
        implementation = IMPLEMENTATIONS[fmt, name]
        if implementation.library == "triton" and ms < IN_REACH * min(times.values()):
            way = next(backends.ways(implementation, x, layer.act_unsigned))
            run = runs(way, layer, before)
            tiles, old, new = tune(way, layer, run, partial(median_ms, run, x.is_cuda))
            print(f"{name:>48}: {old:.3f} ms with the tiles it ships with, {new:.3f} ms with the fastest")
            found |= tiles
    return found


def runs(way: Implementation, layer: QuantizedLinear, before: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The layer on its input, which is made anew at every call: once computed, it would not be deferred."""
    return lambda: backends.run(way, before(), layer)


def time_of(implementation: Implementation, layer: QuantizedLinear, before: Callable[[], Tensor]) -> float | None:
    """Milliseconds; None, with the reason on the screen, if it cannot run this shape."""
    x = before()
    for way in backends.ways(implementation, x, layer.act_unsigned):
        try:
            return median_ms(runs(way, layer, before), x.is_cuda)
        except Exception as error:
            print(f"{way.name}: {backends.describe(error)}")
    return None


def sixteen_bit(layer: QuantizedLinear, before: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """torch's linear of the same shape, and what stands before it, in the input's dtype."""
    weight = layer.fmt.unpack(layer.tensors, before().dtype)
    return lambda: torch.nn.functional.linear(plain(before()), weight, layer.bias)


def median_ms(run: Callable[[], Tensor], gpu: bool, repeats: int = 9) -> float:
    """Median time of a call in milliseconds, after warm-up; on a GPU by :func:`gpu_times`."""
    for _ in range(2):
        run()
    if gpu:
        return statistics.median(gpu_times(run, 2 * repeats))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def gpu_times(run: Callable[[], Any], calls: int, cold: bool = False) -> list[float]:
    """Milliseconds that the current GPU works on each of some calls, of which none may be the first.

    Calls are queued behind other work, as in a model: a linear takes the host longer to queue than a large GPU to
    compute, so a GPU that had nothing to do would be timed waiting. ``cold``: with nothing in its L2 cache. Else the
    weight is found there if it fits, which a model's is not, so expect a little more.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    rubbish = torch.empty(2**28 if cold else 0, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    keep_busy(calls * (time.perf_counter() - start))
    for before, after in events:
        rubbish.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def keep_busy(seconds: float) -> None:
    """Queue products of matrices that take the current GPU twice as long."""
    matrix = torch.zeros(4096, 4096, dtype=torch.float16, device="cuda")
    done = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=done)  # the first one loads libraries
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.mm(matrix, matrix, out=done)
    torch.cuda.synchronize()
    for _ in range(1 + int(2 * seconds / (time.perf_counter() - start))):
        torch.mm(matrix, matrix, out=done)

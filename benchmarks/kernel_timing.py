"""What the benchmarks of single kernels share: the GPU, the shapes, and a line of results."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
from comfyui_svdquant.svdq_core.benchmark import FLUX_SHAPES, gpu_times, input_of
from comfyui_svdquant.svdq_core.deferred import operands
from torch import Tensor

TOKENS, RANK = 4608, 32  # of FLUX.1 at 1024 x 1024
SHAPES = FLUX_SHAPES  # (K, N)


def gpu() -> torch.device:
    """The GPU; without one the script ends here, with an error."""
    if not torch.cuda.is_available():
        raise SystemExit("No GPU: this benchmark times kernels. benchmarks/count_instructions.py needs none.")
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}")
    return device


def compare(name: str, runs: dict[str, Callable[[], Any]], work: float, unit: str) -> None:
    """Print the median of every run, and its speed against the last, the baseline; ``work`` in 10¹² per run.

    Times are the GPU's own, with a cold L2 cache.
    """
    for call in runs.values():  # compiles
        call()
    times = {run: statistics.median(gpu_times(call, 50, cold=True)) for run, call in runs.items()}
    baseline = times[list(times)[-1]]
    for run, ms in times.items():
        print(f"{name:>16}  {run:<28} {ms:8.3f} ms  {work / ms * 1e3:8.2f} {unit}  {baseline / ms:5.2f}x")


def in_front(quantize: Callable[..., Any], x: Tensor, work: float) -> None:
    """What a quantizer saves that computes what FLUX has before a linear: norm and modulation, or GELU and the cat.

    ``quantize`` takes x and its arguments by name. The baseline is torch's passes, and then the quantizer.
    """
    k = x.shape[1]
    before = "norm" if k == 3072 else "gelu"
    value = input_of(x, before)
    rows, given = operands(value())
    runs = {before: lambda: quantize(rows, **given), "torch, then it": lambda: quantize(value().value())}
    compare(f"K {k}", runs, work, "TB/s")

"""What the benchmarks of single kernels share: the GPU, the shapes, and a line of results."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from comfyui_svdquant.svdq_core.benchmark import FLUX_SHAPES
from triton.testing import do_bench

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
    times = {run: do_bench(call, return_mode="median") for run, call in runs.items()}
    baseline = times[list(times)[-1]]
    for run, ms in times.items():
        print(f"{name:>16}  {run:<28} {ms:8.3f} ms  {work / ms * 1e3:8.2f} {unit}  {baseline / ms:5.2f}x")

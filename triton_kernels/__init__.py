"""The kernels, one per file, each a `torch.library` custom op named ``svdquant::<file>``.

Import the file of the kernel you want; nothing here imports Triton, which not every machine has.
"""

import importlib.util

EXACT_SUMS = 4096  # columns of e4m3 that Ada's and Hopper's matrix units sum well enough (`rounding.columns_at_once`)


def why_not() -> str | None:
    """Why kernels cannot run here, or None if they can: Triton and a GPU, or Triton's interpreter on the CPU."""
    import os

    import torch

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA or ROCm GPU"
    return None


def available() -> bool:
    """Whether kernels can run here."""
    return why_not() is None

"""An NVIDIA GPU that is not there, for whole programs: torch, Triton, ComfyUI and comfy-aimdo take it for a real one.

`driver.c` is CUDA's runtime and driver on memory of the host, with late copies and streams that must be waited for;
`operators.py` runs torch's operators on that memory, and `kernels.py` compiled Triton kernels (as PTX, `tests/ptx`).
`environment()` is what a child process needs to see it. So the code that only runs on a GPU is tested without one: the
choice of kernels, CUDA graphs, devices that do not match, partly loaded models, ComfyUI's dynamic VRAM. It knows
nothing of speed, and comfy-kitchen's compiled kernels do not run on it. Idle (`idle.py`), it computes nothing, and what
is left is the host's time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """The compiled driver. The compiler is of requirements-dev.txt, the headers came with torch and Triton."""
    import triton  # which not every system has

    site, library = Path(torch.__file__).parents[1], folder / "libcuda.so.1"
    includes = [site / "nvidia" / "cu13" / "include", Path(triton.__file__).parent / "backends/nvidia/include"]
    command = [sys.executable, "-m", "ziglang", "cc", "-O1", "-shared", "-fPIC", "-w", str(HERE / "driver.c"),
               *(f"-I{each}" for each in includes), "-o", str(library), "-Wl,-soname,libcuda.so.1"]  # fmt: skip
    subprocess.run(command, check=True)
    return library


def environment(library: Path, **settings: str) -> dict[str, str]:
    """For a child process; ``settings`` as ``mib="4096"`` are those of driver.c."""
    paths = [str(HERE / "start"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    named = {f"SVDQ_GPU_{name.upper()}": value for name, value in settings.items()}
    visible = {"CUDA_VISIBLE_DEVICES": "0", "TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": str(library.parent)}
    return {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(paths), **visible, **named}


def answer(script: str, library: Path) -> Any:
    """What a script of this folder prints, as JSON."""
    env = {**os.environ, **environment(library)}
    done = subprocess.run([sys.executable, HERE / script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

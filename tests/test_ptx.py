"""The kernels as GPUs get them: tests that are marked ``ptx``, compiled for each GPU and run on the CPU by `ptx/`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from host.install import ROOT
from triton_compile import KERNELS

FILES = [ROOT / "tests" / f"test_{kernel}.py" for kernel in KERNELS]
GEMMS = [file for file in FILES if file.name.startswith("test_gemm")]
NVFP4 = [file for file in FILES if file.name == "test_gemm_nvfp4.py"]
# What differs: all on mma.sync, the products on wgmma and tcgen05, e4m3 and how it is converted, the block-scaled MMA.
# Elsewhere the code is sm 80's; `pytest tests/test_<kernel>.py --ptx sm120` runs the rest.
RUNS = {"sm80": (FILES, ""), "sm90": (GEMMS, ""), "sm100": (GEMMS, ""), "sm120": (NVFP4, "")}
RUNS |= {"sm89 e4m3": (FILES, "fp8 or long_sums"), "sm120 e4m3": (FILES, "fp8 or long_sums")}


def test_no_kernel_is_left_out():
    assert len(FILES) == 10
    assert not [file.name for file in FILES if "@pytest.mark.ptx" not in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("run", RUNS)
def test_kernels_are_right_on(run: str):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there has its own turn
    pytest_alone = [str(Path(sys.executable).with_name("pytest")), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    files, which = RUNS[run]
    selected = ["--ptx", run.split()[0], "-m", "ptx", "-k", which, *map(str, files)]
    done = subprocess.run([*pytest_alone, *selected], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

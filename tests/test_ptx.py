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
OTHERS = [file for file in FILES if file not in GEMMS]  # sm 89, 90 and 120 get what sm 80 gets, but for fp8
RUNS = {arch: (FILES, "") for arch in ("sm80", "sm100")} | {arch: (GEMMS, "") for arch in ("sm89", "sm90", "sm120")}
RUNS |= {f"{arch} others": (OTHERS, "fp8") for arch in ("sm89", "sm90", "sm120")}


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

"""The kernels as GPUs get them: tests that are marked ``ptx``, compiled for each GPU and run on the CPU by `ptx/`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from host.install import ROOT
from triton_compile import KERNELS

FILES = [ROOT / "tests" / f"test_{kernel}.py" for kernel in KERNELS]


def test_no_kernel_is_left_out():
    assert len(FILES) == 10
    assert not [file.name for file in FILES if "@pytest.mark.ptx" not in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90", "sm100", "sm120"])
def test_kernels_are_right_on(arch: str):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there has its own turn
    pytest_alone = [str(Path(sys.executable).with_name("pytest")), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [*pytest_alone, "--ptx", arch, "-m", "ptx", *map(str, FILES)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]

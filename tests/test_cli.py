"""The command line, run as users run it."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from small_flux import activations, random_flux


def svdquant(*arguments, env=None):
    command = [sys.executable, "-m", "comfyui_svdquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    sd = random_flux()
    save_file(sd, folder / "in.safetensors")
    save_file(activations(sd), folder / "act.safetensors")
    return folder


@pytest.mark.parametrize("command", [(), ("quantize",), ("inspect",), ("bench",)])
def test_help(command):
    done = svdquant(*command, "--help")
    assert done.returncode == 0 and "usage: svdquant" in done.stdout


def test_quantize_inspect_and_chart(folder):
    done = svdquant("quantize", folder / "in.safetensors", folder / "out.safetensors", "--calibration",
                    folder / "act.safetensors", "--preset", "fast", "--chart", folder / "chart.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "smaller than 16 bit" in done.stdout and "13 layers" in done.stdout
    assert Image.open(folder / "chart.png").size == (1024, 420)
    with safe_open(folder / "out.safetensors", "np") as file:
        made = json.loads(file.metadata()["svdquant"])
    assert made["source"]["file"] == "in.safetensors" and len(made["source"]["sha256"]) == 64
    assert made["calibration"] == {"kind": "file", "file": "act.safetensors"}
    shown = svdquant("inspect", folder / "out.safetensors", "--layers")
    assert "an SVDQuant file of FLUX.1" in shown.stdout and "SVDQuant Loader" in shown.stdout
    assert "single_blocks.0.linear2" in shown.stdout
    assert "a 16-bit diffusion model (FLUX.1)" in svdquant("inspect", folder / "in.safetensors").stdout


def test_without_calibration_the_file_says_so(folder):
    done = svdquant("quantize", folder / "in.safetensors", folder / "w.safetensors", "--preset", "naive")
    assert done.returncode == 0, done.stderr
    assert "weight statistics only" in svdquant("inspect", folder / "w.safetensors").stdout


def test_other_files_are_not_overwritten(folder):
    save_file(random_flux(seed=1), folder / "other.safetensors")
    before = (folder / "other.safetensors").read_bytes()
    done = svdquant("quantize", folder / "in.safetensors", folder / "other.safetensors")
    assert done.returncode == 1 and "a 16-bit diffusion model (FLUX.1): it is not overwritten" in done.stderr
    assert (folder / "other.safetensors").read_bytes() == before


def test_refusals_are_one_line_without_traceback(folder):
    (folder / "text.safetensors").write_text("hello there, not a model")
    cases = [
        (("quantize", folder / "absent.safetensors", folder / "x.safetensors"), "no such file"),
        (("quantize", folder / "text.safetensors", folder / "x.safetensors"), "not a safetensors file"),
        (("quantize", folder / "in.safetensors", folder / "x.bin"), "must end in .safetensors"),
        (("quantize", folder / "in.safetensors", folder / "in.safetensors"), "same file"),
        (("inspect", folder / "text.safetensors"), "not a safetensors file"),
    ]
    for arguments, message in cases:
        done = svdquant(*arguments)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_tiles_are_a_gpus():
    done = svdquant("bench", "--device", "cpu", "--tiles")
    assert done.returncode == 1 and "--tiles needs a GPU" in done.stderr


def test_bench_prints_ratios():
    done = svdquant("bench", "--tokens", "2", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x  torch\n") == 6 and "speed-up" in done.stdout

"""The benchmarks of whole linears and whole models run, at a small size: what they need a GPU for is the figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
from host.install import ROOT


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_linear(tmp_path: Path):
    done = run("benchmark_linear.py", "--small", "--json", str(tmp_path / "results" / "linear.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "linear.json").read_text())
    assert "torch" in result["device"] and result["command"].startswith("benchmarks/benchmark_linear.py --small")
    assert {"bfloat16", "int8"} <= result["ceilings_tops"].keys()
    for shape in result["shapes"]:
        assert {"bf16", "auto", "rank 0", "unfused", "torch", "comfy-kitchen INT8"} <= shape["ms"].keys()
        assert shape["auto"] == "torch" and all(ms > 0 for ms in shape["ms"].values())
    assert result["auto_is_faster_than"]["bf16"] > 0


def test_model(comfy_path: Path, tmp_path: Path):
    arguments = ("--small", "--steps", "1", "--loras", "0", "1", "--json", str(tmp_path / "model.json"))
    done = run("benchmark_model.py", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    names = ["bf16", *(f"int4, activations {a}" for a in ("auto", "4 bit", "8 bit")), "int4, auto, none deferred"]
    assert [(row["model"], row["loras"]) for row in rows] == [(name, loras) for name in names for loras in (0, 1)]
    assert rows[0]["weights_gib"] > 1.5 * rows[2]["weights_gib"]


ONE_MODEL = "import sys, benchmark_host as b; b.ROUNDS = 1; b.FORMATS = ['int4']; b.ACTIVATIONS = ['4 bit']; b.main()"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the emulated driver is preloaded")
def test_host(comfy_path: Path, tmp_path: Path):
    """On a GPU that does nothing."""
    env = {**os.environ, **gpu.environment(gpu.build(tmp_path), idle="1", arch="80")}
    env["PYTHONPATH"] += os.pathsep + str(ROOT / "benchmarks")
    command = [sys.executable, "-c", ONE_MODEL, "--json", str(tmp_path / "host.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, quantized, lora = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert plain["through"] == [] and quantized["through"][0] == "triton-w4a4" and quantized["ratio"] > 1
    assert lora["model"] == "int4, 4 bit, LoRA" and "triton-w4a4" in lora["through"]
    assert 19 * quantized["double"] + 38 * quantized["single"] == pytest.approx(1000 * quantized["step_ms"])


@pytest.mark.parametrize("script", ["benchmark_linear.py", "benchmark_model.py"])
def test_no_figures_without_a_gpu(script: str):
    done = run(script)
    assert done.returncode == 2 and "there is no GPU; --small tries the script on the CPU" in done.stderr

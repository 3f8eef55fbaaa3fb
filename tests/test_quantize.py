"""Whole files: resume after a kill, determinism, events, refusals, memory."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_svdquant import svdq_core
from comfyui_svdquant.svdq_core.calibration import Samples
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from comfyui_svdquant.svdq_core.quantize import FileSource, Job, parts_folder, quantize
from safetensors.torch import save_file

from small_flux import activations, random_flux


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A 16-bit model file and a calibration file for it."""
    folder = tmp_path_factory.mktemp("model")
    sd = random_flux(depth=2, single=2)
    save_file(sd, folder / "flux.safetensors")
    save_file(activations(sd), folder / "activations.safetensors")
    return folder / "flux.safetensors", folder / "activations.safetensors"


def run(files, output, **changes):
    model, calibration = files
    events = []
    changes.setdefault("on_event", events.append)
    job = changes.pop("job", Job(preset="fast", residual="gptq"))
    report = quantize(FileSource(model), Samples.load(calibration), output, job, **changes)
    return report, events


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_events_and_report(files, tmp_path):
    report, events = run(files, tmp_path / "a.safetensors")
    solved = [e for e in events if e["stage"] == "solve"]
    assert len(solved) == 2 * 10 + 2 * 3 == len(report.layers)
    assert [e["index"] for e in solved] == list(range(1, 27)) and {e["total"] for e in solved} == {26}
    assert solved[0]["name"].startswith("double_blocks.0") and solved[-1]["name"].startswith("single_blocks.1")
    for event in solved:
        assert event["eta"] >= 0 and event["bytes"] > 0 and event["error_db"] < -5
        assert (event["rank"], event["format"]) == (
            (0, "awq_w4a16") if "mod" in event["name"] else (32, "svdquant_w4a4")
        )
    assert solved[-1]["eta"] == 0 and events[-1]["stage"] == "write"
    size = (tmp_path / "a.safetensors").stat().st_size
    assert report.bytes == size and f"{report.bytes_16bit / size:.2f}×" in report.summary()
    assert report.bytes_16bit == sum(2 * t.numel() for t in FileSource(files[0]).state_dict.values())
    assert not parts_folder(tmp_path / "a.safetensors").exists()


def test_same_seed_same_file(files, tmp_path):
    for name in ("a", "b"):
        run(files, tmp_path / f"{name}.safetensors")
    assert digest(tmp_path / "a.safetensors") == digest(tmp_path / "b.safetensors")


def test_interrupt_keeps_the_work_and_the_result_is_identical(files, tmp_path):
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    run(files, whole)

    def stop_at_nine(event):
        if event.get("index") == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(files, stopped, on_event=stop_at_nine)
    assert not stopped.exists()
    parts = sorted(parts_folder(stopped).iterdir())
    assert len(parts) == 9
    parts[0].write_bytes(b"damaged")  # is noticed and solved again
    report, _ = run(files, stopped)
    assert report.resumed == 8
    assert digest(whole) == digest(stopped)


def test_sigkill_at_any_time_then_resume(files, tmp_path):
    """The command line, killed hard several times: the file ends up identical to an undisturbed run's."""
    model, calibration = files
    output = tmp_path / "killed.safetensors"
    command = [sys.executable, "-m", "comfyui_svdquant", "quantize", str(model), str(output)]
    command += ["--calibration", str(calibration), "--preset", "best"]
    kills = 0
    for solved_before_kill in (2, 9, 17):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(parts_folder(output).glob("*.part"))) < solved_before_kill:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            assert not output.exists()
    assert kills == 3
    survivors = len(list(parts_folder(output).glob("*.part")))
    assert survivors >= 17
    subprocess.run(command, check=True, capture_output=True)
    fresh = tmp_path / "fresh.safetensors"
    subprocess.run([*command[:5], str(fresh), *command[6:]], check=True, capture_output=True)
    assert digest(output) == digest(fresh)


def test_parts_of_other_settings_are_not_used(files, tmp_path):
    output = tmp_path / "a.safetensors"

    def stop(event):
        if event.get("index") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(files, output, on_event=stop)
    report, _ = run(files, output, job=Job(preset="fast", residual="gptq", rank=16))
    assert report.resumed == 0
    assert {layer["rank"] for layer in report.layers} == {0, 16}


def test_quantized_layers_load_and_fit_the_model(files, tmp_path):
    report, _ = run(files, tmp_path / "a.safetensors")
    sd, _ = svdq_core.read_checkpoint(tmp_path / "a.safetensors")
    original = FileSource(files[0]).state_dict
    samples = Samples.load(files[1])
    for record in report.layers:
        name = record["name"]
        layer = svdq_core.QuantizedLinear.from_state_dict(sd, name)
        x, w = samples.tokens[name].float(), original[f"{name}.weight"].float()
        exact = x @ w.t()
        error = layer(x) - exact - original[f"{name}.bias"].float()
        assert 10 * torch.log10(error.square().sum() / exact.square().sum()) == pytest.approx(
            record["error_db"], abs=0.05
        )
    for key in ("img_in.weight", "final_layer.linear.bias", "vector_in.in_layer.weight"):
        assert torch.equal(sd[key], original[key])


@pytest.mark.parametrize("in_features", [64, 128, 384])
def test_input_widths_of_fill_depth_canny_kontext(tmp_path, in_features):
    """text to image and Kontext 64, Depth and Canny 128, Fill 384."""
    path = tmp_path / "m.safetensors"
    save_file(random_flux(in_features=in_features, guidance=True), path)
    quantize(FileSource(path), None, tmp_path / "q.safetensors", Job(preset="naive"))
    assert svdq_core.read_checkpoint(tmp_path / "q.safetensors")[0]["img_in.weight"].shape == (128, in_features)


@pytest.mark.parametrize(("fmt", "disk"), [("nvfp4", "svdquant_nvfp4"), ("int8", "svdquant_w8a8")])
def test_other_formats(files, tmp_path, fmt, disk):
    report, _ = run(files, tmp_path / "a.safetensors", job=Job(fmt=fmt, preset="fast"))
    assert {layer["format"] for layer in report.layers} == {disk, "awq_w4a16"}
    assert {layer["rank"] for layer in report.layers} == {0, 16 if fmt == "int8" else 32}


def test_unknown_architectures_are_refused_by_name(tmp_path):
    cases = {
        "Stable Diffusion 1.x": {"input_blocks.0.0.weight": torch.ones(4, 4)},
        "Chroma Radiance": {"img_in_patch.weight": torch.ones(4, 4), "nerf_blocks.0.norm.weight": torch.ones(4)},
        "some.layer.weight": {"some.layer.weight": torch.ones(4, 4)},
    }
    for seen, sd in cases.items():
        save_file(sd, tmp_path / "m.safetensors")
        with pytest.raises(SVDQuantError, match=f"no quantization recipe.*{seen}.*FLUX.1"):
            quantize(FileSource(tmp_path / "m.safetensors"), None, tmp_path / "q.safetensors", Job())
    assert not (tmp_path / "q.safetensors").exists()


def test_incomplete_and_wrong_inputs(files, tmp_path):
    sd = random_flux(depth=2)
    del sd["double_blocks.1.txt_mlp.0.weight"]
    save_file(sd, tmp_path / "m.safetensors")
    with pytest.raises(SVDQuantError, match=r"double_blocks.1.txt_mlp.0.weight is missing"):
        quantize(FileSource(tmp_path / "m.safetensors"), None, tmp_path / "q.safetensors", Job())
    save_file({"something.else": torch.randn(4, 64)}, tmp_path / "c.safetensors")
    with pytest.raises(SVDQuantError, match="no activations of double_blocks.0.*made for another model"):
        quantize(FileSource(files[0]), Samples.load(tmp_path / "c.safetensors"), tmp_path / "q.safetensors", Job())
    save_file({"x": torch.ones(4, dtype=torch.int32)}, tmp_path / "c.safetensors")
    with pytest.raises(SVDQuantError, match="float matrix"):
        Samples.load(tmp_path / "c.safetensors")
    for job, message in (
        (Job(preset="ultra"), "Unknown preset"),
        (Job(rank=-1), "rank must be"),
        (Job(fmt="x"), "format"),
    ):
        with pytest.raises(SVDQuantError, match=message):
            quantize(FileSource(files[0]), None, tmp_path / "q.safetensors", job)


def test_scaled_8_bit_files_are_refused(tmp_path):
    """Their weights without the scales would make a broken model with a good-looking report."""
    save_file(random_flux() | {"scaled_fp8": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(SVDQuantError, match="scaled 8-bit weights.*16-bit"):
        FileSource(tmp_path / "m.safetensors")


def test_a_layer_that_does_not_fit_stays_16_bit_and_says_so(tmp_path):
    sd = random_flux()
    sd["double_blocks.0.img_mlp.2.weight"] = torch.randn(128, 500).bfloat16()
    save_file(sd, tmp_path / "m.safetensors")
    events = []
    quantize(
        FileSource(tmp_path / "m.safetensors"),
        None,
        tmp_path / "q.safetensors",
        Job(preset="naive"),
        on_event=events.append,
    )
    skipped = [e for e in events if e["stage"] == "skip"]
    assert [e["name"] for e in skipped] == ["double_blocks.0.img_mlp.2"] and "500" in skipped[0]["reason"]


def test_a_broken_layer_is_named(files, tmp_path, monkeypatch):
    sd = random_flux()
    sd["double_blocks.0.txt_attn.proj.weight"][3, 3] = float("nan")
    save_file(sd, tmp_path / "m.safetensors")
    with pytest.raises(SVDQuantError, match=r"m.safetensors: double_blocks.0.txt_attn.proj: The weight holds NaN"):
        quantize(FileSource(tmp_path / "m.safetensors"), None, tmp_path / "q.safetensors", Job(preset="naive"))

    def no_memory(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("comfyui_svdquant.svdq_core.quantize.solve_shared_input", no_memory)
    with pytest.raises(SVDQuantError, match=r"memory ran out while solving double_blocks.0.\S+ \(.*kept"):
        run(files, tmp_path / "q.safetensors")


PEAK = """
import sys, torch
from pathlib import Path
from comfyui_svdquant.svdq_core.quantize import FileSource, Job, quantize
from comfyui_svdquant.svdq_core.calibration import Samples
torch.set_num_threads(1)

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])

peak = 0
def watch(event=None):
    global peak
    peak = max(peak, anonymous())

folder = Path(sys.argv[1])
quantize(FileSource(folder / "m.safetensors"), Samples.load(folder / "c.safetensors"), folder / "q.safetensors",
         Job(preset="fast", residual="gptq"), on_event=watch, check=watch)
print(peak // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from Linux's /proc")
def test_memory_follows_one_layer_not_the_model(tmp_path):
    """Four blocks must not need more than one: weights, samples and results all stream (docs/memory.md).

    Memory-mapped files do not count, as the system can drop their pages; the three extra blocks would be 22 MiB of
    16-bit weights and 6 MiB of results if they were kept.
    """
    peaks = []
    for single in (1, 4):
        sd = random_flux(hidden=512, single=single)
        save_file(sd, tmp_path / "m.safetensors")
        save_file(activations(sd, tokens=128), tmp_path / "c.safetensors")
        command, env = [sys.executable, "-c", PEAK, str(tmp_path)], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        out = subprocess.run(command, env=env, check=True, capture_output=True, text=True)  # freed memory goes back
        peaks.append(int(out.stdout))
    assert peaks[1] - peaks[0] < 10, peaks

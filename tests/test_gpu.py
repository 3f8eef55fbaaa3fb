"""The plugin on an NVIDIA GPU that is emulated (`tests/gpu`): in a real ComfyUI with its dynamic VRAM, and by itself.

Plain torch runs the linears in ComfyUI here (SVDQUANT_BACKEND=torch), since compiled kernels in NumPy are slow.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gpu
from host.install import ROOT
from host.prompts import insert, prompt, quantize_prompt, run, sixteen_bit_loader, with_activations
from host.server import ComfyServer, PromptError
from sampling import error_db

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the emulated driver is preloaded")

MODES = {
    "dynamic VRAM": (),
    "offloaded": ("--disable-dynamic-vram", "--novram"),
    "all on the GPU": ("--gpu-only",),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return gpu.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """On the branch, and on a modulation, which has none."""
    path, tensors = tmp_path_factory.mktemp("lora") / "lora.safetensors", {}
    generator = torch.Generator().manual_seed(0)
    for layer, n, k in (("double_blocks.0.img_attn.proj", 256, 256), ("single_blocks.1.modulation.lin", 768, 256)):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(8, k, generator=generator) / 4
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(n, 8, generator=generator) / 4
    save_file(tensors, path)
    return path


def comfyui(base: Path, library: Path, flags: tuple[str, ...], **settings: str) -> ComfyServer:
    env = {"OMP_NUM_THREADS": "1", "SVDQUANT_BACKEND": "torch"} | gpu.environment(library, **settings)
    packs = [ROOT / "examples" / "demo" / "comfy_nodes", ROOT / "tests" / "host" / "nodes"]
    return ComfyServer(packs=packs, base=base, args=flags, env=env)


def latents(server: ComfyServer) -> Iterator[tuple[str, Tensor]]:
    """What a user may do in one session, by name."""
    plain = prompt("int4.safetensors", cfg=2.0)
    lora = {"lora_name": "lora.safetensors"}
    yield "plain", run(server, plain)
    yield "ordinary LoRA", run(server, insert(plain, "LoraLoaderModelOnly", strength_model=0.9, **lora))
    yield "SVDQuant LoRA", run(server, insert(plain, "SVDQuantLoRA", strength=0.9, **lora))
    yield "8 bit", run(server, with_activations("int4.safetensors", "8 bit", cfg=2.0))
    server.free(unload_models=True)
    yield "another picture, after unloading", run(server, prompt("int4.safetensors", steps=3))
    server.free(unload_models=True, free_memory=True)
    yield "plain, loaded again", run(server, plain)


@pytest.fixture(scope="module")
def by_mode(library: Path, lora: Path, small_flux_files: dict[str, Path], tmp_path_factory) -> dict[str, dict]:
    """Latents, and the log, of ComfyUI in each mode."""
    results = {}
    for mode, flags in MODES.items():
        with comfyui(tmp_path_factory.mktemp("server"), library, flags) as server:
            server.add_model(small_flux_files["int4"])
            server.add_model(lora, "loras")
            results[mode] = dict(latents(server)) | {"log": server.log()}
    return results


@pytest.mark.parametrize("mode", MODES)
def test_where_the_weights_are_does_not_matter(mode: str, by_mode: dict[str, dict]):
    """The same bits with weights that come from the CPU, late, on streams of their own, as with weights that stay."""
    found, wanted = by_mode[mode], by_mode["all on the GPU"]
    assert "Device: cuda:0 Emulated GPU sm_89" in found["log"]
    assert ("DynamicVRAM support detected and enabled" in found["log"]) == (mode == "dynamic VRAM")
    assert "runs through torch on Emulated GPU" in found["log"] and "Traceback" not in found["log"]
    for name in wanted.keys() - {"log"}:
        assert torch.equal(found[name], wanted[name]), name
        assert found[name].isfinite().all(), name
    assert torch.equal(found["plain, loaded again"], found["plain"])
    assert torch.equal(found["ordinary LoRA"], found["SVDQuant LoRA"])
    assert error_db(found["SVDQuant LoRA"], found["plain"]) > -30 and error_db(found["8 bit"], found["plain"]) > -60


def test_a_stream_that_does_not_wait_is_seen(library: Path, small_flux_files: dict[str, Path], tmp_path: Path):
    """What the test above relies on: weights that are used before they have arrived are NaN."""
    with comfyui(tmp_path, library, MODES["offloaded"], no_wait="1") as server:
        server.add_model(small_flux_files["int4"])
        assert run(server, prompt("int4.safetensors")).isnan().any()


def short_quantize(preset: str) -> dict:
    """SVDQuant Quantize on bf16.safetensors, with next to no calibration."""
    graph = quantize_prompt(preset)
    graph["model"]["inputs"]["unet_name"] = "bf16.safetensors"
    graph["quantize"]["inputs"] |= {"max_prompts": 2, "steps": 2, "size": 64}
    return graph


def test_quantize(library: Path, small_flux_files: dict[str, Path], tmp_path: Path):
    """SVDQuant Quantize, and SVDQuant Loader with what it wrote."""
    with comfyui(tmp_path, library, MODES["dynamic VRAM"]) as server:
        server.add_model(small_flux_files["bf16"])
        server.run(short_quantize("fast"))
        found = run(server, prompt("demo_fast.safetensors"))
        unet = sixteen_bit_loader("bf16.safetensors")
        wanted = run(server, prompt("") | {"model": unet})
        assert "DynamicVRAM support detected and enabled" in server.log()
    assert -60 < error_db(found, wanted) < -6


def test_quantize_out_of_memory(library: Path, small_flux_files: dict[str, Path], tmp_path: Path):
    """24 MiB are too few to solve an MLP: the error says so, nothing is lost, and the server goes on."""
    with comfyui(tmp_path, library, ("--disable-dynamic-vram",), mib="24") as server:
        for form in ("bf16", "int4"):
            server.add_model(small_flux_files[form])
        with pytest.raises(PromptError, match=r"the GPU's memory ran out while solving \w+.*solved so far are kept"):
            server.run(short_quantize("balanced"))
        assert run(server, prompt("int4.safetensors")).isfinite().all()
        assert "loaded partially" in server.log()


def test_the_linear(library: Path):
    """Every format by its kernels: right, within a CUDA graph, and with what is elsewhere refused by name."""
    result = gpu.answer("check_linear.py", library)
    facts, solved = result["linear"], result["solved"]
    chosen = {"int4": "triton-w4a8-int8", "nvfp4": "triton-nvfp4", "int8": "triton-w8a8", "awq": "triton-w4a16"}
    assert {fmt: found["chosen"] for fmt, found in facts.items()} == chosen
    for found in facts.values():
        assert found["device"] == "cuda:0" and found["error"] < -36
        assert all(found[way] < -60 for way in ("captured", "on another stream", "not contiguous"))
        assert found["empty"] == [0, 128] and not found["rejected"]
        for name in ("weight", "bias"):
            message = f"ValueError: SVDQuant: the input of a quantized linear is on cuda:0, but its {name} is on cpu"
            assert message in found[f"{name} elsewhere"]
    for wait in result["waits"].values():
        assert "stream is capturing" in wait
    assert solved["device"] == "cuda:0" and solved["error"] < -18


def test_the_choice(library: Path):
    """Some tests of it, as they run where there is a GPU."""
    names = ("what_is_forced_runs", "gradients", "log_says_what_runs", "opcheck", "wrong_fused_mlp_is_not_used")
    tests = [f"{ROOT / 'tests' / 'test_backends.py'}::test_{name}" for name in names]
    command = [Path(sys.executable).with_name("pytest"), "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    env = {**os.environ, **gpu.environment(library)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr

"""Fixtures: ComfyUI in this process (`comfy`), and a running ComfyUI with the plugin (`server`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Some tests want the same bits from two ways of computing one thing. MKL, which reads this when torch is imported,
# otherwise adds in an order that depends on where in memory a matrix lies.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
# Two tests run at a time, on models too small to share: threads that wait for each other took half of two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from host.browser import Browser
from host.install import ROOT, host_path
from host.prompts import quantize_prompt
from host.server import ComfyServer
from sampling import load

DEMO = ROOT / "examples" / "demo"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", metavar="sm89", help="compile the kernels for this GPU and run their PTX on the CPU")


# Files of minutes, longest first: one that a process began last would leave the other without work. The first two use
# both cores, which browsers would not like.
LONG = ("compile_matrix", "ptx", "panel", "backends", "quantize_node", "gpu", "workflows", "demo_lora", "deferred",
        "quantize", "compare", "file_info", "cli", "runtime", "demo_model", "lora", "mlp", "benchmarks")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))  # stable


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run on the GPU where there is one, else in Triton's interpreter: to be said before Triton is imported."""
    if not torch.cuda.is_available() and not config.getoption("--ptx"):
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def kernel_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where kernels run in this process: on the GPU, compiled, or on the CPU, interpreted or (``--ptx``) as PTX.

    Whoever imports Triton before `conftest.py` spoils the choice, so the test fails then: it does not skip.
    """
    if importlib.util.find_spec("triton") is None:
        if sys.platform == "linux":
            pytest.fail("Triton is missing, which torch brings on Linux.")
        pytest.skip("needs Triton, which torch does not bring on this system")
    if arch := request.config.getoption("--ptx"):
        from ptx.driver import pretend

        with pretend(arch):
            yield torch.device("cpu")
        return
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    import triton.language.standard
    from triton.runtime.interpreter import InterpretedFunction

    import triton_interpreter

    assert isinstance(triton.language.standard.max, InterpretedFunction), "Triton was imported without TRITON_INTERPRET"
    triton_interpreter.mend()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one program at a time, on small tiles
    yield torch.device("cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cpu_kernels(kernel_device: torch.device) -> Iterator[None]:
    """Kernels run on tensors of the CPU, on which ComfyUI runs in the tests: as PTX where there is a GPU."""
    if kernel_device.type == "cpu":
        yield
        return
    from ptx.driver import pretend

    with pretend("sm80"):
        yield


@pytest.fixture
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The choice is made anew, without the user's measurements, after checks on small layers: interpreters are slow."""
    from comfyui_svdquant.svdq_core import backends

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "CHECKED", dict.fromkeys(backends.CHECKED, (5, 128)))
    monkeypatch.setattr(backends, "CHECKED_K", 512)
    backends.forget()
    yield
    backends.forget()


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """The ComfyUI that the tests use. Without one the test fails: skipping would look like success."""
    try:
        return host_path()
    except FileNotFoundError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def comfy(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """ComfyUI's `comfy` package in this process, on the CPU, with a base directory of its own.

    Ask for this fixture before importing `comfy.*`, `folder_paths` or the plugin's `nodes` in a test.
    """
    sys.path.insert(0, str(comfy_path))
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(tmp_path_factory.mktemp("comfy"))
    return importlib.import_module("comfy")


@pytest.fixture(scope="session")
def server(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """One running ComfyUI for the whole session, with the demo's model and nodes and the tests' nodes."""
    server = ComfyServer(
        packs=[DEMO / "comfy_nodes", ROOT / "tests" / "host" / "nodes"],
        base=tmp_path_factory.mktemp("server"),
        # the models are too small to share, and waiting threads starve a busy CPU; Triton as users have it
        env={"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    for name, folder in (("demo_flux", "diffusion_models"), ("demo_lora", "loras")):
        for model in (DEMO / "models").glob(f"{name}*.safetensors"):
            server.add_model(model, folder)
    with server:
        yield server


@pytest.fixture(scope="session")
def demo_quantized(server: ComfyServer) -> ComfyServer:
    """The server after SVDQuant Quantize made demo_balanced.safetensors and demo_naive.safetensors."""
    for preset in ("balanced", "naive"):
        server.run(quantize_prompt(preset))
    return server


@pytest.fixture(scope="session")
def small_flux_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small untrained FLUX as files: 16 bit (and another one), and quantized to each format."""
    import small_flux

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its layers are too small to share
    folder, sd = tmp_path_factory.mktemp("small_flux"), small_flux.state_dict(double=2, single=2)
    files = {"bf16": small_flux.write(folder / "bf16.safetensors", sd, {})}
    files["other"] = small_flux.write(folder / "other.safetensors", small_flux.state_dict(2, 2, seed=9), {})
    for fmt in ("int4", "nvfp4", "int8"):
        files[fmt] = small_flux.write(folder / f"{fmt}.safetensors", sd, small_flux.quantize(sd, fmt))
    torch.set_num_threads(threads)
    return files


@pytest.fixture(scope="module")
def host(comfy: ModuleType) -> Iterator[ModuleType]:
    """ComfyUI, imported, in inference mode as when it samples."""
    import nodes  # noqa: F401

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the small models are too small to share
    with torch.inference_mode():
        yield comfy
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(host: ModuleType, small_flux_files: dict[str, Path]) -> Any:
    """The int4 model, loaded once per file of tests; tests clone it."""
    return load(small_flux_files["int4"])


class FakeVBAR:
    """ComfyUI's virtual VRAM on the CPU: every weight gets its place, and what was written there stays."""

    def __init__(self, size, index):
        self.allocated = 0

    def alloc(self, size):
        self.allocated += size
        return torch.zeros(size, dtype=torch.uint8)

    def prioritize(self):
        pass

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        return 0


class FakeHostBuffer:
    """Pinned memory, of which none is ever taken."""

    size = 0

    def __init__(self, *sizes):
        pass


@pytest.fixture
def dynamic_vram(monkeypatch):
    """ComfyUI's dynamic VRAM code with cpu:0 for a GPU; only what needs a driver is replaced."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.pinned_memory
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfyui_svdquant.svdq_core.host import ops

    gpu, cast = torch.device("cpu:0"), comfy.ops.cast_bias_weight
    monkeypatch.setattr(ops, "cast_bias_weight", lambda module, **kw: cast(module, **(kw | {"device": gpu})))
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: gpu)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", FakeHostBuffer)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", FakeVBAR)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda place: 1)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: a == b)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda place: None)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda place, device: place)
    monkeypatch.setattr(comfy.pinned_memory, "get_pin", lambda module, subset="weights": None)
    monkeypatch.setattr(comfy.pinned_memory, "pin_memory", lambda module, subset="weights", size=None: None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real Chromium. Without one the test fails: skipping would look like success."""
    with Browser() as browser:
        yield browser

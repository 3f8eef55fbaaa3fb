"""Fixtures: ComfyUI in this process (`comfy`), and a running ComfyUI with the plugin (`server`)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from host.install import ROOT, host_path
from host.server import ComfyServer

DEMO = ROOT / "examples" / "demo"


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
        env={"OMP_NUM_THREADS": "1"},  # the models are too small to share, and waiting threads starve a busy CPU
    )
    for model in (DEMO / "models").glob("demo_flux*.safetensors"):
        server.add_model(model)
    with server:
        yield server


@pytest.fixture(scope="session")
def small_flux_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small untrained FLUX as files: 16 bit (and another one), and quantized to each format."""
    import torch

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

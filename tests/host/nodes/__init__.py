"""Nodes that only the tests use."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType

import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import ComfyExtension, io


def of_the_tests(name: str) -> ModuleType:
    """A module of the tests' folder, which is not on this process' path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[2] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NARROW = of_the_tests("narrow").read_widths()
NARROW.__enter__()  # for as long as this ComfyUI runs


class SVDQuantTestFail(io.ComfyNode):
    """Fails with a message of the test's choice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantTestFail",
            category="SVDQuant/tests",
            inputs=[io.String.Input("message")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, message: str) -> io.NodeOutput:
        raise ValueError(message)


class SVDQuantTestSleep(io.ComfyNode):
    """Takes its time, and lets itself be interrupted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantTestSleep",
            category="SVDQuant/tests",
            inputs=[io.Float.Input("seconds", default=1.0)],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, seconds: float) -> io.NodeOutput:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            throw_exception_if_processing_interrupted()
            time.sleep(0.02)
        return io.NodeOutput()


class SVDQuantTestText(io.ComfyNode):
    """What a text encoder would say, in random numbers: for models whose text encoders are not at hand."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantTestText",
            category="SVDQuant/tests",
            inputs=[io.Int.Input("width"), io.Int.Input("seed")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, width: int, seed: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        context, pooled = (torch.randn(1, *size, generator=generator) for size in ((7, width), (width,)))
        return io.NodeOutput([[context, {"pooled_output": pooled}]])


class SVDQuantTestTwin(io.ComfyNode):
    """The exact arithmetic of a quantized file without the plugin's runtime: `small_flux.twin`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantTestTwin",
            category="SVDQuant/tests",
            inputs=[io.String.Input("sixteen_bit"), io.String.Input("quantized")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, sixteen_bit: str, quantized: str) -> io.NodeOutput:
        small_flux = of_the_tests("small_flux")
        files = [folder_paths.get_full_path_or_raise("diffusion_models", name) for name in (sixteen_bit, quantized)]
        return io.NodeOutput(small_flux.twin(*map(Path, files)))


class TestNodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SVDQuantTestFail, SVDQuantTestSleep, SVDQuantTestText, SVDQuantTestTwin]


async def comfy_entrypoint() -> TestNodes:
    return TestNodes()

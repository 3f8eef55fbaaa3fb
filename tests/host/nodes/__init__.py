"""Nodes that only the tests use."""

from __future__ import annotations

import time

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import ComfyExtension, io


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


class TestNodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SVDQuantTestFail, SVDQuantTestSleep]


async def comfy_entrypoint() -> TestNodes:
    return TestNodes()

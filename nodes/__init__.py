"""The nodes. ComfyUI must be running: the package's own `__init__` imports this from the entry point."""

from pathlib import Path

from aiohttp import web
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .compare import SVDQuantCompare
from .file_info import get_file, get_lora
from .loader import SVDQuantLoader
from .lora import SVDQuantLoRA, SVDQuantLoRAStack
from .prompts import SVDQuantPrompts
from .quantize import SVDQuantQuantize
from .runs import get_runs

NODES: list[type[io.ComfyNode]] = [
    SVDQuantCompare,
    SVDQuantLoader,
    SVDQuantLoRA,
    SVDQuantLoRAStack,
    SVDQuantPrompts,
    SVDQuantQuantize,
]


class SVDQuantExtension(ComfyExtension):
    async def on_load(self) -> None:
        for name, answer in (("runs", get_runs), ("file", get_file), ("lora", get_lora)):
            PromptServer.instance.routes.get(f"/svdquant/{name}")(answer)
        # ComfyUI looks for templates in `examples` before `workflows`, and of two folders serves the first alone.
        pack = Path(__file__).parents[1]
        templates = web.static(f"/api/workflow_templates/{pack.name}", pack / "workflows")
        PromptServer.instance.app.add_routes([templates])

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES

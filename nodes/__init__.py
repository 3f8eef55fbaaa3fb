"""The nodes. ComfyUI must be running: the package's own `__init__` imports this from the entry point."""

from comfy_api.latest import ComfyExtension, io

from .loader import SVDQuantLoader
from .lora import SVDQuantLoRA, SVDQuantLoRAStack
from .prompts import SVDQuantPrompts
from .quantize import SVDQuantQuantize

NODES: list[type[io.ComfyNode]] = [
    SVDQuantLoader,
    SVDQuantLoRA,
    SVDQuantLoRAStack,
    SVDQuantPrompts,
    SVDQuantQuantize,
]


class SVDQuantExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES

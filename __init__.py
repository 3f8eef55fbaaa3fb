"""ComfyUI-SVDQuant: 4-bit SVDQuant for FLUX in ComfyUI.

ComfyUI loads this folder and calls `comfy_entrypoint`. Installed with pip it is `comfyui_svdquant`, which
works without ComfyUI: nothing of ComfyUI is imported before the entry point runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import SVDQuantExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> SVDQuantExtension:
    from .nodes import SVDQuantExtension

    return SVDQuantExtension()

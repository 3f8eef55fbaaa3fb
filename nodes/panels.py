"""What the panels on the nodes are told while a prompt runs (web/svdquant_info.js)."""

from typing import Any

from server import PromptServer


def tell(hidden: Any, event: str, **data: Any) -> None:
    """Send ``svdquant.<event>`` about the node with these ``hidden`` inputs to the tab whose prompt runs."""
    server = PromptServer.instance
    about = {"node": hidden.unique_id, "workflow": workflow_id(hidden.extra_pnginfo)}
    server.send_sync(f"svdquant.{event}", about | data, server.client_id)


def workflow_id(pnginfo: dict | None) -> str | None:
    """The id of the workflow on the canvas that was queued; a prompt from a script has none."""
    return ((pnginfo or {}).get("workflow") or {}).get("id")

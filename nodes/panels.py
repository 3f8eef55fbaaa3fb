"""What the panels on the nodes are told while a prompt runs (web/svdquant_info.js)."""

from server import PromptServer


def tell(node_id: str, event: str, **data) -> None:
    """Send ``svdquant.<event>`` about a node to the tab whose prompt runs."""
    server = PromptServer.instance
    server.send_sync(f"svdquant.{event}", {"node": node_id, **data}, server.client_id)

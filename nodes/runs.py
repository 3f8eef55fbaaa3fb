"""What the Quantize nodes are doing, for tabs that were not there from the start: GET /svdquant/runs.

A tab follows a run by its ``svdquant.*`` events. One that was reloaded, opened later or cut off asks here for the
events it has missed; their numbers (``seq``) tell it where the two streams meet.
"""

import threading
import time
from typing import Any

from aiohttp import web

from ..svdq_core.quantize import Event

MAX_RUNS = 8


class Runs:
    """The last runs, one per node of a workflow; its next run replaces it. Safe to use from any thread."""

    def __init__(self, limit: int = MAX_RUNS) -> None:
        self.limit = limit
        self.lock = threading.Lock()
        self.runs: dict[tuple[str | None, str], list[Event]] = {}

    def add(self, event: Event) -> Event:
        """Keep an event of the run ``workflow``, ``node``, ``prompt_id``; returns it with its number and time."""
        key = (event["workflow"], event["node"])
        with self.lock:
            if event["stage"] == "start":
                self.runs.pop(key, None)
                self.runs[key] = []
                while len(self.runs) > self.limit:
                    del self.runs[next(iter(self.runs))]  # the oldest; the one that runs is the newest
            events = self.runs[key]
            last = events[-1] if events else {"seq": -1, "stage": None}
            event = event | {"seq": last["seq"] + 1, "time": time.time()}
            if event["stage"] == last["stage"] == "calibrate" and event["prompt"] == last["prompt"]:
                events.pop()  # a prompt's last step says it all, with the newest of its pictures
                events.append({"preview": last.get("preview")} | event)
            else:
                events.append(event)
            return event

    def snapshot(self) -> dict[str, Any]:
        """All runs as lists of events, oldest run first, and the server's clock to compare their times with."""
        with self.lock:
            return {"now": time.time(), "runs": [list(events) for events in self.runs.values()]}


RUNS = Runs()


async def get_runs(request: web.Request) -> web.Response:
    """The events of the last runs, as JSON."""
    response = web.json_response(RUNS.snapshot(), headers={"Cache-Control": "no-store"})
    response.enable_compression()
    return response

"""ComfyUI's own frontend in a real Chromium, as a user has it.

    with Browser() as browser:
        page = browser.open(server)
        node = page.search("SVDQuant Loader")
        page.screenshot("loader")
        page.close()

`page.errors` holds what the console complained of; the frontend's own look-ups of user files do not count.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, TimeoutError, sync_playwright

from .install import ROOT, browser_path
from .server import ComfyServer

SHOTS = ROOT / "out" / "screenshots"  # kept, to be looked at
# What a fresh ComfyUI says on its own: files that a new user does not have yet, a race while it starts, the model links
# of the workflow that it opens at first, and events of a run that come before extensions are loaded.
STOCK = re.compile(
    r"user\.css|/userdata|ComfyApp graph accessed before initialization|/settings/|huggingface\.co"
    r"|Unknown message type svdquant"
)
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Queue.QPOV2": False}


class Browser:
    """One Chromium; every page has a profile of its own."""

    def __enter__(self) -> Browser:
        self._playwright = sync_playwright().start()
        flags = ["--no-sandbox", "--disable-dev-shm-usage"] if sys.platform == "linux" else []
        self._chromium = self._playwright.chromium.launch(executable_path=str(browser_path()), args=flags)
        return self

    def __exit__(self, *exc: object) -> None:
        self._chromium.close()
        self._playwright.stop()

    def open(self, server: ComfyServer, settings: dict[str, Any] | None = None, **context: Any) -> ComfyPage:
        """A new tab on the server's frontend, with an empty canvas. ``settings`` are ComfyUI's own, by id."""
        context = {"viewport": {"width": 1500, "height": 950}, "color_scheme": "dark", **context}
        return ComfyPage(self._chromium.new_context(**context).new_page(), server, settings or {})


class ComfyPage:
    """A tab of the frontend. ``page`` is Playwright's; the rest are steps that several tests take."""

    def __init__(self, page: Page, server: ComfyServer, settings: dict[str, Any]):
        self.page, self.server = page, server
        self.errors: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        kept = server.base / "user" / "default" / "comfy.settings.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(SETTINGS | settings), "utf-8")  # posting would leave what other tests have set
        self.page.goto(server.url)
        self.ready()
        self.clear()

    def _console(self, message: Any) -> None:
        text = f"{message.text} ({message.location.get('url', '')})"
        if message.type == "error" and not STOCK.search(text):
            self.errors.append(text)

    def ready(self) -> None:
        """Wait until the frontend has opened a workflow and takes clicks."""
        opened = "window.app?.extensionManager?.workflow?.activeWorkflow && !app.extensionManager.spinner"
        self.page.wait_for_function(f"{opened} && !document.querySelector('#splash-loader')", timeout=60_000)

    def reload(self) -> None:
        self.page.reload()
        self.ready()

    def clear(self) -> None:
        """An empty canvas at its natural zoom, without the workflow that ComfyUI opens by itself."""
        self.page.evaluate("() => { app.rootGraph.clear(); app.canvas.ds.reset(); }")

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def search(self, name: str, at: tuple[int, int] = (500, 300)) -> int:
        """Put a node on the canvas through the search box, as a user does; returns the node's id."""
        before = set(self.nodes())
        box = self.page.locator("[role=search] input[role=combobox]")
        for _ in range(10):  # a busy canvas takes a slow double click for two clicks
            self.page.locator("#graph-canvas").dblclick(position={"x": at[0], "y": at[1]}, force=True)
            with suppress(TimeoutError):
                box.wait_for(timeout=2000)
                break
        box.fill(name)
        self.page.locator("#results-list [role=option]").filter(has_text=name).first.click()
        self.page.wait_for_function("n => app.rootGraph.nodes.length > n", arg=len(before))
        (new,) = set(self.nodes()) - before
        box.wait_for(state="hidden")
        while self.evaluate("id => app.rootGraph.getNodeById(id).flags.ghost", new):
            self.page.mouse.move(*at, steps=4)  # a new node hangs on the pointer until a click
            self.page.mouse.click(*at)
            self.page.wait_for_timeout(100)
        return new

    def nodes(self) -> dict[int, str]:
        """Node types by id."""
        return {
            int(k): v
            for k, v in self.evaluate("Object.fromEntries(app.rootGraph.nodes.map(n => [n.id, n.type]))").items()
        }

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a saved workflow, as dropping its file does."""
        self.evaluate("workflow => app.loadGraphData(workflow)", workflow)

    def prompt(self) -> dict[str, Any]:
        """What the frontend would post to /prompt."""
        return self.evaluate("async () => (await app.graphToPrompt()).output")

    def run(self) -> None:
        """Queue the workflow on the canvas."""
        self.evaluate("() => app.queuePrompt(0)")

    def screenshot(self, name: str) -> Path:
        """A PNG in out/screenshots, kept for people to look at."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        self.page.context.close()

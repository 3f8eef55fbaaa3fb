"""A real ComfyUI with this plugin in it, for the tests and the demo.

    with ComfyServer() as server:
        history = server.run(prompt)
        paths = server.images(history)

It listens on a free local port, keeps everything it writes in a folder of its own, and needs no network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import websocket

from .install import ROOT, host_path

FLAGS = ("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")
HTTP = build_opener(ProxyHandler({}))  # 127.0.0.1 is never behind a proxy


class PromptError(RuntimeError):
    """A prompt that ComfyUI refused, or that failed or was interrupted while it ran."""

    def __init__(self, message: str, node_id: str = "", node_type: str = "", exception_type: str = ""):
        where = f"{node_type} (node {node_id}): " if node_id else ""
        super().__init__(f"{where}{exception_type}: {message}")
        self.message, self.node_id, self.node_type = message, node_id, node_type
        self.exception_type = exception_type

    @classmethod
    def refused(cls, answer: dict) -> PromptError:
        """From the answer to /prompt: the first node's first complaint, or the one about the prompt."""
        for node_id, node in (answer.get("node_errors") or {}).items():
            for error in node["errors"]:
                text = f"{error['message']}: {error['details']}"
                return cls(text, node_id, node["class_type"], error["type"])
        error = answer["error"]
        info = error.get("extra_info", {})
        return cls(error["message"], info.get("node_id", ""), info.get("class_type", ""), error["type"])

    @classmethod
    def failed(cls, history: dict) -> PromptError:
        """From a history entry whose status is not success."""
        for event, data in reversed(history["status"]["messages"]):
            if event == "execution_error":
                message, kind = data["exception_message"].strip(), data["exception_type"]
                return cls(message, data["node_id"], data["node_type"], kind)
            if event == "execution_interrupted":
                return cls("interrupted", data["node_id"], data["node_type"], "InterruptProcessingException")
        return cls(f"failed without a message: {history['status']}")


class Event(NamedTuple):
    type: str
    data: dict[str, Any]


class Events(threading.Thread):
    """Records every JSON event of ComfyUI's websocket, in order; previews (binary) are skipped."""

    def __init__(self, url: str):
        super().__init__(name="comfy-events", daemon=True)
        self.seen: list[Event] = []
        self._news = threading.Condition()
        self._socket = websocket.create_connection(url, timeout=30, http_no_proxy=["127.0.0.1"])
        self._socket.settimeout(None)
        self.start()

    def run(self) -> None:
        while True:
            try:
                message = self._socket.recv()
            except (OSError, websocket.WebSocketException):
                return
            if isinstance(message, str) and message:
                event = json.loads(message)
                with self._news:
                    self.seen.append(Event(event["type"], event.get("data") or {}))
                    self._news.notify_all()

    def wait(self, match: Callable[[Event], Any], timeout: float = 30, since: int = 0) -> Event:
        """The first event from index `since` on for which `match(event)` holds, waiting for it to come."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for event in self.seen[since:]:
                    if match(event):
                        return event
                since = len(self.seen)
                if not self._news.wait(deadline - time.monotonic()):
                    last = ", ".join(event.type for event in self.seen[-10:])
                    raise TimeoutError(f"No such event within {timeout} s; the last ones were: {last}")

    def of(self, type: str, prompt_id: str | None = None) -> list[Event]:
        """All events of a type so far, of one prompt if an id is given."""
        return [e for e in list(self.seen) if e.type == type and prompt_id in (None, e.data.get("prompt_id"))]

    def close(self) -> None:
        self._socket.shutdown()
        self.join(timeout=5)


def link(source: Path, target: Path) -> None:
    """Make `target` show `source`: a symlink, or a copy where the system does not allow one."""
    if not source.exists():
        raise FileNotFoundError(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            skip = shutil.ignore_patterns(".git", ".venv", ".host", "__pycache__")
            shutil.copytree(source, target, ignore=skip, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """ComfyUI's own main.py as a child process, with this plugin and any `packs` as custom nodes.

    `base` holds models, input, output and log; without one it is temporary and goes with the server.
    `args` are further flags for main.py: replace the default to run on a GPU.
    """

    def __init__(
        self,
        packs: Sequence[Path] = (),
        args: Sequence[str] = ("--cpu",),
        base: Path | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout: float = 180,
    ):
        self._temporary = None if base else tempfile.TemporaryDirectory(prefix="comfy-")
        self.base = Path(base or self._temporary.name).resolve()
        self.log_path = self.base / "server.log"
        self.args, self.env, self.start_timeout = list(args), dict(env or {}), start_timeout
        self.client_id = str(uuid.uuid4())
        self.process: subprocess.Popen | None = None
        link(ROOT, self.base / "custom_nodes" / "ComfyUI-SVDQuant")
        for pack in packs:  # two packs may both be called "nodes"
            link(pack, self.base / "custom_nodes" / f"{pack.resolve().parent.name}-{pack.name}")

    def __enter__(self) -> ComfyServer:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        if self._temporary:
            self._temporary.cleanup()

    def add_model(self, path: Path, folder: str = "diffusion_models") -> None:
        """Show a model file to ComfyUI in `models/<folder>`; works on a running server too."""
        link(path, self.base / "models" / folder / path.name)

    def start(self) -> None:
        """Start main.py and return when it answers; also after `stop` or `kill`, in the same folder."""
        host, port = host_path(), free_port()
        command = [sys.executable, str(host / "main.py"), "--port", str(port), "--base-directory"]
        command += [str(self.base), *FLAGS, *self.args]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", **self.env}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.base, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.url = f"http://127.0.0.1:{port}"
        self._await_answer()
        self.events = Events(f"ws://127.0.0.1:{port}/ws?clientId={self.client_id}")

    def _await_answer(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while True:
            try:
                self.get("/system_stats")
                return
            except (URLError, OSError):
                self._check_alive()
                if time.monotonic() > deadline:
                    late = f"ComfyUI did not answer within {self.start_timeout} s"
                    raise TimeoutError(f"{late}:\n{self.log_tail()}") from None
                time.sleep(0.1)

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with exit code {self.process.returncode}:\n{self.log_tail()}")

    def stop(self) -> None:
        self._end(lambda process: process.terminate())

    def kill(self) -> None:
        """End it at once, as a crash or a power cut would."""
        self._end(lambda process: process.kill())

    def _end(self, how: Callable[[subprocess.Popen], None]) -> None:
        if self.process is None:
            return
        how(self.process)
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        if hasattr(self, "events"):
            self.events.close()

    def log(self) -> str:
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[\d*m", "", text)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def get(self, path: str) -> Any:
        with HTTP.open(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict) -> Any:
        headers = {"Content-Type": "application/json"}
        with HTTP.open(Request(self.url + path, json.dumps(body).encode(), headers), timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def object_info(self, node: str) -> dict | None:
        """What the UI knows about a node; None if there is no such node."""
        return self.get(f"/object_info/{node}").get(node)

    def queue(self, prompt: dict, extra_data: dict | None = None) -> str:
        """Queue a prompt in API format and return its id; PromptError if ComfyUI finds fault with it."""
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data or {}}
        try:
            answer = self.post("/prompt", body)
        except HTTPError as error:
            if error.code != 400:
                raise
            raise PromptError.refused(json.load(error)) from None
        if answer["node_errors"]:  # one branch of the prompt is wrong, the others would run
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptError.refused(answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """The history entry of a queued prompt once it has run; PromptError if it did not succeed."""
        deadline = time.monotonic() + timeout
        while not (history := self.get(f"/history/{prompt_id}").get(prompt_id)):
            self._check_alive()
            if time.monotonic() > deadline:
                self.interrupt()
                raise TimeoutError(f"Prompt still running after {timeout} s:\n{self.log_tail()}")
            time.sleep(0.05)
        if history["status"]["status_str"] != "success":
            raise PromptError.failed(history)
        return history

    def run(self, prompt: dict, timeout: float = 300, extra_data: dict | None = None) -> dict:
        return self.wait(self.queue(prompt, extra_data), timeout)

    def free(self, **what: bool) -> None:
        """Post to /free, and return when it is done: ComfyUI does it between prompts, after one that came too soon."""
        self.post("/free", what)
        image = {"width": 8, "height": 8, "batch_size": 1, "color": 0}
        self.run({
            "1": {"class_type": "EmptyImage", "inputs": image},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        })  # fmt: skip

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def images(self, history: dict) -> list[Path]:
        """The image files that a prompt wrote."""
        found = [image for output in history["outputs"].values() for image in output.get("images", [])]
        return [self.base / image["type"] / image["subfolder"] / image["filename"] for image in found]

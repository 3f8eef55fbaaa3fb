"""What the documentation says is run: its Python, its links, its commands, the messages it explains."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from host.install import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("web/docs/**/*.md")]
README = (ROOT / "README.md").read_text("utf-8")
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in CODE.findall(text) if found == language]


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@each_page
def test_python_in_it_runs(page: Path, tmp_path: Path):
    code = "\n".join(blocks(page.read_text("utf-8"), "python"))
    if not code:
        return
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@each_page
def test_its_links_lead_somewhere(page: Path):
    text = CODE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        found = (page.parent / file) if file else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_files_it_names_are_there():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        rooms = r"(?:nodes|svdq_core|triton_kernels|web|workflows|tests|benchmarks|examples|docs)"
        for name in re.findall(rf"`({rooms}/[\w./-]+\.\w+)`", page.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_messages_that_the_readme_explains_are_ours():
    """Every quoted message of the troubleshooting table is in the source; … stands for what varies."""
    table = README.split("## Troubleshooting", 1)[1].split("\n## ", 1)[0]
    messages = re.findall(r"^\| “([^”]+)”", table, re.MULTILINE)
    assert len(messages) >= 8
    sources = [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "svdq_core").rglob("*.py")]
    source = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text("utf-8")) for path in sources)
    for message in messages:
        for part in filter(None, (piece.strip() for piece in message.split("…"))):
            assert part in source, message


def test_commands_of_the_readme_run(tmp_path: Path):
    """With the demo model in the place of the file names; `svdquant bench` takes minutes and has its own test."""
    commands = [line for line in "\n".join(blocks(README, "sh")).splitlines() if line.startswith("svdquant ")]
    assert {command.split()[1] for command in commands} == {"quantize", "inspect", "bench"}
    model = ROOT / "examples" / "demo" / "models" / "demo_flux.safetensors"
    for command in commands:
        words = shlex.split(command.split("#")[0].replace("flux1-dev.safetensors", str(model)))
        if words[1] == "bench":
            words.append("--help")
        if words[1] == "quantize":
            words += ["--preset", "fast"]
        run = subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], cwd=tmp_path, capture_output=True)
        assert run.returncode == 0, (command, run.stderr.decode())

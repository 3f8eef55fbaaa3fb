"""The live panel of SVDQuant Quantize, in ComfyUI's own frontend: watched, reloaded, interrupted, finished, used."""

from __future__ import annotations

import base64
import io
import re
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

import host.server
from conftest import DEMO
from host.browser import Browser, ComfyPage
from host.prompts import CALIBRATION, quantize_prompt
from host.server import ComfyServer, PromptError

MINUTE = 60_000
WORKFLOW = "5dac0001-0000-4000-8000-000000000001"
OTHER_WORKFLOW = "5dac0002-0000-4000-8000-000000000001"
FAST = {"preset": "fast", "rank": 16, "steps": 1, "max_prompts": 2, "size": 64}
SLOW = {"preset": "best", "rank": 32, "steps": 16, "max_prompts": 6, "size": 128}  # time to look at it


# --- the user's hands ---


def put(page: ComfyPage, name: str, x: int, y: int) -> int:
    return page.search(name, at=(x, y))


def wire(page: ComfyPage, source: int, output: str, target: int, input: str) -> None:
    """Drag a wire from an output to an input."""
    script = """([source, output, target, input]) => {
        const [from, to] = [source, target].map((id) => app.rootGraph.getNodeById(id));
        const ends = [from.getOutputPos(from.findOutputSlot(output)), to.getInputPos(to.findInputSlot(input))];
        return ends.map((end) => app.canvasPosToClientPos(end));
    }"""
    start, end = page.evaluate(script, [source, output, target, input])
    page.page.mouse.move(*start)
    page.page.mouse.down()
    page.page.mouse.move(*end, steps=8)
    page.page.mouse.up()
    linked = "([id, name]) => app.rootGraph.getNodeById(id).inputs.find((i) => i.name === name).link !== null"
    page.page.wait_for_function(linked, arg=[target, input])


def set_widget(page: ComfyPage, node: int, name: str, value: Any) -> None:
    """Click on a widget of the classic canvas and type or choose its value."""
    script = """([id, name]) => {
        const node = app.rootGraph.getNodeById(id), widget = node.widgets.find((w) => w.name === name);
        return app.canvasPosToClientPos([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10]);
    }"""
    page.page.mouse.click(*page.evaluate(script, [node, name]))
    combo = page.evaluate("([id, name]) => app.rootGraph.getNodeById(id).widgets.find((w) => w.name === name).type"
                          " === 'combo'", [node, name])  # fmt: skip
    if combo:
        page.page.locator(".litecontextmenu .litemenu-entry", has_text=str(value)).first.click()
    else:
        page.page.locator(".graphdialog input").fill(str(value))
        page.page.keyboard.press("Enter")
    same = "([id, name, value]) => app.rootGraph.getNodeById(id).widgets.find((w) => w.name === name).value === value"
    page.page.wait_for_function(same, arg=[node, name, value])


def press_run(page: ComfyPage) -> None:
    page.page.get_by_test_id("queue-button").click()


def press_interrupt(page: ComfyPage) -> None:
    """In the list of jobs: the button next to Run is off in a tab that was reloaded while the job runs."""
    page.page.get_by_test_id("queue-overlay-toggle").click()
    jobs = page.page.get_by_test_id("job-assets-list")
    jobs.locator("[data-job-id]").first.hover()
    jobs.get_by_role("button", name="Cancel").click()
    page.page.get_by_test_id("queue-overlay-toggle").click()


# --- what the panel shows ---


def wait_for(page: ComfyPage, condition: str, timeout: int = 5 * MINUTE) -> None:
    """Wait for a condition on `panel`, the only one on the page; `count(selector)` counts what is in it."""
    script = f"""() => {{
        const panel = document.querySelector('.svdq');
        const count = (selector) => panel.querySelectorAll(selector).length;
        return panel && ({condition});
    }}"""
    try:
        page.page.wait_for_function(script, timeout=timeout)
    except Exception:
        page.screenshot("panel_failure")
        raise


def wait_for_state(page: ComfyPage, state: str) -> None:
    wait_for(page, f"panel.dataset.state === '{state}'")


def text(page: ComfyPage, selector: str = "") -> str:
    return page.page.locator(f".svdq {selector}").inner_text()


def count(page: ComfyPage, selector: str) -> int:
    return page.page.locator(f".svdq {selector}").count()


def percent(page: ComfyPage) -> int:
    return int(page.page.get_by_role("progressbar", name="SVDQuant Quantize").get_attribute("aria-valuenow"))


SET = """([id, values]) => {
    const { widgets } = app.rootGraph.getNodeById(id);
    for (const [name, value] of Object.entries(values)) widgets.find((widget) => widget.name === name).value = value;
}"""


def build(page: ComfyPage, workflow: str = WORKFLOW, **widgets: Any) -> int:
    """The graph of the tests that are not about drawing it: returns the Quantize node's id."""
    script = """([workflow, prompts]) => {
        app.rootGraph.clear();
        app.rootGraph.id = workflow;
        const make = (type, x, y) => {
            const node = LiteGraph.createNode(type);
            node.pos = [x, y];
            return app.rootGraph.add(node);
        };
        const model = make("UNETLoader", 100, 120), clip = make("DemoTextEncoderLoader", 100, 300);
        const list = make("SVDQuantPrompts", 100, 420), quantize = make("SVDQuantQuantize", 560, 80);
        model.widgets[0].value = "demo_flux.safetensors";
        list.widgets[0].value = prompts;
        model.connect(0, quantize, "model");
        clip.connect(0, list, "clip");
        list.connect(0, quantize, "conditioning");
        app.canvas.setDirty(true, true);
        return quantize.id;
    }"""
    quantize = int(page.evaluate(script, [workflow, CALIBRATION]))
    page.evaluate(SET, [quantize, FAST | widgets])
    return quantize


@pytest.fixture(scope="module")
def page(browser: Browser, server: ComfyServer) -> Iterator[ComfyPage]:
    """A tab that tests clear and use again."""
    page = browser.open(server)
    yield page
    assert page.errors == []
    page.close()


def image(page: ComfyPage, node: int) -> np.ndarray:
    """The picture that a Preview Image node shows, once it does."""
    page.page.wait_for_function("id => app.rootGraph.getNodeById(id).imgs?.length", arg=node, timeout=5 * MINUTE)
    url = page.evaluate("id => app.rootGraph.getNodeById(id).imgs[0].src", node)
    with urllib.request.urlopen(url) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"), np.float32)


# --- the whole way ---


def test_from_an_empty_canvas_to_a_picture(browser: Browser, server: ComfyServer):
    """Draw, run, watch, reload, interrupt, run to the end, load the file with the panel's button, sample."""
    page = browser.open(server)
    page.evaluate("() => { app.canvas.ds.scale = 0.6; app.canvas.setDirty(true, true); }")
    model = put(page, "Load Diffusion Model", 230, 130)
    clip = put(page, "Load Demo Text Encoder", 230, 260)
    prompts = put(page, "SVDQuant Prompts", 230, 360)
    quantize = put(page, "SVDQuant Quantize", 560, 130)
    wait_for_state(page, "none")
    assert text(page).startswith("Pictures and the error of every layer appear here")
    wire(page, model, "MODEL", quantize, "model")
    wire(page, clip, "CLIP", prompts, "clip")
    wire(page, prompts, "conditioning list", quantize, "conditioning")
    set_widget(page, model, "unet_name", "demo_flux.safetensors")
    for name, value in ({"file_name": "watched"} | SLOW).items():
        set_widget(page, quantize, name, value)
    page.page.locator(".comfy-multiline-input").fill(CALIBRATION)
    height = page.evaluate("id => app.rootGraph.getNodeById(id).size[1]", quantize)

    press_run(page)
    wait_for(page, "count('.svdq-strip img') >= 1 && panel.dataset.state === 'calibrate'")
    assert count(page, ".svdq-strip > span") == 6, "one place for each prompt"
    assert re.match(r"Calibrating: prompt \d of 6", text(page, ".svdq-stage"))
    assert re.match(r"about \d+ s, then the layers", text(page, ".svdq-eta"))
    assert count(page, "figure img[src^='data:image/jpeg']") == 1
    begun = percent(page)
    wait_for(page, "count('.svdq-strip img') >= 2")
    page.screenshot("panel_calibrating")

    page.reload()  # whatever it showed comes back, and goes on
    wait_for(page, "count('.svdq-strip img') >= 2")
    seen = count(page, ".svdq-strip img")
    wait_for(page, f"count('.svdq-strip img') > {seen} || count('.svdq-bar')")
    wait_for(page, "count('.svdq-bar') >= 3 && panel.dataset.state === 'solve'")
    assert percent(page) > begun and count(page, ".svdq-strip img") == 6
    assert re.match(r"Solving: layer \d+ of 32", text(page, ".svdq-stage"))
    assert re.match(r"about \d+ (s|min) left", text(page, ".svdq-eta"))
    assert re.search(
        r"Solved so far\n[\d.]+ [KM]iB\n.*Smaller\n\d\.\d\d×.*Worst layer\n−\d", text(page, ".svdq-stats"), re.S
    )
    page.screenshot("panel_solving")

    press_interrupt(page)
    wait_for_state(page, "stopped")
    solved = count(page, ".svdq-bar")
    assert text(page, ".svdq-stage") == "Interrupted" and text(page, ".svdq-eta") == ""
    assert f"The calibration and {solved} of 32 layers are kept. Run again" in text(page, ".svdq-note")
    page.screenshot("panel_stopped")

    press_run(page)
    wait_for(page, "count('.svdq-kept.svdq-bar') >= 3")
    wait_for_state(page, "done")
    assert text(page, ".svdq-stage") == "Done: 32 layers" and count(page, ".svdq-bar") == 32
    assert count(page, ".svdq-kept.svdq-bar") >= solved
    assert f"{count(page, '.svdq-kept.svdq-bar')} of 32 layers were kept" in text(page, ".svdq-note")
    assert text(page, ".svdq-file") == "watched.safetensors"
    assert page.page.locator(".svdq [role=status]").text_content().startswith("Done. ")
    shown = page.evaluate("id => app.rootGraph.getNodeById(id).size[1]", quantize)
    saved = page.evaluate("id => app.rootGraph.getNodeById(id).serialize()", quantize)
    assert shown > height + 200 and abs(saved["size"][1] - height) <= 2, "the run's height is not saved"
    assert len(saved["widgets_values"]) == 9 and "svdquant_panel" not in page.prompt()[str(quantize)]["inputs"]

    page.page.locator(".svdq button").click()
    page.page.wait_for_function("app.rootGraph.nodes.some((n) => n.type === 'SVDQuantLoader')")
    (loader,) = (id for id, type in page.nodes().items() if type == "SVDQuantLoader")
    page.page.wait_for_function("id => app.canvas.selectedItems.has(app.rootGraph.getNodeById(id))", arg=loader)
    page.screenshot("panel_loader")
    script = "id => { const [w] = app.rootGraph.getNodeById(id).widgets; return [w.value, w.options.values]; }"
    widget = page.evaluate(script, loader)
    assert widget[0] == "watched.safetensors" and widget[0] in widget[1]

    positive = put(page, "CLIP Text Encode", 1060, 150)
    latent = put(page, "EmptySD3LatentImage", 840, 330)
    vae = put(page, "Load Demo VAE", 840, 470)
    sampler = put(page, "KSampler", 1060, 380)
    decode = put(page, "VAE Decode", 840, 560)
    preview = put(page, "Preview Image", 840, 660)
    page.page.locator(".comfy-multiline-input").last.fill("large red star on blue")
    wire(page, clip, "CLIP", positive, "clip")
    wire(page, loader, "model", sampler, "model")
    for name in ("positive", "negative"):
        wire(page, positive, "CONDITIONING", sampler, name)
    wire(page, latent, "LATENT", sampler, "latent_image")
    wire(page, sampler, "LATENT", decode, "samples")
    wire(page, vae, "VAE", decode, "vae")
    wire(page, decode, "IMAGE", preview, "images")
    for name, value in {"width": 128, "height": 128}.items():
        set_widget(page, latent, name, value)
    for name, value in {"steps": 8, "cfg": 1}.items():
        set_widget(page, sampler, name, value)
    press_run(page)
    picture = image(page, preview)
    page.screenshot("panel_picture")
    assert picture.shape == (128, 128, 3) and picture.std() > 10
    wait_for(page, "panel.querySelector('.svdq-stage').textContent === 'Done before: 32 layers'")
    assert page.errors == []
    page.close()


# --- whose run it is ---


def test_a_second_tab_a_queue_and_other_nodes(browser: Browser, server: ComfyServer, page: ComfyPage):
    """Two jobs in the queue, seen by two tabs; a copy of the node and another workflow do not show them."""
    quantize = build(page, file_name="first", **{**SLOW, "preset": "balanced"})
    workflow = page.evaluate("() => app.rootGraph.serialize()")
    page.run()
    wait_for(page, "count('.svdq-strip img') >= 1")
    other = browser.open(server)  # came late, and gets what it has missed
    other.load(workflow)
    wait_for(other, "count('.svdq-strip img') >= 1")
    page.evaluate(SET, [quantize, FAST | {"file_name": "second"}])
    page.run()
    for tab in (page, other):
        assert text(tab, ".svdq-file") == "first.safetensors", "what is queued does not run yet"
    for tab in (page, other):
        wait_for(tab, "panel.dataset.state === 'done' && panel.textContent.includes('second.safetensors')")
        assert count(tab, ".svdq-bar") == 32 and count(tab, ".svdq-strip img") == 2

    other.load(workflow | {"id": OTHER_WORKFLOW})  # the same node ids, another workflow
    wait_for_state(other, "none")
    other.load(workflow)  # the node is made anew
    wait_for_state(other, "done")
    other.evaluate(
        """id => {
            app.canvas.copyToClipboard([app.rootGraph.getNodeById(id)]);
            app.canvas.pasteFromClipboard();
        }""",
        quantize,
    )
    other.page.wait_for_function("document.querySelectorAll('.svdq').length === 2")
    states = "[...document.querySelectorAll('.svdq')].map((panel) => panel.dataset.state).sort().join()"
    other.page.wait_for_function(f"{states} === 'done,none'")
    assert other.errors == []
    other.close()


def test_inside_a_subgraph(browser: Browser, server: ComfyServer):
    page = browser.open(server)
    quantize = build(page, file_name="inside")
    subgraph = page.evaluate(
        """id => {
            const { subgraph, node } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(id)]));
            app.canvas.openSubgraph(subgraph, node);
            return node.id;
        }""",
        quantize,
    )
    page.run()
    wait_for_state(page, "done")
    assert f"{subgraph}:{quantize}" in page.prompt()
    assert page.errors == []
    page.close()


def test_a_job_that_was_finished_before(server: ComfyServer, page: ComfyPage):
    """Its file is there: the run ends at once, and the chart comes from the file."""
    build(page, file_name="finished")
    page.run()
    wait_for(page, "panel.dataset.state === 'done' && panel.textContent.includes('finished.safetensors')")  # not before
    assert count(page, ".svdq-strip img") == 2
    server.free(unload_models=True, free_memory=True)
    page.run()
    wait_for(page, "panel.querySelector('.svdq-stage').textContent === 'Done before: 32 layers'")
    assert count(page, ".svdq-bar") == 32 and not count(page, ".svdq-strip img")
    assert "its file is kept as it is" in text(page, ".svdq-note")
    assert "File" in text(page, ".svdq-stats") and page.page.locator(".svdq button").is_visible()


def test_a_failed_run_says_why(browser: Browser, server: ComfyServer):
    page = browser.open(server)
    build(page, file_name="demo_flux")
    page.run()
    wait_for_state(page, "stopped")
    assert text(page, ".svdq-stage") == "Failed"
    assert "demo_flux.safetensors exists and is a 16-bit diffusion model" in text(page, ".svdq-note")
    assert "kept" not in text(page, ".svdq-note") and not page.page.locator(".svdq button").is_visible()
    page.close()


def test_a_lost_connection_and_a_server_that_was_restarted(browser: Browser, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The first is made up for; after the second nothing runs any more, and the panel says so."""
    port = host.server.free_port()
    monkeypatch.setattr(host.server, "free_port", lambda: port)
    with ComfyServer(packs=[DEMO / "comfy_nodes"], base=tmp_path, env={"OMP_NUM_THREADS": "1"}) as own:
        own.add_model(DEMO / "models" / "demo_flux.safetensors")
        page = browser.open(own)
        build(page, file_name="cut", **{**SLOW, "steps": 4})
        page.run()
        wait_for(page, "count('.svdq-bar') >= 2")
        page.evaluate("() => app.api.socket.close()")
        wait_for(page, "panel.querySelector('.svdq-eta').textContent === 'connection lost'")
        wait_for(page, "panel.querySelector('.svdq-eta').textContent.startsWith('about')")
        wait_for(page, "count('.svdq-bar') >= 6")
        names = page.evaluate("[...document.querySelectorAll('.svdq-bar')].map((bar) => bar.layer.name)")
        assert len(set(names)) == len(names), "no layer is missed or told twice"
        own.kill()
        own.start()
        wait_for_state(page, "stopped")
        assert text(page, ".svdq-stage") == "The server was restarted"
        assert re.search(r"calibration and \d+ of 32 layers are kept", text(page, ".svdq-note"))
        page.run()
        wait_for(page, "count('.svdq-bar.svdq-kept') >= 6")
        page.close()


# --- what the server remembers ---


def queue(workflow: str, **widgets: Any) -> tuple[dict, dict]:
    """A prompt for the API, and the extra data that the frontend would send with it."""
    prompt = quantize_prompt("fast")
    prompt["quantize"]["inputs"] |= FAST | widgets
    return prompt, {"extra_pnginfo": {"workflow": {"id": workflow}}}


@pytest.mark.parametrize("method", ["none", "latent2rgb"])
def test_runs_are_there_for_those_who_come_late(server: ComfyServer, method: str):
    """All events of a run, but of each prompt only the last step, with a small picture."""
    prompt, extra = queue(f"late-{method}", file_name=f"late_{method}", steps=3, size=128)
    prompt_id = server.queue(prompt, extra | {"preview_method": method})
    server.wait(prompt_id)
    answer = server.get("/svdquant/runs")
    events = answer["runs"][-1]
    assert {(e["workflow"], e["node"], e["prompt_id"]) for e in events} == {(f"late-{method}", "quantize", prompt_id)}
    assert [e["stage"] for e in events] == ["start", "calibrate", "calibrate", "hash", *["solve"] * 32, "write", "done"]
    numbers = [e["seq"] for e in events]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 1 + 6 + 1 + 32 + 1
    assert all(0 <= answer["now"] - e["time"] < 600 for e in events)
    for event in events[1:3]:
        assert event["step"] == event["steps"] == 3
        kind, data = event["preview"].split(",")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/jpeg;base64" and max(picture.size) <= 96 and len(data) < 8000
        assert np.asarray(picture).std() > 5


def test_few_runs_are_kept_and_a_node_has_one(server: ComfyServer):
    for i in (*range(10), 9):
        with pytest.raises(PromptError, match="not overwritten"):
            server.wait(server.queue(*queue(f"many-{i}", file_name="demo_flux")))
    runs = server.get("/svdquant/runs")["runs"]
    assert [events[0]["workflow"] for events in runs] == [f"many-{i}" for i in range(2, 10)]
    assert all([e["stage"] for e in events] == ["start", "stopped"] and not events[1]["interrupted"] for events in runs)


def test_runs_can_only_be_read(server: ComfyServer):
    for path in ("/svdquant/runs", "/api/svdquant/runs"):
        with pytest.raises(HTTPError, match="405"):
            server.post(path, {})


# --- what it looks like, and for whom ---

EVENTS = """([node, workflow, events]) => {
    const run = { node: `${node}`, workflow, prompt_id: `${Math.random()}`, time: Date.now() / 1000, file: "x" };
    const send = (event, seq) => app.api.dispatchCustomEvent("svdquant." + event.stage, { ...run, ...event, seq });
    events.forEach(send);
}"""


def pretend(page: ComfyPage, node: int, *events: dict[str, Any]) -> None:
    """Events as the server sends them, of a run that nobody has the time or the model for."""
    page.evaluate(
        EVENTS, [node, WORKFLOW, [{"stage": "start", "format": "int4", "rank": 32, "preset": "best"}, *events]]
    )


def layer(i: int, total: int, name: str, kind: str = "w4a4", db: float = -20.0, kept: bool = False) -> dict[str, Any]:
    sizes = {"bytes": 100 * 2**10, "bytes_16bit": 350 * 2**10}
    totals = {f"total_{key}": (i + 1) * size for key, size in sizes.items()}
    told = {"stage": "solve", "index": i + 1, "total": total, "eta": 60.0, "kept": kept, "name": name, "kind": kind}
    branch = {"alpha": None, "rank": 0} if kind == "w4a16" else {"alpha": 0.5, "rank": 32}
    return told | branch | {"format": "f", "error_db": db} | sizes | totals


def flux_layers() -> list[dict[str, Any]]:
    """All 304 layers of FLUX.1, in the order in which they are solved."""
    streams = [f"{stream}_{part}" for stream in ("img", "txt")
               for part in ("attn.proj", "attn.qkv", "mlp.0", "mlp.2", "mod.lin")]  # fmt: skip
    names = [f"double_blocks.{i}.{part}" for i in range(19) for part in streams]
    names += [f"single_blocks.{i}.{part}" for i in range(38) for part in ("linear1", "linear2", "modulation.lin")]
    kinds = ["w4a16" if "mod" in name else "w4a4" for name in names]
    return [layer(i, 304, n, k, -18 - i % 7 - 8 * ("mod" in n)) for i, (n, k) in enumerate(zip(names, kinds))]


def test_bars_by_mouse_and_by_keyboard(page: ComfyPage):
    quantize = build(page)
    script = """id => {
        const node = app.rootGraph.getNodeById(id);
        node.setSize([900, node.size[1]]);
        app.canvas.selectItems([node]);
    }"""
    page.evaluate(script, quantize)
    skip = {"stage": "skip", "name": "double_blocks.0.odd", "reason": "96 input features are not a multiple of 64"}
    pretend(page, quantize, skip, *flux_layers())
    wait_for(page, "count('.svdq-bar') === 304")
    bars = page.page.locator(".svdq-bar")
    assert count(page, ".svdq-block") == 19 + 38 and count(page, ".svdq-bar.svdq-w4a16") == 76
    assert page.page.locator(".svdq-block > .svdq-kind").all_inner_texts() == ["double blocks", "single blocks"]
    assert page.page.get_by_role("list", name="Error per layer").get_by_role("listitem").count() == 304
    assert bars.nth(1).get_attribute("aria-label") == (
        "double_blocks.0.img_attn.qkv: −19.0 dB, α 0.5, rank 32, 350 KiB in 16 bit, 100 KiB now (3.50×)"
    )
    assert bars.nth(4).get_attribute("aria-label").startswith("double_blocks.0.img_mod.lin: −30.0 dB, weights only, ")
    assert text(page, ".svdq-detail b") == "single_blocks.37.modulation.lin", "at rest: the newest"
    bars.nth(150).hover()
    assert text(page, ".svdq-detail b") == "double_blocks.15.img_attn.proj"
    page.page.mouse.move(5, 300)
    assert text(page, ".svdq-detail b") == "single_blocks.37.modulation.lin"

    assert page.page.locator(".svdq-bar[tabindex='0']").count() == 1, "one stop for the tab key"
    bars.first.focus()
    for key, name in (
        ("ArrowRight", "double_blocks.0.img_attn.qkv"),
        ("End", "single_blocks.37.modulation.lin"),
        ("ArrowRight", "single_blocks.37.modulation.lin"),
        ("ArrowLeft", "single_blocks.37.linear2"),
        ("Home", "double_blocks.0.img_attn.proj"),
    ):
        page.page.keyboard.press(key)
        assert text(page, ".svdq-detail b") == name
    for key in ("Delete", "Backspace"):
        page.page.keyboard.press(key)
    assert quantize in page.nodes(), "these keys delete the selected node, but not from in here"
    page.page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "then what stays 16 bit"
    page.page.keyboard.press("Enter")
    assert text(page, ".svdq-skipped li") == "double_blocks.0.odd: 96 input features are not a multiple of 64"
    assert text(page, ".svdq-skipped summary") == "1 layer stays 16 bit"


def test_panels_live_as_long_as_their_nodes(page: ComfyPage):
    quantize = build(page)
    alive = "async () => (await import('/extensions/ComfyUI-SVDQuant/svdquant_panel.js')).panels.size"
    page.evaluate("() => { for (let i = 0; i < 10; i++) LiteGraph.createNode('SVDQuantQuantize'); }")
    assert page.evaluate(alive) == 1, "nodes that never came into the graph have none"
    script = """id => {
        const node = app.rootGraph.getNodeById(id);
        app.rootGraph.remove(node);
        app.rootGraph.add(node);
        return node.id;
    }"""
    quantize = page.evaluate(script, quantize)
    assert page.evaluate(alive) == 1
    pretend(page, quantize, layer(0, 1, "double_blocks.0.odd"))
    wait_for(page, "count('.svdq-bar') === 1")  # a node that comes back is followed again
    page.evaluate("() => app.rootGraph.clear()")
    assert page.evaluate(alive) == 0


def test_the_button_makes_one_loader(page: ComfyPage):
    quantize = build(page)
    report = {"summary": "in words", "bytes": 100, "bytes_16bit": 350, "kept": 0}
    pretend(page, quantize, layer(0, 1, "double_blocks.0.odd"), {"stage": "done", **report})
    wait_for_state(page, "done")
    assert page.page.locator(".svdq-stats").get_attribute("title") == "in words"
    button = page.page.locator(".svdq button")
    page.evaluate("() => { const b = document.querySelector('.svdq button'); b.click(); b.click(); }")
    assert button.is_disabled()
    page.page.wait_for_function("!document.querySelector('.svdq button').disabled")
    (loader,) = (id for id, type in page.nodes().items() if type == "SVDQuantLoader")
    script = """([source, target]) => {
        const [from, to] = [source, target].map((id) => app.rootGraph.getNodeById(id));
        from.connect(0, to, "unet_name");
        app.canvas.deselectAll();
    }"""
    page.evaluate(script, [quantize, loader])
    page.evaluate("() => document.querySelector('.svdq button').click()")
    page.page.wait_for_function("id => app.canvas.selectedItems.has(app.rootGraph.getNodeById(id))", arg=loader)
    assert list(page.nodes().values()).count("SVDQuantLoader") == 1, "the one that is linked is enough"


def test_names_are_text(page: ComfyPage):
    evil = "<img src=x onerror=window.hacked=1>"
    quantize = build(page)
    events = [{"stage": "skip", "name": evil, "reason": evil}, layer(0, 1, f"{evil}.0.{evil}")]
    end = {"stage": "stopped", "reason": evil, "interrupted": False, "file": evil}
    pretend(page, quantize, *({**event, "file": evil} for event in events), end)
    wait_for_state(page, "stopped")
    assert page.page.locator(".svdq [role=status]").text_content().startswith(f"Failed. {evil}")
    assert count(page, "img[src=x]") == 0 and text(page, ".svdq-note").startswith(evil)
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_nodes_2_and_themes(browser: Browser, server: ComfyServer, palette: str):
    """In the other renderer the panel takes part in the node's own layout: wide, narrow, with and without a run."""
    settings = {"Comfy.VueNodes.Enabled": True, "Comfy.ColorPalette": palette}
    page = browser.open(server, settings=settings, reduced_motion="reduce")
    quantize = build(page)
    size = "([id, width]) => { const n = app.rootGraph.getNodeById(id); n.setSize([width, n.size[1]]); }"
    wait_for(page, "panel.dataset.state === 'none' && panel.offsetHeight < 60")
    pretend(page, quantize, *flux_layers()[:200])
    for width, columns in ((900, 4), (300, 2)):
        page.evaluate(size, [quantize, width])
        shown = "getComputedStyle(panel.querySelector('.svdq-stats')).gridTemplateColumns.split(' ').length"
        wait_for(page, f"{shown} === {columns} && panel.scrollWidth <= panel.clientWidth")
        wait_for(page, "panel.closest('.lg-node').offsetHeight > panel.offsetHeight + 200")
        page.screenshot(f"panel_vue_{palette}_{width}")
    assert page.evaluate("getComputedStyle(document.querySelector('.svdq-bar'), '::before').animationName") == "none"
    colours = "(() => { const s = getComputedStyle(document.querySelector('.svdq')); return s.color; })()"
    light = sum(int(c) for c in re.findall(r"\d+", page.evaluate(colours))[:3])
    assert (light < 300) == (palette == "light"), "dark text on light, light text on dark"
    assert page.errors == []
    page.close()

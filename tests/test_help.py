"""The help page of every node and its names in English and Chinese, as ComfyUI's frontend shows them."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
from playwright.sync_api import TimeoutError

from host.browser import Browser, ComfyPage
from host.install import ROOT
from host.server import HTTP, ComfyServer
from host.workflow import input_specs

NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
LANGUAGES = ("en", "zh")
HEADINGS = {
    "en": ("## Inputs", "## Outputs", "## Example", "## Limits"),
    "zh": ("## 输入", "## 输出", "## 示例", "## 限制"),
}

each_node = pytest.mark.parametrize("node", NODES)
each_language = pytest.mark.parametrize("language", LANGUAGES)


def page_of(node: str, language: str) -> str:
    docs = ROOT / "web" / "docs"
    return (docs / f"{node}.md" if language == "en" else docs / node / f"{language}.md").read_text("utf-8")


def names(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def ours(server: ComfyServer) -> dict:
    """What the server says of the plugin's nodes (the tests' own nodes are elsewhere)."""
    return {name: info for name, info in server.get("/object_info").items() if info["category"] == "SVDQuant"}


@pytest.fixture(scope="module")
def page(server: ComfyServer, browser: Browser) -> Iterator[ComfyPage]:
    page = browser.open(server)
    yield page
    page.close()


@pytest.fixture(scope="module")
def chinese(server: ComfyServer, browser: Browser) -> Iterator[ComfyPage]:
    page = browser.open(server, settings={"Comfy.Locale": "zh"})
    yield page
    page.close()


def test_every_node_has_a_page(ours: dict):
    assert sorted(ours) == NODES


@each_language
@each_node
def test_the_page_names_every_input_and_output(node: str, language: str, ours: dict):
    text, info = page_of(node, language), ours[node]
    for heading in HEADINGS[language]:
        assert re.search(rf"^{heading}", text, re.MULTILINE), heading
    assert text.startswith(f"# {names(language)[node]['display_name']}\n")
    bold = set(re.findall(r"\*\*([\w ]+)\*\*", text))
    for name in (*input_specs(info), *info["output_name"]):
        first, last = re.sub(r"_\d$", "_1", name), re.sub(r"_\d$", "_5", name)  # of the rows of the stack
        assert {name} <= bold or {first, last} <= bold, name


@each_node
def test_the_frontend_shows_the_page(node: str, page: ComfyPage, ours: dict):
    text = show_help(page, node, ours[node]["display_name"])
    assert "limits" in text.lower()
    tables = len(re.findall(r"^\|---", page_of(node, "en"), re.MULTILINE))
    assert page.page.locator(".node-help-content table").count() == tables
    page.screenshot(f"help_{node}")
    assert unexpected(page) == []


@each_node
def test_the_frontend_shows_the_page_in_chinese(node: str, chinese: ComfyPage):
    assert "限制" in show_help(chinese, node, names("zh")[node]["display_name"])
    chinese.screenshot(f"help_{node}_zh")


def show_help(page: ComfyPage, node: str, title: str) -> str:
    """Select a node of that type, press the i, and return what the help says."""
    page.clear()
    page.evaluate("type => void app.rootGraph.add(Object.assign(LiteGraph.createNode(type), {pos: [300, 200]}))", node)
    help = page.page.locator(".node-help-content")
    heading = help.locator("h1", has_text=re.compile(f"^{re.escape(title)}$"))
    for _ in range(10):  # a busy canvas may not have drawn the node yet
        page.page.mouse.click(420, 185)  # its title
        with suppress(TimeoutError):
            if not help.is_visible():
                page.page.get_by_test_id("info-button").click(timeout=3000)
            heading.wait_for(timeout=3000)
            return help.inner_text()
    raise AssertionError(f"no help for {node}")


@each_language
def test_translations_cover_every_name_and_tooltip(language: str, ours: dict, server: ComfyServer):
    translated = names(language)
    assert server.get("/i18n")[language]["nodeDefs"].items() >= translated.items()
    assert set(translated) == set(ours)
    for node, info in ours.items():
        texts, inputs = translated[node], input_specs(info)
        assert texts.keys() == {"display_name", "description", "inputs", "outputs"}
        assert list(texts["inputs"]) == list(inputs), node
        assert list(texts["outputs"]) == [str(i) for i in range(len(info["output"]))], node
        for slot in (*texts["inputs"].values(), *texts["outputs"].values()):
            assert slot.keys() == {"name", "tooltip"}
            assert slot["name"] and slot["tooltip"], node
        for text in strings(texts):
            assert not re.search(r"[@{}|]", text), text  # these mean something to the frontend


def strings(tree: dict) -> Iterator[str]:
    for value in tree.values():
        yield from strings(value) if isinstance(value, dict) else (value,)


@each_node
def test_english_is_what_the_schema_says(node: str, ours: dict):
    texts, info = names("en")[node], ours[node]
    assert (texts["display_name"], texts["description"]) == (info["display_name"], info["description"])
    for name, spec in input_specs(info).items():
        assert texts["inputs"][name] == {"name": spec[1].get("display_name", name), "tooltip": spec[1]["tooltip"]}
    for i, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"])):
        assert texts["outputs"][str(i)] == {"name": name, "tooltip": tooltip}


@each_node
def test_chinese_is_chinese(node: str):
    texts = names("zh")[node]
    tooltips = [slot["tooltip"] for slot in (*texts["inputs"].values(), *texts["outputs"].values())]
    for text in (texts["description"], *tooltips):
        assert re.search(r"[\u4e00-\u9fff]", text), text


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_the_canvas_speaks_chinese(chinese: ComfyPage, vue: bool):
    chinese.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", vue)
    chinese.clear()
    shown = chinese.evaluate(
        """types => types.map((type, i) => {
            const node = LiteGraph.createNode(type);
            node.pos = [140 + 520 * (i % 3), 160 + 620 * Math.floor(i / 3)];
            app.rootGraph.add(node);
            const label = ({name, label, localized_name}) => [name, label ?? localized_name ?? name];
            const inputs = [...(node.widgets ?? []), ...node.inputs];
            return [node.title, Object.fromEntries(inputs.map(label)), node.outputs.map(label)];
        })""",
        NODES,
    )
    for node, (title, labels, outputs) in zip(NODES, shown):
        texts = names("zh")[node]
        assert title == texts["display_name"]
        assert {name: labels[name] for name in texts["inputs"]} == {k: v["name"] for k, v in texts["inputs"].items()}
        assert [label for _, label in outputs] == [slot["name"] for slot in texts["outputs"].values()]
    chinese.evaluate("() => { app.canvas.ds.scale = 0.65; app.canvas.setDirty(true, true); }")
    chinese.page.wait_for_timeout(500)  # for the picture only
    chinese.screenshot(f"chinese_{'nodes2' if vue else 'canvas'}")
    assert unexpected(chinese) == []


def unexpected(page: ComfyPage) -> list[str]:
    """The frontend looks for docs/<node>/en.md before docs/<node>.md."""
    return [error for error in page.errors if not re.search(r"/docs/\w+/en\.md", error)]


@each_node
def test_the_page_is_served(node: str, server: ComfyServer):
    for file in (f"{node}.md", f"{node}/zh.md"):
        with HTTP.open(f"{server.url}/extensions/ComfyUI-SVDQuant/docs/{file}", timeout=30) as answer:
            assert answer.read().decode().startswith("# ")

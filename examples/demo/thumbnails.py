"""Makes the pictures that ComfyUI's template browser shows of the workflows: `workflows/<name>.jpg`.

The workflows are run in a real ComfyUI with the demo model where its weights will do. Kontext, Redux, ControlNet and
models other than FLUX.1 need weights that the demo does not have: their pictures show the workflow on the canvas.

    .venv/bin/python examples/demo/thumbnails.py
"""

from __future__ import annotations

import argparse
import json
import time

from PIL import Image, ImageDraw, ImageFilter
from run import CALIBRATION, CFG, HERE, LOADERS, PROMPTS, ROOT, SIZE, change, load_workflow, quantize, set_picture

from host.browser import Browser
from host.server import ComfyServer

SIDE = 512  # of a thumbnail
FILE = "demo_flux_balanced.safetensors"
SCENES = PROMPTS[:2] + PROMPTS[3:5]
# What is shown of the workflows whose weights the demo does not have.
FRAMED = {
    "kontext_edit": ("LoadImage", "FluxKontextImageScale", "VAEEncode", "CLIPTextEncode", "ReferenceLatent"),
    "redux": ("LoadImage", "CLIPVisionEncode", "StyleModelLoader", "CLIPTextEncode", "StyleModelApply"),
    "controlnet": ("LoadImage", "Canny", "PreviewImage", "ControlNetLoader"),
    "text_to_image_flux2": ("CLIPTextEncode", "Flux2Scheduler", "CFGGuider", "RandomNoise", "SamplerCustomAdvanced"),
    "text_to_image_qwen_image": ("CLIPTextEncode", "EmptySD3LatentImage", "ModelSamplingAuraFlow", "KSampler"),
    "text_to_image_z_image": ("CLIPTextEncode", "EmptySD3LatentImage", "ModelSamplingAuraFlow", "KSampler"),
    "text_to_video_hunyuan": ("CLIPTextEncode", "FluxGuidance", "EmptyHunyuanLatentVideo", "KSampler"),
    "text_to_video_wan": ("CLIPTextEncode", "EmptyHunyuanLatentVideo", "ModelSamplingSD3", "KSamplerAdvanced"),
}
FILES = {
    "style_models": "flux1-redux-dev.safetensors",
    "clip_vision": "sigclip_vision_patch14_384.safetensors",
    "controlnet": "FLUX.1-dev-ControlNet-Union-Pro-2.0.safetensors",
}
VIEW = 1600  # pixels of the browser's window
FRAME = """([types, size]) => {
    const nodes = app.rootGraph.nodes.filter((n) => types.includes(n.type)), view = app.canvas.ds;
    const [left, top] = [0, 1].map((i) => Math.min(...nodes.map((n) => n.pos[i])) - (i ? 75 : 35));
    const [right, bottom] = [0, 1].map((i) => Math.max(...nodes.map((n) => n.pos[i] + n.size[i])) + 35);
    view.scale = size / Math.max(right - left, bottom - top);
    const { clientWidth, clientHeight } = app.canvas.canvas;
    view.offset[0] = clientWidth / 2 / view.scale - (left + right) / 2;
    view.offset[1] = clientHeight / 2 / view.scale - (top + bottom) / 2;
    app.canvas.setDirty(true, true);
}"""
SET = """values => {
    for (const node of app.rootGraph.nodes)
        for (const widget of node.widgets ?? []) {
            const value = values[node.type]?.[widget.name];
            if (value !== undefined) widget.value = value;
        }
}"""


def run(server: ComfyServer, name: str, text: str, seed: int = 1, steps: int = 25, **nodes: dict) -> Image.Image:
    """The picture that a workflow saves; ``nodes`` are widget values by type of node."""
    prompt = load_workflow(server, name)
    change(prompt, "SVDQuantLoader", unet_name=FILE)
    change(prompt, "LoadImage", image="scene.png")
    set_picture(prompt, text, seed)
    change(prompt, "KSampler", steps=steps)
    for class_type, values in nodes.items():
        change(prompt, class_type, **values)
    return picture(server, prompt)


def picture(server: ComfyServer, prompt: dict) -> Image.Image:
    saver = next(id for id, node in prompt.items() if node["class_type"] == "SaveImage")
    (saved,) = server.run(prompt, timeout=600)["outputs"][saver]["images"]
    with Image.open(server.base / saved["type"] / saved["subfolder"] / saved["filename"]) as image:
        return image.convert("RGB")


def tiles(pictures: list[Image.Image]) -> Image.Image:
    """Two or four pictures in a square; two overlap at the diagonal."""
    if len(pictures) == 2:
        first, second = (p.resize((SIDE, SIDE), Image.BICUBIC) for p in pictures)
        mask = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).polygon([(SIDE, 0), (SIDE, SIDE), (0, SIDE)], 255)
        first.paste(second, mask=mask.filter(ImageFilter.GaussianBlur(1)))
        ImageDraw.Draw(first).line([(SIDE, 0), (0, SIDE)], "white", 4)
        return first
    sheet, half = Image.new("RGB", (SIDE, SIDE), "white"), SIDE // 2
    for i, tile in enumerate(pictures):
        sheet.paste(tile.resize((half, half), Image.BICUBIC), (i % 2 * half, i // 2 * half))
    return sheet


def write_input(server: ComfyServer, scene: Image.Image) -> Image.Image:
    """``scene`` as an input file whose middle is masked (transparent); returns it with the mask in grey."""
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    mask = Image.new("L", scene.size, 255)
    ImageDraw.Draw(mask).ellipse([SIZE * 0.14, SIZE * 0.14, SIZE * 0.86, SIZE * 0.86], 0)
    masked = scene.copy()
    masked.putalpha(mask)
    masked.save(folder / "scene.png")
    scene.resize((SIDE, SIDE), Image.BICUBIC).save(folder / "example.png")  # what the workflows name
    return Image.composite(scene, Image.new("RGB", scene.size, (90, 90, 90)), mask)


def painted(server: ComfyServer) -> dict[str, Image.Image]:
    """The workflows that end in pictures."""
    lora = {f"{key}_1": value for key, value in (("lora", "demo_lora_neon.safetensors"), ("strength", 1.0))}
    sticker = lora | {"lora_1": "demo_lora_sticker.safetensors"}
    plain = [run(server, "text_to_image", text, seed) for seed, text in enumerate(SCENES, 1)]
    few = [run(server, "text_to_image_schnell", text, seed, steps=4) for seed, text in enumerate(SCENES[::-1], 1)]
    styled = [run(server, "text_to_image_lora", SCENES[0], 1, SVDQuantLoRAStack=row) for row in (lora, sticker)]
    styled += [run(server, "text_to_image_lora", SCENES[3], 4, SVDQuantLoRAStack=row) for row in (sticker, lora)]
    holed = write_input(server, plain[0])
    changed = run(server, "image_to_image", "large white ring on blue", 5, KSampler={"denoise": 0.8})
    filled = run(server, "inpaint_fill", "large yellow circle on red", 3)
    return {
        "text_to_image": tiles(plain),
        "text_to_image_schnell": tiles(few),
        "text_to_image_lora": tiles(styled),
        "image_to_image": tiles([plain[0], changed]),
        "inpaint_fill": tiles([holed, filled]),
    }


def compared(server: ComfyServer) -> Image.Image:
    """The sheet that SVDQuant Compare makes."""
    prompt = load_workflow(server, "quantize_and_compare")
    change(prompt, "UNETLoader", unet_name="demo_flux.safetensors")
    change(prompt, "SVDQuantPrompts", prompts=CALIBRATION)
    change(prompt, "SVDQuantQuantize", file_name=FILE.removesuffix(".safetensors"))
    test = prompt[next(n for n in prompt.values() if n["class_type"] == "SVDQuantCompare")["inputs"]["positive"][0]]
    test["inputs"]["prompts"] = "\n".join(SCENES)
    negative = {"class_type": "CLIPTextEncode", "inputs": {"clip": test["inputs"]["clip"], "text": ""}}
    change(prompt, "SVDQuantCompare", steps=25, cfg=CFG, negative=["negative", 0], pictures=3)
    sheet = picture(server, prompt | {"negative": negative})
    square = Image.new("RGB", (max(sheet.size),) * 2, sheet.getpixel((0, 0)))
    square.paste(sheet, ((square.width - sheet.width) // 2, (square.height - sheet.height) // 2))
    return square.resize((SIDE, SIDE), Image.LANCZOS)


def on_canvas(
    server: ComfyServer, browser: Browser, saved: dict, framed: tuple[str, ...], widgets: dict
) -> Image.Image:
    """Part of a workflow on the canvas, after a run where ``widgets`` are given."""
    quiet = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
    page = browser.open(server, settings=quiet, viewport={"width": VIEW, "height": VIEW})
    page.load(saved)
    if widgets:
        page.evaluate(SET, widgets)
        page.run()
        while any(server.get("/queue").values()):
            time.sleep(0.5)
    page.page.wait_for_timeout(1500)  # pictures on the nodes, and the panels
    page.evaluate(FRAME, [framed, VIEW * 7 // 10])
    page.page.wait_for_timeout(1500)
    edge = VIEW * 3 // 20  # off the toolbars and messages
    with Image.open(page.screenshot("thumbnail")) as image:
        image = image.convert("RGB").crop((edge, edge, VIEW - edge, VIEW - edge))
    page.close()
    return image.resize((SIDE, SIDE), Image.LANCZOS)


def shown(server: ComfyServer, browser: Browser) -> dict[str, Image.Image]:
    """The workflows on the canvas: those that the demo cannot run, and SVDQuant Quantize after its work."""
    for folder, name in FILES.items():
        path = server.base / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # the node shows the name only
    made = {name: on_canvas(server, browser, saved(name), framed, {}) for name, framed in FRAMED.items()}
    workflow = saved("quantize")
    for node in workflow["nodes"]:
        if node["type"] in LOADERS:
            node |= {"type": LOADERS[node["type"]], "inputs": [], "widgets_values": []}
    widgets = {
        "UNETLoader": {"unet_name": "demo_flux.safetensors"},
        "SVDQuantPrompts": {"prompts": CALIBRATION},
        "SVDQuantQuantize": {"size": SIZE, "max_prompts": 12},
        "EmptySD3LatentImage": {"width": SIZE, "height": SIZE},
        "KSampler": {"steps": 4},
    }
    return made | {"quantize": on_canvas(server, browser, workflow, ("SVDQuantQuantize",), widgets)}


def saved(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with ComfyServer(packs=[HERE / "comfy_nodes"], env={"OMP_NUM_THREADS": "1"}) as server, Browser() as browser:
        server.add_model(HERE / "models" / "demo_flux.safetensors")
        for file in (HERE / "models").glob("demo_lora_*.safetensors"):
            server.add_model(file, "loras")
        quantize(server, "demo_flux", "balanced")
        made = painted(server) | {"quantize_and_compare": compared(server)}
        made |= shown(server, browser)
    for name, image in made.items():
        image.save(ROOT / "workflows" / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()

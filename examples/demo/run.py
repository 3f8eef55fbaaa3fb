"""`make demo`: a real ComfyUI quantizes the demo model through the shipped workflow, loads it and makes pictures.

Leaves `out/demo/sheet.png` (16 bit | naive W4A4 | SVDQuant W4A4, same prompts and seeds, for the model as it
is and for the variant with large outliers) and `out/demo/lora_sheet.png` (two LoRAs, merged into the 16-bit model
and on the branch of the 4-bit one), and prints tables.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from comfyui_svdquant.svdq_core import read_checkpoint
from comfyui_svdquant.svdq_core.quantize import Report
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(HERE))

from outliers import add_outliers_to_file  # noqa: E402

from host.server import ComfyServer  # noqa: E402
from host.workflow import to_prompt  # noqa: E402

PROMPTS = (
    "large white ring on red",
    "large black moon on white",
    "large orange triangle on purple",
    "yellow circle on purple left",
    "large blue diamond on black",
    "orange square on blue bottom",
)
CALIBRATION = "\n".join(
    f"{size} {colour} {shape} on {ground}"
    for size, colour, shape, ground in (
        ("large", "red", "circle", "white"),
        ("small", "green", "star", "black"),
        ("large", "blue", "heart", "yellow"),
        ("small", "white", "square", "red"),
        ("large", "purple", "triangle", "green"),
        ("small", "yellow", "moon", "blue"),
        ("large", "pink", "cross", "white"),
        ("small", "red", "diamond", "green"),
        ("large", "yellow", "flower", "purple"),
        ("small", "blue", "ring", "pink"),
        ("large", "black", "star", "yellow"),
        ("small", "purple", "heart", "white"),
    )
)
STEPS, CFG, SIZE = 25, 3.0, 128

LOADERS = {"DualCLIPLoader": "DemoTextEncoderLoader", "VAELoader": "DemoVAELoader"}  # the demo's in FLUX's place

Loras = tuple[tuple[str, float], ...]  # (style, strength)
LORAS: dict[str, Loras] = {
    "neon": (("neon", 1.0),),
    "sticker": (("sticker", 1.0),),
    "both, 0.5 each": (("neon", 0.5), ("sticker", 0.5)),
}


def load_workflow(server: ComfyServer, name: str) -> dict[str, dict]:
    """A shipped workflow as a prompt, with the demo's text encoder and VAE where FLUX's would be, and its size."""
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))
    prompt = to_prompt(workflow, server.get("/object_info"))
    for node in prompt.values():
        if node["class_type"] in LOADERS:
            node.update(class_type=LOADERS[node["class_type"]], inputs={})
        if node["class_type"] == "FluxKontextImageScale":  # to a megapixel
            scale = {"upscale_method": "lanczos", "width": SIZE, "height": SIZE, "crop": "center"}
            node.update(class_type="ImageScale", inputs=node["inputs"] | scale)
    change(prompt, "EmptySD3LatentImage", width=SIZE, height=SIZE)
    change(prompt, "ImageScaleToTotalPixels", megapixels=SIZE**2 / 2**20)
    change(prompt, "SVDQuantQuantize", size=SIZE)
    change(prompt, "SVDQuantCompare", width=SIZE, height=SIZE)
    return prompt


def change(prompt: dict[str, dict], class_type: str, **inputs: object) -> None:
    """Set widget values of all nodes of a type."""
    for node in prompt.values():
        if node["class_type"] == class_type:
            node["inputs"].update(inputs)


def set_picture(prompt: dict[str, dict], text: str, seed: int) -> None:
    """Fill in what is asked for; the negative prompt stays empty."""
    change(prompt, "KSampler", steps=STEPS, cfg=CFG, seed=seed)
    node = next(n for n in prompt.values() if n["class_type"] == "KSampler")
    while node["class_type"] != "CLIPTextEncode":
        node = prompt[node["inputs"].get("positive", node["inputs"].get("conditioning"))[0]]
    node["inputs"]["text"] = text


def quantize(server: ComfyServer, model: str, preset: str) -> str:
    """Run the shipped quantize workflow; it also loads the new file and makes a first picture."""
    prompt = load_workflow(server, "quantize")
    name = f"{model}_{preset}"
    change(prompt, "UNETLoader", unet_name=f"{model}.safetensors")
    change(prompt, "SVDQuantPrompts", prompts=CALIBRATION)
    change(prompt, "SVDQuantQuantize", file_name=name, preset=preset, steps=8)
    set_picture(prompt, PROMPTS[0], seed=1)
    history = server.run(prompt, timeout=600)
    texts = [t for out in history["outputs"].values() for t in out.get("text", ())]
    print("\n".join(f"    {line}" for text in texts for line in text.splitlines()), flush=True)
    return f"{name}.safetensors"


def pictures(server: ComfyServer, file: str, quantized: bool, loras: Loras = ()) -> list[np.ndarray]:
    """One picture per prompt, float (H, W, 3) in 0...1."""
    out = []
    prompt = load_workflow(server, "text_to_image_lora" if loras else "text_to_image")
    change(prompt, "SVDQuantLoader", unet_name=file)
    for row, (name, strength) in enumerate(loras, start=1):
        lora = {f"lora_{row}": f"demo_lora_{name}.safetensors", f"strength_{row}": strength}
        change(prompt, "SVDQuantLoRAStack", **lora)
    if not quantized:
        to_16_bit(prompt, file, loras)
    for seed, text in enumerate(PROMPTS, start=1):
        set_picture(prompt, text, seed)
        history = server.run(prompt, timeout=300)
        out.append(np.asarray(Image.open(server.images(history)[0]).convert("RGB"), np.float32) / 255)
    return out


def to_16_bit(prompt: dict[str, dict], file: str, loras: Loras) -> None:
    """ComfyUI's own nodes in the place of ours: Load Diffusion Model, and a Load LoRA for each LoRA."""
    for id, node in list(prompt.items()):
        if node["class_type"] == "PreviewAny":  # of our report
            del prompt[id]
        if node["class_type"] == "SVDQuantLoader":
            node.update(class_type="UNETLoader", inputs={"unet_name": file, "weight_dtype": "default"})
        if node["class_type"] == "SVDQuantLoRAStack":
            source = node["inputs"]["model"]
            for name, strength in loras:
                lora = {"lora_name": f"demo_lora_{name}.safetensors", "strength_model": strength}
                step = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": source, **lora}}
                source = [f"lora_{name}", 0]
                prompt[source[0]] = step
            node.update(step)


def mean_error_db(file: Path) -> float:
    """As SVDQuant Quantize wrote it into the file's metadata."""
    return Report.of_file(file, read_checkpoint(file)[1]).mean_error_db


def psnr(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Mean over the pictures of the peak signal-to-noise ratio in dB."""
    values = [10 * math.log10(1 / max(float(np.mean((x - y) ** 2)), 1e-10)) for x, y in zip(a, b)]
    return sum(values) / len(values)


def sheet(rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    """Rows of pictures with a caption each."""
    zoom, left, top = SIZE * 3 // 2, 250, 56
    image = Image.new("RGB", (left + len(PROMPTS) * (zoom + 8), top + len(rows) * (zoom + 8)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    small = ImageFont.load_default(13)
    for column, text in enumerate(PROMPTS):
        draw.text((left + column * (zoom + 8), 14), text.replace(" on ", "\non "), "black", small)
    for row, (caption, cells) in enumerate(rows):
        y = top + row * (zoom + 8)
        draw.multiline_text((12, y + 60), caption, "black", font, spacing=6)
        for column, cell in enumerate(cells):
            tile = Image.fromarray((cell * 255).round().astype(np.uint8)).resize((zoom, zoom), Image.BICUBIC)
            image.paste(tile, (left + column * (zoom + 8), y))
    return image


def compare_quantization(server: ComfyServer, out: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The demo model and its hard variant: 16 bit, naive and SVDQuant. Leaves the 4-bit files for what follows.

    Returns the pictures of the demo model in 16 bit and with SVDQuant.
    """
    models = server.base / "models" / "diffusion_models"
    rows, table = [], []
    for model, label in (("demo_flux", "as trained"), ("demo_flux_hard", "with outliers")):
        exact = pictures(server, f"{model}.safetensors", quantized=False)
        size = (models / f"{model}.safetensors").stat().st_size
        rows.append((f"{label}\n16 bit", exact))
        for preset, title in (("naive", "naive W4A4"), ("balanced", "SVDQuant W4A4")):
            print(f"{model}, {title}:", flush=True)
            file = quantize(server, model, preset)
            made = pictures(server, file, quantized=True)
            quality = psnr(exact, made)
            rows.append((f"{label}\n{title}\n{quality:.1f} dB PSNR", made))
            ratio = size / (models / file).stat().st_size
            table.append(
                f"{label:14} {title:15} {ratio:9.2f}x {quality:6.1f} dB {mean_error_db(models / file):14.1f} dB"
            )
    sheet(rows).save(out / "sheet.png")
    print(
        f"\n{'model':14} {'quantization':15} {'size ratio':>10} {'PSNR':>9} {'mean layer error':>17}", *table, sep="\n"
    )
    (_, exact), _, (_, made), *_ = rows
    return exact, made


def compare_loras(server: ComfyServer, out: Path, exact: list[np.ndarray], made: list[np.ndarray]) -> None:
    """Each LoRA merged into the 16-bit model by ComfyUI, and on the branch of the 4-bit one.

    ``exact`` and ``made`` are the pictures of the two without a LoRA.
    """
    quality = psnr(exact, made)
    rows = [("no LoRA\n16 bit", exact), (f"no LoRA\n4 bit\n{quality:.1f} dB PSNR", made)]
    table = [f"{'no LoRA':16} {quality:6.1f} dB"]
    for label, loras in LORAS.items():
        merged = pictures(server, "demo_flux.safetensors", quantized=False, loras=loras)
        branch = pictures(server, "demo_flux_balanced.safetensors", quantized=True, loras=loras)
        quality = psnr(merged, branch)
        rows.append((f"{label}\n16 bit, merged", merged))
        rows.append((f"{label}\n4 bit, on the branch\n{quality:.1f} dB PSNR", branch))
        table.append(f"{label:16} {quality:6.1f} dB")
    sheet(rows).save(out / "lora_sheet.png")
    print(
        f"\n{'LoRA':16} {'PSNR':>9}   4 bit with the LoRA on its branch against 16 bit with it merged", *table, sep="\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with ComfyServer(packs=[HERE / "comfy_nodes"], base=out / "comfyui") as server:
        models = server.base / "models" / "diffusion_models"
        models.mkdir(parents=True, exist_ok=True)
        server.add_model(HERE / "models" / "demo_flux.safetensors")
        add_outliers_to_file(HERE / "models" / "demo_flux.safetensors", models / "demo_flux_hard.safetensors")
        for file in (HERE / "models").glob("demo_lora_*.safetensors"):
            server.add_model(file, "loras")
        print(f"ComfyUI answers at {server.url} ({time.monotonic() - started:.0f} s)", flush=True)
        exact, made = compare_quantization(server, out)
        compare_loras(server, out, exact, made)
    print(f"\nPictures: {out / 'sheet.png'}, {out / 'lora_sheet.png'}   ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()

"""SVDQuant Compare: PSNR and SSIM against formulas and scipy, the sheet, and the node in a running ComfyUI."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from comfyui_svdquant.svdq_core.compare import amplification, compare, sheet, ssim, to_tensor
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from PIL import Image
from torch import Tensor

from host.browser import Browser, ComfyPage
from host.install import ROOT
from host.prompts import CALIBRATION, sixteen_bit_loader
from host.server import HTTP, ComfyServer, PromptError
from sampling import conditioning, load

# ---- the figures -----------------------------------------------------------------------------------------


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("difference", [0.5, 0.1, 1 / 255])
def test_psnr_of_a_constant_difference(difference: float):
    """Both signs: the mean squared error is its square."""
    reference = torch.full((1, 16, 16, 3), 0.5, dtype=torch.float64)
    sign = torch.ones(16, 16, 3, dtype=torch.float64)
    sign[::2] = -1
    found = compare(reference, reference + difference * sign)
    assert found.psnr[0] == pytest.approx(-20 * math.log10(difference), abs=1e-9)


@pytest.mark.parametrize(("x", "y"), [(0.2, 0.7), (0.0, 1.0), (0.5, 0.5)])
def test_ssim_of_flat_pictures(x: float, y: float):
    """No structure: what is left is the comparison of luminances."""
    wanted = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    flat = [torch.full((1, 20, 24, 3), v, dtype=torch.float64) for v in (x, y)]
    assert ssim(*flat).item() == pytest.approx(wanted, abs=1e-9)


def test_ssim_of_a_negative():
    """A picture around grey and its mirror: the structure is opposite, so SSIM is negative."""
    wave = torch.linspace(0, 40, 32).sin().expand(32, 32)[None, :, :, None].expand(1, 32, 32, 3).double() / 2
    assert ssim(0.5 + wave, 0.5 - wave).item() < -0.9


def test_identical_pictures():
    found = compare(pictures(2, 16, 16, 3), pictures(2, 16, 16, 3))
    assert found.psnr == [math.inf, math.inf] and found.ssim == pytest.approx([1, 1])
    assert found.lines() == ["1: identical", "2: identical", "all 2 pictures: identical"]


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """By the paper's formula (13), with scipy's convolution and the window as one matrix."""
    x, y = (0.299 * p[..., 0] + 0.587 * p[..., 1] + 0.114 * p[..., 2] for p in (a, b))
    i, j = np.mgrid[-5:6, -5:6]
    window = np.exp(-(i**2 + j**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(p: np.ndarray) -> np.ndarray:
        return scipy.signal.convolve2d(p, window, mode="valid")

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


@pytest.mark.parametrize("size", [(11, 11), (16, 37), (64, 48)])
@pytest.mark.parametrize("noise", [0.02, 0.3, 3.0])
def test_figures_against_numpy(size: tuple[int, int], noise: float):
    a = pictures(2, *size, 3)
    b = (a + noise * (pictures(2, *size, 3, seed=1) - 0.5)).clamp(0, 1)
    found = compare(a, b)
    for i in range(2):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        assert found.ssim[i] == pytest.approx(reference_ssim(x, y), abs=1e-9)
        assert found.psnr[i] == pytest.approx(10 * math.log10(1 / np.mean((x - y) ** 2)), abs=1e-9)
    everything = np.mean((a.double().numpy() - b.double().numpy()) ** 2)
    assert found.mean_psnr == pytest.approx(-10 * math.log10(everything), abs=1e-9)
    assert found.mean_ssim == pytest.approx(sum(found.ssim) / 2)


def test_one_window_by_hand():
    """11×11 pixels are one window: sums over its pixels, weight by weight."""
    a, b = pictures(1, 11, 11, 3).double(), pictures(1, 11, 11, 3, seed=1).double()
    weights, x, y = {}, {}, {}
    for i in range(11):
        for j in range(11):
            weights[i, j] = math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5)
            for target, picture in ((x, a), (y, b)):
                r, g, blue = picture[0, i, j].tolist()
                target[i, j] = 0.299 * r + 0.587 * g + 0.114 * blue
    total = sum(weights.values())
    mx, my = (sum(w * p[k] for k, w in weights.items()) / total for p in (x, y))
    vx, vy = (sum(w * (p[k] - m) ** 2 for k, w in weights.items()) / total for p, m in ((x, mx), (y, my)))
    cov = sum(w * (x[k] - mx) * (y[k] - my) for k, w in weights.items()) / total
    wanted = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(a, b).item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((1, 16, 16, 3), (1, 16, 24, 3), "differ in size: 16×16 and 24×16"),
        ((2, 16, 16, 3), (3, 16, 16, 3), "2 reference and 3 candidate pictures"),
        ((1, 10, 16, 3), (1, 10, 16, 3), "at least 11×11"),
    ],
)
def test_what_cannot_be_compared(a, b, message: str):
    with pytest.raises(SVDQuantError, match=message):
        compare(pictures(*a), pictures(*b))


def test_alpha_does_not_count():
    a, b = pictures(1, 16, 16, 4), pictures(1, 16, 16, 4)
    b[..., 3] = 0
    assert compare(a, b).psnr == [math.inf]


# ---- the sheet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "factor"), [(0.0, 64), (0.01, 64), (0.1, 8), (0.3, 2), (0.6, 1), (1.0, 1)])
def test_amplification(high: float, factor: int):
    assert amplification(torch.full((1, 16, 16, 3), high)) == factor


def test_few_bright_pixels_do_not_darken_the_rest():
    difference = torch.full((1, 100, 100, 1), 0.01)
    difference[0, 0, :50] = 1.0
    assert amplification(difference) == 64


def test_sheet_holds_the_pictures():
    """Pixel for pixel where the size allows it: both pictures and their difference times the written factor."""
    a = pictures(2, 40, 400, 3)
    b = (a + 0.04).clamp(0, 1)
    image = sheet(a, b, compare(a, b), ("", ""))
    found = np.asarray(image).astype(int)
    for row in range(2):
        for column, picture in enumerate((a, b, (a - b).abs() * 16)):
            wanted = (picture[row] * 255).round().int().numpy()
            y, x = 46 + row * (40 + 28 + 8), 16 + column * (400 + 16)
            assert np.abs(found[y : y + 40, x : x + 400] - wanted).max() <= 1
    assert to_tensor(image).shape == (1, image.height, image.width, 3)


@pytest.mark.parametrize("size", [(64, 64), (48, 2000), (2000, 500)])
def test_sheet_of_any_size(size: tuple[int, int]):
    """Columns are wide enough for captions and not too wide; long names are cut in the middle."""
    a = pictures(1, *size, 3)
    image = sheet(a, a, compare(a, a), ("a_very_long_name_of_a_model_file_" * 4, "x.safetensors"))
    assert 3 * 320 <= image.width <= 3 * 1024 + 64


# ---- the node ----------------------------------------------------------------------------------------------


def graph(**inputs) -> dict:
    """SVDQuant Compare of the demo model in 16 and 4 bit, its figures shown."""
    widgets = {"seed": 1, "pictures": 2, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    models = {"model_a": ["a", 0], "model_b": ["b", 0], "positive": ["prompts", 0], "vae": ["vae", 0]}
    inputs = widgets | {"width": 128, "height": 128} | models | inputs
    shown = {
        name: {"class_type": "PreviewAny", "inputs": {"source": ["compare", i]}}
        for i, name in ((1, "psnr"), (2, "ssim"), (3, "report"))
    }
    return {
        "a": sixteen_bit_loader(),
        "b": loader("demo_balanced"),
        "clip": {"class_type": "DemoTextEncoderLoader", "inputs": {}},
        "vae": {"class_type": "DemoVAELoader", "inputs": {}},
        "prompts": {"class_type": "SVDQuantPrompts", "inputs": {"clip": ["clip", 0], "prompts": CALIBRATION}},
        "compare": {
            "class_type": "SVDQuantCompare",
            "inputs": {name: value for name, value in inputs.items() if value is not None},
        },
        **shown,
    }


def loader(name: str) -> dict:
    return {"class_type": "SVDQuantLoader", "inputs": {"unet_name": f"{name}.safetensors", "dtype": "auto"}}


def figures(server: ComfyServer, prompt: dict) -> tuple[float, float, str, Path]:
    """PSNR, SSIM, the report and the sheet's file."""
    history = server.run(prompt)
    psnr, similarity, report = (history["outputs"][name]["text"][0] for name in ("psnr", "ssim", "report"))
    (path,) = server.images(history)
    return float(psnr), float(similarity), report, path


IMAGES = {"model_a": None, "model_b": None, "positive": None, "vae": None}


def sampled(key: str, model: str, seed: int, prompt: str) -> dict:
    """KSampler and VAE Decode, as people have them."""
    inputs = {"seed": seed, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs |= {"model": [model, 0], "positive": [f"text_{key}", 0], "negative": [f"text_{key}", 0]}
    return {
        f"text_{key}": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": prompt}},
        f"latent_{key}": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 1},
        },
        f"sampler_{key}": {"class_type": "KSampler", "inputs": inputs | {"latent_image": [f"latent_{key}", 0]}},
        f"image_{key}": {
            "class_type": "VAEDecode",
            "inputs": {"samples": [f"sampler_{key}", 0], "vae": ["vae", 0]},
        },
    }


def test_what_the_ui_shows(server: ComfyServer):
    info = server.object_info("SVDQuantCompare")
    assert (info["display_name"], info["category"]) == ("SVDQuant Compare", "SVDQuant")
    assert info["output"] == ["IMAGE", "FLOAT", "FLOAT", "STRING"]
    assert info["output_name"] == ["sheet", "PSNR", "SSIM", "report"] and all(info["output_tooltips"])
    assert info["output_node"] and {"psnr", "ssim"} < set(info["search_aliases"])
    widgets = info["input"]["required"] | info["input"]["optional"]
    assert all(options["tooltip"] for _, options in widgets.values())
    with HTTP.open(f"{server.url}/extensions/ComfyUI-SVDQuant/docs/SVDQuantCompare.md") as answer:
        page = answer.read().decode()
    assert page.startswith("# SVDQuant Compare")
    assert all(f"**{name}**" in page for name in (*widgets, *info["output_name"]))


def test_two_models(demo_quantized: ComfyServer):
    """Balanced is close to 16 bit, naive is not; the sheet says what was compared."""
    psnr, similarity, report, path = figures(demo_quantized, graph())
    assert psnr > 25 and similarity > 0.9
    assert "reference: demo_flux.safetensors" in report and "candidate: demo_balanced.safetensors" in report
    assert "\n1: PSNR " in report and f"all 2 pictures: PSNR {psnr:.2f} dB, SSIM {similarity:.4f}" in report
    with Image.open(path) as sheet_image:
        assert sheet_image.width == 3 * 384 + 4 * 16
    naive = figures(demo_quantized, graph() | {"b": loader("demo_naive")})
    assert naive[0] < psnr - 3 and naive[1] < similarity


def test_models_and_images_give_the_same_figures(demo_quantized: ComfyServer):
    """What the node samples is what KSampler makes: the same pictures, one prompt and one seed after the other."""
    psnr, similarity, _, _ = figures(demo_quantized, graph())
    prompt = graph(**IMAGES, images_a=["all_a", 0], images_b=["all_b", 0])
    for model in "ab":
        for i, text in enumerate(CALIBRATION.splitlines()[:2]):
            prompt |= sampled(f"{model}{i}", model, 1 + i, text)
        both = {"image1": [f"image_{model}0", 0], "image2": [f"image_{model}1", 0]}
        prompt[f"all_{model}"] = {"class_type": "ImageBatch", "inputs": both}
    found = figures(demo_quantized, prompt)
    assert found[:2] == pytest.approx((psnr, similarity), abs=1e-6)
    assert "reference:" not in found[2]


def test_a_model_with_itself(demo_quantized: ComfyServer):
    psnr, similarity, report, _ = figures(demo_quantized, graph(model_b=["a", 0], pictures=1))
    assert psnr == math.inf and similarity == pytest.approx(1) and report.endswith("identical")


def test_guidance(demo_quantized: ComfyServer):
    """With cfg the negative prompt counts."""
    text = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "small yellow moon on black"}}
    guided = figures(demo_quantized, graph(cfg=3.0, negative=["negative", 0], pictures=1) | {"negative": text})
    assert guided[0] > 15
    assert figures(demo_quantized, graph(pictures=1))[0] != pytest.approx(guided[0], abs=0.01)


ERRORS = {
    "nothing": (IMAGES, "Nothing to compare"),
    "both": ({"images_a": ["picture", 0], "images_b": ["picture", 0]}, "Models and images are connected"),
    "one model": ({"model_b": None}, "connect model_b, too"),
    "no prompt, no vae": ({"positive": None, "vae": None}, "connect positive and vae, too"),
    "no negative": ({"cfg": 3.5}, "cfg is 3.5: connect negative"),
    "one image": (IMAGES | {"images_a": ["picture", 0]}, "connect images_b, too"),
    "sizes": (IMAGES | {"images_a": ["picture", 0], "images_b": ["wide", 0]}, "64×64 and 96×64"),
    "counts": (IMAGES | {"images_a": ["picture", 0], "images_b": ["three", 0]}, "1 reference and 3 candidate"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_missing_is_said(demo_quantized: ComfyServer, case: str):
    inputs, message = ERRORS[case]
    prompt = graph(**inputs)
    for name, width, count in (("picture", 64, 1), ("wide", 96, 1), ("three", 64, 3)):
        size = {"width": width, "height": 64, "batch_size": count, "color": 255}
        prompt[name] = {"class_type": "EmptyImage", "inputs": size}
    with pytest.raises(PromptError, match=message) as caught:
        demo_quantized.run(prompt)
    assert caught.value.node_type == "SVDQuantCompare" and caught.value.exception_type.endswith("SVDQuantError")


def test_progress(demo_quantized: ComfyServer):
    """Every step of both models on the bar, and in words what is done and how long it takes."""
    since = len(demo_quantized.events.seen)
    demo_quantized.run(graph(seed=77))
    events = demo_quantized.events.seen[since:]
    bar = [(e.data["value"], e.data["max"]) for e in events if e.type == "progress" and e.data["node"] == "compare"]
    assert bar == sorted(set(bar)) and bar[0][0] < 8 and bar[-1] == (16, 16)  # ComfyUI leaves some out when it is busy
    words = [e.data["text"] for e in events if e.type == "svdquant.report" and e.data["node"] == "compare"]
    assert words[0].startswith("reference: picture 1 of 2, step 1 of 4, about ")
    assert words[-1].startswith("candidate: picture 2 of 2, step 4 of 4") and len(words) == 16


def test_interrupt(demo_quantized: ComfyServer):
    since = len(demo_quantized.events.seen)
    prompt_id = demo_quantized.queue(graph(seed=78, steps=2000))
    demo_quantized.events.wait(lambda e: e.type == "svdquant.report", since=since)
    demo_quantized.interrupt()
    with pytest.raises(PromptError, match="Interrupt"):
        demo_quantized.wait(prompt_id)


def test_one_model_in_memory_at_a_time(host, small_flux_files):
    import comfy.model_management
    from comfyui_svdquant.svdq_core.host.compare import SamplingSettings, sample_both

    where = ROOT / "examples" / "demo" / "comfy_nodes" / "__init__.py"
    spec = importlib.util.spec_from_file_location("demo_comfy_nodes", where)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    models = host.sd.load_diffusion_model(str(small_flux_files["bf16"])), load(small_flux_files["int4"])
    settings, seen = SamplingSettings(1, 1, 1, 1.0, "euler", "simple", 64, 64), []

    def look(text: str) -> None:
        seen.append([loaded.model.model for loaded in comfy.model_management.current_loaded_models])

    both = sample_both(models, [conditioning()], [conditioning()], demo.DemoVAE(), settings, look)
    assert seen == [[models[0].model], [models[1].model]]
    assert both[0].shape == both[1].shape == (1, 64, 64, 3) and not torch.equal(*both)


def test_models_with_different_latents(host, small_flux_files):
    import comfy.latent_formats
    from comfyui_svdquant.svdq_core.host.compare import SamplingSettings, sample_both

    models = load(small_flux_files["int4"]), load(small_flux_files["int4"])
    models[1].model.latent_format = comfy.latent_formats.SDXL()
    settings = SamplingSettings(1, 1, 1, 1.0, "euler", "simple", 64, 64)
    with pytest.raises(SVDQuantError, match="different latents: Flux and SDXL"):
        sample_both(models, [conditioning()], [conditioning()], None, settings, print)


# ---- in the browser ----------------------------------------------------------------------------------------

WIRED = """() => {
    const add = (kind, x, y) => {
        const node = LiteGraph.createNode(kind);
        node.pos = [x, y];
        app.rootGraph.add(node);
        return node;
    };
    const set = (node, name, value) => { node.widgets.find(w => w.name === name).value = value };
    const a = add("UNETLoader", 80, 100), b = add("SVDQuantLoader", 80, 240);
    const clip = add("DemoTextEncoderLoader", 80, 580);
    const vae = add("DemoVAELoader", 80, 680), prompts = add("SVDQuantPrompts", 470, 100);
    set(a, "unet_name", "demo_flux.safetensors");
    set(b, "unet_name", "demo_balanced.safetensors");
    set(prompts, "prompts", "large red star on blue\\nsmall yellow moon on black");
    clip.connect(0, prompts, "clip");
    return [a, b, prompts, vae].map(node => node.id);
}"""
CONNECT = """([sources, target]) => {
    const compare = app.rootGraph.getNodeById(target);
    ["model_a", "model_b", "positive", "vae"].forEach((name, i) =>
        app.rootGraph.getNodeById(sources[i]).connect(0, compare, name));
    for (const [name, value] of Object.entries({ pictures: 2, steps: 6, width: 128, height: 128, seed: 5 }))
        compare.widgets.find(w => w.name === name).value = value;
}"""
SAYS = """([id, words]) => {
    const node = app.rootGraph.getNodeById(id);
    const said = node.widgets.find(w => w.name === "svdquant_info").element.innerText;
    return said.includes(words) && said;
}"""


@pytest.fixture(params=[(False, "dark"), (True, "light")], ids=["classic_dark", "vue_light"])
def page(demo_quantized: ComfyServer, browser: Browser, request) -> Iterator[ComfyPage]:
    vue, palette = request.param
    settings = {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": palette, "Comfy.Minimap.Visible": False}
    page = browser.open(demo_quantized, settings, viewport={"width": 1500, "height": 1150})
    page.look = f"{'vue' if vue else 'classic'}_{palette}"
    yield page
    page.close()


def test_in_the_browser(page: ComfyPage):
    """Found by what people type, wired, run: the sheet and the figures are on the node, also for a cached result."""
    sources = page.evaluate(WIRED)
    node = page.search("SVDQuant Compare", at=(960, 120))

    def says(words: str) -> str:
        return page.page.wait_for_function(SAYS, arg=[node, words], timeout=60_000).json_value()

    says("Connect model_a, model_b")
    page.evaluate(CONNECT, [sources, node])
    says("Not run yet.")
    page.run()
    said = says("all 2 pictures: PSNR")
    assert "reference: demo_flux.safetensors" in said and "1: PSNR" in said
    page.page.wait_for_function("id => app.nodeOutputs[id]?.images?.length === 1", arg=node)
    page.page.wait_for_timeout(500)  # the picture is drawn a frame after it came
    page.screenshot(f"compare_{page.look}")
    page.reload()
    (node,) = [number for number, kind in page.nodes().items() if kind == "SVDQuantCompare"]
    page.run()
    says("all 2 pictures: PSNR")
    assert page.errors == []

"""The trained demo model, quantized by the node: its 4-bit pictures are its 16-bit pictures, whatever patches it."""

import pytest
from torch import Tensor

import small_flux
from host.prompts import prompt, run, sixteen_bit_loader
from host.server import ComfyServer
from sampling import error_db
from test_loader_node import with_controlnet, with_easycache, with_image, with_skipped_layers


@pytest.fixture(scope="module")
def demo(demo_quantized: ComfyServer, tmp_path_factory) -> ComfyServer:
    """The server, with demo_flux.safetensors in 4 bit beside the 16-bit one, and a ControlNet."""
    folder = tmp_path_factory.mktemp("controlnet")
    demo_quantized.add_model(small_flux.write_controlnet(folder / "small_controlnet.safetensors"), "controlnet")
    return demo_quantized


def base(file: str, **changes) -> dict:
    """128×128 text to image; a 16-bit file goes through UNETLoader."""
    graph = prompt(file, steps=12, **{"cfg": 2.0} | changes)
    graph["latent"]["inputs"] |= {"width": 128, "height": 128}
    graph["negative"]["inputs"]["text"] = ""
    if "demo_flux" in file:
        graph["model"] = sixteen_bit_loader()
    return graph


def batch_of_two(graph: dict) -> dict:
    latent = {"class_type": "EmptySD3LatentImage", "inputs": graph["latent"]["inputs"] | {"batch_size": 2}}
    return graph | {"latent": latent}


def other_prompt_lengths(graph: dict) -> dict:
    """CFG between a long and a short prompt: FLUX cannot batch them."""
    text = "small black square on white top left"
    return graph | {"negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": text}}}


def image_to_image(graph: dict) -> dict:
    graph = with_image(graph)
    graph["picture"]["inputs"] |= {"width": 128, "height": 128}
    return graph


def plain(graph: dict) -> dict:
    return graph


def no_cfg(graph: dict) -> dict:
    return graph | {"sampler": {"class_type": "KSampler", "inputs": graph["sampler"]["inputs"] | {"cfg": 1.0}}}


def reference_latent(graph: dict) -> dict:
    """As Kontext does it: an encoded picture joins the image tokens."""
    picture = {"width": 128, "height": 128, "batch_size": 1, "color": 0x20C040}
    reference = {
        "shown": {"class_type": "EmptyImage", "inputs": picture},
        "vae": {"class_type": "DemoVAELoader", "inputs": {}},
        "encoded": {"class_type": "VAEEncode", "inputs": {"pixels": ["shown", 0], "vae": ["vae", 0]}},
        "reference": {
            "class_type": "ReferenceLatent",
            "inputs": {"conditioning": ["positive", 0], "latent": ["encoded", 0]},
        },
    }
    inputs = graph["sampler"]["inputs"] | {"positive": ["reference", 0]}
    return graph | reference | {"sampler": {"class_type": "KSampler", "inputs": inputs}}


PATCHES = [
    reference_latent,
    plain,
    no_cfg,
    batch_of_two,
    other_prompt_lengths,
    image_to_image,
    with_controlnet,
    with_easycache,
    with_skipped_layers,
]


@pytest.fixture(scope="module")
def unpatched(demo) -> Tensor:
    return run(demo, base("demo_flux.safetensors"))


@pytest.mark.parametrize("patch", PATCHES)
def test_4_bit_follows_16_bit(demo, unpatched, patch):
    wanted = run(demo, patch(base("demo_flux.safetensors")))
    found = run(demo, patch(base("demo_balanced.safetensors")))
    naive = run(demo, patch(base("demo_naive.safetensors")))
    assert error_db(found, wanted) < -15
    assert error_db(found, wanted) < error_db(naive, wanted) - 2, "SVDQuant must be clearly closer than naive"
    if patch is batch_of_two:
        alone = run(demo, base("demo_balanced.safetensors"))
        assert wanted.shape[0] == 2 and error_db(found[:1], alone) < -25
    elif patch is not plain:
        assert error_db(wanted, unpatched) > -20, "this patch does nothing"


def test_8_bit_activations_are_closer(demo):
    """The loader's widget on the same file, over whole pictures."""
    errors = {}
    for activations in ("4 bit", "auto", "8 bit"):
        per_prompt = []
        for text in ("large red star on blue", "small green ring on black", "pink heart on yellow"):
            sixteen, four = base("demo_flux.safetensors"), base("demo_balanced.safetensors")
            four["model"]["inputs"]["activations"] = activations
            pictures = []
            for graph in (sixteen, four):
                graph["positive"]["inputs"]["text"] = text
                pictures.append(run(demo, no_cfg(graph)))
            per_prompt.append(error_db(pictures[1], pictures[0]))
        errors[activations] = sum(per_prompt) / len(per_prompt)
    assert errors["auto"] == errors["4 bit"], "on a CPU"
    assert errors["8 bit"] < errors["4 bit"] - 0.5, errors  # 1.4 dB when this was written

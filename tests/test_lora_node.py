"""SVDQuant LoRA and SVDQuant LoRA Stack in a running ComfyUI, beside ComfyUI's own LoRA node."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from host.prompts import insert, prompt, run, sixteen_bit_loader
from host.server import HTTP, ComfyServer, PromptError
from sampling import error_db

RANK, ALPHA = 8, 4.0
MODEL = "small_int4.safetensors"

# A whole layer of each kind in the names of five dialects: BFL's name, rows and columns of the weight.
LAYERS = {
    "double_blocks.0.img_attn.proj": (256, 256),
    "double_blocks.1.img_mlp.2": (256, 1024),
    "double_blocks.0.txt_mod.lin": (1536, 256),
    "single_blocks.1.linear2": (256, 1280),
}
DIFFUSERS = {
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.1.img_mlp.2": "transformer_blocks.1.ff.net.2",
    "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
    "single_blocks.1.linear2": "single_transformer_blocks.1.proj_out",
}


def kohya(layer: str, end: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}." + {"A": "lora_down.weight", "B": "lora_up.weight"}.get(end, end)


def bfl(prefix: str):
    return lambda layer, end: f"{prefix}{layer}." + {"A": "lora_A.weight", "B": "lora_B.weight"}.get(end, end)


def diffusers(prefix: str):
    return lambda layer, end: bfl(prefix)(DIFFUSERS[layer], end)


def onetrainer(layer: str, end: str) -> str:
    name = "lora_transformer_" + DIFFUSERS[layer].replace(".", "_")
    return f"{name}." + {"A": "lora_down.weight", "B": "lora_up.weight"}.get(end, end)


DIALECTS = {
    "kohya": kohya,
    "bfl": bfl("diffusion_model."),
    "bare": bfl(""),
    "fal": bfl("base_model.model."),
    "diffusers": diffusers("transformer."),
    "peft": diffusers("base_model.model.transformer."),
    "onetrainer": onetrainer,
}


def lora(name=kohya, seed: int = 0, layers=tuple(LAYERS)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sd = {}
    for layer in layers:
        n, k = LAYERS[layer]
        sd[name(layer, "A")] = torch.randn(RANK, k, generator=generator) / k**0.5
        sd[name(layer, "B")] = torch.randn(n, RANK, generator=generator)
        sd[name(layer, "alpha")] = torch.tensor(ALPHA)
    return sd


@pytest.fixture(scope="module")
def comfyui(server: ComfyServer, small_flux_files: dict[str, Path], tmp_path_factory) -> ComfyServer:
    """The server with the small FLUX in 4 and 16 bit, and LoRA files."""
    folder = tmp_path_factory.mktemp("lora_models")
    for form in ("int4", "bf16"):
        server.add_model(Path(shutil.copy(small_flux_files[form], folder / f"small_{form}.safetensors")))
    for dialect, name in DIALECTS.items():
        add(server, dialect, lora(name))
    add(server, "second", lora(seed=1))
    return server


def add(server: ComfyServer, name: str, sd: dict[str, Tensor]) -> str:
    """A LoRA file in the server's folder; returns its name in the widget."""
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(sd, folder / f"{name}.safetensors")
    return f"{name}.safetensors"


def with_lora(name: str, strength: float = 0.75, graph: dict | None = None, **inputs) -> dict:
    """The prompt with SVDQuant LoRA, and its report shown."""
    graph = insert(graph or prompt(MODEL), "SVDQuantLoRA", lora_name=name, strength=strength, **inputs)
    return graph | {"report": {"class_type": "PreviewAny", "inputs": {"source": ["SVDQuantLoRA", 1]}}}


def with_load_lora(graph: dict) -> dict:
    """ComfyUI's own node."""
    return insert(graph, "LoraLoaderModelOnly", lora_name="kohya.safetensors", strength_model=0.75)


def report(comfyui: ComfyServer, graph: dict) -> str:
    return comfyui.run(graph)["outputs"]["report"]["text"][0]


def stack(*rows: tuple[bool, str, float], graph: dict | None = None) -> dict:
    rows = (*rows, *[(True, "none", 1.0)] * (5 - len(rows)))
    inputs = {}
    for i, (on, name, strength) in enumerate(rows, start=1):
        inputs |= {f"on_{i}": on, f"lora_{i}": name, f"strength_{i}": strength}
    return insert(graph or prompt(MODEL), "SVDQuantLoRAStack", **inputs)


@pytest.mark.parametrize("node", ["SVDQuantLoRA", "SVDQuantLoRAStack"])
def test_what_the_ui_shows(comfyui: ComfyServer, node: str):
    info = comfyui.object_info(node)
    assert info["display_name"].startswith("SVDQuant LoRA") and info["category"] == "SVDQuant"
    assert info["output"] == ["MODEL", "STRING"] and info["output_name"] == ["model", "report"]
    assert info["description"] and all(info["output_tooltips"])
    widgets = info["input"]["required"]
    assert all(options["tooltip"] for _, options in widgets.values())
    names = next(options["options"] for key, (_, options) in widgets.items() if key.startswith("lora"))
    assert "kohya.safetensors" in names and ("none" in names) == (node == "SVDQuantLoRAStack")
    with HTTP.open(f"{comfyui.url}/extensions/ComfyUI-SVDQuant/docs/{node}.md") as answer:
        page = answer.read().decode()
    assert page.startswith(f"# {info['display_name']}")
    assert all(f"**{name.rstrip('_12345')}" in page for name in (*widgets, "report"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(comfyui: ComfyServer, dialect: str):
    """One LoRA in the names of each tool gives the very same latent, and all keys apply."""
    wanted = run(
        comfyui, insert(prompt(MODEL), "LoraLoaderModelOnly", lora_name="kohya.safetensors", strength_model=0.75)
    )
    assert error_db(wanted, run(comfyui, prompt(MODEL))) > -20
    graph = with_lora(f"{dialect}.safetensors")
    assert report(comfyui, graph) == f"{dialect}.safetensors: 12 of 12 keys apply (4 lora)."
    assert torch.equal(run(comfyui, graph), wanted)


def test_on_a_16_bit_model(comfyui: ComfyServer):
    """There it is ComfyUI's own LoRA node."""
    unet = sixteen_bit_loader("small_bf16.safetensors")
    graph = prompt("") | {"model": unet}
    assert torch.equal(run(comfyui, with_lora("kohya.safetensors", graph=graph)), run(comfyui, with_load_lora(graph)))


def test_stack(comfyui: ComfyServer):
    first, second = ("kohya.safetensors", 0.5), ("second.safetensors", -1.0)
    chain = with_lora(*first)
    chain["second"] = {
        "class_type": "SVDQuantLoRA",
        "inputs": {"model": ["SVDQuantLoRA", 0], "lora_name": second[0], "strength": second[1], "rank": 128},
    }
    chain["sampler"] = {**chain["sampler"], "inputs": chain["sampler"]["inputs"] | {"model": ["second", 0]}}
    wanted, plain = run(comfyui, chain), run(comfyui, prompt(MODEL))
    assert error_db(wanted, plain) > -20
    assert torch.equal(run(comfyui, stack((True, *first), (True, *second))), wanted)
    mixed = stack((True, *first), (False, *second))
    assert torch.equal(run(comfyui, mixed), run(comfyui, with_lora(*first)))
    for off in (stack(), stack((False, *first)), stack((True, first[0], 0.0))):
        assert torch.equal(run(comfyui, off), plain)


def test_strength_zero(comfyui: ComfyServer):
    assert torch.equal(run(comfyui, with_lora("kohya.safetensors", 0.0)), run(comfyui, prompt(MODEL)))


def test_changed_file_is_read_again(comfyui: ComfyServer):
    results = []
    for seed in (0, 1, 0):
        add(comfyui, "changing", lora(seed=seed))
        results.append(run(comfyui, with_lora("changing.safetensors")))
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_report_names_what_is_not_used(comfyui: ComfyServer):
    """Once, by name, in the report on the node; text-encoder keys are counted, with what to do."""
    sd = lora() | {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(4, 768),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(3072, 4),
        "lora_unet_img_in.alpha": torch.tensor(4.0),
        "lora_unet_double_blocks_7_img_mlp_2.lora_down.weight": torch.randn(8, 1024),
        "lora_unet_double_blocks_7_img_mlp_2.lora_up.weight": torch.randn(256, 8),
    }
    text = report(comfyui, with_lora(add(comfyui, "partly", sd)))
    assert "partly.safetensors: 13 of 17 keys apply (4 lora)." in text, text
    assert "For the text encoder: 2 keys" in text and "lora_te1" not in text
    assert text.count("double_blocks_7_img_mlp_2.lora_down.weight") == 1 and "Of no layer of this model: 2 keys" in text
    assert "lora key not loaded" not in comfyui.log()


def test_many_unused_keys(comfyui: ComfyServer):
    """All are in the report output and the log."""
    strange = {f"lora_unet_strange_{i}.lora_{h}.weight": torch.ones(2, 2) for i in range(6) for h in ("down", "up")}
    graph = with_lora(add(comfyui, "strange", lora() | strange))
    text = report(comfyui, graph)
    assert "Of no layer of this model: 12 keys" in text and all(key in text for key in strange)
    assert all(key in comfyui.log() for key in strange)


def test_lora_hook(comfyui: ComfyServer):
    """ComfyUI's hook nodes: a LoRA that a prompt brings with it."""
    graph = prompt(MODEL)
    graph |= {
        "hook": {
            "class_type": "CreateHookLoraModelOnly",
            "inputs": {"lora_name": "kohya.safetensors", "strength_model": 0.75},
        },
        "hooked": {
            "class_type": "ConditioningSetProperties",
            "inputs": {
                "cond_NEW": ["positive", 0],
                "strength": 1.0,
                "set_cond_area": "default",
                "hooks": ["hook", 0],
            },
        },
    }
    inputs = graph["sampler"]["inputs"] | {"positive": ["hooked", 0]}
    graph["sampler"] = {"class_type": "KSampler", "inputs": inputs}
    assert torch.equal(run(comfyui, graph), run(comfyui, with_load_lora(prompt(MODEL))))
    assert torch.equal(run(comfyui, prompt(MODEL)), run(comfyui, stack()))


def test_full_size_update_reports_what_is_kept(comfyui: ComfyServer):
    generator = torch.Generator().manual_seed(3)
    name = "diffusion_model.double_blocks.1.img_mlp.2.diff"
    low = torch.randn(256, 12, generator=generator) @ torch.randn(12, 1024, generator=generator) / 50
    add(comfyui, "update", {name: low})
    assert "at least 100.0 %" in report(comfyui, with_lora("update.safetensors"))
    text = report(comfyui, with_lora("update.safetensors", rank=6))
    assert "1 full-size updates" in text and "100.0 %" not in text
    exact = run(comfyui, with_lora("update.safetensors"))
    reduced = run(comfyui, with_lora("update.safetensors", rank=6))
    assert not torch.equal(exact, reduced)


def test_layer_given_twice(comfyui: ComfyServer):
    """In two dialects, or as a LoRA and as a difference: ComfyUI takes one of them, and the report says so."""
    both = lora(layers=["single_blocks.1.linear2"]) | lora(diffusers("transformer."), 1, ["single_blocks.1.linear2"])
    text = report(comfyui, with_lora(add(comfyui, "twice", both)))
    assert "Given more than once" in text and "lora_unet_single_blocks_1_linear2.lora_up.weight" in text
    assert "transformer.single_transformer_blocks.1.proj_out.lora_B.weight" in text


def test_what_runs_in_16_bit_is_reported(comfyui: ComfyServer):
    """OFT with DoRA's magnitude has no place beside the codes."""
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    sd = {f"{name}.oft_blocks": torch.randn(16, 16, 16) / 10, f"{name}.dora_scale": torch.ones(256, 1)}
    text = report(comfyui, with_lora(add(comfyui, "oft_dora", sd | {f"{name}.alpha": torch.tensor(1.0)})))
    assert f"In 16 bit while it is applied: 1 layers, {name}.weight first" in text


# ---- files that are refused ------------------------------------------------------------------------------


def other_architecture() -> dict[str, Tensor]:
    prefix = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    return {f"{prefix}.lora_down.weight": torch.randn(8, 640), f"{prefix}.lora_up.weight": torch.randn(640, 8)}


def changed(key: str, change) -> dict[str, Tensor]:
    sd = lora()
    sd[key] = change(sd[key])
    return sd


DOWN, UP = (f"lora_unet_double_blocks_1_img_mlp_2.lora_{half}.weight" for half in ("down", "up"))
REFUSED = {
    "another_model": (other_architecture, "is for Stable Diffusion.*the model is Flux"),
    "strange_keys": (
        lambda: {"foo.lora_A.weight": torch.ones(1, 2), "foo.lora_B.weight": torch.ones(2, 1)},
        "foo.lora_A",
    ),
    "text_encoder": (
        lambda: {f"lora_te1_x.lora_{h}.weight": torch.ones(2, 2) for h in ("down", "up")},
        "text encoder alone.*Load LoRA",
    ),
    "nan": (lambda: changed(UP, lambda t: t.index_fill(0, torch.tensor([3]), float("nan"))), f"{UP}.*NaN"),
    "rank": (lambda: changed(UP, lambda t: t[:, :5].contiguous()), f"{UP}.*rank"),
    "other_size": (
        lambda: changed(DOWN, lambda t: t[:, :512].contiguous()),
        r"img_mlp\.2\.weight.*\(256, 512\).*\(256, 1024\)",
    ),
    "norm_size": (
        lambda: {"diffusion_model.double_blocks.0.img_attn.norm.key_norm.w_norm": torch.ones(64)},
        r"key_norm.*\(64,\).*\(128,\)",
    ),
    "no_bias": (
        lambda: lora() | {"diffusion_model.double_blocks.0.img_attn.norm.key_norm.diff_b": torch.ones(128)},
        "key_norm.*has none",
    ),
    "set_size": (lambda: {"diffusion_model.double_blocks.0.img_attn.proj.set_weight": torch.ones(3, 3)}, r"\(3, 3\)"),
    "flat_lokr": (
        lambda: {f"diffusion_model.double_blocks.0.img_attn.proj.lokr_w{i}": torch.ones(16) for i in (1, 2)},
        "lokr_w1.*2 dimensions",
    ),
    "flat_glora": (
        lambda: {
            f"diffusion_model.double_blocks.0.img_attn.proj.{m}.weight": torch.ones(16)
            for m in ("a1", "a2", "b1", "b2")
        },
        "a1.weight.*2 dimensions",
    ),
    "long_key": (lambda: {"x" * 2000 + ".lora_A.weight": torch.ones(2, 2)}, "key of 2014 characters"),
    "no_up": (lambda: {k: t for k, t in lora().items() if k != UP}, f"{DOWN}.*{UP}"),
    "no_lora": (lambda: {"double_blocks.0.img_attn.proj.weight": torch.ones(2, 2)}, "no (LoRA|adapter)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(comfyui: ComfyServer, name: str):
    make, message = REFUSED[name]
    file = add(comfyui, f"refused_{name}", make())
    with pytest.raises(PromptError, match=f"(?s){message}") as caught:
        comfyui.run(with_lora(file))
    assert caught.value.exception_type.endswith("SVDQuantError") and file in caught.value.message
    assert caught.value.node_type == "SVDQuantLoRA"


def test_broken_files(comfyui: ComfyServer):
    """Truncated, too many tensors, a pickle: refused in words, at once; the server goes on."""
    folder = comfyui.base / "models" / "loras"
    whole = (folder / "kohya.safetensors").read_bytes()
    header = b'{"' + b'":{"dtype":"F16","shape":[0],"data_offsets":[0,0]},"'.join(b"%d" % i for i in range(300_000))
    header += b'":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}'
    contents = {
        "broken_cut": (whole[:-1000], "truncated or damaged"),
        "broken_many": (len(header).to_bytes(8, "little") + header, "300000 tensors"),
        "broken_pickle": (b"PK\x03\x04" + bytes(300), "[Pp]ickle"),
    }
    for name, (data, message) in contents.items():
        (folder / f"{name}.safetensors").write_bytes(data)
        with pytest.raises(PromptError, match=message):
            comfyui.run(with_lora(f"{name}.safetensors"))
    run(comfyui, with_lora("kohya.safetensors"))


def test_only_offered_names_are_found(comfyui: ComfyServer):
    outside = comfyui.base / "outside_lora.safetensors"
    save_file(lora(), outside)
    for name in ("gone.safetensors", "../../outside_lora.safetensors", str(outside), ""):
        for graph in (with_lora(name), stack((True, name, 1.0))):
            with pytest.raises(PromptError, match="no such file in models/loras. Refresh"):
                comfyui.run(graph)

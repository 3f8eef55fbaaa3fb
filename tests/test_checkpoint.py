"""Reading and writing files: dialects, bad files, what a file is."""

import json
import pickle
import struct
from functools import partial

import pytest
import torch
from comfyui_svdquant import svdq_core
from comfyui_svdquant.svdq_core.checkpoint import DTYPES, describe_file, write_checkpoint
from comfyui_svdquant.svdq_core.dialects import DIFFUSERS_CHROMA, DIFFUSERS_FLUX, DIFFUSERS_FLUX2
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from comfyui_svdquant.svdq_core.quantize import FileSource, Job, quantize
from safetensors.torch import load_file, save_file

from small_flux import random_chroma, random_flux, random_flux2


@pytest.fixture(scope="module")
def source_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    save_file(random_flux(), path)
    return path


@pytest.fixture(scope="module")
def quantized_file(source_file):
    path = source_file.with_name("flux4.safetensors")
    quantize(FileSource(source_file), None, path, Job(preset="naive"))
    return path


def rewrite(path, target, change):
    """A copy of a file with its tensors changed in place by `change(tensors)`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, target, {"kept": "metadata"})
    return target


def test_written_files_are_plain_safetensors(tmp_path):
    tensors = {str(d).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(d) for d in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "sliced": torch.arange(10.0)[::2]}
    write_checkpoint(tmp_path / "a.safetensors", tensors, {"note": "größe"})
    back = load_file(tmp_path / "a.safetensors")
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape
        assert torch.equal(back[key].float(), tensor.float())
    assert svdq_core.read_checkpoint(tmp_path / "a.safetensors")[1] == {"note": "größe"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"], "no temporary file may stay behind"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"x": torch.ones(3)}, {})
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk on fire")))
    with pytest.raises(OSError, match="disk on fire"):
        write_checkpoint(path, {"x": torch.zeros(3)}, {})
    assert load_file(path)["x"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("U", (), {"free": 1000})())
    with pytest.raises(SVDQuantError, match="not enough disk space.*GiB"):
        write_checkpoint(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {})
    assert not list(tmp_path.iterdir())


def test_on_disk_format_is_the_contract(quantized_file):
    sd, metadata = svdq_core.read_checkpoint(quantized_file)
    layer = "double_blocks.0.img_mlp.2"
    n, k = 128, 512
    expected = {
        "weight": ((n, k // 2), torch.int8),
        "weight_scale": ((k // 64, n), torch.bfloat16),
        "smooth_factor": ((k,), torch.bfloat16),
        "proj_down": ((k, 0), torch.bfloat16),
        "proj_up": ((n, 0), torch.bfloat16),
        "bias": ((n,), torch.bfloat16),
    }
    for name, (shape, dtype) in expected.items():
        tensor = sd[f"{layer}.{name}"]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
    conf = json.loads(bytes(sd[f"{layer}.comfy_quant"].tolist()))
    assert conf == {"format": "svdquant_w4a4", "act_unsigned": False}
    mod = "double_blocks.0.img_mod.lin"
    assert json.loads(bytes(sd[f"{mod}.comfy_quant"].tolist())) == {"format": "awq_w4a16"}
    assert sd[f"{mod}.weight_zero"].shape == (2, 6 * n)
    layers = json.loads(metadata["_quantization_metadata"])
    assert layers["format_version"] == "1.0" and layers["layers"][mod] == {"format": "awq_w4a16"}
    ours = json.loads(metadata["svdquant"])
    assert ours["recipe"] == "flux" and ours["rank"] == 0 and "error_db" in ours["layers"][layer]
    assert sd["img_in.weight"].dtype == torch.bfloat16
    assert "double_blocks.0.img_attn.norm.query_norm.weight" in sd


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes_are_stripped_and_other_models_left_out(quantized_file, tmp_path, prefix):
    plain, _ = svdq_core.read_checkpoint(quantized_file)
    save_file({prefix + k: t for k, t in plain.items()} | {"vae.decoder.x": torch.ones(1)}, tmp_path / "p.safetensors")
    sd, _ = svdq_core.read_checkpoint(tmp_path / "p.safetensors")
    assert set(sd) == set(plain)


def to_diffusers(sd, mapping):
    """The inverse of the mapping, written as diffusers does."""
    h = sd["img_in.weight"].shape[0]
    alike = ("distilled_guidance_layer.in", "distilled_guidance_layer.out", "distilled_guidance_layer.norms")
    out = {key.replace(".scale", ".weight"): tensor for key, tensor in sd.items() if key.startswith(alike)}
    for target, sources in mapping.items():
        for i in range(5):
            for end in ("weight", "bias", "scale"):
                key = f"{target.replace('{i}', str(i))}.{end}"
                if key not in sd:
                    continue
                end = "weight" if end == "scale" else end
                tensor = sd[key]
                if target == "final_layer.adaLN_modulation.1":
                    tensor = torch.cat(tensor.chunk(2)[::-1])
                names = (sources,) if isinstance(sources, str) else sources
                sizes = [tensor.shape[0]] if len(names) == 1 else [h, h, h, tensor.shape[0] - 3 * h][: len(names)]
                for name, part in zip(names, tensor.split(sizes), strict=True):
                    out[f"{name.replace('{i}', str(i))}.{end}"] = part.contiguous()
    return out


DIFFUSERS = {
    "FLUX.1": (partial(random_flux, depth=2, single=2, guidance=True), DIFFUSERS_FLUX),
    "FLUX.2": (random_flux2, DIFFUSERS_FLUX2),
    "Chroma": (random_chroma, DIFFUSERS_CHROMA),
}


@pytest.mark.parametrize("family", DIFFUSERS)
def test_diffusers_names_become_comfys(tmp_path, comfy, family):
    import comfy.model_detection

    make, mapping = DIFFUSERS[family]
    sd = make()
    diffusers = to_diffusers(sd, mapping)
    assert len(diffusers) > len(sd)
    save_file(diffusers, tmp_path / "d.safetensors")
    got, _ = svdq_core.read_checkpoint(tmp_path / "d.safetensors")
    expected = {k.replace(".scale", ".weight"): t for k, t in sd.items()}
    assert set(got) == set(expected)
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    if family == "FLUX.2":
        return  # ComfyUI's converter wants biases, of which FLUX.2 has none
    host = comfy.model_detection.convert_diffusers_mmdit(dict(diffusers), "")
    assert all(torch.equal(host[k], got[k]) for k in host), "ComfyUI's own converter must agree"


def test_tile_packed_files_are_read(quantized_file, tmp_path, comfy):
    """comfy-kitchen's tile-packed layout, packed here by the inverse of its own unpacking."""
    from comfy_kitchen.backends.eager.svdquant import _tile_packed_weight_to_row_major

    plain, _ = svdq_core.read_checkpoint(quantized_file)

    def tile(tensors):
        for key in [k for k in tensors if k.endswith("proj_up")]:
            prefix = key.removesuffix("proj_up")
            w, s, up = (tensors[prefix + n] for n in ("weight", "weight_scale", "proj_up"))
            n, half = w.shape
            view = w.view(n // 128, 32, 4, half // 32, 32).permute(0, 3, 1, 2, 4)
            tensors[prefix + "weight"] = view.reshape(n // 128, half // 32, 32, 128).contiguous()
            assert torch.equal(_tile_packed_weight_to_row_major(tensors[prefix + "weight"]), w)
            tensors[prefix + "weight_scale"] = s.view(s.shape[0], n // 128, 128).permute(1, 0, 2).contiguous()
            tensors[prefix + "proj_up"] = up.view(n // 128, 128, -1).permute(0, 2, 1).contiguous()

    got, _ = svdq_core.read_checkpoint(rewrite(quantized_file, tmp_path / "t.safetensors", tile))
    assert all(torch.equal(got[k], plain[k]) for k in plain if not k.endswith("comfy_quant"))


LAYER = "double_blocks.0.img_attn.qkv"


def drop(key):
    return lambda tensors: tensors.pop(key)


def replace(key, tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{LAYER}.weight_scale"), f"{LAYER}.weight_scale is missing: expected shape"),
        (drop(f"{LAYER}.smooth_factor"), f"{LAYER}.smooth_factor is missing"),
        (drop(f"{LAYER}.proj_up"), f"{LAYER}.proj_up is missing"),
        (drop("double_blocks.0.txt_mod.lin.weight_zero"), "weight_zero is missing"),
        (replace(f"{LAYER}.weight", torch.zeros(384, 32, dtype=torch.int8)), r"expected shape \(1, 384\)"),
        (replace(f"{LAYER}.weight", torch.zeros(384, 64)), "expected shape .* of int8 or uint8, found .* of float32"),
        (replace(f"{LAYER}.smooth_factor", torch.ones(128, dtype=torch.int32)), "smooth_factor: .*found .* of int32"),
        (replace(f"{LAYER}.bias", torch.ones(7)), rf"{LAYER}.bias: expected shape \(384,\)"),
        (replace(f"{LAYER}.comfy_quant", torch.tensor([1, 2], dtype=torch.uint8)), "comfy_quant is not JSON"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("double_blocks.0.txt_mlp.0")],
            "txt_mlp.0.weight is missing",
        ),
    ],
)
def test_bad_tensors_are_named(quantized_file, tmp_path, change, message):
    path = rewrite(quantized_file, tmp_path / "bad.safetensors", change)
    with pytest.raises(SVDQuantError, match=message) as error:
        svdq_core.read_checkpoint(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_safetensors(tmp_path, quantized_file):
    whole = quantized_file.read_bytes()
    cases = {
        "cut.safetensors": (whole[: len(whole) // 2], "truncated or damaged"),
        "header.safetensors": (whole[:100], "truncated or damaged"),
        "empty.safetensors": (b"", "the file is empty"),
        "pickle.ckpt": (pickle.dumps({"weight": [1, 2]}), "pickled PyTorch file.*never read"),
        "zip.pt": (b"PK\x03\x04" + b"\0" * 100, "pickled PyTorch file"),
        "q.gguf": (b"GGUF" + b"\0" * 100, "a GGUF file.*Unet Loader"),
        "text.safetensors": (b"<html>Not found, sign in first</html>", "not a safetensors file"),
        "huge.safetensors": (struct.pack("<Q", 2**62) + b"{}", "not a safetensors file"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (svdq_core.read_checkpoint, svdq_core.describe_file):
            with pytest.raises(SVDQuantError, match=message) as error:
                read(path)
            assert name in str(error.value)
    with pytest.raises(SVDQuantError, match="no such file"):
        svdq_core.read_checkpoint(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("tensors", "kind", "hint"),
    [
        (random_flux(), "diffusion_model", "Load Diffusion Model"),
        (
            {f"model.diffusion_model.{k}": t for k, t in random_flux().items()},
            "diffusion_model",
            "Load Diffusion Model",
        ),
        ({"cond_stage_model.x": torch.ones(1)}, "checkpoint", "Load Checkpoint"),
        ({"lora_unet_double_blocks_0.lora_up.weight": torch.ones(1)}, "lora", "Load LoRA"),
        ({"decoder.conv_in.weight": torch.ones(1)}, "vae", "Load VAE"),
        ({"text_model.embeddings.x": torch.ones(1)}, "text_encoder", "Load CLIP"),
        ({"input_blocks.0.0.weight": torch.ones(1)}, "diffusion_model", "Load Diffusion Model"),
        ({"a.qweight": torch.ones(1), "a.wscales": torch.ones(1)}, "nunchaku", "Nunchaku"),
        ({"something": torch.ones(1)}, "unknown", "none"),
    ],
)
def test_other_files_are_recognised(tmp_path, tensors, kind, hint):
    save_file(tensors, tmp_path / "x.safetensors")
    info = describe_file(tmp_path / "x.safetensors")
    assert info.kind == kind and hint in info.loader_hint, info


def test_our_files_are_recognised(quantized_file):
    info = describe_file(quantized_file)
    assert info.kind == "svdquant" and "FLUX.1" in info.text and info.loader_hint == "SVDQuant Loader"
    assert info.details["svdquant"]["format"] == "int4"

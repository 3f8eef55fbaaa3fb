"""Model files in Nunchaku's format: what is read is what was packed, to the bit, and samples the same; bad files.

The packers here go by the kernels' layouts (PTX's operands of m16n8k64 and m16n8k16, TinyChat's W4A16): they give every
element its address.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.svdq_core import QuantizedLinear, SVDQuantError, read_checkpoint
from comfyui_svdquant.svdq_core.checkpoint import describe_file
from comfyui_svdquant.svdq_core.dialects import DIFFUSERS_FLUX
from comfyui_svdquant.svdq_core.families import plan_model
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.svdq_core.nunchaku_files import FAMILIES, Packed, beside, read_layer
from safetensors.torch import load_file, save_file
from torch import Tensor

import small_flux
from narrow import read_widths
from sampling import assert_equal_tensors, error_db, load, raw, sample, save
from test_checkpoint import to_diffusers
from test_families import random_qwen_image, random_z_image, z_image_in_diffusers_names
from test_lora_files import pack as pack_half

FLUX, QWEN, Z_IMAGE = FAMILIES
FORMATS = pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
QKV = {  # Nunchaku's layers of several of ComfyUI's
    "attn.to_qkv": [f"attn.to_{c}" for c in "qkv"],
    "attn.add_qkv_proj": [f"attn.add_{c}_proj" for c in "qkv"],
}
SWIGLU = {  # diffusers' feed-forward is value * silu(gate), where Z-Image's is w3 * silu(w1)
    "attention.to_qkv": ["attention.qkv"],
    "attention.to_out.0": ["attention.out"],
    "feed_forward.net.0.proj": ["feed_forward.w3", "feed_forward.w1"],
    "feed_forward.net.2": ["feed_forward.w2"],
}


# ---- the layouts ---------------------------------------------------------------------------------------------


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every element."""
    return torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")


def place(values: Tensor, address: Tensor) -> Tensor:
    assert torch.equal(address.flatten().sort().values, torch.arange(values.numel()))
    out = torch.empty(values.numel(), dtype=values.dtype)
    out[address.flatten()] = values.flatten()
    return out


def nibbles(weight: Tensor) -> Tensor:
    """uint8 (N, K) of natural (N, K/2): the even column is the low one."""
    weight = weight.view(torch.uint8)
    return torch.stack([weight % 16, weight // 16], dim=-1).flatten(-2)


def joined(flat: Tensor) -> Tensor:
    return flat[0::2] + 16 * flat[1::2]


def pack_codes(weight: Tensor) -> Tensor:
    """Operand B of m16n8k64: of 8 rows and 64 columns a lane has one row, and in each of two words 8 columns.

    A lane's 16 bytes are two such operands (16 rows); 8 of those, 128 rows, follow each other, then come 64 columns.
    """
    values = nibbles(weight)
    n, k = grid(*values.shape)
    lane = 4 * (n % 8) + k % 32 // 8
    pair = (n // 128 * (values.shape[1] // 64) + k // 64) * 8 + n % 128 // 16
    word = (pair * 32 + lane) * 4 + n % 16 // 8 * 2 + k % 64 // 32
    return joined(place(values, word * 8 + k % 8)).view(torch.int8).view(weight.shape)


def pack_scales(scales: Tensor) -> Tensor:
    """(K/G, N): columns of an accumulator, two next to each other, in lane % 4; a lane loads those of two."""
    g, n = grid(*scales.shape)
    lane = n % 128 // 16 * 4 + n % 8 // 2
    address = ((n // 128 * scales.shape[0] + g) * 32 + lane) * 4 + n % 16 // 8 * 2 + n % 2
    return place(scales, address).view(scales.shape)


def pack_vector(values: Tensor) -> Tensor:
    return pack_scales(values.view(1, -1)).flatten()


def pack_micro_scales(scales: Tensor) -> Tensor:
    """(N, K/16) of e4m3: four groups to a word; a lane loads words of rows that are 32 apart."""
    n, g = grid(*scales.shape)
    lane = 4 * (n % 8) + n % 32 // 8
    word = ((n // 128 * (scales.shape[1] // 4) + g // 4) * 32 + lane) * 4 + n % 128 // 32
    flat = place(scales.view(torch.uint8), word * 4 + g % 4)
    return flat.view(torch.float8_e4m3fn).view(scales.shape[1], scales.shape[0])


def pack_awq(weight: Tensor) -> Tensor:
    """64 columns of one row, then of the next of four; a 16-bit number has columns 8 apart."""
    values = nibbles(weight)
    n, k = grid(*values.shape)
    number = ((n // 4 * (values.shape[1] // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + k % 8
    return joined(place(values, number * 4 + k % 32 // 8)).view(torch.int32).view(weight.shape[0] // 4, -1)


def interleaved(rows: Tensor, vectors: int) -> Tensor:
    """Of a modulation's vectors first all that belong to feature 0, and so on."""
    size = rows.shape[0] // vectors
    return torch.stack([rows[vector * size + feature] for feature in range(size) for vector in range(vectors)])


def pack_modulation(layer: QuantizedLinear) -> dict[str, Tensor]:
    vectors = layer.shape[0] // layer.shape[1]
    scale, zero = (layer.tensors[f"weight_{name}"] for name in ("scale", "zero"))
    added = torch.tensor([0, 1, 0, 0, 1, 0])[:vectors]  # the model's 1 + scale
    bias = layer.bias.float().view(vectors, -1) + added.view(vectors, 1)
    return {
        "qweight": pack_awq(interleaved(layer.tensors["weight"], vectors)),
        "wscales": interleaved(scale.t(), vectors).t().contiguous(),
        "wzeros": interleaved((zero.float() - 8 * scale.float()).t(), vectors).t().contiguous().bfloat16(),
        "bias": interleaved(bias.flatten(), vectors).bfloat16(),
    }


def pack_layer(layer: QuantizedLinear, bias: bool = True) -> dict[str, Tensor]:
    if not layer.fmt.has_branch:
        return pack_modulation(layer)
    tensors = {
        "qweight": pack_codes(layer.tensors["weight"]),
        "smooth_factor": pack_vector(layer.smooth_factor),
        "smooth_factor_orig": torch.full_like(layer.smooth_factor, 7),
        "proj_down": pack_half(layer.proj_down, True),
        "proj_up": pack_half(layer.proj_up, False),
    }
    if layer.fmt.name == "int4":
        tensors["wscales"] = pack_scales(layer.tensors["weight_scale"])
    else:
        tensors["wscales"] = pack_micro_scales(layer.tensors["weight_scale"])
        scale = layer.tensors["weight_scale_2"]
        tensors |= {"wcscales": pack_vector(scale.bfloat16())} if scale.dim() else {"wtscale": scale.view(1)}
    return tensors | ({"bias": pack_vector(layer.bias)} if bias else {})


# ---- one layer -----------------------------------------------------------------------------------------------


def random_layer(n: int, k: int, fmt: str, unsigned: bool = False, rank: int = 32, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(n + k)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    bias = (torch.randint(-40, 40, (n,), generator=generator) / 64).to(dtype)  # exact with 1 added, too
    layer = small_flux.quantize_layer(weight, bias, get_format(fmt), unsigned, rank)
    if fmt == "awq":
        set_zeros(layer, layer.tensors["weight_zero"].float() - 8 * layer.tensors["weight_scale"].float())
    return layer


def set_zeros(layer: QuantizedLinear, wzeros: Tensor) -> None:
    """Nunchaku's zeros, rounded to 16 bit; ours take float32 where that needs more."""
    zero = wzeros.bfloat16().float() + 8 * layer.tensors["weight_scale"].float()
    short = zero.bfloat16()
    layer.tensors["weight_zero"] = short if torch.equal(short.float(), zero) else zero


def rows_of(layer: QuantizedLinear, first: int, last: int) -> QuantizedLinear:
    """Some of the outputs."""
    tensors = {"weight": layer.tensors["weight"][first:last]}
    if layer.fmt.name == "int4":
        tensors["weight_scale"] = layer.tensors["weight_scale"][:, first:last]
    else:
        tensors |= {
            "weight_scale": layer.tensors["weight_scale"][first:last],
            "weight_scale_2": layer.tensors["weight_scale_2"],
        }
    bias = None if layer.bias is None else layer.bias[first:last]
    return replace(layer, tensors=tensors, proj_up=layer.proj_up[first:last], bias=bias)


def read(tensors: dict[str, Tensor], layer: str, family=QWEN) -> dict[str, Tensor]:
    linears = read_layer(Packed(dict(tensors), f"{layer}.", "a file"), family, family.targets(layer))
    return {key: t for name, linear in linears.items() for key, t in linear.state_dict(name).items()}


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k, rank, unsigned", [(128, 128, 16, False), (256, 384, 32, True), (640, 256, 144, False)])
def test_layer(n, k, rank, unsigned, dtype, fmt):
    name = f"transformer_blocks.0.txt_mlp.net.{'2' if unsigned else '0.proj'}"
    layer = random_layer(n, k, fmt, unsigned and fmt == "int4", rank, dtype)
    assert_equal_tensors(read(pack_layer(layer), name), layer.state_dict(name))
    without_bias = replace(layer, bias=None)
    assert_equal_tensors(read(pack_layer(layer, bias=False), name), without_bias.state_dict(name))


@FORMATS
def test_joined_layers(fmt, tmp_path):
    """q, k and v are rows of one, and share no memory, or safetensors would not save them."""
    layer, expected = random_layer(768, 256, fmt), {}
    for i, c in enumerate("qkv"):
        expected |= rows_of(layer, 256 * i, 256 * i + 256).state_dict(f"transformer_blocks.12.attn.add_{c}_proj")
    found = read(pack_layer(layer), "transformer_blocks.12.attn.add_qkv_proj")
    assert_equal_tensors(found, expected)
    save_file(found, tmp_path / "saved.safetensors")


def scaled_by_row(layer: QuantizedLinear) -> QuantizedLinear:
    """q, k and v that were quantized with a tensor scale each."""
    each = torch.tensor([0.5, 0.25, 3.0]).repeat_interleave(layer.shape[0] // 3)
    return replace(layer, tensors=layer.tensors | {"weight_scale_2": each / 1024})


def test_tensor_scales_by_row():
    layer = random_layer(768, 256, "nvfp4")
    tensors, rows = pack_layer(layer), torch.rand(768, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors["wcscales"] = pack_vector(rows)
    found = read(tensors, "transformer_blocks.0.attn.to_qkv")
    for c, part in zip("qkv", rows.float().chunk(3)):
        wanted = layer.tensors["weight_scale_2"] * part
        assert torch.equal(found[f"transformer_blocks.0.attn.to_{c}.weight_scale_2"], wanted)
    del tensors["wtscale"]
    found = read(tensors, "layers.0.attention.to_qkv", Z_IMAGE)
    assert torch.equal(found["layers.0.attention.qkv.weight_scale_2"], rows.float())
    del tensors["wcscales"]
    found = read(tensors, "layers.0.attention.to_qkv", Z_IMAGE)
    assert float(found["layers.0.attention.qkv.weight_scale_2"]) == 1


@pytest.mark.parametrize("n, k", [(768, 128), (1536, 256), (768, 256)])
def test_modulation(n, k):
    """DeepCompressor's zero is always 7 scales, which is exact in 16 bit here, too; others need not be."""
    layer = random_layer(n, k, "awq")
    name = "transformer_blocks.3.txt_mod.1"
    assert_equal_tensors(read(pack_layer(layer), name), layer.state_dict(name))
    for zero, dtype in ((7, torch.bfloat16), (1, torch.float32)):
        set_zeros(layer, -zero * layer.tensors["weight_scale"].float())
        found = read(pack_layer(layer), name)
        assert found[f"{name}.weight_zero"].dtype == dtype
        assert_equal_tensors(found, layer.state_dict(name))


def test_meta_tensors():
    """A file's header tells what its tensors become; single numbers are read with it."""
    joined = pack_layer(random_layer(384, 128, "nvfp4"))
    joined["wcscales"] = pack_vector(torch.ones(384).bfloat16())
    for name, tensors in {"img_mod.1": pack_layer(random_layer(768, 128, "awq")), "attn.to_qkv": joined}.items():
        header = {key: t if t.numel() == 1 else t.to("meta") for key, t in tensors.items()}
        found, wanted = (read(sd, f"transformer_blocks.0.{name}") for sd in (header, tensors))
        assert found.keys() == wanted.keys()
        assert all((found[key].shape, found[key].dtype) == (t.shape, t.dtype) for key, t in wanted.items())


BAD_LAYERS = [
    ({"qweight": torch.zeros(256, 100, dtype=torch.int8)}, "multiples of 128 for N and K that 3 layers share"),
    ({"qweight": torch.zeros(256, 64, dtype=torch.int8)}, r"3 layers share equally, found shape \(256, 64\)"),
    ({"qweight": torch.zeros(384, 64)}, r"qweight: expected shape \(384, 64\) of int8, found .* of float32"),
    (
        {"wscales": torch.zeros(4, 384).bfloat16()},
        r"wscales: expected shape \(2, 384\) of bfloat16 or float16, found \(4",
    ),
    ({"wscales": None}, r"wscales: missing \(expected shape \(2, 384\)"),
    ({"smooth_factor": torch.ones(384).bfloat16()}, r"smooth_factor: expected shape \(128,\)"),
    ({"proj_down": torch.ones(128, 24).bfloat16()}, "proj_down: expected a rank that is a multiple of 16, found 24"),
    ({"proj_down": torch.ones(128, 16).bfloat16()}, r"proj_up: expected shape \(384, 16\)"),
    ({"proj_down": None}, r"proj_down: missing .*download it again"),
    ({"bias": torch.ones(128).bfloat16()}, r"bias: expected shape \(384,\)"),
    ({"wzeros": torch.ones(3)}, r"wzeros: unexpected in such a layer \(shape \(3,\)\)"),
    ({"wtscale": torch.ones(1)}, "wtscale: unexpected"),
]


@pytest.mark.parametrize("change, message", BAD_LAYERS, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_bad_layers(change, message):
    tensors = pack_layer(random_layer(384, 128, "int4")) | change
    with pytest.raises(SVDQuantError, match=message) as error:
        read({name: t for name, t in tensors.items() if t is not None}, "transformer_blocks.5.attn.to_qkv")
    assert str(error.value).startswith("a file: transformer_blocks.5.attn.to_qkv.")


@pytest.mark.parametrize("name", ["qweight", "wscales", "wzeros", "bias"])
def test_bad_modulations(name):
    tensors = pack_layer(random_layer(768, 128, "awq"))
    for change in (None, torch.ones(3, 5)):
        bad = {key: t for key, t in (tensors | {name: change}).items() if t is not None}
        if "qweight" in bad:
            with pytest.raises(
                SVDQuantError, match=rf"a file: transformer_blocks.0.img_mod.1.{name}: (missing|expected)"
            ):
                read(bad, "transformer_blocks.0.img_mod.1")


def test_layers_that_are_not_in_four_bit():
    with pytest.raises(SVDQuantError, match=r"layers.0.adaLN_modulation.0.qweight: Z-Image has no 4-bit layer"):
        read(pack_layer(random_layer(384, 128, "int4")), "layers.0.adaLN_modulation.0", Z_IMAGE)


# ---- whole files ---------------------------------------------------------------------------------------------


def merged(sd: dict[str, Tensor], names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Nunchaku's names of the layers in a state dict, and ComfyUI's."""
    found = {}
    for group in plan_model({key: tuple(t.shape) for key, t in sd.items()}, "m")[1]:
        for name in group.names:
            ends = [(source, end) for source, targets in names.items() for end in targets if name.endswith(f".{end}")]
            source, end = ends[0] if ends else (name, name)
            prefix = name.removesuffix(end)
            found[prefix + source] = [prefix + target for target in names.get(source, [source])]
    return found


def quantized(sd: dict[str, Tensor], source: str, targets: list[str], fmt: str) -> QuantizedLinear:
    weight = torch.cat([sd[f"{target}.weight"] for target in targets])
    if "_mod." in source:
        return random_layer(*weight.shape, "awq")
    bias = torch.cat([sd.get(f"{t}.bias", torch.zeros(weight.shape[0] // len(targets))) for t in targets])
    unsigned = fmt == "int4" and source.endswith("_mlp.net.2")
    layer = small_flux.quantize_layer(weight, bias, get_format(fmt), unsigned, 32)
    return layer if f"{targets[0]}.bias" in sd else replace(layer, bias=None)


def in_nunchakus_names(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stays 16 bit in a Z-Image: diffusers' names, but for the feed-forward, whose w3 and w1 are one."""
    out = z_image_in_diffusers_names({key: t for key, t in sd.items() if ".feed_forward." not in key})
    for key, tensor in sd.items():
        if ".feed_forward.w3." in key:
            out[key.replace("w3", "net.0.proj")] = torch.cat([tensor, sd[key.replace("w3", "w1")]])
        elif ".feed_forward.w2." in key:
            out[key.replace("w2", "net.2")] = tensor
    return out


def write_both(folder: Path, sd: dict[str, Tensor], fmt: str, skip: str = "nothing") -> list[Path]:
    """A file of ours and one of Nunchaku's that say the same. Layers that begin with ``skip`` stay 16 bit."""
    names, layers, theirs = SWIGLU if "x_embedder.weight" in sd else QKV, {}, {}
    for source, targets in merged(sd, names).items():
        if not source.startswith(skip):
            layer = quantized(sd, source, targets, fmt)
            theirs |= {
                f"{source}.{name}": t.contiguous() for name, t in pack_layer(layer, layer.bias is not None).items()
            }
            size = layer.shape[0] // len(targets)
            for i, target in enumerate(targets):
                layers[target] = layer if len(targets) == 1 else rows_of(layer, i * size, i * size + size)
    rest = {key: t for key, t in sd.items() if key.rpartition(".")[0] not in layers}
    theirs |= in_nunchakus_names(rest) if names is SWIGLU else rest
    save_file(theirs, folder / "nunchaku.safetensors", {"config": "{}", "quantization_config": '{"rank": 32}'})
    return [small_flux.write(folder / "ours.safetensors", sd, layers), folder / "nunchaku.safetensors"]


CASES = [("qwen_image", "nothing", 28), ("z_image", "nothing", 30), ("z_image", ("noise_", "context_"), 10)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def model(host, request):
    name, skip, count = request.param
    with read_widths():
        yield random_qwen_image() if name == "qwen_image" else random_z_image(), skip, count


@FORMATS
def test_model(model, tmp_path, fmt):
    """The same tensors under the same names as in a file of ours, and the same picture, bit by bit."""
    sd, skip, count = model
    ours, nunchakus = write_both(tmp_path, sd, fmt, skip)
    (wanted, _), (found, metadata) = read_checkpoint(ours), read_checkpoint(nunchakus)
    assert_equal_tensors(found, wanted)
    assert metadata["quantization_config"] == '{"rank": 32}'
    info, same = describe_file(nunchakus), describe_file(ours)
    assert (info.kind, info.loader_hint, info.text) == (same.kind, same.loader_hint, f"{same.text}, made by Nunchaku")
    assert info.details["layers"] == count and info.details["ranks"] == [32]
    left_out = ("bytes", "tensors", "svdquant")
    assert {k: v for k, v in info.details.items() if k not in left_out} == {
        k: v for k, v in same.details.items() if k not in left_out
    }
    pictures = [sample(load(path, torch.float32)) for path in (ours, nunchakus)]
    assert torch.equal(*map(raw, pictures)) and pictures[0].isfinite().all() and pictures[0].std() > 0.1


def test_a_lora_is_previewed_and_added(host, tmp_path):
    from comfyui_svdquant.svdq_core.host.lora import add_lora
    from comfyui_svdquant.svdq_core.host.preview import preview_lora

    ours, nunchakus = write_both(tmp_path, random_z_image(), "int4")
    name, generator = "diffusion_model.layers.1.attention.to_k", torch.Generator().manual_seed(0)
    halves = {"A": torch.randn(4, 256, generator=generator), "B": torch.randn(256, 4, generator=generator)}
    save_file({f"{name}.lora_{half}.weight": t / 16 for half, t in halves.items()}, tmp_path / "lora.safetensors")
    with read_widths():
        assert preview_lora(tmp_path / "lora.safetensors", nunchakus)[0].keys == 2
        pictures = []
        for path in (ours, nunchakus):
            model = load(path, torch.float32)
            pictures.append(sample(model))
            assert add_lora(model, tmp_path / "lora.safetensors", 1.0, 16).unused == []
            pictures.append(sample(model))
    assert torch.equal(pictures[1], pictures[3]) and not torch.equal(pictures[0], pictures[1])


# ---- FLUX.1, of whose single blocks Nunchaku has each linear in two parts -------------------------------------

DOUBLE = {
    "qkv_proj": "img_attn.qkv", "qkv_proj_context": "txt_attn.qkv", "out_proj": "img_attn.proj",
    "out_proj_context": "txt_attn.proj", "mlp_fc1": "img_mlp.0", "mlp_fc2": "img_mlp.2",
    "mlp_context_fc1": "txt_mlp.0", "mlp_context_fc2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
}  # fmt: skip
NORMS = {"norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm"}
NORMS |= {"norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm"}
NAMED_BEFORE = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth"}
NAMED_BEFORE |= {"smooth_factor_orig": "smooth_orig"}


def flux_as_nunchaku(sd: dict[str, Tensor], fmt: str) -> tuple[dict[str, Tensor], dict[str, QuantizedLinear]]:
    """A packed FLUX.1 of one double and two single blocks, and its layers: ComfyUI's, or parts of them in order."""
    layers, packed = {}, {}

    def add(theirs: str, ours: str, unsigned: bool = False, smooth: Tensor | None = None, of: str = "") -> None:
        weight, bias = (sd[f"{of or ours}.{end}"] for end in ("weight", "bias"))
        if of:
            rows, columns = PARTS[ours.rpartition(".")[2]]
            weight, bias = weight[rows, columns], bias[rows] * (0 if theirs.endswith("fc2") else 1)
        if "norm" in theirs:
            layer = random_layer(*weight.shape, "awq")
        else:
            layer = small_flux.quantize_layer(weight, bias, get_format(fmt), unsigned and fmt == "int4", 32)
            layer = layer if smooth is None else replace(layer, smooth_factor=smooth)
            layer = scaled_by_row(layer) if fmt == "nvfp4" and "qkv" in theirs else layer
        tensors = pack_layer(layer).items()
        layers[ours] = layer
        packed.update({f"{theirs}.{NAMED_BEFORE.get(key, key)}": t.contiguous() for key, t in tensors})

    for theirs, ours in DOUBLE.items():
        add(f"transformer_blocks.0.{theirs}", f"double_blocks.0.{ours}", unsigned="fc2" in theirs)
    for i in range(2):
        theirs, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        add(f"{theirs}.norm.linear", f"{ours}.modulation.lin")
        add(f"{theirs}.qkv_proj", f"{ours}.qkv", of=f"{ours}.linear1")
        smooth = layers[f"{ours}.qkv"].smooth_factor
        add(f"{theirs}.mlp_fc1", f"{ours}.up", smooth=smooth, of=f"{ours}.linear1")
        add(f"{theirs}.out_proj", f"{ours}.out", of=f"{ours}.linear2")
        add(f"{theirs}.mlp_fc2", f"{ours}.down", unsigned=True, of=f"{ours}.linear2")
        for c, name in ("q", "query_norm"), ("k", "key_norm"):
            packed[f"{theirs}.norm_{c}.weight"] = sd[f"{ours}.norm.{name}.scale"]
    for theirs, ours in NORMS.items():
        packed[f"transformer_blocks.0.{theirs}.weight"] = sd[f"double_blocks.0.{ours}.scale"]
    outside = {key: t for key, t in sd.items() if "blocks." not in key}
    return packed | to_diffusers(outside, DIFFUSERS_FLUX), layers


PARTS = {  # rows and columns of linear1 and linear2
    "qkv": (slice(768), slice(None)), "up": (slice(768, None), slice(None)),
    "out": (slice(None), slice(256)), "down": (slice(None), slice(256, None)),
}  # fmt: skip


@FORMATS
def test_flux(host, tmp_path, fmt):
    """linear1 computes what its parts do; linear2 has their weights, and INT4 the input of one on the signed grid."""
    sd = small_flux.random_flux(256, 1, 2, context=small_flux.CONTEXT, guidance=True)
    packed, layers = flux_as_nunchaku(sd, fmt)
    save_file(packed, tmp_path / "nunchaku.safetensors", {"config": "{}"})
    found = small_flux.quantized_layers(tmp_path / "nunchaku.safetensors")
    assert len(found) == 16 and describe_file(tmp_path / "nunchaku.safetensors").text == (
        f"an SVDQuant file of FLUX.1 (awq_w4a16, {get_format(fmt).disk_name}), made by Nunchaku"
    )
    for name in [name for name in found if not name.endswith(("linear1", "linear2"))]:
        assert_equal_tensors(found[name].state_dict(), layers[name].state_dict())
    generator = torch.Generator().manual_seed(3)
    for i in range(2):
        block = f"single_blocks.{i}"
        x, y = (torch.randn(5, k, generator=generator) for k in (256, 1280))
        both = torch.cat([layers[f"{block}.{part}"](x) for part in ("qkv", "up")], 1)
        assert found[f"{block}.linear1"].rank == 64 and error_db(found[f"{block}.linear1"](x), both.double()) < -110
        out, down = (layers[f"{block}.{part}"] for part in ("out", "down"))
        linear2, weights = found[f"{block}.linear2"], [small_flux.effective(layer) for layer in (out, down)]
        assert (linear2.rank, linear2.act_unsigned, down.act_unsigned) == (64, False, fmt == "int4")
        wanted = y @ torch.cat([w["weight"] for w in weights], 1).t() + weights[0]["bias"] + weights[1]["bias"]
        assert error_db(y @ linear2.dequantized_weight().t() + linear2.bias.float(), wanted.double()) < -50
        if fmt == "nvfp4":  # the second half's scales are others where λ is, and no worse
            parts = out(y[:, :256]) + down(y[:, 256:])
            assert abs(error_db(linear2(y), wanted.double()) - error_db(parts, wanted.double())) < 0.5
    wanted = {key.replace(".scale", ".weight"): t for key, t in sd.items() if key.rpartition(".")[0] not in found}
    assert_equal_tensors(
        {k: t for k, t in read_checkpoint(tmp_path / "nunchaku.safetensors")[0].items() if k in wanted}, wanted
    )
    ours = small_flux.write(tmp_path / "ours.safetensors", sd, found)
    models = [load(path, torch.float32) for path in (ours, tmp_path / "nunchaku.safetensors")]
    pictures = [sample(model) for model in models]
    assert torch.equal(*map(raw, pictures)) and pictures[0].isfinite().all() and pictures[0].std() > 0.1
    saved = small_flux.quantized_layers(save(models[1], f"unpacked_{fmt}"))
    for name, layer in found.items():
        assert_equal_tensors(saved[name].state_dict(), layer.state_dict())


@pytest.mark.parametrize("times", [1 / 256, 0.3, 1, 7, 256])
def test_halves_of_other_tensor_scales(times):
    """The inputs of none of them fall below the smallest scale of an activation."""
    first, second = random_layer(256, 128, "nvfp4"), random_layer(256, 512, "nvfp4")
    second.tensors["weight_scale_2"] = second.tensors["weight_scale_2"] * times
    both, generator = beside(first, second, "m"), torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, k, generator=generator) for k in (128, 512))
    y = torch.nn.functional.gelu(y) * 0.3
    exact = x @ first.dequantized_weight().t() + y @ second.dequantized_weight().t() + first.bias + second.bias
    parts = error_db(first(x) + second(y), exact.double())
    assert abs(error_db(both(torch.cat([x, y], 1)), exact.double()) - parts) < 0.7


def test_progress_of_unpacking(tmp_path):
    told = []
    packed, _ = flux_as_nunchaku(small_flux.random_flux(256, 1, 2, context=64), "int4")
    save_file(packed, tmp_path / "nunchaku.safetensors")
    read_checkpoint(tmp_path / "nunchaku.safetensors", lambda done, total: told.append((done, total)))
    assert told == [(i, 20) for i in range(1, 21)]


@pytest.mark.parametrize(
    ("fmt", "key", "message"),
    [
        ("nvfp4", "single_transformer_blocks.1.out_proj.wcscales", "linear2: the tensor scales of its two parts diff"),
        ("int4", "single_transformer_blocks.1.mlp_fc1.smooth", "single_blocks.1.linear1: its two parts have diff"),
        ("int4", "single_transformer_blocks.1.out_proj.qweight", "a part of single_blocks.1.linear2 is missing"),
        ("int4", "single_transformer_blocks.0.mlp_fc1.bias", "single_blocks.0.linear1: one of its parts has no bias"),
        ("int4", "transformer_blocks.0.mlp_fc2.wscales", r"mlp_fc2.wscales: missing \(expected shape"),
    ],
)
def test_flux_files_that_cannot_be_read(tmp_path, fmt, key, message):
    packed, _ = flux_as_nunchaku(small_flux.random_flux(256, 1, 2, context=64), fmt)
    if key.endswith(".smooth"):
        packed[key] = packed[key] * 2
    elif key.endswith(".wcscales"):
        packed[key] = pack_vector(torch.linspace(1, 2, 256).bfloat16())
    else:
        layer = key.removesuffix("qweight")
        packed = {k: t for k, t in packed.items() if k != key and not (k.startswith(layer) and layer != key)}
    save_file(packed, tmp_path / "bad.safetensors")
    with pytest.raises(SVDQuantError, match=rf"bad\.safetensors: .*{message}"):
        read_checkpoint(tmp_path / "bad.safetensors")


def test_damaged_files(host, tmp_path):
    tensors = load_file(write_both(tmp_path, random_qwen_image(), "int4")[1])
    for change, message in (
        (
            {"transformer_blocks.1.attn.to_add_out.qweight": None},
            "transformer_blocks.1.attn.to_add_out.weight is missing",
        ),
        ({"transformer_blocks.1.attn.to_qkv.wscales": None}, r"transformer_blocks.1.attn.to_qkv.wscales: missing"),
    ):
        save_file({k: t for k, t in (tensors | change).items() if t is not None}, tmp_path / "bad.safetensors")
        with pytest.raises(SVDQuantError, match=rf"bad\.safetensors: {message}"):
            read_checkpoint(tmp_path / "bad.safetensors")
    save_file(tensors | {"img_in.qweight": torch.ones(2, 2)}, tmp_path / "bad.safetensors")
    for read_file in (read_checkpoint, describe_file):
        with pytest.raises(SVDQuantError, match=r"bad.safetensors: img_in.qweight: Qwen-Image has no 4-bit layer"):
            read_file(tmp_path / "bad.safetensors")


def test_qwen_image_edit_2511(host, tmp_path):
    """ComfyUI knows it by an empty tensor's name, diffusers by its config."""
    sd = random_qwen_image()
    del sd["__index_timestep_zero__"]
    _, file = write_both(tmp_path, sd, "int4")
    tensors = load_file(file)
    for config, marked in (({"zero_cond_t": True}, True), ({"zero_cond_t": False}, False), ({}, False)):
        save_file(tensors, file, {"config": json.dumps(config)})
        assert ("__index_timestep_zero__" in read_checkpoint(file)[0]) == marked
    save_file(tensors, file, {"config": "{"})
    assert "__index_timestep_zero__" not in read_checkpoint(file)[0]


def test_text_encoders_are_no_models(tmp_path):
    layer = pack_layer(random_layer(384, 128, "int4"))
    save_file(
        {f"encoder.block.0.layer.0.SelfAttention.q.{k}": t for k, t in layer.items()}, tmp_path / "t5.safetensors"
    )
    assert describe_file(tmp_path / "t5.safetensors").text == "a text encoder"


def test_other_models_are_refused(tmp_path):
    """Each error says why, and what to do instead."""
    layer, file = pack_layer(random_layer(384, 128, "int4")), tmp_path / "m.safetensors"
    name, message = "down_blocks.1.attentions.0.attn1.to_qkv", "only FLUX.1, Qwen-Image, Z-Image are read"
    save_file({f"{name}.{key}": t for key, t in layer.items()}, file)
    info = describe_file(file)
    assert info.kind == "nunchaku" and message in info.text and "Nunchaku's own loader, or q" in info.loader_hint
    with pytest.raises(SVDQuantError, match=rf"m.safetensors: a Nunchaku file.*\({message}.*SVDQuant Quantize"):
        read_checkpoint(file)

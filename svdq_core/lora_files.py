"""LoRA files: any dialect for FLUX.1 into key names that ComfyUI's `comfy.lora.load_lora` maps, or a clear error.

Names that ComfyUI maps already are kept. Shapes: `N` out_features, `K` in_features, `R` rank; a LoRA of a linear is
`down (R, K)` and `up (N, R)`, and adds `alpha / R · up @ down` (`up @ down` without an alpha) to its weight.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint import describe_file, open_safetensors, why_unreadable
from .dialects import DIFFUSERS_FLUX
from .errors import SVDQuantError

MAX_TENSORS = 100_000  # the largest real files have a few thousand
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

# The keys of each kind of adapter; group 1 is the layer they belong to.
KINDS: dict[str, re.Pattern[str]] = {
    "lora": re.compile(r"(.*lora(?:[12]|_linear_layer)?[._])(down|up|A|B)(\.weight|\.[^.]+\.weight|)"),
    "lokr": re.compile(r"(.*)\.lokr_(?:w1|w2|t2|w1_a|w1_b|w2_a|w2_b)"),
    "loha": re.compile(r"(.*)\.hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)"),
    "glora": re.compile(r"(.*)\.[ab][12]\.weight"),
    "oft": re.compile(r"(.*)\.oft_blocks"),
    "dora": re.compile(r"(.*)\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)*)"),
    "diff": re.compile(r"(.*)\.(?:diff|diff_b)"),
    "norm": re.compile(r"(.*)\.(?:w_norm|b_norm)"),
    "set": re.compile(r"(.*)\.set_weight"),
}
OTHER_HALF = {"down": "up", "up": "down", "A": "B", "B": "A"}
NEEDED = {  # what a layer must have besides; "|" separates alternatives, "+" joins what goes together
    "lokr": ("lokr_w1|lokr_w1_a+lokr_w1_b", "lokr_w2|lokr_w2_a+lokr_w2_b"),
    "loha": ("hada_w1_a+hada_w1_b", "hada_w2_a+hada_w2_b"),
    "glora": ("a1.weight+a2.weight", "b1.weight+b2.weight"),
}

PREFIXES = re.compile(r"((?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|unet\.)*)(.*)")
BFL = re.compile(
    r"(?:double_blocks|single_blocks)\.\d+\.|(?:img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\."
)
DIFFUSERS = re.compile(
    r"(?:single_)?transformer_blocks\.\d+\.|(?:x_embedder|context_embedder|time_text_embed|norm_out|proj_out)\."
)
XLABS = re.compile(r"(.*)\.processor\.(qkv_lora|proj_lora)([12]?)\.(?:((?:down|up)\.weight)|(alpha))")
XLABS_LAYERS = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",  # ComfyUI's name for the first rows of linear1
    "proj_lora": "linear2",
}
BFL_CONTROL = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")  # ComfyUI converts such files itself

# Nunchaku splits linear1 by rows and linear2 by columns; every other layer is one of BFL's.
NUNCHAKU = re.compile(
    r"((?:single_)?transformer_blocks\.\d+)\."
    r"(norm1?(?:_context)?\.linear|(?:qkv|out)_proj(?:_context)?|mlp(?:_context)?_fc[12])\.lora_(down|up)"
)
NUNCHAKU_RANK = 32  # ranks of the base model's own branch, which come first in every 4-bit layer of such a file
NUNCHAKU_DOUBLE = {
    "qkv_proj": "img_attn.qkv",
    "qkv_proj_context": "txt_attn.qkv",
    "out_proj": "img_attn.proj",
    "out_proj_context": "txt_attn.proj",
    "mlp_fc1": "img_mlp.0",
    "mlp_fc2": "img_mlp.2",
    "mlp_context_fc1": "txt_mlp.0",
    "mlp_context_fc2": "txt_mlp.2",
}
NUNCHAKU_SINGLE = ("qkv_proj", "mlp_fc1", "out_proj", "mlp_fc2")
NUNCHAKU_MODULATION = {  # to BFL's name and the number of vectors it computes
    "norm1.linear": ("img_mod.lin", 6),
    "norm1_context.linear": ("txt_mod.lin", 6),
    "norm.linear": ("modulation.lin", 3),
}
NUNCHAKU_PLAIN = {source: target for target, source in DIFFUSERS_FLUX.items() if isinstance(source, str)} | {
    "transformer_blocks.{i}.attn.to_qkv": "double_blocks.{i}.img_attn.qkv",
    "transformer_blocks.{i}.attn.add_qkv_proj": "double_blocks.{i}.txt_attn.qkv",
}

# Signs of other models in a LoRA's keys ("~" is a dot or an underscore); the first hit names the model.
FOREIGN: tuple[tuple[str, str], ...] = (
    (r"double_stream_modulation_|~to_qkv_mlp_proj~", "FLUX.2"),
    (r"distilled_guidance_layer~", "Chroma"),
    (r"(?:down|input|mid|middle|output|up)_blocks?~.*~transformer_blocks~[1-9]", "Stable Diffusion XL"),
    (r"(?:input|output)_blocks~[12]~1~", "Stable Diffusion 1.x or 2.x"),
    (r"(?:input|output)_blocks~\d+~|middle_block~\d", "Stable Diffusion XL"),
    (r"(?:down|up)_blocks~\d+~(?:attentions|resnets)~|mid_block~attentions~", "Stable Diffusion 1.x or 2.x"),
    (r"lora_prior_unet_", "Stable Cascade"),
    (r"img_mod~linear|modulation~linear|img_mlp~fc[12]|individual_token_refiner", "HunyuanVideo"),
    (r"double_blocks~(?:19|[2-9]\d)~|double_blocks\.\d+\.(?:img|txt)_attn_(?:qkv|proj)\.", "HunyuanVideo"),
    (r"single_blocks~[4-9]\d~", "FLUX.2"),
    (r"single_transformer_blocks~(?:3[89]|[4-9]\d)~", "FLUX.2 or HunyuanVideo"),
    (r"patchify_proj|audio_to_video_attn|transformer_blocks~\d+~audio_", "LTX-Video"),
    (r"(?:^|\.)blocks\.\d+\.(?:attn[12]\.|ffn\.)", "Wan 2.x video"),
    (r"(?<!transformer_)blocks~\d+~(?:self|cross)_attn~(?:q|k|v|o|k_img|v_img)\.", "Wan 2.x video"),
    (r"(?<!transformer_)blocks~\d+~(?:adaln_modulation_|(?:self|cross)_attn~q_proj)", "Cosmos-Predict2 or Anima"),
    (r"transformer_blocks~\d+~attn1~to_", "LTX-Video or PixArt"),
    (r"transformer_blocks~\d+~(?:img|txt)_(?:mlp|mod)~", "Qwen-Image"),
    (r"joint_transformer_blocks~\d", "AuraFlow"),
    (r"joint_blocks~\d", "Stable Diffusion 3"),
    (r"(?<!single_)transformer_blocks~(?:3[89]|[4-9]\d)~attn~", "Qwen-Image"),
    (r"(?<!single_)transformer_blocks~(?:19|[23]\d)~", "Stable Diffusion 3 or Qwen-Image"),
    (r"(?:double|single)_stream_blocks~\d", "HiDream"),
    (r"(?:context|noise)_refiner~\d|cap_embedder~|(?:^|[._])layers~\d+~(?:attention|feed_forward)~",
     "Z-Image or Lumina 2"),
)  # fmt: skip


def read_lora(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``(tensors, metadata)`` of a LoRA file, in key names that ComfyUI maps for FLUX.1.

    Normalised: XLabs, PEFT (``base_model.model.``, adapter names, ``lora_magnitude_vector``), bare BFL names,
    Nunchaku's packed files. Other names, text encoders and files of other models are kept. Two things are left to
    ComfyUI's ``comfy.lora_convert.convert_lora``: BFL's control LoRAs, and Wan's.
    Floats of 8 bits come as bf16. :class:`SVDQuantError` says what is wrong with which key of the file.
    """
    path = Path(path)
    check_header(path)
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise SVDQuantError(f"{path}: {why_unreadable(path, str(error))}") from None
    if not describe_adapters(tensors):
        raise SVDQuantError(f"{path}: {why_no_lora(path, tensors)}")
    tensors = {key: t.bfloat16() if t.dtype in FLOAT8 else t for key, t in tensors.items()}
    check_values(tensors, str(path))
    if any(NUNCHAKU.fullmatch(key) for key in tensors):
        return from_nunchaku(tensors, str(path)), metadata
    check_parts(tensors, str(path))
    if all(key in tensors for key in BFL_CONTROL) or foreign_architecture(tensors):
        return tensors, metadata
    return rename(tensors, str(path)), metadata


def describe_adapters(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many layers have an adapter of each kind; kinds with none are left out. Before or after normalising.

    Kinds: lora, lokr, loha, glora, oft, boft, dora (a magnitude beside another kind), diff, norm, set (replaces).
    """
    layers: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        for kind, pattern in KINDS.items():
            if match := pattern.fullmatch(key):
                layers.setdefault("boft" if kind == "oft" and tensor.dim() == 4 else kind, set()).add(match[1])
    return {kind: len(names) for kind, names in layers.items()}


def foreign_architecture(keys: Iterable[str]) -> str | None:
    """The model that a LoRA's keys clearly belong to if that is not FLUX.1, or None: it may be FLUX.1."""
    text = "\n".join(keys)
    return next((model for sign, model in FOREIGN if re.search(sign.replace("~", "[._]"), text, re.MULTILINE)), None)


def check_header(path: Path) -> None:
    """Refuse, before anything parses it, a file that is missing, is no safetensors file or has too many tensors."""
    if not path.is_file():
        raise SVDQuantError(f"{path}: no such file. Choose another one, or put it there.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        header = file.read(length) if length <= min(size, MAX_HEADER) else b""
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        raise SVDQuantError(
            f"{path}: a web page, not a LoRA: the download was answered with a page (often a log-in or a licence to "
            "accept). Download the file itself."
        )
    if start.startswith(b"version https://git-lfs"):
        raise SVDQuantError(f"{path}: a Git LFS pointer, not the file. Run `git lfs pull`, or download the file.")
    if length > size - 8 or length > MAX_HEADER:
        reason = f"its first 8 bytes announce a header of {length} bytes in a file of {size}"
        raise SVDQuantError(f"{path}: {why_unreadable(path, reason)}")
    if (count := header.count(b'"data_offsets"')) > MAX_TENSORS:
        raise SVDQuantError(
            f"{path}: {count} tensors. A LoRA has at most a few thousand, so more than {MAX_TENSORS} are refused: "
            "this is no LoRA, or a damaged one."
        )


def why_no_lora(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """What a file without adapters is instead, and which node takes it."""
    names = set(tensors)
    if names and names <= {"emb_params", "clip_l", "clip_g", "t5xxl"}:
        return "an embedding (textual inversion), not a LoRA. Put it into models/embeddings and name it in the prompt."
    if any("ip_adapter" in name for name in names):
        return "an IP-Adapter, not a LoRA. Load it with an IP-Adapter node."
    info = describe_file(path)
    if info.kind in ("lora", "unknown"):
        found = ", ".join(sorted(names)[:4]) or "none"
        return (
            f"no adapter that is known here: expected keys such as <layer>.lora_A.weight, .lora_down.weight, .lokr_w1 "
            f"or .diff, found {found}. Choose a LoRA file."
        )
    return f"no LoRA but {info.text}. Load it with: {info.loader_hint}."


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless adapters are floats, all numbers finite, no tensor empty, and every alpha is one number."""
    for key, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if key.endswith(".alpha"):
            number = tensor.numel() == 1 and tensor.dtype in (*FLOATS, torch.int64, torch.int32)
            if not (number and torch.isfinite(tensor).all()):
                raise SVDQuantError(
                    f"{where}: {key}: expected one finite number, found {short(tensor)} of {dtype}. "
                    "The file is damaged; download or export it again."
                )
            continue
        adapter = any(pattern.fullmatch(key) for pattern in KINDS.values())
        if adapter and tensor.dtype not in FLOATS:
            raise SVDQuantError(
                f"{where}: {key}: expected floating-point numbers, found {dtype}. A quantized LoRA cannot be read; "
                "use the original file."
            )
        if adapter and tensor.numel() == 0:
            raise SVDQuantError(
                f"{where}: {key}: expected numbers, found none (shape {tuple(tensor.shape)}, so rank 0). "
                "Export the LoRA again."
            )
        if tensor.dtype in FLOATS and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise SVDQuantError(
                f"{where}: {key}: {bad} of {tensor.numel()} values are NaN or infinite. The training diverged or the "
                "file is damaged; use an earlier save or download it again."
            )


def short(tensor: Tensor) -> str:
    """A number, or the shape of more than one."""
    return str(tensor.item()) if tensor.numel() == 1 else f"shape {tuple(tensor.shape)}"


def check_parts(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless every adapter has all its tensors, with shapes that can be multiplied."""
    for key, tensor in tensors.items():
        for kind, groups in NEEDED.items():
            if match := KINDS[kind].fullmatch(key):
                for group in groups:
                    check_group(tensors, where, key, match[1], group)
        if key.endswith(".oft_blocks") and tensor.dim() not in (3, 4):
            raise wrong_shape(where, key, tensor, "3 dimensions (OFT) or 4 (BOFT)")
        if key.endswith(".diff_b") and tensor.dim() != 1:
            raise wrong_shape(where, key, tensor, "1 dimension")
        if match := KINDS["lora"].fullmatch(key):
            other = match[1] + OTHER_HALF[match[2]] + match[3]
            if other not in tensors:
                raise SVDQuantError(
                    f"{where}: {key} is there but {other} is not. The file is incomplete; download or export it again."
                )
            if match[2] in ("down", "A"):
                check_product(tensors, where, other, key)


def check_group(tensors: Mapping[str, Tensor], where: str, key: str, layer: str, group: str) -> None:
    """One entry of :data:`NEEDED`: one of its alternatives is there, and LoKr's and LoHa's products have one rank."""
    found = [
        names for names in (a.split("+") for a in group.split("|")) if all(f"{layer}.{n}" in tensors for n in names)
    ]
    if not found:
        expected = group.replace("+", " and ").replace("|", ", or ")
        raise SVDQuantError(
            f"{where}: {key} needs {expected} in {layer}. The file is incomplete; download or export it again."
        )
    names = [f"{layer}.{name}" for name in found[0]]
    convolution = any(f"{layer}.{t}" in tensors for t in ("lokr_t2", "hada_t1", "hada_t2"))  # has its own layout
    if len(names) == 2 and not names[0].endswith(".weight") and not convolution:
        check_product(tensors, where, *names)


def check_product(tensors: Mapping[str, Tensor], where: str, up: str, down: str) -> None:
    """Raise unless ``up (N, R)`` fits ``down (R, K)``. Convolutions (other models) have up to 3 dimensions more in
    both, of size 1 in up."""
    left, right = tensors[up], tensors[down]
    for key, tensor in ((up, left), (down, right)):
        if not 2 <= tensor.dim() <= 5:
            raise wrong_shape(where, key, tensor, "2 dimensions")
    if left.numel() != left.shape[0] * left.shape[1]:
        raise wrong_shape(where, up, left, "2 dimensions")
    if left.dim() != right.dim():
        raise wrong_shape(where, down, right, f"{left.dim()} dimensions as in {up}")
    if left.shape[1] != right.shape[0]:
        raise SVDQuantError(
            f"{where}: {up} has rank {left.shape[1]} (shape {tuple(left.shape)}), but {down} has rank "
            f"{right.shape[0]} (shape {tuple(right.shape)}): expected the same rank. The file is damaged; download or "
            "export it again."
        )


def wrong_shape(where: str, key: str, tensor: Tensor, expected: str) -> SVDQuantError:
    """The error for a wrong number of dimensions."""
    return SVDQuantError(
        f"{where}: {key}: expected {expected}, found shape {tuple(tensor.shape)}. "
        "The file is damaged; download or export it again."
    )


def rename(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """All keys by :func:`comfy_name`; PEFT's DoRA magnitude (N,) becomes ComfyUI's ``dora_scale`` (N, 1)."""
    out: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = comfy_name(key)
        if name in out:
            raise SVDQuantError(
                f"{where}: {key} and {source[name]} both mean {name}. The file holds two LoRAs; export one."
            )
        if ".lora_magnitude_vector" in key and tensor.dim() == 1:
            tensor = tensor.unsqueeze(1)
        out[name], source[name] = tensor, key
    return out


def comfy_name(key: str) -> str:
    """The name by which ComfyUI maps a FLUX.1 LoRA's key; unknown keys are kept."""
    key = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", key)  # PEFT's adapter name
    key = re.sub(r"\.lora_magnitude_vector(?:\.[^.]+)*$", ".dora_scale", key)
    match = PREFIXES.fullmatch(key)
    prefix, name = match.groups() if match else ("", key)
    if BFL.match(name):
        if xlabs := XLABS.fullmatch(name):
            block, layer, stream, half, alpha = xlabs.groups()
            return f"diffusion_model.{block}.{XLABS_LAYERS[layer + stream]}.{alpha or 'lora_' + half}"
        name = name.replace(".lora_B.bias", ".diff_b")
        return "diffusion_model." + re.sub(r"_norm\.scale$", "_norm.set_weight", name)
    if "base_model.model." in prefix and DIFFUSERS.match(name):
        return "transformer." + name
    return key


def from_nunchaku(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A file made by Nunchaku's (or DeepCompressor's) LoRA converter, as the LoRA it was made from, in BFL's names.

    In each 4-bit layer the converter puts the base model's own branch first (32 ranks: Nunchaku's loader also applies
    the LoRA's strength only to those after them); it is dropped here, since it belongs to that base model. The rest
    is the LoRA in the raw-input basis, its alpha applied, padded with zero ranks (dropped too) and packed.
    """
    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    out: dict[str, Tensor] = {}
    for key in tensors:
        if match := NUNCHAKU.fullmatch(key):
            block, layer, _ = match.groups()
            prefix = f"{block}.{layer}.lora_"
            for half in ("down", "up"):
                if prefix + half not in tensors:
                    raise SVDQuantError(f"{where}: {prefix + half} is missing. The file is incomplete; convert again.")
            pairs.setdefault(block, {})[layer] = nunchaku_pair(tensors, prefix, layer, where)
    for block, layers in pairs.items():
        number, single = block.rsplit(".", 1)[1], block.startswith("single_")
        expected = set(NUNCHAKU_SINGLE if single else NUNCHAKU_DOUBLE)
        modulation = {k: bfl for k, (bfl, splits) in NUNCHAKU_MODULATION.items() if (splits == 3) == single}
        for layer in sorted(expected ^ layers.keys() - modulation.keys()):
            found = "is missing" if layer in expected else "is unexpected"
            raise SVDQuantError(
                f"{where}: {block}.{layer}.lora_down {found}: Nunchaku's converter writes every 4-bit layer of FLUX.1 "
                "and no other, so the file is incomplete or of another model. Use the LoRA it was converted from."
            )
        for layer, bfl in modulation.items():
            if layer in layers:
                add_lora(out, f"{'single' if single else 'double'}_blocks.{number}.{bfl}", *layers[layer])
        if single:
            qkv, fc1, proj, fc2 = (layers[layer] for layer in NUNCHAKU_SINGLE)
            if qkv[0].shape[1] != fc1[0].shape[1] or proj[1].shape[0] != fc2[1].shape[0]:
                raise SVDQuantError(
                    f"{where}: {block}: expected as many inputs in mlp_fc1 as in qkv_proj and as many outputs in "
                    f"mlp_fc2 as in out_proj, found {fc1[0].shape[1]} and {qkv[0].shape[1]}, {fc2[1].shape[0]} and "
                    f"{proj[1].shape[0]}. The file is damaged; convert the LoRA again."
                )
            add_lora(out, f"single_blocks.{number}.linear1", *stack(qkv, fc1))
            add_lora(out, f"single_blocks.{number}.linear2", *beside(proj, fc2))
        else:
            for layer, bfl in NUNCHAKU_DOUBLE.items():
                add_lora(out, f"double_blocks.{number}.{bfl}", *layers[layer])
    rest = {key: t for key, t in tensors.items() if not NUNCHAKU.fullmatch(key)}
    add_nunchaku_biases(out, rest, pairs)
    check_parts(rest, where)
    for key, tensor in rest.items():
        add_nunchaku_plain(out, key, tensor, where)
    width = "diffusion_model.img_in.lora_A.weight"
    if width in out and out[width].shape[1] > 64:  # a control LoRA: FLUX.1's img_in reads 64
        shape = [out["diffusion_model.img_in.lora_B.weight"].shape[0], out[width].shape[1]]
        out["diffusion_model.img_in.reshape_weight"] = torch.tensor(shape)
    if not out:
        raise SVDQuantError(
            f"{where}: a file in Nunchaku's format that holds nothing beyond the base model's own branch of "
            f"{NUNCHAKU_RANK} ranks. Use the LoRA it was converted from."
        )
    return out


def nunchaku_pair(tensors: Mapping[str, Tensor], prefix: str, layer: str, where: str) -> tuple[Tensor, Tensor]:
    """``down (R, K)``, ``up (N, R)`` of one layer in plain order, without the base's branch and zero ranks.

    4-bit layers are packed: down is stored as (K, R), up as (N, R), each in tiles of 16×16. Modulation layers are
    stored plainly, but their outputs are ordered (feature, vector) instead of BFL's (vector, feature).
    """
    down, up = tensors[prefix + "down"], tensors[prefix + "up"]
    plain = layer in NUNCHAKU_MODULATION
    for key, tensor in ((prefix + "down", down), (prefix + "up", up)):
        if tensor.dim() != 2:
            raise wrong_shape(where, key, tensor, "2 dimensions")
        if not plain and (tensor.shape[0] % 16 or tensor.shape[1] % 16 or tensor.shape[1] < NUNCHAKU_RANK):
            raise SVDQuantError(
                f"{where}: {key}: expected multiples of 16 and at least {NUNCHAKU_RANK} ranks (the base model's own "
                f"branch comes first), found shape {tuple(tensor.shape)}. Use the LoRA it was converted from."
            )
    rank = down.shape[0] if plain else down.shape[1]
    splits = NUNCHAKU_MODULATION[layer][1] if plain else 1
    if rank != up.shape[1] or up.shape[0] % splits:
        raise SVDQuantError(
            f"{where}: {prefix}up: expected rank {rank} as in {prefix}down and a multiple of {splits} rows, found "
            f"shape {tuple(up.shape)}. The file is damaged; convert the LoRA again."
        )
    if plain:
        up = up.view(-1, splits, rank).transpose(0, 1).reshape(-1, rank)
    else:
        down, up = untile(down).t()[NUNCHAKU_RANK:], untile(up, transposed=True)[:, NUNCHAKU_RANK:]
    used = (down != 0).any(dim=1) & (up != 0).any(dim=0)
    return down[used].contiguous(), up[:, used].contiguous()


def untile(packed: Tensor, transposed: bool = False) -> Tensor:
    """Nunchaku's packed ``(C, R)`` in plain order: tiles of 16×16 in the order of a 16-bit tensor-core operand.

    In memory a tile is ``[8][4][2][2][2]``: row % 8, column // 2 % 4, row // 8, column // 8, column % 2, where rows
    are ranks and columns channels. In ``transposed`` tiles (the up half) rows are channels and columns ranks.
    """
    channels, rank = packed.shape
    tiles = packed.reshape(channels // 16, rank // 16, 8, 4, 2, 2, 2)
    order = (0, 4, 2, 1, 5, 3, 6) if transposed else (0, 5, 3, 6, 1, 4, 2)
    return tiles.permute(order).reshape(channels, rank)


def stack(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One LoRA of two that read the same input: ``down (R₁+R₂, K)``, ``up (N₁+N₂, R₁+R₂)``; exact.

    Two equal downs (one LoRA that was split) stay one.
    """
    (down1, up1), (down2, up2) = first, second
    if torch.equal(down1, down2):
        return down1, torch.cat([up1, up2])
    return torch.cat([down1, down2]), torch.block_diag(up1, up2)


def beside(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One LoRA of two whose outputs are added: ``down (R₁+R₂, K₁+K₂)``, ``up (N, R₁+R₂)``; exact."""
    (down1, up1), (down2, up2) = first, second
    up, down = stack((up1.t(), down1.t()), (up2.t(), down2.t()))
    return down.t().contiguous(), up.t().contiguous()


def add_lora(out: dict[str, Tensor], layer: str, down: Tensor, up: Tensor) -> None:
    """A pair by ComfyUI's name, unless it has no rank left."""
    if down.shape[0]:
        out[f"diffusion_model.{layer}.lora_A.weight"] = down
        out[f"diffusion_model.{layer}.lora_B.weight"] = up


def add_nunchaku_biases(
    out: dict[str, Tensor], rest: dict[str, Tensor], pairs: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
) -> None:
    """Move the two bias changes of each linear1 (q, k, v, then mlp; zeros for an absent one) from ``rest``."""
    for block, layers in pairs.items():
        parts = (("attn.to_qkv", "qkv_proj"), ("proj_mlp", "mlp_fc1"))
        if not block.startswith("single_") or not any(f"{block}.{name}.bias" in rest for name, _ in parts):
            continue
        biases = []
        for name, layer in parts:
            up = layers[layer][1]
            biases.append(rest.pop(f"{block}.{name}.bias", up.new_zeros(up.shape[0])))
        out[f"diffusion_model.single_blocks.{block.rsplit('.', 1)[1]}.linear1.diff_b"] = torch.cat(biases)


def add_nunchaku_plain(out: dict[str, Tensor], key: str, tensor: Tensor, where: str) -> None:
    """What such a file holds unpacked under diffusers' names: LoRAs of the 16-bit layers, biases, norms.

    Biases are added, norms replaced. Keys of text encoders are kept.
    """
    if key.startswith(("text_encoder", "lora_te")):
        out[key] = tensor
        return
    match = re.fullmatch(r"(.*?)\.(lora_A\.weight|lora_B\.weight|weight|bias)", key)
    name, end = match.groups() if match else (key, "")
    number = re.search(r"\.(\d+)\.", name)
    template = name.replace(f".{number[1]}.", ".{i}.", 1) if number and "blocks." in name else name
    bfl = NUNCHAKU_PLAIN.get(template)
    norm = "_norm" in (bfl or "")
    if bfl is None or norm != (end == "weight") or (end in ("weight", "bias") and tensor.dim() != 1):
        raise SVDQuantError(
            f"{where}: {key}: not among the tensors that Nunchaku's LoRA converter is known to write "
            f"(shape {tuple(tensor.shape)}). Use the LoRA it was converted from."
        )
    if "{i}" in bfl and end.startswith("lora_"):
        raise SVDQuantError(
            f"{where}: {key}: an unpacked LoRA inside a file in Nunchaku's format. Use the LoRA it was converted from."
        )
    if bfl == "final_layer.adaLN_modulation.1" and end != "lora_A.weight":  # diffusers stores scale before shift
        tensor = torch.cat(tensor.chunk(2)[::-1])
    layer = bfl.replace("{i}", number[1]) if number else bfl
    end = {"weight": "set_weight", "bias": "diff_b"}.get(end, end)
    out[f"diffusion_model.{layer}.{end}"] = tensor

"""LoRA files: any dialect for the models of RECIPES into names that `comfy.lora.load_lora` maps, or an error.

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

from .checkpoint import describe_file, read_header, why_unreadable
from .dialects import renamed_by
from .errors import SVDQuantError
from .families import QWEN_IMAGE, RECIPES
from .lora_checks import check_parts, check_values, describe_adapters
from .nunchaku_lora import NUNCHAKU, from_nunchaku

MAX_TENSORS = 100_000  # the largest real files have a few thousand
MAX_NAME = 1000  # characters of a key
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

PREFIXES = re.compile(r"((?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|unet\.|net\.)*)(.*)")
BFL = re.compile(
    r"(?:double_blocks|single_blocks)\.\d+\.|(?:img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\."
    r"|(?:double|single)_stream_modulation(?:_img|_txt)?\.lin\.|distilled_guidance_layer\."
)
DIFFUSERS = re.compile(
    r"(?:single_)?transformer_blocks\.\d+\.|(?:x_embedder|context_embedder|time_text_embed|norm_out|proj_out)\."
)
OTHERS = re.compile(  # Wan, Z-Image, Lumina 2, Krea 2, Anima and SD 3, whose names are the same nearly everywhere
    r"(?:vace_)?blocks\.\d+\.(?:self_attn|cross_attn|ffn|norm3|modulation|before_proj|after_proj)\."
    r"|blocks\.\d+\.(?:attn\.(?:w[qkvo]|gate)|mlp\.(?:gate|up|down|layer[12])|adaln_modulation_\w+\.[12])\.|llm_adapter\."
    r"|joint_blocks\.\d+\.|y_embedder\.mlp\.\d\."
    r"|(?:audio_)?(?:patchify_proj|adaln_single|caption_projection)\.|txtfusion\.|txtmlp\.\d\."
    r"|(?:text_embedding|time_embedding|time_projection)\.\d\."
    r"|(?:patch_embedding|head\.head|img_emb\.proj\.\d)\.|(?:cap_embedder\.1|t_embedder\.mlp\.\d)\."
    r"|(?:layers|noise_refiner|context_refiner)\.\d+\.(?:attention|feed_forward|adaLN_modulation)\."
)
WAN_DIFFUSERS = re.compile(r"(?:vace_)?blocks\.\d+\.(?:attn[12]|ffn\.net|proj_in|proj_out)\.")
WAN_NAMES = (  # diffusers' piece of a name, ComfyUI's
    (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."), (".to_out.0.", ".o."), (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."), (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."),
    (".add_k_proj.", ".k_img."), (".add_v_proj.", ".v_img."), (".proj_in.", ".before_proj."),
    (".proj_out.", ".after_proj."),
)  # fmt: skip
LUMINA_DIFFUSERS = re.compile(
    r"(?:layers|noise_refiner|context_refiner)\.\d+\.(?:attn\.|feed_forward\.linear_|norm1\.linear\.)"
)
LUMINA_NAMES = (
    (".attn.to_out.0.", ".attention.out."), (".attn.", ".attention."), (".feed_forward.linear_", ".feed_forward.w"),
    (".norm1.linear.", ".adaLN_modulation.1."),
)  # fmt: skip
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

Z_IMAGE_LORA = "Z-Image or Lumina 2"
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
    (r"patchify_proj|audio_to_video_attn|transformer_blocks~\d+~audio_", "LTX-Video or LTX-2"),
    (r"(?:^|\.)blocks\.\d+\.(?:attn[12]\.|ffn\.)", "Wan 2.x video"),
    (r"(?<!transformer_)blocks~\d+~(?:self|cross)_attn~(?:q|k|v|o|k_img|v_img)\.", "Wan 2.x video"),
    (r"(?<!transformer_)blocks~\d+~(?:adaln_modulation_|(?:self|cross)_attn~q_proj)", "Cosmos-Predict2 or Anima"),
    (r"transformer_blocks~\d+~attn1~to_", "LTX-Video, LTX-2 or PixArt"),
    (r"transformer_blocks~\d+~(?:img|txt)_(?:mlp|mod)~", "Qwen-Image"),
    (r"joint_transformer_blocks~\d", "AuraFlow"),
    (r"joint_blocks~\d", "Stable Diffusion 3"),
    (r"(?<!single_)transformer_blocks~(?:3[89]|[4-9]\d)~attn~", "Qwen-Image"),
    (r"(?<!single_)transformer_blocks~(?:19|[23]\d)~", "Stable Diffusion 3 or Qwen-Image"),
    (r"(?:double|single)_stream_blocks~\d", "HiDream"),
    (r"(?:context|noise)_refiner~\d|cap_embedder~|(?:^|[._])layers~\d+~(?:attention|feed_forward)~",
     Z_IMAGE_LORA),
)  # fmt: skip


def read_lora(path: str | os.PathLike[str], data: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``(tensors, metadata)`` of a LoRA file, in key names that ComfyUI maps for the models of RECIPES.

    Normalised: XLabs, PEFT (``base_model.model.``, adapter names, ``lora_magnitude_vector``), bare BFL names,
    Nunchaku's packed files. Other names, text encoders and files of other models are kept. Two things are left to
    ComfyUI's ``comfy.lora_convert.convert_lora``: BFL's control LoRAs, and Wan's.
    Floats of 8 bits come as bf16. :class:`SVDQuantError` says what is wrong with which key of the file.
    Without ``data`` only the header is read, as by :func:`~svdq_core.checkpoint.read_header`, and NaNs stay unseen;
    a packed file of Nunchaku's must be read all the same, since its ranks are in its numbers.
    """
    path = Path(path)
    check_header(path)
    tensors, metadata = read_header(path)
    if longest := max(tensors, key=len, default="")[MAX_NAME:]:
        raise SVDQuantError(
            f"{path}: a key of {MAX_NAME + len(longest)} characters; at most {MAX_NAME} are read. The file is "
            "damaged; download it again."
        )
    if data or any(NUNCHAKU.fullmatch(key) for key in tensors):
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
    family = foreign_architecture(tensors)
    known = family is None or any(recipe.title in family for recipe in RECIPES)
    if all(key in tensors for key in BFL_CONTROL) or not known:
        return tensors, metadata
    if family in (QWEN_IMAGE.title, Z_IMAGE_LORA):  # ComfyUI maps OneTrainer's prefix for FLUX.1 only
        tensors = {re.sub(r"^lora_transformer_", "lycoris_", key): t for key, t in tensors.items()}
    return rename(tensors, str(path)), metadata


def foreign_architecture(keys: Iterable[str]) -> str | None:
    """The model that a LoRA's keys clearly belong to, or None: it may be FLUX.1. Two models may share their names."""
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
    """The name by which ComfyUI maps a LoRA's key for the models of RECIPES; unknown keys are kept."""
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
    if WAN_DIFFUSERS.match(name):
        name = renamed_by(WAN_NAMES, name)
    if LUMINA_DIFFUSERS.match(name):
        name = renamed_by(LUMINA_NAMES, name)
    return "diffusion_model." + name if OTHERS.match(name) else key

"""Key names and layouts that other tools use, turned into ComfyUI's."""

import json
import re

import torch
from torch import Tensor

from .errors import SVDQuantError
from .families import Z_IMAGE
from .nunchaku_files import Progress, from_nunchaku_model, is_nunchaku, no_progress

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "transformer.", "net.")
TILE_N, INTERLEAVE, HALF_GROUP = 128, 4, 32  # comfy-kitchen's tile-packed W4A4

SCALE_AND_SHIFT = "norm_out.linear"  # diffusers stores scale before shift, BFL after it

# black-forest-labs' name → diffusers'; several of diffusers' are concatenated along the output features.
Names = dict[str, str | tuple[str, ...]]
DIFFUSERS_ALL: Names = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": SCALE_AND_SHIFT,
    "double_blocks.{i}.img_attn.qkv": tuple(f"transformer_blocks.{{i}}.attn.to_{c}" for c in "qkv"),
    "double_blocks.{i}.txt_attn.qkv": tuple(f"transformer_blocks.{{i}}.attn.add_{c}_proj" for c in "qkv"),
    "double_blocks.{i}.img_attn.proj": "transformer_blocks.{i}.attn.to_out.0",
    "double_blocks.{i}.txt_attn.proj": "transformer_blocks.{i}.attn.to_add_out",
    "double_blocks.{i}.img_attn.norm.query_norm": "transformer_blocks.{i}.attn.norm_q",
    "double_blocks.{i}.img_attn.norm.key_norm": "transformer_blocks.{i}.attn.norm_k",
    "double_blocks.{i}.txt_attn.norm.query_norm": "transformer_blocks.{i}.attn.norm_added_q",
    "double_blocks.{i}.txt_attn.norm.key_norm": "transformer_blocks.{i}.attn.norm_added_k",
    "single_blocks.{i}.norm.query_norm": "single_transformer_blocks.{i}.attn.norm_q",
    "single_blocks.{i}.norm.key_norm": "single_transformer_blocks.{i}.attn.norm_k",
}
DIFFUSERS_FLUX: Names = DIFFUSERS_ALL | {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.{i}.img_mod.lin": "transformer_blocks.{i}.norm1.linear",
    "double_blocks.{i}.txt_mod.lin": "transformer_blocks.{i}.norm1_context.linear",
    "double_blocks.{i}.img_mlp.0": "transformer_blocks.{i}.ff.net.0.proj",
    "double_blocks.{i}.img_mlp.2": "transformer_blocks.{i}.ff.net.2",
    "double_blocks.{i}.txt_mlp.0": "transformer_blocks.{i}.ff_context.net.0.proj",
    "double_blocks.{i}.txt_mlp.2": "transformer_blocks.{i}.ff_context.net.2",
    "single_blocks.{i}.modulation.lin": "single_transformer_blocks.{i}.norm.linear",
    "single_blocks.{i}.linear1": (
        *(f"single_transformer_blocks.{{i}}.attn.to_{c}" for c in "qkv"),
        "single_transformer_blocks.{i}.proj_mlp",
    ),
    "single_blocks.{i}.linear2": "single_transformer_blocks.{i}.proj_out",
}
DIFFUSERS_CHROMA: Names = DIFFUSERS_FLUX | {
    "distilled_guidance_layer.layers.{i}.in_layer": "distilled_guidance_layer.layers.{i}.linear_1",
    "distilled_guidance_layer.layers.{i}.out_layer": "distilled_guidance_layer.layers.{i}.linear_2",
}
DIFFUSERS_FLUX2: Names = DIFFUSERS_ALL | {
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_blocks.{i}.img_mlp.0": "transformer_blocks.{i}.ff.linear_in",
    "double_blocks.{i}.img_mlp.2": "transformer_blocks.{i}.ff.linear_out",
    "double_blocks.{i}.txt_mlp.0": "transformer_blocks.{i}.ff_context.linear_in",
    "double_blocks.{i}.txt_mlp.2": "transformer_blocks.{i}.ff_context.linear_out",
    "single_blocks.{i}.linear1": "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj",
    "single_blocks.{i}.linear2": "single_transformer_blocks.{i}.attn.to_out",
}
Z_IMAGE_ATTENTION = {
    "qkv": ("to_q", "to_k", "to_v"),
    "out": ("to_out.0",),
    "q_norm": ("norm_q",),
    "k_norm": ("norm_k",),
}
DIFFUSERS_Z_IMAGE: Names = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
} | {
    f"{blocks}.{{i}}.attention.{name}": tuple(f"{blocks}.{{i}}.attention.{theirs}" for theirs in names)
    for blocks in Z_IMAGE.lists
    for name, names in Z_IMAGE_ATTENTION.items()
}
HUNYUAN_NAMES = (  # Tencent's piece of a name, ComfyUI's
    ("_mod.linear.", "_mod.lin."), (".modulation.linear.", ".modulation.lin."), ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.", "_attn.norm.query_norm."), ("_attn_k_norm.", "_attn.norm.key_norm."),
    (".q_norm.", ".norm.query_norm."), (".k_norm.", ".norm.key_norm."),
    ("t_embedder.mlp.0.", "t_embedder.in_layer."), ("t_embedder.mlp.2.", "t_embedder.out_layer."),
    ("c_embedder.linear_1.", "c_embedder.in_layer."), ("c_embedder.linear_2.", "c_embedder.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."), ("_in.mlp.2.", "_in.out_layer."),
)  # fmt: skip
DIFFUSERS_BY_KEY = (
    ("noise_refiner.0.attention.norm_q.weight", DIFFUSERS_Z_IMAGE),
    ("double_stream_modulation_img.linear.weight", DIFFUSERS_FLUX2),
    ("distilled_guidance_layer.in_proj.weight", DIFFUSERS_CHROMA),
    ("x_embedder.weight", DIFFUSERS_FLUX),
)


def to_comfy_names(sd: dict[str, Tensor], where: str, progress: Progress = no_progress) -> dict[str, Tensor]:
    """A state dict in ComfyUI's names and the natural layout; unknown keys are kept as they are."""
    sd = strip_prefix(sd)
    packed = is_nunchaku(sd)
    if packed:
        sd = from_nunchaku_model(sd, where, progress)
    marks = ("transformer_blocks.0.attn.to_q.weight", "noise_refiner.0.attention.norm_q.weight")
    if packed or any(key in sd for key in marks):
        names = next((names for key, names in DIFFUSERS_BY_KEY if key in sd), None)
        sd = sd if names is None else from_diffusers(sd, names, where)
    if "txt_in.individual_token_refiner.blocks.0.norm1.weight" in sd:
        sd = {renamed_by(HUNYUAN_NAMES, key): tensor for key, tensor in sd.items()}
    renamed = {re.sub(r"(query|key)_norm\.scale$", r"\1_norm.weight", key): t for key, t in sd.items()}
    for key in [k for k in renamed if k.endswith(".comfy_quant")]:
        untile_layer(renamed, key.removesuffix("comfy_quant"))
    return renamed


def renamed_by(pieces: tuple[tuple[str, str], ...], name: str) -> str:
    """A name after these replacements."""
    for old, new in pieces:
        name = name.replace(old, new)
    return name


def swap_halves(tensor: Tensor) -> Tensor:
    """Rows of :data:`SCALE_AND_SHIFT` in BFL's order, from diffusers'."""
    return torch.cat(tensor.chunk(2)[::-1])


def strip_prefix(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the diffusion model alone: a full checkpoint's text encoders and VAE are left out."""
    for prefix in PREFIXES:
        inner = {k.removeprefix(prefix): t for k, t in sd.items() if k.startswith(prefix)}
        if any(re.search(r"(?:blocks|layers)\.\d", k) for k in inner):
            return inner
    return sd


def from_diffusers(sd: dict[str, Tensor], names: Names, where: str) -> dict[str, Tensor]:
    """diffusers' names of a 16-bit model; split q, k, v (and mlp) are joined."""
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    numbers = [int(m[1]) for k in sd if (m := re.search(r"(?:transformer_blocks|layers)\.(\d+)\.", k))]
    blocks = max(numbers, default=-1) + 1
    for target, sources in names.items():
        parts = (sources,) if isinstance(sources, str) else sources
        for i in range(blocks if "{i}" in target else 1):
            for end in ("weight", "bias"):
                keys = [f"{p.replace('{i}', str(i))}.{end}" for p in parts]
                present = [k for k in keys if k in sd]
                if not present:
                    continue
                if len(present) < len(keys):
                    missing = next(k for k in keys if k not in sd)
                    raise SVDQuantError(f"{where}: {missing} is missing. The file is incomplete; download it again.")
                tensor = sd[keys[0]] if len(keys) == 1 else torch.cat([sd[k] for k in keys])
                if sources == SCALE_AND_SHIFT:
                    tensor = swap_halves(tensor)
                out[f"{target.replace('{i}', str(i))}.{end}"] = tensor
                used.update(keys)
    return out | {k: t for k, t in sd.items() if k not in used}


def untile_layer(sd: dict[str, Tensor], prefix: str) -> None:
    """comfy-kitchen's tile-packed W4A4 tensors (``kitchen_tile_packed_w4a4``) in place to the natural layout."""
    weight, scale, up = (sd.get(prefix + name) for name in ("weight", "weight_scale", "proj_up"))
    if weight is not None and weight.dim() == 4:
        tiles, groups = weight.shape[0], weight.shape[1]
        view = weight.view(tiles, groups, TILE_N // INTERLEAVE, INTERLEAVE, HALF_GROUP)
        sd[prefix + "weight"] = view.permute(0, 2, 3, 1, 4).reshape(tiles * TILE_N, groups * HALF_GROUP)
        conf = json.loads(bytes(sd[prefix + "comfy_quant"].tolist()))
        conf.pop("layout", None)
        sd[prefix + "comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    if scale is not None and scale.dim() == 3:
        sd[prefix + "weight_scale"] = scale.permute(1, 0, 2).reshape(scale.shape[1], -1)
    if up is not None and up.dim() == 3:
        sd[prefix + "proj_up"] = up.permute(0, 2, 1).reshape(up.shape[0] * TILE_N, up.shape[1])

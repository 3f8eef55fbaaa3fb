"""LoRA files in Nunchaku's format, packed for its kernels, as the LoRA they were made from."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .dialects import DIFFUSERS_FLUX, SCALE_AND_SHIFT, swap_halves
from .errors import SVDQuantError
from .lora_checks import check_parts, wrong_shape
from .nunchaku_files import (
    FLUX_DOUBLE,
    FLUX_DOUBLE_MODULATION,
    FLUX_SINGLE,
    FLUX_SINGLE_MODULATION,
    by_vector,
    template_of,
    untile,
)

# Nunchaku splits linear1 by rows and linear2 by columns; every other layer is one of BFL's.
NUNCHAKU = re.compile(
    r"((?:single_)?transformer_blocks\.\d+)\."
    r"(norm1?(?:_context)?\.linear|(?:qkv|out)_proj(?:_context)?|mlp(?:_context)?_fc[12])\.lora_(down|up)"
)
NUNCHAKU_RANK = 32  # ranks of the base model's own branch, which come first in every 4-bit layer of such a file
NUNCHAKU_MODULATION = {  # to BFL's name and the number of vectors it computes
    **{layer: (bfl, 6) for layer, bfl in FLUX_DOUBLE_MODULATION.items()},
    **{layer: (bfl, 3) for layer, bfl in FLUX_SINGLE_MODULATION.items()},
}
NUNCHAKU_PLAIN = {source: target for target, source in DIFFUSERS_FLUX.items() if isinstance(source, str)} | {
    "transformer_blocks.{i}.attn.to_qkv": "double_blocks.{i}.img_attn.qkv",
    "transformer_blocks.{i}.attn.add_qkv_proj": "double_blocks.{i}.txt_attn.qkv",
}


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
        expected = set(FLUX_SINGLE if single else FLUX_DOUBLE)
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
            qkv, fc1, proj, fc2 = (layers[layer] for layer in FLUX_SINGLE)
            if qkv[0].shape[1] != fc1[0].shape[1] or proj[1].shape[0] != fc2[1].shape[0]:
                raise SVDQuantError(
                    f"{where}: {block}: expected as many inputs in mlp_fc1 as in qkv_proj and as many outputs in "
                    f"mlp_fc2 as in out_proj, found {fc1[0].shape[1]} and {qkv[0].shape[1]}, {fc2[1].shape[0]} and "
                    f"{proj[1].shape[0]}. The file is damaged; convert the LoRA again."
                )
            add_lora(out, f"single_blocks.{number}.linear1", *stack(qkv, fc1))
            add_lora(out, f"single_blocks.{number}.linear2", *beside(proj, fc2))
        else:
            for layer, bfl in FLUX_DOUBLE.items():
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
        up = by_vector(up, splits)
    else:
        down, up = untile(down).t()[NUNCHAKU_RANK:], untile(up, transposed=True)[:, NUNCHAKU_RANK:]
    used = (down != 0).any(dim=1) & (up != 0).any(dim=0)
    return down[used].contiguous(), up[:, used].contiguous()


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
    template, number = template_of(name)
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
    if DIFFUSERS_FLUX[bfl] == SCALE_AND_SHIFT and end != "lora_A.weight":
        tensor = swap_halves(tensor)
    layer = bfl.replace("{i}", number)
    end = {"weight": "set_weight", "bias": "diff_b"}.get(end, end)
    out[f"diffusion_model.{layer}.{end}"] = tensor

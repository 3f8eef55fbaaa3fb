"""The adapters in a LoRA file: which kinds there are, and whether all their tensors are there and make sense.

Shapes: `N` out_features, `K` in_features, `R` rank; a LoRA of a linear is `down (R, K)` and `up (N, R)`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import SVDQuantError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

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
RANKED = re.compile(r".*(?:lora(?:[12]|_linear_layer)?[._](?:down|A)(?:\.weight)?|\.(?:lokr_w[12]_b|hada_w[12]_b))")
OTHER_HALF = {"down": "up", "up": "down", "A": "B", "B": "A"}
NEEDED = {  # what a layer must have besides; "|" separates alternatives, "+" joins what goes together
    "lokr": ("lokr_w1|lokr_w1_a+lokr_w1_b", "lokr_w2|lokr_w2_a+lokr_w2_b"),
    "loha": ("hada_w1_a+hada_w1_b", "hada_w2_a+hada_w2_b"),
    "glora": ("a1.weight+a2.weight", "b1.weight+b2.weight"),
}


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


def adapter_ranks(tensors: Mapping[str, Tensor]) -> list[int]:
    """The ranks that occur in LoRAs, LoKrs and LoHas, smallest first."""
    return sorted({int(t.shape[0]) for k, t in tensors.items() if RANKED.fullmatch(k) and t.dim() >= 2})


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless adapters are floats, all numbers finite, no tensor empty, and every alpha is one number.

    Of tensors on the meta device only the kind is checked: their numbers are not there.
    """
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
        if tensor.dtype in FLOATS and not tensor.is_meta and not torch.isfinite(tensor).all():
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
    for name in names:
        if tensors[name].dim() < 2:
            raise wrong_shape(where, name, tensors[name], "2 dimensions")
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

"""ComfyUI's patches of one quantized weight as adapters beside it.

A patch is ComfyUI's tuple ``(strength, value, strength_model, offset, function)``; ``value`` is one of its
``comfy.weight_adapter`` objects or ``("diff", (tensor,))``. The results are those of ``comfy.lora.calculate_weight``.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter.boft import BOFTAdapter
from comfy.weight_adapter.glora import GLoRAAdapter
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from comfy.weight_adapter.oft import OFTAdapter
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapters import Adapter, Adapters, Kronecker, LowRank, Rotation, dora, join, loha, reduce

EXACT_RANK = 256  # a LoHa of two factors of rank R is exactly of rank R²; beyond this it is reduced
REDUCED_RANK = 128  # of what is not low rank, unless SVDQuant LoRA was told another
Offset = tuple[int, int, int] | None  # (dimension, start, length) of the slice of a weight that is patched
Patch = tuple[float, Any, float, Offset, Any]

reductions: Any = WeakTensorKeyDictionary()  # a new strength needs no new SVD


def fits_beside(patch: Patch) -> bool:
    """Whether a patch can stay beside the codes. Merges of models, for example, cannot."""
    _, value, strength_model, offset, function = patch
    if strength_model != 1.0 or function is not None:
        return False
    whole_rows = offset is None or offset[0] == 0
    if isinstance(value, LoRAAdapter):
        up, _, _, mid, magnitude, reshape = value.weights
        return mid is None and reshape is None and scales_output(magnitude, up, offset)
    if isinstance(value, LoHaAdapter):
        w1_a, *_, t1, t2, magnitude = value.weights
        return t1 is None and t2 is None and scales_output(magnitude, w1_a, offset)
    if isinstance(value, LoKrAdapter):
        *_, t2, magnitude = value.weights
        return t2 is None and (magnitude is None or offset is None)
    if isinstance(value, GLoRAAdapter):
        return value.weights[-1] is None or offset is None
    if isinstance(value, OFTAdapter | BOFTAdapter):
        return whole_rows and value.weights[-1] is None
    return difference(value) is not None


def scales_output(magnitude: Tensor | None, up: Tensor, offset: Offset) -> bool:
    """Whether DoRA's magnitudes have a place: on any whole weight, and on slices of rows if they scale rows."""
    return magnitude is None or offset is None or (offset[0] == 0 and magnitude.shape[0] == up.shape[0])


def difference(value: Any) -> Tensor | None:
    """The tensor (N, K) of a full-size difference; None for anything else."""
    if isinstance(value, tuple) and value[0] == "diff":
        value = value[1]
    return value[0] if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], Tensor) else None


def signature(patches: list[Patch]) -> tuple[Any, ...]:
    """What makes patches the same, without comparing tensors: as long as the values live."""
    return tuple(
        (strength, id(value), strength_model, offset) for strength, value, strength_model, offset, _ in patches
    )


def build(
    key: str, patches: list[Patch], weight: Callable[[], Tensor], shape: tuple[int, int], like: Tensor
) -> Adapters | None:
    """Adapters for the patches of a weight of ``shape`` (N, K), on the device and in the dtype of ``like``.

    ``weight()`` gives the effective weight (N, K), float32, for the adapters that depend on it. As in ComfyUI, a
    patch whose tensors do not fit is left out with an error in the log.
    """
    adapters: list[Adapter] = []
    energy = 1.0
    for index, (strength, value, _, offset, _) in enumerate(patches):
        if strength == 0:
            continue
        dim, start, length = offset or (0, 0, shape[0])

        def current(index: int = index, offset: Any = offset) -> Tensor:
            """The weight that this patch meets: those before it are applied, in float32."""
            whole = comfy.lora.calculate_weight(patches[:index], weight(), key)
            return whole if offset is None else whole.narrow(*offset)

        try:
            value, kept = reduced(value, REDUCED_RANK, like.device)
            part = (length, shape[1]) if dim == 0 else (shape[0], length)
            found = translate(value, strength, part, current, like.device)
        except torch.OutOfMemoryError:  # a RuntimeError, and ComfyUI's to handle
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            logging.error("SVDQuant: a LoRA does not fit %s and is left out there: %s", key, error)
            continue
        energy = energy if kept is None else min(energy, kept)
        adapters += found if offset is None else [adapter.on_slice(shape, dim, start) for adapter in found]
    return join(adapters, like, energy)


def reduced(value: Any, rank: int, device: torch.device) -> tuple[Any, float | None]:
    """What has no low rank as a LoRA of ``rank``, and the share of energy that this keeps; all else as it is, None."""
    magnitude, source = None, difference(value)
    if isinstance(value, LoHaAdapter) and value.weights[1].shape[0] * value.weights[4].shape[0] > EXACT_RANK:
        source, *_, magnitude = value.weights
    if source is None:
        return value, None
    known = reductions.setdefault(source, {})
    if rank not in known:
        delta = loha_delta(value, device) if isinstance(value, LoHaAdapter) else source
        branch, energy = reduce(delta.to(device), rank)
        weights = (branch.up.cpu(), branch.down.cpu(), None, None, magnitude, None)
        known[rank] = LoRAAdapter(getattr(value, "loaded_keys", set()), weights), energy
    return known[rank]


def loha_delta(value: LoHaAdapter, device: torch.device) -> Tensor:
    """The update (N, K) of a LoHa, float32."""
    w1_a, w1_b, alpha, w2_a, w2_b, *_ = on_device(value, device)
    return (w1_a @ w1_b) * (w2_a @ w2_b) * ratio(alpha, w1_b.shape[0])


def translate(
    value: Any, strength: float, shape: tuple[int, int], current: Callable[[], Tensor], device: torch.device
) -> list[Adapter]:
    """The adapters, in order, of one patch on a weight (or slice) of ``shape``."""
    if isinstance(value, LoRAAdapter):
        up, down, alpha, _, magnitude, _ = value.weights
        delta = LowRank(up.to(device).flatten(1), down.to(device).flatten(1))  # most files: no float32 for nothing
        return scaled(delta, ratio(alpha, down.shape[0]), magnitude, strength, shape, current)
    tensors = on_device(value, device)
    magnitude = tensors[-1]
    if isinstance(value, LoHaAdapter):
        w1_a, w1_b, alpha, w2_a, w2_b, *_ = tensors
        delta = loha(w1_a, w1_b, w2_a, w2_b)
        return scaled(delta, ratio(alpha, w1_b.shape[0]), magnitude, strength, shape, current)
    if isinstance(value, GLoRAAdapter):
        delta, scale = glora(tensors, shape, current())
        return scaled(delta, scale, magnitude, strength, shape, current)
    if isinstance(value, LoKrAdapter):
        product, scale = lokr(tensors)
        return scaled(product, scale, magnitude, strength, shape, current)
    blocks, rescale, alpha, _ = tensors
    return [rotation(type(value)(set(), (blocks, rescale, alpha or 0.0, None)), strength, shape)]


def on_device(value: Any, device: torch.device) -> list[Any]:
    """An adapter's tensors in float32; they travel in the file's dtype, which is half the way."""
    return [t.to(device).float() if isinstance(t, Tensor) else t for t in value.weights]


def ratio(alpha: float | None, rank: int) -> float:
    """``alpha / R``; 1 for a file without alpha."""
    return 1.0 if alpha is None else alpha / rank


def scaled(
    delta: LowRank | Kronecker,
    scale: float,
    magnitude: Tensor | None,
    strength: float,
    shape: tuple[int, int],
    current: Callable[[], Tensor],
) -> list[Adapter]:
    """``strength`` times ``scale`` times an update, with DoRA's magnitudes if it has any."""
    check(delta.shape, shape)
    if magnitude is None:
        return [delta.times(strength * scale)]
    weight = current()
    return dora(weight, delta.times(scale), magnitude.to(weight.device).float(), strength)


def lokr(tensors: list[Any]) -> tuple[Kronecker, float]:
    """``w1 ⊗ w2`` and ``alpha / R``; either factor may be a product itself, whose rank R is."""
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, _, _ = tensors
    rank = None
    if w1 is None:
        w1, rank = w1_a @ w1_b, w1_b.shape[0]
    if w2 is None:
        w2, rank = w2_a @ w2_b, w2_b.shape[0]
    return Kronecker(w1, w2), 1.0 if rank is None else ratio(alpha, rank)


def glora(tensors: list[Any], shape: tuple[int, int], weight: Tensor) -> tuple[LowRank, float]:
    """GLoRA (arXiv 2306.07967), ``W a1 a2 + b1 b2``, and ``alpha / R``.

    LyCORIS' first version had the factors the other way round.
    """
    a1, a2, b1, b2 = (t.flatten(1) for t in tensors[:4])
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if old and (not new or (a2.shape[0] == shape[0] == shape[1])):
        a1, a2, b1, b2 = a2, a1, b2, b1
    return LowRank(torch.cat([weight @ a1, b1], dim=1), torch.cat([a2, b2])), ratio(tensors[4], a2.shape[0])


def rotation(value: OFTAdapter | BOFTAdapter, strength: float, shape: tuple[int, int]) -> Rotation:
    """``L`` of ``W' = L W``: for OFT its diagonal blocks are computed once; BOFT's stages run on the outputs."""
    *_, count, size = value.weights[0].shape[:-1]
    check((count * size,), shape[:1])

    def rows(weight: Tensor) -> Tensor:
        return value.calculate_weight(weight, value.name, strength, 1.0, None, lambda a: a)

    if isinstance(value, BOFTAdapter):
        return Rotation(lambda y: rows(y.t().float().contiguous()).t().to(y.dtype), shape[0])
    identities = torch.eye(size, device=value.weights[0].device).repeat(count, 1)
    return Rotation(partial(rotate_blocks, rows(identities).view(count, size, size)), shape[0])


def rotate_blocks(blocks: Tensor, y: Tensor) -> Tensor:
    """``y (M, B b)`` times the transpose of a block-diagonal matrix, ``blocks (B, b, b)``."""
    grid = y.unflatten(-1, blocks.shape[:2])
    return torch.einsum("mbi,bji->mbj", grid, blocks.to(y.dtype)).flatten(1)


def check(found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the shapes agree."""
    if tuple(found) != tuple(wanted):
        raise ValueError(f"it is made for a weight of {tuple(found)}, this one is {tuple(wanted)}")

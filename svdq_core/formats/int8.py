"""INT8 weights (one scale per output channel) and activations (one scale per token): W8A8 with a branch.

SVDQuant section 5 uses rank 16 here. No public on-disk name exists yet: ``svdquant_w8a8``.
"""

import torch
from torch import Tensor

from .base import Format, positive
from .int4 import FLOATS


class Int8(Format):
    name = "int8"
    disk_name = "svdquant_w8a8"
    bits = 8
    group = None
    default_rank = 16

    def weight_scales(self, w: Tensor, dtype: torch.dtype, tensor_scale: Tensor, factor: float = 1.0) -> Tensor:
        return positive((w.abs().amax(dim=1, keepdim=True) * factor / 127).to(dtype).float())

    def weight_codes(self, scaled: Tensor) -> Tensor:
        return scaled.round().clamp(-127, 127)

    def pack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, tensor_scale: Tensor) -> dict[str, Tensor]:
        return {"weight": codes.to(torch.int8), "weight_scale": scales.t().contiguous().to(dtype)}

    def unpack(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors["weight"].to(dtype).mul_(tensors["weight_scale"].t().to(dtype))

    def round_activations(self, x: Tensor, scale_dtype: torch.dtype, unsigned: bool = False) -> Tensor:
        low, high = (0, 255) if unsigned else (-127, 127)
        scale = positive((x.abs().amax(dim=-1, keepdim=True) / high).to(scale_dtype).float())
        return x.div_(scale).round_().clamp_(low, high).mul_(scale)

    def expected(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {"weight": ((n, k), (torch.int8,)), "weight_scale": ((1, n), FLOATS)}

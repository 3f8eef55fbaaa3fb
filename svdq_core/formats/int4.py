"""INT4 weights and activations, symmetric, 64 columns per scale: ComfyUI's ``svdquant_w4a4``.

SVDQuant (arXiv 2411.05007) section 4; scale = absmax / 7, codes -7...7 (weights may use -8).
"""

import torch
from torch import Tensor

from ..packing import pack_int4, unpack_int4
from .base import Format, grouped_absmax, positive

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Int4(Format):
    name = "int4"
    disk_name = "svdquant_w4a4"
    bits = 4
    group: int = 64
    factors = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75)  # 7/8: -8 is a code, too

    def weight_scales(self, w: Tensor, dtype: torch.dtype, tensor_scale: Tensor, factor: float = 1.0) -> Tensor:
        return positive((grouped_absmax(w, self.group) * factor / 7).to(dtype).float())

    def weight_codes(self, scaled: Tensor) -> Tensor:
        return scaled.round().clamp(-8, 7)

    def pack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, tensor_scale: Tensor) -> dict[str, Tensor]:
        return {"weight": pack_int4(codes), "weight_scale": scales.t().contiguous().to(dtype)}

    def unpack(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = unpack_int4(tensors["weight"]).unflatten(-1, (-1, self.group)).to(dtype)
        return codes.mul_(tensors["weight_scale"].t().unsqueeze(-1).to(dtype)).flatten(-2)

    def round_activations(self, x: Tensor, scale_dtype: torch.dtype, unsigned: bool = False) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group))
        # absmax, not max, in the unsigned case too: a stray negative then saturates at 0 as the kernels do
        scale = positive((groups.abs().amax(dim=-1, keepdim=True) / (15 if unsigned else 7)).to(scale_dtype).float())
        codes = groups.div_(scale).round_()
        codes = codes.clamp_(0, 15) if unsigned else codes.clamp_(-7, 7)
        return codes.mul_(scale).flatten(-2)

    def expected(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {
            "weight": ((n, k // 2), (torch.int8, torch.uint8)),
            "weight_scale": ((k // self.group, n), FLOATS),
        }

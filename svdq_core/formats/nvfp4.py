"""NVFP4: e2m1 values, 16 columns per e4m3 scale, one float32 scale per weight, or per row (``svdquant_nvfp4``).

Activations take an e4m3 scale per token and group and no tensor scale: after smoothing their range fits
e4m3, and a tensor scale would cost a pass over the input or a calibrated constant.
"""

import torch
from torch import Tensor

from ..packing import pack_int4, unpack_uint4
from .base import Format, grouped_absmax, positive

E4M3_MAX = 448.0
E2M1_MAX = 6.0
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 value, ties to the even code, saturating at 6."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    # the spacing is 0.5 below 2, 1 up to 4 and 2 above; torch.round breaks ties to even, as e2m1 does
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x)


def to_e4m3(x: Tensor) -> Tensor:
    """Scales rounded through e4m3, as float32."""
    return x.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()


class NVFP4(Format):
    name = "nvfp4"
    disk_name = "svdquant_nvfp4"
    bits = 4
    group: int = 16
    extra_tensors = ("weight_scale_2",)
    by_row = ("weight_scale_2",)
    factors = (1.0, 0.85, 0.9, 0.95, 1.1, 1.2, 1.35, 1.5)  # 6/4: the largest value as a 4, which has nearer neighbours
    has_unsigned = False  # e2m1 has a sign bit, whatever the values are

    def tensor_scale(self, w: Tensor) -> Tensor:
        return positive(w.abs().amax() / (E4M3_MAX * E2M1_MAX))

    def weight_scales(self, w: Tensor, dtype: torch.dtype, tensor_scale: Tensor, factor: float = 1.0) -> Tensor:
        block = to_e4m3(grouped_absmax(w, self.group) * factor / (E2M1_MAX * tensor_scale))
        return positive(block) * tensor_scale

    def weight_codes(self, scaled: Tensor) -> Tensor:
        return round_e2m1(scaled)

    def pack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, tensor_scale: Tensor) -> dict[str, Tensor]:
        grid = torch.tensor(GRID, device=codes.device)
        index = torch.bucketize(codes.abs(), grid, out_int32=True).to(torch.uint8)
        index |= torch.signbit(codes).to(torch.uint8) << 3
        return {
            "weight": pack_int4(index).view(torch.uint8),
            "weight_scale": (scales / tensor_scale).to(torch.float8_e4m3fn),
            "weight_scale_2": tensor_scale,
        }

    def unpack(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        grid = torch.tensor(GRID + tuple(-v for v in GRID), device=tensors["weight"].device, dtype=dtype)
        values = grid[unpack_uint4(tensors["weight"]).int()].unflatten(-1, (-1, self.group))
        scale = (tensors["weight_scale"].float() * tensors["weight_scale_2"].reshape(-1, 1)).to(dtype)
        return values.mul_(scale.unsqueeze(-1)).flatten(-2)

    def round_activations(self, x: Tensor, scale_dtype: torch.dtype, unsigned: bool = False) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group))
        scale = positive(to_e4m3(groups.abs().amax(dim=-1, keepdim=True) / E2M1_MAX))
        return round_e2m1(groups.div_(scale)).mul_(scale).flatten(-2)

    def expected(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {
            "weight": ((n, k // 2), (torch.uint8, torch.int8)),
            "weight_scale": ((n, k // self.group), (torch.float8_e4m3fn,)),
            "weight_scale_2": ((), (torch.float32,)),
        }

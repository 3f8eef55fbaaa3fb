"""W4A16: 4-bit weights with a zero point, 16-bit activations, for the modulation linears (M = batch).

``w = (code - 8) * scale + zero``, 64 columns per scale: ComfyUI's ``awq_w4a16``.
"""

import torch
from torch import Tensor

from ..packing import pack_int4, unpack_uint4
from .base import Format, positive
from .int4 import FLOATS


class AWQ(Format):
    name = "awq"
    disk_name = "awq_w4a16"
    bits = 4
    group: int = 64
    has_branch = False
    default_rank = 0
    extra_tensors = ("weight_zero",)

    def solve(self, w: Tensor, importance: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per group, the clipping range that loses least: ``sum_k importance_k (w - q(w))_k^2``.

        ``w (N, K)`` float32, ``importance (K,)`` the mean square of the inputs (AWQ, arXiv 2306.00978).
        """
        groups, weights = w.unflatten(-1, (-1, self.group)), importance.unflatten(-1, (-1, self.group))
        best = torch.full(groups.shape[:2], float("inf"), device=w.device)
        codes = torch.zeros_like(groups)
        scale, zero = torch.ones_like(best), torch.zeros_like(best)
        high, low = groups.amax(dim=-1), groups.amin(dim=-1)
        for shrink in torch.linspace(1.0, 0.7, 13).tolist():
            s = positive(((high - low) * (shrink / 15)).to(dtype).float())
            z = ((high + low) / 2 + s / 2).to(dtype).float()  # codes -8...7 around zero: centre is z - s / 2
            q = ((groups - z.unsqueeze(-1)) / s.unsqueeze(-1)).round().clamp(-8, 7)
            loss = ((q * s.unsqueeze(-1) + z.unsqueeze(-1) - groups).square() * weights).sum(dim=-1)
            better = loss < best
            best = torch.where(better, loss, best)
            codes = torch.where(better.unsqueeze(-1), q, codes)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        return {
            "weight": pack_int4(codes.flatten(-2) + 8),
            "weight_scale": scale.t().contiguous().to(dtype),
            "weight_zero": zero.t().contiguous().to(dtype),
        }

    def weight_scales(self, w: Tensor, dtype: torch.dtype, tensor_scale: Tensor, factor: float = 1.0) -> Tensor:
        raise NotImplementedError("W4A16 has a zero point: use solve()")

    weight_codes = pack = weight_scales  # type: ignore[assignment]

    def unpack(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = unpack_uint4(tensors["weight"]).unflatten(-1, (-1, self.group)).to(dtype).sub_(8)
        scale = tensors["weight_scale"].t().unsqueeze(-1).to(dtype)
        return codes.mul_(scale).add_(tensors["weight_zero"].t().unsqueeze(-1).to(dtype)).flatten(-2)

    def round_activations(self, x: Tensor, scale_dtype: torch.dtype, unsigned: bool = False) -> Tensor:
        return x

    def expected(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        scales = ((k // self.group, n), FLOATS)
        return {
            "weight": ((n, k // 2), (torch.int8, torch.uint8)),
            "weight_scale": scales,
            "weight_zero": scales,
        }

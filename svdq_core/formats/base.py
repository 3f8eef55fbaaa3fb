"""What a number format must say. Shapes: weights ``(N, K)``, activations ``(M, K)``."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

COLUMNS = 128  # whose scales are looked for together: more would take more copies of a weight
GELU_SHIFT = 0.171875  # GELU(tanh) never goes below -0.17, so x + shift fits an unsigned grid


class Format(ABC):
    """A weight grid, an activation grid and the tensors that hold them on disk."""

    name: str
    disk_name: str
    bits: int
    group: int | None  # columns that share a weight scale; None: the whole row does
    factors: tuple[float, ...] = (1.0,)  # of the scale that fits the largest value, for :meth:`best_scales`
    has_branch: bool = True
    has_unsigned: bool = True  # an unsigned activation grid
    default_rank: int = 32
    extra_tensors: tuple[str, ...] = ()  # beside ``weight`` and ``weight_scale``
    by_row: tuple[str, ...] = ()  # of these, which may have an entry for every row (N,) instead of one for all ()

    def tensor_scale(self, w: Tensor) -> Tensor:
        """The scale of the whole weight, for formats that have one (float32, no dimensions)."""
        return torch.ones((), device=w.device)

    @abstractmethod
    def weight_scales(self, w: Tensor, dtype: torch.dtype, tensor_scale: Tensor, factor: float = 1.0) -> Tensor:
        """Scales ``(N, K/G)`` in float32 of a weight ``(N, K)``, already rounded as they will be stored.

        With ``factor`` 1 the largest value of a group is the grid's largest, too.
        """

    @abstractmethod
    def weight_codes(self, scaled: Tensor) -> Tensor:
        """Nearest grid value of ``w / scale``, in the input's float dtype."""

    @abstractmethod
    def pack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, tensor_scale: Tensor) -> dict[str, Tensor]:
        """Grid values ``(N, K)`` and their scales ``(N, K/G)`` as the on-disk tensors."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight ``(N, K)`` in ``dtype`` that on-disk tensors stand for."""

    @abstractmethod
    def round_activations(self, x: Tensor, scale_dtype: torch.dtype, unsigned: bool = False) -> Tensor:
        """Quantize and dequantize float32 activations ``(M, K)``; the scale is rounded to ``scale_dtype``.

        The argument is overwritten when that saves memory.
        """

    @abstractmethod
    def expected(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Shape and allowed dtypes of every on-disk weight tensor of an ``(n, k)`` linear."""

    def logical_shape(self, weight: Tensor) -> tuple[int, int]:
        """(N, K) of a stored ``weight``."""
        return weight.shape[0], weight.shape[1] * (2 if self.bits == 4 else 1)

    def spread(self, scales: Tensor, k: int) -> Tensor:
        """Scales ``(N, K/G)`` repeated over their columns: ``(N, K)``."""
        return scales.repeat_interleave(k // scales.shape[1], dim=1)

    def best_scales(self, w: Tensor, importance: Tensor, dtype: torch.dtype, tensor_scale: Tensor) -> Tensor:
        """Scales ``(N, K/G)`` with which each group loses least: ``Σ_k importance_k (w - q(w))_k²``.

        ``w (N, K)`` float32, ``importance (K,)``. A little less than what fits the largest value is mostly better for
        the others.
        """
        if self.group is None:
            return self.weight_scales(w, dtype, tensor_scale)
        groups, weights = w.unflatten(-1, (-1, self.group)), importance.unflatten(-1, (-1, self.group))

        def tried(factor: float) -> tuple[Tensor, Tensor]:
            scales = self.weight_scales(w, dtype, tensor_scale, factor)
            spread = scales.unsqueeze(-1)
            return scales, (self.weight_codes(groups / spread) * spread - groups).square_().mul_(weights).sum(dim=-1)

        best, least = tried(self.factors[0])
        for factor in self.factors[1:]:
            scales, lost = tried(factor)
            best, least = torch.where(lost < least, scales, best), torch.minimum(lost, least)
        return best

    def round_weight(self, w: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Round to nearest: grid values ``(N, K)`` and scales ``(N, K/G)`` of a float32 weight.

        With ``importance (K,)`` the scales are its :meth:`best_scales`.
        """
        tensor_scale, k = self.tensor_scale(w), w.shape[1]
        if importance is None:
            scales = self.weight_scales(w, dtype, tensor_scale)
        else:
            size = COLUMNS if self.group else k
            parts = zip(w.split(size, dim=1), importance.split(size), strict=True)
            scales = torch.cat([self.best_scales(*part, dtype, tensor_scale) for part in parts], dim=1)
        return self.weight_codes(w / self.spread(scales, k)), scales


def grouped_absmax(x: Tensor, group: int) -> Tensor:
    """Largest magnitude of every ``group`` columns: ``(M, K)`` to ``(M, K/G)``."""
    return x.unflatten(-1, (-1, group)).abs().amax(dim=-1)


def positive(scales: Tensor) -> Tensor:
    """Scales with the zeros (all-zero groups, underflow) replaced by one, so that division is safe."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)

"""Smoothing: outliers move from activations into weights (SVDQuant section 4.1, after SmoothQuant)."""

import torch
from torch import Tensor

from .formats import Format


def smoothing_factor(x_absmax: Tensor, w_absmax: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """``λ_k = max|X_k|^α / max|W_k|^(1-α)``, ``(K,)`` float32, rounded as ``dtype`` stores it.

    Normalised to a geometric mean of one, which changes nothing in the product and keeps λ, the scales and
    the branch far from the ends of the float16 range. Channels that never fire get their neighbours' mean.
    """
    tiny = torch.finfo(torch.float32).tiny ** 0.5
    log = alpha * x_absmax.clamp(min=tiny).log() - (1 - alpha) * w_absmax.clamp(min=tiny).log()
    alive = (x_absmax > tiny) & (w_absmax > tiny)
    mean = log[alive].mean() if alive.any() else log.new_zeros(())
    log = torch.where(alive, log - mean, torch.zeros_like(log))
    limit = 9.0  # e^9 = 8103: λ and x / λ stay inside float16
    return log.clamp(-limit, limit).exp().to(dtype).float()


def quantized_input(x: Tensor, smooth: Tensor, fmt: Format, unsigned_shift: float) -> Tensor:
    """What the 4-bit product reads: ``Q((x + shift) / λ)``, ``(T, K)`` float32."""
    return fmt.round_activations((x + unsigned_shift) / smooth, torch.bfloat16, unsigned_shift > 0)

"""The 16-bit branch: the best rank-R part of the smoothed weight (SVDQuant, arXiv 2411.05007, section 4.2)."""

import torch
from torch import Tensor

OVERSAMPLE = 32  # extra columns of the random range finder
POWER_ITERATIONS = 4  # with these the residual is within 0.5 % of the exact SVD's (tests/test_solve.py)


def lowrank_branch(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``weight (N, K) ≈ up (N, R) downᵀ``, ``down (K, R)``, by randomized SVD (Halko et al. 2011).

    Same dtype and device as ``weight``; the same seed gives the same factors and leaves torch's global
    random state alone. The singular values are split evenly so that both factors fit 16-bit floats.
    """
    n, k = weight.shape
    rank = min(rank, n, k)
    if rank == 0:
        return weight.new_zeros(n, 0), weight.new_zeros(k, 0)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(rank + OVERSAMPLE, n, k), niter=POWER_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, v[:, :rank] * root

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


def as_stored(up: Tensor, down: Tensor, smooth: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``proj_up (N, R)`` and ``proj_down (K, R)`` of a smoothed weight's branch, rounded to ``dtype``, in float32."""
    return up.to(dtype).float(), (down / smooth.unsqueeze(1)).to(dtype).float()


def better_branch(
    branch: tuple[Tensor, Tensor],
    missing: Tensor,
    factor: Tensor,
    smooth: Tensor,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """``branch``, or what serves better in its place once the residual is rounded, as ``dtype`` stores it.

    ``missing (N, K)`` is the smoothed weight less the rounded residual, ``factor (K, K)`` the inputs'
    :func:`.gptq.hessian_factor`, ``H⁻¹ = factorᵀ factor``. The best rank-R branch ``B`` is that of the least
    ``tr((missing - B) H (missing - B)ᵀ)``: of ``missing factor⁻¹`` by SVD. Both are ``proj_up (N, R)`` and
    ``proj_down (K, R)`` of the raw input, float32.
    """
    rank = branch[0].shape[1]
    if rank == 0:
        return branch
    wanted = whitened(missing, factor)
    up, down = lowrank_branch(wanted, rank, seed)
    down = factor.t() @ down
    tiny = torch.finfo(torch.float32).tiny
    balance = (down.norm(dim=0) / up.norm(dim=0).clamp(min=tiny)).sqrt().clamp(min=tiny)
    better = as_stored(up * balance, down / balance, smooth, dtype)

    def lost(branch: tuple[Tensor, Tensor]) -> float:
        up, down = branch
        return float((wanted - up @ whitened((down * smooth.unsqueeze(1)).t(), factor)).square().sum())

    return min(branch, better, key=lost)


def whitened(rows: Tensor, factor: Tensor) -> Tensor:
    """``rows (N, K) factor⁻¹``: their squares are what the rows cost as errors of a weight."""
    return torch.linalg.solve_triangular(factor, rows, upper=True, left=False)

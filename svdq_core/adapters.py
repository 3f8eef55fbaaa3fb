"""Adapters beside a quantized linear: LoRA, LoHa, LoKr, GLoRA, DoRA, OFT without touching the 4-bit codes.

A linear without its bias is a function ``f(x) = x Wᵀ`` on rows ``x (M, K) -> (M, N)``. An adapter wraps it:
``adapter(f, x)`` is ``x W'ᵀ`` with the adapted ``W' (N, K)``. Low rank is special: it joins the linear's own
branch (SVDQuant, arXiv 2411.05007, section 4.3), ``proj_down' = [proj_down, downᵀ]``, ``proj_up' = [proj_up, up]``,
and costs no product of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .linear import RANKS
from .lowrank import lowrank_branch

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LowRank:
    """``W' = W + up down``: ``up (N, R)``, ``down (R, K)``."""

    up: Tensor
    down: Tensor
    additive = True

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight it is made for."""
        return self.up.shape[0], self.down.shape[1]

    def times(self, factor: float) -> "LowRank":
        """The update times a number, which is applied in float32."""
        return replace(self, up=self.up.float() * factor)

    def __call__(self, f: Rows, x: Tensor) -> Tensor:
        return torch.addmm(f(x), x @ self.down.t(), self.up.t())

    def on_slice(self, shape: tuple[int, int], dim: int, start: int) -> "LowRank":
        """The same for a weight of ``shape`` (N, K) of which only rows (dim 0) or columns (1) are adapted."""
        if dim == 0:
            up = self.up.new_zeros(shape[0], self.up.shape[1])
            up[start : start + len(self.up)] = self.up
            return replace(self, up=up)
        down = self.down.new_zeros(self.down.shape[0], shape[1])
        down[:, start : start + self.down.shape[1]] = self.down
        return replace(self, down=down)


@dataclass(frozen=True)
class Kronecker:
    """LoKr, ``W' = W + left ⊗ right``: ``left (N1, K1)``, ``right (N2, K2)``, from ``row`` and ``column`` on.

    ``gain`` scales the rows or columns of the product (DoRA).
    """

    left: Tensor
    right: Tensor
    row: int = 0
    column: int = 0
    gain: "Gain | None" = None
    additive = True

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight, or the part of one, that it is made for."""
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    def times(self, factor: float) -> "Kronecker":
        """The update times a number, which is applied in float32."""
        return replace(self, left=self.left.float() * factor)

    def __call__(self, f: Rows, x: Tensor) -> Tensor:
        k1, k2 = self.left.shape[1], self.right.shape[1]
        length, width = self.shape
        part = x.narrow(1, self.column, width)

        def product(rows: Tensor) -> Tensor:
            grid = torch.einsum("mik,ji->mjk", rows.unflatten(1, (k1, k2)), self.left)
            return (grid @ self.right.t()).flatten(1)

        y = f(x)
        y.narrow(1, self.row, length).add_(product(part) if self.gain is None else self.gain(product, part))
        return y

    def on_slice(self, shape: tuple[int, int], dim: int, start: int) -> "Kronecker":
        return replace(self, row=start) if dim == 0 else replace(self, column=start)


@dataclass(frozen=True)
class Gain:
    """The magnitudes of DoRA: ``W' = diag(rows) W`` with ``rows (N,)``, or ``W diag(columns)`` with ``(K,)``."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    additive = False

    def __call__(self, f: Rows, x: Tensor) -> Tensor:
        y = f(x) if self.columns is None else f(x * self.columns)
        return y if self.rows is None else y * self.rows

    def on_slice(self, shape: tuple[int, int], dim: int, start: int) -> "Gain":
        assert dim == 0 and self.rows is not None, "a gain on other slices is not a function of the output"
        rows = self.rows.new_ones(shape[0])
        rows[start : start + len(self.rows)] = self.rows
        return Gain(rows)


@dataclass(frozen=True)
class Rotation:
    """OFT and BOFT: ``W' = L W`` on ``length`` rows from ``row`` on; ``function`` maps outputs ``y`` to ``y Lᵀ``."""

    function: Rows
    length: int
    row: int = 0
    additive = False

    def __call__(self, f: Rows, x: Tensor) -> Tensor:
        y = f(x).clone()
        part = y.narrow(1, self.row, self.length)
        part.copy_(self.function(part))
        return y

    def on_slice(self, shape: tuple[int, int], dim: int, start: int) -> "Rotation":
        assert dim == 0, "columns of the weight cannot be rotated on the output"
        return replace(self, row=start)


Adapter = LowRank | Kronecker | Gain | Rotation


@dataclass(frozen=True)
class Adapters:
    """All adapters of one linear: what joins its ``branch``, and the ``others`` in their order.

    ``energy`` is the share of the squared norm that reductions to low rank kept, 1 where nothing was reduced.
    ``filled`` is the branch with zeros up to a rank that kernels take, so that they are not added at every call.
    """

    branch: LowRank | None
    others: tuple[Adapter, ...]
    dtype: torch.dtype
    device: torch.device
    energy: float = 1.0
    filled: LowRank | None = field(init=False)

    def __post_init__(self) -> None:
        filled = self.branch
        if filled is not None and (missing := -filled.up.shape[1] % RANKS):
            filled = LowRank(pad(filled.up, (0, missing)), pad(filled.down, (0, 0, 0, missing)))
        object.__setattr__(self, "filled", filled)

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        filled = None if self.filled is self.branch else self.filled
        return sum(t.nbytes for adapter in (self.branch, filled, *self.others) if adapter for t in tensors_of(adapter))

    def to(self, x: Tensor) -> "Adapters":
        """The same on the device and in the dtype of ``x``: itself, usually, for they are made where the model is."""
        if (x.dtype, x.device) == (self.dtype, self.device):
            return self
        branch = self.branch and cast(self.branch, x)
        return Adapters(branch, tuple(cast(adapter, x) for adapter in self.others), x.dtype, x.device, self.energy)

    @property
    def additive(self) -> bool:
        """Whether they only add to the output, so that a bias in it does no harm."""
        return all(adapter.additive for adapter in self.others)

    def __call__(self, f: Rows, x: Tensor) -> Tensor:
        """``x (M, K)`` through ``f``, which has the branch already, and the others."""
        for adapter in self.others:
            f = partial(adapter, f)
        return f(x)


def join(adapters: Iterable[Adapter], like: Tensor, energy: float = 1.0) -> Adapters | None:
    """Adapters in the order in which they apply, on the device and in the dtype of ``like``; None for none.

    What is low rank joins the branch, up to the first adapter that does more than add.
    """
    low_rank: list[LowRank] = []
    others: list[Adapter] = []
    for adapter in adapters:
        adapter = cast(adapter, like)
        if isinstance(adapter, LowRank) and all(other.additive for other in others):
            low_rank.append(adapter)
        else:
            others.append(adapter)
    if not low_rank and not others:
        return None
    branch = None
    if low_rank:
        branch = LowRank(torch.cat([a.up for a in low_rank], dim=1), torch.cat([a.down for a in low_rank]))
    return Adapters(branch, tuple(others), like.dtype, like.device, energy)


AnyAdapter = TypeVar("AnyAdapter", bound=Adapter)


def cast(adapter: AnyAdapter, like: Tensor) -> AnyAdapter:
    """The adapter with its tensors on the device and in the dtype of ``like``."""
    changed: dict[str, Any] = {}
    for name, value in vars(adapter).items():
        if isinstance(value, Tensor):
            changed[name] = value.to(like)
        elif isinstance(value, Gain):
            changed[name] = cast(value, like)
    return replace(adapter, **changed)


def tensors_of(adapter: Adapter) -> list[Tensor]:
    """Its tensors, with those of its gain."""
    tensors = []
    for value in vars(adapter).values():
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, Gain):
            tensors += tensors_of(value)
    return tensors


def loha(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> LowRank:
    """``(w1_a w1_b) ⊙ (w2_a w2_b)`` with ``w_a (N, R)``, ``w_b (R, K)``: exactly of rank R1 R2 (FedPara, eq. 3)."""
    up = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    down = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return LowRank(up, down)


def reduce(delta: Tensor, rank: int) -> tuple[LowRank, float]:
    """A difference of weights ``(N, K)`` as low rank, and the share of its energy (squared norm) that is kept."""
    up, down = lowrank_branch(delta.float(), rank)
    total = delta.float().square().sum()
    lost = (delta.float() - up @ down.t()).square().sum()
    return LowRank(up, down.t()), float(1 - lost / total) if total > 0 else 1.0


def dora(weight: Tensor, delta: LowRank | Kronecker, magnitude: Tensor, strength: float) -> list[Adapter]:
    """DoRA (arXiv 2402.09353, eq. 5) as ComfyUI applies it, which is LyCORIS' form of it.

    ``weight (N, K)`` is the one adapted, ``delta`` the scaled update. ``magnitude`` of N elements scales rows by
    ``m / |W|`` (norms of the rows before the update); of K elements columns by ``m / |W + delta|``. The result is
    ``W + strength (W'' - W)``.
    """
    n = weight.shape[0]
    eps = torch.finfo(weight.dtype).eps
    if magnitude.shape[0] == n:
        scale = magnitude.reshape(n) / (weight.norm(dim=1) + eps)
        outside, inside = Gain(rows=1 + strength * (scale - 1)), Gain(rows=strength * scale)
    else:
        scale = magnitude.flatten() / ((weight + dense(delta)).norm(dim=0) + eps)
        outside, inside = Gain(columns=1 + strength * (scale - 1)), Gain(columns=strength * scale)
    if isinstance(delta, Kronecker):
        return [outside, replace(delta, gain=inside)]
    up = delta.up if inside.rows is None else delta.up * inside.rows[:, None]
    return [outside, LowRank(up, delta.down if inside.columns is None else delta.down * inside.columns)]


def dense(delta: LowRank | Kronecker) -> Tensor:
    """The update itself, (N, K)."""
    return delta.up @ delta.down.float() if isinstance(delta, LowRank) else torch.kron(delta.left, delta.right)

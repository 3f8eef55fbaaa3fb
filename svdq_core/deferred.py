"""Inputs that a linear's quantizer computes as it reads them: a norm and its modulation, GELU or a gated SiLU, and what
is beside these.

Between FLUX's linears stand a norm, a modulation, a GELU, a ``torch.cat``, each of which reads and writes all tokens
once more. Where they are deferred, the model's own code goes on with a :class:`Deferred` in place of the result; a
quantized linear takes it apart (:func:`operands`), and for everything else it is the tensor that torch would have made.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten
GROUP = 64  # columns that have a scale in common, at most: none of these may be of both kinds


class Deferred(Tensor):
    """A tensor ``(..., K)`` that is computed when it is needed, once; then it is an ordinary one, :meth:`value`.

    ``head`` is ``x (..., K0)``. With ``tail``: ``[x | GELU(tail)]`` (tanh); with ``gate``, too: ``[x | SiLU(gate) *
    tail]``. Else ``LayerNorm(x)``, without weights, and with ``mult`` and ``shift``, both (B, 1, K) or (1, 1, K) for an
    x (B, L, K): ``LayerNorm(x) * mult + shift``. With ``weight (K,)``, in float32: ``RMSNorm(x, weight)``, or with such
    a ``mult`` ``RMSNorm(x, weight) * mult``. Nobody may write to these tensors before it is used.
    """

    head: Tensor
    tail: Tensor | None
    gate: Tensor | None
    mult: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    eps: float
    computed: Tensor | None

    # Every operation comes by __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        head: Tensor,
        tail: Tensor | None = None,
        mult: Tensor | None = None,
        shift: Tensor | None = None,
        eps: float = 1e-6,
        gate: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> "Deferred":
        width = head.shape[-1] + (0 if tail is None else tail.shape[-1])
        self = Tensor._make_wrapper_subclass(cls, (*head.shape[:-1], width), dtype=head.dtype, device=head.device)
        self.head, self.tail, self.gate = head, tail, gate
        self.mult, self.shift, self.weight, self.eps = mult, shift, weight, eps
        self.computed = None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def before(self) -> str:
        """What the quantizers' kernels call it (``triton_kernels/inputs.py``); "" where they have to read the value."""
        if self.computed is not None:
            return ""
        if self.tail is not None:
            return "gelu" if self.gate is None else "silu"
        if self.weight is not None:
            return "rms"
        return "norm" if self.mult is not None else ""

    @cached_property
    def scale(self) -> Tensor:
        """By what an RMSNorm without weight is multiplied, (B, K) or (1, K) in float32."""
        assert self.weight is not None
        return self.weight.unsqueeze(0) if self.mult is None else (self.weight * self.mult).flatten(0, -2)

    def value(self) -> Tensor:
        """The tensor itself, the same one at every call: who writes to it finds that again."""
        if self.computed is None:
            self.computed = self.compute()
        return self.computed

    def compute(self) -> Tensor:
        if self.tail is not None:
            if self.gate is None:
                after = torch.nn.functional.gelu(self.tail, approximate="tanh")
            else:
                after = torch.nn.functional.silu(self.gate) * self.tail
            return torch.cat([self.head, after], -1) if self.head.shape[-1] else after
        width = self.head.shape[-1:]
        if self.weight is not None:
            normed = torch.nn.functional.rms_norm(self.head, width, self.weight.to(self.dtype), self.eps)
            return normed if self.mult is None else normed * self.mult
        normed = torch.nn.functional.layer_norm(self.head, width, eps=self.eps)
        if self.mult is None or self.shift is None:
            return normed
        return torch.addcmul(self.shift, normed, self.mult)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        further = None
        if func is aten.addcmul.default and not kwargs:
            further = modulated(*args)
        elif func is aten.mul.Tensor:
            further = scaled(*args)
        elif func is aten.cat.default and not kwargs:
            further = joined(*args)
        if further is not None:
            return further
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def plain(x: Any) -> Any:
    """The value of a :class:`Deferred`, anything else as it is."""
    return x.value() if isinstance(x, Deferred) else x


def gelu(x: Tensor) -> Deferred:
    """GELU(x), tanh."""
    return Deferred(x[..., :0], x)


def gated_silu(gate: Tensor, tail: Tensor) -> Deferred:
    """SiLU(gate) * tail."""
    return Deferred(tail[..., :0], tail, gate=gate)


def modulated(shift: Tensor, normed: Tensor, mult: Tensor) -> Deferred | None:
    """``shift + normed * mult`` where that is FLUX's: a norm (B, L, K), and one row for all tokens of an image."""
    if not isinstance(normed, Deferred) or not (is_row(mult, normed) and is_row(shift, normed)):
        return None
    if normed.computed is not None or normed.before:
        return None
    return Deferred(normed.head, None, mult, shift, normed.eps)


def scaled(normed: Tensor, mult: Tensor) -> Deferred | None:
    """``normed * mult`` where that is Z-Image's: an RMSNorm (B, L, K), and one row for all tokens of an image."""
    if not isinstance(normed, Deferred) or not is_row(mult, normed):
        return None
    if normed.before != "rms" or normed.mult is not None:
        return None
    return Deferred(normed.head, None, mult, eps=normed.eps, weight=normed.weight)


def is_row(t: Any, x: Tensor) -> bool:
    """Whether t is one row for all tokens of an image ``x (B, L, K)``."""
    if not isinstance(t, Tensor) or isinstance(t, Deferred) or x.dim() != 3:
        return False
    return t.shape == (x.shape[0], 1, x.shape[2]) and t.dtype == x.dtype and t.device == x.device


def joined(tensors: list[Tensor], dim: int = 0) -> Deferred | None:
    """``torch.cat`` of a tensor and a GELU or a gated SiLU along the columns."""
    if len(tensors) != 2:
        return None
    head, after = tensors
    if isinstance(head, Deferred) or not isinstance(after, Deferred) or not after.before or after.tail is None:
        return None
    if dim not in (-1, head.dim() - 1) or after.head.shape[-1] or head.shape[:-1] != after.shape[:-1]:
        return None
    if (head.dtype, head.device) != (after.dtype, after.device) or head.shape[-1] % GROUP:
        return None
    return Deferred(head, after.tail, gate=after.gate)


def rows(x: Tensor) -> Tensor:
    """The value of an ``x (..., K)`` as (M, K)."""
    x = plain(x)
    return x.reshape(-1, x.shape[-1])


def operands(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """An ``x (..., K)`` as the quantizers' kernels take it: their first argument (M, K), and those that have a name."""
    if not isinstance(x, Deferred) or not x.before:
        return rows(x), {}
    head = x.head.flatten(0, -2)
    if x.tail is not None:
        return head, {"tail": x.tail.flatten(0, -2), "gate": None if x.gate is None else x.gate.flatten(0, -2)}
    if x.weight is not None:
        return head, {"mult": x.scale, "eps": x.eps}
    assert x.mult is not None and x.shift is not None
    return head, {"mult": x.mult.flatten(0, -2), "shift": x.shift.flatten(0, -2), "eps": x.eps}


def pieces_of(x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
    """The tensors that :func:`operands` takes from x, and what else it depends on."""
    if not isinstance(x, Deferred) or not x.before:
        return (plain(x),), ""
    if x.tail is not None:
        return (x.head, x.tail) if x.gate is None else (x.head, x.tail, x.gate), x.before
    if x.weight is not None:
        return (x.head, x.scale), (x.before, x.eps)
    assert x.mult is not None and x.shift is not None
    return (x.head, x.mult, x.shift), (x.before, x.eps)


LOCAL = threading.local()


def deferring() -> bool:
    """Whether the code that runs is known to use norms and activations before it writes to what they were made of.

    Not where torch.compile traces it, which fuses them itself: a piece of a block, perhaps, between two graph breaks.
    """
    return not torch.compiler.is_compiling() and getattr(LOCAL, "on", False)


@contextmanager
def deferred() -> Iterator[None]:
    """Within it :func:`deferring` holds, for this thread."""
    before, LOCAL.on = deferring(), True
    try:
        yield
    finally:
        LOCAL.on = before

"""Tiles that were measured on a device, in place of those that a kernel ships with.

A launcher asks :func:`measured`, and says what else it could take. `svdquant bench --tiles` tries that, and what it
stores is in :data:`MEASURED` from then on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

FEW, SOME = 16, 512  # tokens: a GEMM is bound by reading the weight up to about SOME

Place = tuple[torch.device, str, int, int, int]  # device, kernel, class of M, K, N (or the rank)
Tiles = tuple[tuple[str, int], ...]  # what differs from the kernel's own: name and value
Choices = Mapping[str, tuple[int, ...]]  # values to try, by name

MEASURED: dict[Place, Tiles] = {}
ASKED: list[dict[Place, Choices]] = []  # who listens


def size_class(m: int) -> int:
    """Tokens in classes: FEW, SOME, or 0 for more."""
    return FEW if m <= FEW else SOME if m <= SOME else 0


def measured(kernel: str, choices: Choices, device: torch.device, m: int, k: int, n: int) -> Tiles:
    """What was measured for a kernel (its name, and what else makes it another one) and a shape; else nothing."""
    place = (device, kernel, size_class(m), k, n)
    for asked in ASKED:
        asked[place] = choices
    return MEASURED.get(place, ())


@contextmanager
def listening() -> Iterator[dict[Place, Choices]]:
    """What kernels ask for while it is open."""
    ASKED.append({})
    try:
        yield ASKED[-1]
    finally:
        ASKED.pop()

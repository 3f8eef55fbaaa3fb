"""The demo's text encoder: a fixed random vector per word and clause. Nothing is learned and nothing is stored.

FLUX gives its text tokens no positions: a word's role has to be in its embedding, where T5 would put it. Here
the role is the clause, "before or after *on*": blue in "blue star on red" and in "red star on blue" are
different tokens.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

try:
    from .pictures import WORDS
except ImportError:  # run from this folder
    from pictures import WORDS

WIDTH = 128
EMPTY = ("", 0)  # the token of a prompt without known words


def tokenize(text: str) -> list[tuple[str, int]]:
    """The known words of `text`, each with the number of its clause; unknown words are ignored."""
    tokens = []
    clause = 0
    for word in re.findall(r"[a-z]+", text.lower()):
        if word not in WORDS:
            continue
        clause = 1 if word == "on" else clause
        tokens.append((word, clause))
    return tokens or [EMPTY]


def _vector(name: str) -> Tensor:
    """A unit-variance random vector that depends on `name` alone, (128,)."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def encode(tokens: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """Tokens -> context (1, L, 128) and pooled (1, 128), the mean of the context."""
    rows = [0.8 * _vector(f"word {word}") + 0.6 * _vector(f"clause {clause}") for word, clause in tokens]
    context = torch.stack(rows)[None]
    return context, context.mean(dim=1)

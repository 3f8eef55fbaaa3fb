"""What a recipe says: how to know a model family, and which of its linears takes which treatment (``families.py``)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import SVDQuantError

W4A4 = "w4a4"  # the chosen 4-bit (or 8-bit) format with smoothing and branch
W4A16 = "w4a16"  # 4-bit weights only
W8A8 = "w8a8"  # 8 bit with smoothing and branch, where 4 bit would lose too much and 16 bit be too large


@dataclass(frozen=True)
class Rule:
    """One linear of a block, of ``some`` blocks or of all. ``after_gelu`` allows unsigned activations; equal ``shares``
    share their input."""

    name: str
    kind: str = W4A4
    after_gelu: bool = False
    shares: str | None = None
    some: bool = False

    @property
    def list(self) -> str:
        """The list of blocks that it is in."""
        return self.name.split(".", 1)[0]

    def matches(self, layer: str) -> re.Match[str] | None:
        """A match whose group 1 is the block number, or None."""
        return re.fullmatch(re.escape(self.name).replace(r"\{i\}", r"(\d+)"), layer)


@dataclass(frozen=True)
class Recipe:
    """A model family. ``keys`` must be in the state dict and ``absent`` must not; other layers stay 16 bit.

    ``text`` are the linears that read the text encoder's tokens, side by side, ``pooled`` the one for its pooled
    output, if the model has that; text comes with a mask if it is ``masked``. Calibration samples ``frames`` pictures
    of a latent, and ``sound`` with them.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    absent: tuple[str, ...]
    rules: tuple[Rule, ...]
    text: tuple[str, ...] = ("txt_in",)
    pooled: str = "vector_in.in_layer"
    masked: bool = False
    frames: int = 1
    sound: bool = False

    @property
    def lists(self) -> tuple[str, ...]:
        """The names of its lists of blocks, in the model's order."""
        return tuple(dict.fromkeys(rule.list for rule in self.rules))


@dataclass(frozen=True)
class LayerGroup:
    """Linears solved together, because they read the same input (mostly one)."""

    names: tuple[str, ...]
    kind: str
    after_gelu: bool


def plan(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], where: str) -> list[LayerGroup]:
    """The groups to solve, in the model's order. ``shapes`` maps layer names to their weight's ``(N, K)``.

    Every block must be complete: a file that lost layers is refused by name, not quantized half.
    """
    blocks: dict[str, set[int]] = {}
    found: dict[tuple[str, str, str], list[tuple[str, Rule]]] = {}
    for rule in recipe.rules:
        for layer in shapes:
            if match := rule.matches(layer):
                blocks.setdefault(rule.list, set()).add(int(match[1]))
                found.setdefault((rule.list, match[1], rule.shares or layer), []).append((layer, rule))
    for rule in (rule for rule in recipe.rules if not rule.some):
        for i in range(max(blocks.get(rule.list, {-1})) + 1):
            if (name := rule.name.replace("{i}", str(i))) not in shapes:
                raise SVDQuantError(f"{where}: {name}.weight is missing. The file is incomplete; download it again.")
    position = {layer: n for n, layer in enumerate(natural_order(shapes))}
    groups = [
        LayerGroup(tuple(layer for layer, _ in members), members[0][1].kind, members[0][1].after_gelu)
        for members in found.values()
    ]
    return sorted(groups, key=lambda g: (recipe.lists.index(g.names[0].split(".", 1)[0]), position[g.names[0]]))


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted so that block 10 comes after block 9."""
    return sorted(names, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")])

"""Model families as data: which linear takes which treatment. A new family is a new ``Recipe``, not code.

Layer names are ComfyUI's (for FLUX those of black-forest-labs/flux). ``{i}`` stands for the block number.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import SVDQuantError

W4A4 = "w4a4"  # the chosen 4-bit (or 8-bit) format with smoothing and branch
W4A16 = "w4a16"  # 4-bit weights only


@dataclass(frozen=True)
class Rule:
    """One linear of a block. ``after_gelu`` allows unsigned activations; equal ``shares`` share their input."""

    name: str
    kind: str = W4A4
    after_gelu: bool = False
    shares: str | None = None

    def matches(self, layer: str) -> re.Match[str] | None:
        """A match whose group 1 is the block number, or None."""
        return re.fullmatch(re.escape(self.name).replace(r"\{i\}", r"(\d+)"), layer)


@dataclass(frozen=True)
class Recipe:
    """A model family. ``keys`` must be in the state dict and ``absent`` must not; other layers stay 16 bit."""

    name: str
    title: str
    keys: tuple[str, ...]
    absent: tuple[str, ...]
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class LayerGroup:
    """Linears solved together, because they read the same input (mostly one)."""

    names: tuple[str, ...]
    kind: str
    after_gelu: bool


FLUX = Recipe(
    name="flux",
    title="FLUX.1",
    keys=(
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
    ),
    absent=("double_stream_modulation_img.lin.weight", "distilled_guidance_layer.in_proj.weight"),
    rules=(
        Rule("double_blocks.{i}.img_mod.lin", W4A16),
        Rule("double_blocks.{i}.txt_mod.lin", W4A16),
        Rule("double_blocks.{i}.img_attn.qkv"),
        Rule("double_blocks.{i}.img_attn.proj"),
        Rule("double_blocks.{i}.img_mlp.0"),
        Rule("double_blocks.{i}.img_mlp.2", after_gelu=True),
        Rule("double_blocks.{i}.txt_attn.qkv"),
        Rule("double_blocks.{i}.txt_attn.proj"),
        Rule("double_blocks.{i}.txt_mlp.0"),
        Rule("double_blocks.{i}.txt_mlp.2", after_gelu=True),
        Rule("single_blocks.{i}.modulation.lin", W4A16),
        Rule("single_blocks.{i}.linear1"),
        Rule("single_blocks.{i}.linear2"),
    ),
)

FLUX_LINEARS = tuple(rule for rule in FLUX.rules if rule.kind == W4A4)  # of blocks without modulations of their own

FLUX2 = Recipe(
    name="flux2",
    title="FLUX.2",
    keys=(
        "img_in.weight",
        "txt_in.weight",
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
    ),
    absent=(),
    # Its MLPs have a gated SiLU; modulations are shared by all blocks, 2 to 4 % of the weights: they stay 16 bit.
    rules=tuple(replace(rule, after_gelu=False) for rule in FLUX_LINEARS),
)

CHROMA = Recipe(
    name="chroma",
    title="Chroma",
    keys=(
        "img_in.weight",
        "txt_in.weight",
        "distilled_guidance_layer.in_proj.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
    ),
    absent=(),
    rules=FLUX_LINEARS,  # a network of its own makes all modulations
)

RECIPES: tuple[Recipe, ...] = (FLUX, FLUX2, CHROMA)

FLUX_BLOCKS, FLUX_WIDTH = (19, 38), 3072
FLUX2_RELEASES: dict[tuple[tuple[int, ...], int], str] = {  # by blocks and width
    ((8, 48), 6144): "dev",
    ((8, 24), 4096): "klein 9B",
    ((5, 20), 3072): "klein 4B",
}
FLUX_RELEASES = {  # by what shapes tell: whether guidance is an input, and the channels that img_in reads
    (True, 64): "dev, Krea or Kontext",
    (False, 64): "schnell",
    (True, 384): "Fill",
    (True, 128): "Depth or Canny",
}

# What else people drop here, by a key only that family has; the first hit names it.
KNOWN_FAMILIES: tuple[tuple[str, str], ...] = (
    ("nerf_blocks.", "Chroma Radiance"),
    ("double_blocks.0.img_attn.norm.key_norm", "a FLUX-like model"),
    ("txt_in.individual_token_refiner.", "HunyuanVideo"),
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("transformer_blocks.0.img_mod.1.", "Qwen-Image"),
    ("cap_embedder.", "Lumina 2 or Z-Image"),
    ("blocks.0.self_attn.q.", "Wan"),
    ("label_emb.0.0.weight", "Stable Diffusion XL"),
    ("input_blocks.0.0.weight", "Stable Diffusion 1.x or 2.x"),
    ("adaln_single.", "PixArt or LTX-Video"),
    ("joint_transformer_blocks.0.", "AuraFlow"),
)


def flux_facts(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, Any]:
    """Blocks and width of a model, and which release of its family it is (or is finetuned from) if its shapes tell."""
    width, channels = shapes["img_in.weight"]
    blocks = tuple(
        len({key.split(".")[1] for key in shapes if key.startswith(f"{kind}_blocks.")}) for kind in ("double", "single")
    )
    guidance = "guidance_in.in_layer.weight" in shapes
    release = FLUX2_RELEASES.get((blocks, width)) if recipe is FLUX2 else None
    if recipe is FLUX and (blocks, width) == (FLUX_BLOCKS, FLUX_WIDTH):
        release = FLUX_RELEASES.get((guidance, channels))
    return {"release": release, "blocks": blocks, "width": width, "channels": channels, "guidance": guidance}


def family_of(keys: Iterable[str]) -> str | None:
    """The name of a known model family whose key is among ``keys``, or None."""
    names = list(keys)
    return next((family for mark, family in KNOWN_FAMILIES if any(k.startswith(mark) for k in names)), None)


def find_recipe(keys: Collection[str], where: str) -> Recipe:
    """The recipe for a state dict, or :class:`SVDQuantError` that names what was seen (``where``: file or model)."""
    recipe = match_recipe(keys)
    if recipe is not None:
        return recipe
    present = set(keys)
    family = family_of(present)
    seen = f"It looks like {family}." if family else f"Its first keys are: {', '.join(sorted(present)[:6]) or 'none'}."
    known = ", ".join(r.title for r in RECIPES)
    raise SVDQuantError(f"{where}: no quantization recipe for this architecture. {seen} Known so far: {known}.")


def plan_model(shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[Recipe, list[LayerGroup]]:
    """Recipe and groups of a whole model, from the shapes of its state dict by key."""
    recipe = find_recipe(shapes, where)
    layers = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2}
    return recipe, plan(recipe, layers, where)


def match_recipe(keys: Collection[str]) -> Recipe | None:
    """The recipe whose keys are all there, if any."""
    present = set(keys)
    for recipe in RECIPES:
        if present.issuperset(recipe.keys) and not present.intersection(recipe.absent):
            return recipe
    return None


def plan(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], where: str) -> list[LayerGroup]:
    """The groups to solve, in the model's order. ``shapes`` maps layer names to their weight's ``(N, K)``.

    Every block must be complete: a file that lost layers is refused by name, not quantized half.
    """
    blocks: dict[str, set[int]] = {}
    found: dict[tuple[int, str], list[tuple[str, Rule]]] = {}
    for rule in recipe.rules:
        for layer in shapes:
            if match := rule.matches(layer):
                blocks.setdefault(rule.name.split(".", 1)[0], set()).add(int(match[1]))
                found.setdefault((int(match[1]), rule.shares or layer), []).append((layer, rule))
    for rule in recipe.rules:
        for i in range(max(blocks.get(rule.name.split(".", 1)[0], {-1})) + 1):
            if (name := rule.name.replace("{i}", str(i))) not in shapes:
                raise SVDQuantError(f"{where}: {name}.weight is missing. The file is incomplete; download it again.")
    groups = [
        LayerGroup(tuple(layer for layer, _ in members), members[0][1].kind, members[0][1].after_gelu)
        for members in found.values()
    ]
    order = {rule.name.split(".", 1)[0]: n for n, rule in reversed(list(enumerate(recipe.rules)))}
    position = {layer: n for n, layer in enumerate(natural_order(shapes))}
    return sorted(groups, key=lambda g: (order[g.names[0].split(".", 1)[0]], position[g.names[0]]))


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted so that block 10 comes after block 9."""
    return sorted(names, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")])

"""Procedural pictures and their prompts: one flat shape on a soft background.

The grammar is ``[size] colour shape on colour [top|bottom] [left|right]``, for example
"large red star on blue" or "small white moon on purple top left". What a prompt leaves open (exact
place and size, rotation, shading) is drawn at random, so one prompt has many pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 128
SIZES = {"small": (17.0, 21.0), "": (27.0, 33.0), "large": (41.0, 48.0)}  # radius in pixels; "" is no size word
COLOURS = {
    "red": (0.86, 0.13, 0.15),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.97, 0.88, 0.22),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.15, 0.32, 0.86),
    "purple": (0.55, 0.20, 0.70),
    "pink": (0.98, 0.60, 0.78),
    "white": (0.94, 0.94, 0.94),
    "black": (0.08, 0.08, 0.08),
}
VERTICAL = {"top": -1, "bottom": 1}
HORIZONTAL = {"left": -1, "right": 1}


# Signed distances in units of the shape's radius, y downwards: x, y (N, H, W) -> (N, H, W), negative inside.
# Only the neighbourhood of the outline has to be a true distance: it is what antialiasing looks at.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.80


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.15
    return torch.maximum(x.abs() * (math.sqrt(3) / 2) - y * 0.5, y) - 0.55


def _fold(x: Tensor, y: Tensor, sectors: int) -> tuple[Tensor, Tensor]:
    """Fold the plane onto half of one of `sectors` equal sectors, its middle pointing along +x."""
    step = 2 * math.pi / sectors
    angle = torch.atan2(x, -y)
    angle = (angle - step * torch.round(angle / step)).abs()
    radius = torch.hypot(x, y)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _star(x: Tensor, y: Tensor) -> Tensor:
    u, v = _fold(x, y, 5)
    # The edge from the tip (1, 0) to the notch between two tips.
    notch_u, notch_v = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    normal_u, normal_v = notch_v, 1 - notch_u
    return ((u - 1) * normal_u + v * normal_v) / math.hypot(normal_u, normal_v)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs() * 0.6, 0.55 - y * 0.6
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    half = 0.5 * (x + y).clamp_min(0)
    tip = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - half, y - half)) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, tip) / 0.6


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.74).abs() - 0.22


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.95, y - 0.30), torch.maximum(x - 0.30, y - 0.95))


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x + 0.1, y) - 0.95, 0.80 - torch.hypot(x - 0.38, y))


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.58 + y.abs() - 1) * (0.58 / math.hypot(0.58, 1))


def _flower(x: Tensor, y: Tensor) -> Tensor:
    u, v = _fold(x, y, 5)
    petal = torch.hypot(u - 0.60, v) - 0.36
    eye = 0.19 - torch.hypot(x, y)
    return torch.maximum(torch.minimum(petal, torch.hypot(x, y) - 0.5), eye)


SHAPES = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart,
    "ring": _ring, "cross": _cross, "moon": _moon, "diamond": _diamond, "flower": _flower,
}  # fmt: skip
WORDS = (*filter(None, SIZES), *COLOURS, *SHAPES, "on", *VERTICAL, *HORIZONTAL)


@dataclass(frozen=True)
class Scene:
    """What a prompt says. An empty string is a word left out."""

    colour: str
    shape: str
    ground: str
    size: str = ""
    vertical: str = ""
    horizontal: str = ""

    @property
    def prompt(self) -> str:
        words = (self.size, self.colour, self.shape, "on", self.ground, self.vertical, self.horizontal)
        return " ".join(word for word in words if word)


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene; the shape's colour and the background's always differ."""
    colour, ground = rng.choice(list(COLOURS), 2, replace=False)
    return Scene(
        colour=str(colour),
        ground=str(ground),
        shape=str(rng.choice(list(SHAPES))),
        size=str(rng.choice(list(SIZES), p=[0.35, 0.3, 0.35])),
        vertical=str(rng.choice(["", *VERTICAL], p=[0.6, 0.2, 0.2])),
        horizontal=str(rng.choice(["", *HORIZONTAL], p=[0.6, 0.2, 0.2])),
    )


def _column(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).view(-1, 1, 1)


def _pixels() -> tuple[Tensor, Tensor]:
    """x (1, 1, W) and y (1, H, 1) of the pixels' centres."""
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    return axis.view(1, 1, -1), axis.view(1, -1, 1)


def _ramp(rng: np.random.Generator, count: int, strength: float) -> Tensor:
    """A linear brightness ramp of random direction and slope, (N, H, W) around zero."""
    x, y = _pixels()
    angle = rng.uniform(0, 2 * math.pi, count)
    slope = rng.uniform(0.2, 1, count) * strength / (SIZE / 2)
    dx, dy = (_column(f(angle) * slope) for f in (np.cos, np.sin))
    return dx * (x - SIZE / 2) + dy * (y - SIZE / 2)


def paint(rng: np.random.Generator, names: list[str], ramp: float) -> Tensor:
    """Areas of the named colours with a little jitter and a brightness ramp: (N, 3, H, W), may leave 0..1."""
    light = _ramp(rng, len(names), ramp)[:, None]
    base = np.array([COLOURS[name] for name in names]) + rng.uniform(-0.03, 0.03, (len(names), 3))
    return torch.from_numpy(base.astype(np.float32))[:, :, None, None] + light


def outline(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Place the shapes of `scenes`: signed distances to their outlines in pixels, (N, H, W), negative inside."""
    count = len(scenes)
    low, high = np.array([SIZES[scene.size] for scene in scenes]).T
    radius = rng.uniform(low, high)
    # A place word pushes the shape to the border, without leaving the picture; otherwise it is near the middle.
    reach = (SIZE / 2 - radius - 2) * rng.uniform(0.8, 1, count)
    centre = []
    for sides, words in ((HORIZONTAL, [s.horizontal for s in scenes]), (VERTICAL, [s.vertical for s in scenes])):
        side = np.array([sides.get(word, 0) for word in words])
        centre.append(SIZE / 2 + side * reach + (side == 0) * rng.uniform(-4, 4, count))
    turn = rng.uniform(-0.2, 0.2, count)

    x, y = _pixels()
    dx, dy = x - _column(centre[0]), y - _column(centre[1])
    cos, sin, scale = _column(np.cos(turn)), _column(np.sin(turn)), _column(radius)
    u, v = (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale

    distance = torch.empty_like(u)
    shapes = np.array([scene.shape for scene in scenes])
    for name in set(shapes):
        rows = torch.from_numpy(np.flatnonzero(shapes == name))
        distance[rows] = SHAPES[name](u[rows], v[rows])
    return distance * scale


def render(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Pictures of `scenes`, (N, 3, 128, 128) in 0..1."""
    alpha = (0.5 - outline(scenes, rng)).clamp(0, 1)[:, None]
    ground = paint(rng, [scene.ground for scene in scenes], ramp=0.12)
    shape = paint(rng, [scene.colour for scene in scenes], ramp=0.10)
    return torch.lerp(ground, shape, alpha).clamp(0, 1)

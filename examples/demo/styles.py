"""The looks that `train_lora.py` teaches: the scenes of `pictures.py`, drawn in another style.

Each function has the signature of `pictures.render`: scenes -> pictures (N, 3, 128, 128) in 0..1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pictures import Scene, outline, paint
from torch import Tensor


def neon(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """A tube of light along the outline, with a glow; only a trace of the background's colour is left."""
    distance = outline(scenes, rng)[:, None]
    ground = 0.15 * paint(rng, [scene.ground for scene in scenes], ramp=0.12)
    light = paint(rng, [scene.colour for scene in scenes], ramp=0.0) + 0.1
    light += (0.6 - light.amax(dim=1, keepdim=True)).clamp_min(0)  # black cannot shine: it is a grey tube
    from_tube = (distance + 4).abs()  # inside the outline, so that the shape keeps its size
    glow = ground + 0.55 * torch.exp(-from_tube / 9) * light
    return torch.lerp(glow, light, (4.5 - from_tube).clamp(0, 1)).clamp(0, 1)


def sticker(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Pale colours; the shape has a wide white border and lies on its soft shadow."""
    border, offset = 6, 7
    distance = outline(scenes, rng)[:, None]
    ground = 0.45 * paint(rng, [scene.ground for scene in scenes], ramp=0.12) + 0.5
    shape = 0.7 * paint(rng, [scene.colour for scene in scenes], ramp=0.10) + 0.25
    caster = F.pad(distance - border, (offset, 0, offset, 0), mode="replicate")[..., :-offset, :-offset]
    shaded = ground * (1 - 0.6 * torch.sigmoid(-caster / 2.5))
    bordered = torch.lerp(shaded, torch.tensor(0.98), (border + 0.5 - distance).clamp(0, 1))
    return torch.lerp(bordered, shape, (0.5 - distance).clamp(0, 1)).clamp(0, 1)

"""A tiny autoencoder with the geometry of FLUX's: 8x smaller, 16 channels.

The encoder is linear, the principal components of patches of pixels; the decoder is learned. Every convolution
runs at latent resolution, so it costs little on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 16
FACTOR = 8
PIXELS = 3 * FACTOR**2  # numbers in the patch of pixels behind one latent position
# comfy.latent_formats.Flux: the model sees (z - SHIFT) * SCALE.
SHIFT, SCALE = 0.1159, 0.3611


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Decoder(nn.Module):
    """Latents -> patches of pixels: a linear map, corrected by convolutions that see the neighbours."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Conv2d(CHANNELS, PIXELS, 1)
        self.correction = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, padding=1),
            Residual(width),
            Residual(width),
            nn.SiLU(),
            nn.Conv2d(width, PIXELS, 1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.linear(latents) + self.correction(latents), FACTOR)


class Autoencoder(nn.Module):
    """Pictures (N, 3, H, W) in 0..1 <-> FLUX-style latents (N, 16, H/8, W/8)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(nn.PixelUnshuffle(FACTOR), nn.Conv2d(PIXELS, CHANNELS, 1))
        self.decoder = Decoder(width)

    @torch.no_grad()
    def fit_components(self, pictures: Tensor) -> None:
        """Set the encoder, and the decoder's linear part, from the 8x8 patches of pictures (N, 3, H, W)."""
        patches = F.pixel_unshuffle(pictures * 2 - 1, FACTOR).movedim(1, -1).flatten(0, 2)
        mean = patches.mean(dim=0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        variance, vectors = (part[..., -CHANNELS:] for part in torch.linalg.eigh(covariance))
        # Colours stay stronger than fine detail, as in any picture, so that sampling goes from coarse to fine;
        # taking all components to equal strength made outlines fall apart.
        strength = variance**0.25
        strength /= strength.square().mean().sqrt()
        # An orthogonal mix (Hadamard) of the components has the same variance in every channel: one.
        mix = torch.ones(1, 1)
        for _ in range(CHANNELS.bit_length() - 1):
            mix = torch.kron(mix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5)
        encode = mix @ (vectors * strength / variance.sqrt()).T
        decode = (vectors * variance.sqrt() / strength) @ mix.T
        self.encoder[1].weight.copy_(encode[:, :, None, None])
        self.encoder[1].bias.copy_(-encode @ mean)
        self.decoder.linear.weight.copy_(decode[:, :, None, None])
        self.decoder.linear.bias.copy_(mean)
        nn.init.zeros_(self.decoder.correction[-1].weight)
        nn.init.zeros_(self.decoder.correction[-1].bias)

    def encode_normalised(self, pictures: Tensor) -> Tensor:
        """What the diffusion model is trained on: latents after FLUX's process_in."""
        return self.encoder(pictures * 2 - 1)

    def decode_normalised(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * 0.5 + 0.5

    def encode(self, pictures: Tensor) -> Tensor:
        return self.encode_normalised(pictures) / SCALE + SHIFT

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_normalised((latents - SHIFT) * SCALE).clamp(0, 1)


def load_autoencoder(path: Path) -> Autoencoder:
    """Read the weights; the module computes in fp32 on the CPU."""
    model = Autoencoder()
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval().requires_grad_(False).to(torch.float32)

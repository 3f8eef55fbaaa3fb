"""How alike two pictures are, in numbers and as a sheet to look at.

Pictures are ``(B, H, W, 3)`` float in 0…1, as ComfyUI's IMAGE.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import SVDQuantError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
LUMA = (0.299, 0.587, 0.114)

NARROW, WIDE = 320, 1024  # columns of the sheet: small pictures are enlarged (nearest), large ones reduced
MARGIN, HEAD, CAPTION = 16, 46, 28
PAPER, INK, QUIET = (24, 24, 27), (235, 235, 235), (165, 165, 170)
AMPLIFICATIONS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Comparison:
    """``psnr (B,)`` in dB (infinite for identical pictures) and ``ssim (B,)``, with the figures of all together."""

    psnr: list[float]
    ssim: list[float]
    mean_psnr: float
    mean_ssim: float

    def lines(self) -> list[str]:
        """One per picture, and one for all if there are several."""
        lines = [f"{i}: {figures(*pair)}" for i, pair in enumerate(zip(self.psnr, self.ssim, strict=True), start=1)]
        if len(lines) == 1:
            return [lines[0].removeprefix("1: ")]
        return [*lines, f"all {len(lines)} pictures: {figures(self.mean_psnr, self.mean_ssim)}"]


def figures(psnr: float, ssim: float) -> str:
    """In words."""
    return "identical" if math.isinf(psnr) else f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"


def compare(reference: Tensor, candidate: Tensor) -> Comparison:
    """PSNR and SSIM of every pair; of all together, the PSNR of the mean squared error and the mean SSIM.

    :class:`SVDQuantError` for batches of different size or shape, and for pictures smaller than the window.
    """
    if reference.shape[1:3] != candidate.shape[1:3]:
        sizes = " and ".join(f"{t.shape[2]}×{t.shape[1]}" for t in (reference, candidate))
        raise SVDQuantError(f"The pictures differ in size: {sizes}. Compare pictures of the same size.")
    if len(reference) != len(candidate):
        raise SVDQuantError(
            f"There are {len(reference)} reference and {len(candidate)} candidate pictures. Give as many of both, in "
            "the same order."
        )
    if min(reference.shape[1:3]) < WINDOW:
        raise SVDQuantError(f"Pictures of at least {WINDOW}×{WINDOW} pixels are needed, for SSIM's window.")
    a, b = reference[..., :3].double().cpu(), candidate[..., :3].double().cpu()
    errors = (a - b).square().mean(dim=(1, 2, 3))
    similarity = torch.cat([ssim(x, y) for x, y in zip(a.split(1), b.split(1), strict=True)])
    return Comparison(
        [psnr_of(e) for e in errors.tolist()],
        similarity.tolist(),
        psnr_of(float(errors.mean())),
        float(similarity.mean()),
    )


def psnr_of(squared_error: float) -> float:
    """Peak signal (1) over a mean squared error, in dB."""
    return math.inf if squared_error == 0 else -10 * math.log10(squared_error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity ``(B,)`` of two batches (Wang et al. 2004, doi 10.1109/TIP.2003.819861).

    On luma (BT.601, as the pictures are encoded), Gaussian window 11×11 with σ 1.5, K₁ 0.01, K₂ 0.03, range 1, the
    mean over all places where the window fits.
    """
    x, y = (torch.tensordot(t, t.new_tensor(LUMA), dims=1)[:, None] for t in (a, b))  # (B, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x.square()
    var_y = blur(y * y) - mean_y.square()
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * structure).mean(dim=(1, 2, 3))


def blur(x: Tensor) -> Tensor:
    """Weighted means ``(B, 1, H - 10, W - 10)`` in the Gaussian window, which is a product of two lines."""
    line = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    line = torch.exp(-line.square() / (2 * SIGMA**2))
    line /= line.sum()
    rows = torch.nn.functional.conv2d(x, line.view(1, 1, 1, -1))
    return torch.nn.functional.conv2d(rows, line.view(1, 1, -1, 1))


def amplification(difference: Tensor) -> int:
    """The largest factor by which differences may be shown with 99 % of them still in range."""
    flat = difference.flatten()
    rank = max(1, math.ceil(0.99 * flat.numel()))
    high = float(flat.kthvalue(rank).values)
    return max((f for f in AMPLIFICATIONS if f * high <= 1), default=1)


def sheet(reference: Tensor, candidate: Tensor, comparison: Comparison, names: tuple[str, str]) -> Image.Image:
    """A row per pair: reference, candidate, and their absolute difference, amplified by the factor that is written."""
    a, b = reference[..., :3].float().cpu().clamp(0, 1), candidate[..., :3].float().cpu().clamp(0, 1)
    difference = (a - b).abs()
    factor = amplification(difference)
    width, height = column_size(a.shape[2], a.shape[1])
    small = ImageFont.load_default(15)
    image = Image.new("RGB", (3 * width + 4 * MARGIN, HEAD + len(a) * (height + CAPTION + 8) + CAPTION), PAPER)
    draw = ImageDraw.Draw(image)
    columns = (a, b, (difference * factor).clamp(0, 1))
    shown = f"{factor} times as strong" if factor > 1 else "as it is"
    heads = (("reference", names[0]), ("candidate", names[1]), ("difference", shown))
    for i, (pictures, (title, name)) in enumerate(zip(columns, heads, strict=True)):
        x = MARGIN + i * (width + MARGIN)
        draw.text((x, 14), title, INK, ImageFont.load_default(18))
        shift = draw.textlength(title, ImageFont.load_default(18)) + 10
        draw.text((x + shift, 17), shortened(draw, name, small, width - shift), QUIET, small)
        for row, picture in enumerate(pictures):
            y = HEAD + row * (height + CAPTION + 8)
            image.paste(to_pil(picture, (width, height)), (x, y))
    for row, pair in enumerate(zip(comparison.psnr, comparison.ssim, strict=True)):
        y = HEAD + row * (height + CAPTION + 8) + height + 6
        draw.text((MARGIN, y), f"{row + 1}:  {figures(*pair)}", INK, small)
    draw.text((MARGIN, image.height - CAPTION), summary(comparison), QUIET, small)
    return image


def summary(comparison: Comparison) -> str:
    """The last line of a sheet: how the figures are meant, and those of all pictures if there are several."""
    meant = "PSNR: higher is closer. SSIM on luma: 1 is the same."
    return meant if len(comparison.psnr) == 1 else f"{comparison.lines()[-1]}.  {meant}"


def column_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture on the sheet."""
    if width < NARROW:
        factor = math.ceil(NARROW / width)
        return factor * width, factor * height
    if width > WIDE:
        return WIDE, round(height * WIDE / width)
    return width, height


def to_pil(picture: Tensor, size: tuple[int, int]) -> Image.Image:
    """``(H, W, 3)`` as an image of that size."""
    image = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    if image.size == size:
        return image
    enlarged = size[0] > image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as IMAGE ``(1, H, W, 3)``."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def shortened(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float) -> str:
    """The text, with its middle left out where it is wider than that."""
    if draw.textlength(text, font) <= width:
        return text
    keep = len(text)
    while keep > 2 and draw.textlength(middle_out(text, keep), font) > width:
        keep -= 1
    return middle_out(text, keep)


def middle_out(text: str, keep: int) -> str:
    """``keep`` characters of the text, from both ends."""
    return f"{text[: (keep + 1) // 2]}...{text[len(text) - keep // 2 :]}"

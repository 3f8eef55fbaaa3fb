"""The picture people look at first: one bar of error per layer, in the model's order."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, TOP, BOTTOM, LEFT = 1024, 56, 64, 64
COLOURS = {"w4a4": (74, 144, 226), "w8a8": (63, 166, 107), "w4a16": (155, 155, 155)}
LEGEND = {"w4a4": "blue: weights and activations", "w8a8": "green: 8 bit", "w4a16": "grey: 4-bit weights only"}
INK, GRID = (40, 40, 40), (225, 225, 225)


def error_chart(layers: list[dict[str, Any]], title: str, height: int = 420) -> Image.Image:
    """RGB picture of ``error_db`` per layer (dB under the layer's output; lower bars are better).

    ``layers`` are the records of :class:`~svdq_core.quantize.Report`.
    """
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    draw.text((LEFT, 14), title, INK, font)
    floor, ceiling = axis([layer["error_db"] for layer in layers])
    plot = height - TOP - BOTTOM

    def y_of(db: float) -> float:
        return TOP + plot * (ceiling - db) / (ceiling - floor)

    for db in range(floor, ceiling + 1, max(5, (ceiling - floor) // 5 // 5 * 5)):
        draw.line((LEFT, y_of(db), WIDTH - 20, y_of(db)), GRID)
        draw.text((8, y_of(db) - 8), f"{db} dB", INK, small)
    step = (WIDTH - LEFT - 20) / max(1, len(layers))
    block = None
    for i, layer in enumerate(layers):
        x = LEFT + i * step
        colour = COLOURS.get(layer["kind"], COLOURS["w4a4"])
        draw.rectangle((x, y_of(layer["error_db"]), x + max(1.0, step * 0.8), y_of(floor)), colour)
        head = ".".join(layer["name"].split(".")[:2])
        if head != block and (block is None or head.split(".")[0] != block.split(".")[0] or len(layers) < 60):
            draw.line((x - step * 0.1, y_of(floor), x - step * 0.1, y_of(floor) + 6), INK)
            draw.text((x, y_of(floor) + 8), head.replace("_blocks", ""), INK, small)
        block = head
    kinds = {layer["kind"] for layer in layers}
    legend = [text for kind, text in LEGEND.items() if kind in kinds]
    draw.text((LEFT, height - 24), "   ".join([*legend, "lower is better"]), INK, small)
    return image


def axis(errors: list[float]) -> tuple[int, int]:
    """Floor and ceiling of the axis, multiples of 5 dB around the errors."""
    low, high = min(errors, default=-30.0), max(errors, default=0.0)
    floor, ceiling = int(low // 5) * 5 - 5, int(-(-high // 5)) * 5
    return floor, max(ceiling, floor + 10)


def save_chart(layers: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write the chart as a PNG."""
    error_chart(layers, title).save(path)

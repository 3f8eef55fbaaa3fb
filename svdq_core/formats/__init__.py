"""Number formats of the 4-bit (and 8-bit) path: how weights are stored, how activations are rounded.

One file per format. ``FORMATS`` maps the name users pick (``int4``, ``nvfp4``, ``int8``, ``awq``) to it;
``by_disk_name`` maps what a file's ``comfy_quant`` says.
"""

from ..errors import SVDQuantError
from .awq import AWQ
from .base import GELU_SHIFT, Format
from .int4 import Int4
from .int8 import Int8
from .nvfp4 import NVFP4

FORMATS: dict[str, Format] = {f.name: f for f in (Int4(), NVFP4(), Int8(), AWQ())}
BRANCH_FORMATS = tuple(name for name, f in FORMATS.items() if f.has_branch)


def get_format(name: str) -> Format:
    """The format a user named; :class:`SVDQuantError` lists the known ones otherwise."""
    if name not in FORMATS:
        raise SVDQuantError(f"Unknown format '{name}'. Choose one of: {', '.join(FORMATS)}.")
    return FORMATS[name]


def by_disk_name(disk_name: str) -> Format | None:
    """The format that a layer's ``comfy_quant`` names, or None for one that is not ours."""
    return next((f for f in FORMATS.values() if f.disk_name == disk_name), None)


__all__ = ["AWQ", "BRANCH_FORMATS", "FORMATS", "GELU_SHIFT", "Format", "by_disk_name", "get_format"]

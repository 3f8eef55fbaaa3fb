"""The quantizer and the runtime of ComfyUI-SVDQuant: pure torch, except for the sub-package ``host``."""

from .checkpoint import describe_file, read_checkpoint
from .errors import SVDQuantError
from .linear import QuantizedLinear
from .solve import solve_linear

__all__ = ["QuantizedLinear", "SVDQuantError", "describe_file", "read_checkpoint", "solve_linear"]

"""A quantized linear layer: its tensors, its exact forward, its on-disk form.

Shapes: ``M`` tokens, ``K`` in_features, ``N`` out_features, ``R`` rank, ``G`` group size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import SVDQuantError
from .formats import FORMATS, GELU_SHIFT, Format, by_disk_name
from .formats.int4 import FLOATS


def linear_forward(
    x: Tensor,
    fmt: Format,
    tensors: dict[str, Tensor],
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    act_unsigned: bool,
    compute_dtype: torch.dtype,
    grid: Format | None = None,
) -> Tensor:
    """``y = Q(x / λ) Q(R)ᵀ + (x proj_down) proj_upᵀ + b`` (SVDQuant, arXiv 2411.05007, eq. 4 and 5).

    ``x (..., K)`` of any float dtype, result ``(..., N)`` in x's dtype. Activations are smoothed and
    rounded in float32, their scales in x's dtype; the two products run in ``compute_dtype``. ``grid`` is the format
    that activations are rounded as, if it is not the weight's: a 4-bit weight takes INT8's, too (W4A8).
    """
    rows = x.reshape(-1, x.shape[-1])
    weight = fmt.unpack(tensors, compute_dtype)
    if smooth_factor is None:
        main = rows.to(compute_dtype)
    else:
        shift = GELU_SHIFT if act_unsigned else 0.0
        smoothed = rows.float().add(shift).div_(smooth_factor.float())  # one float32 copy, rounded in place
        main = (grid or fmt).round_activations(smoothed, x.dtype, act_unsigned).to(compute_dtype)
        del smoothed
    bias = None if bias is None else bias.to(compute_dtype)
    y = torch.nn.functional.linear(main, weight, bias)
    if proj_down is not None and proj_up is not None and proj_down.shape[1] > 0:
        y = y.addmm_(rows.to(compute_dtype) @ proj_down.to(compute_dtype), proj_up.to(compute_dtype).t())
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


RANKS = 16  # kernels take a rank that is a multiple of this


@dataclass
class QuantizedLinear:
    """One quantized linear, in the natural layout of the file format.

    ``tensors`` holds the weight as the format stores it (INT4: ``weight (N, K/2)`` int8 and
    ``weight_scale (K/64, N)``); ``smooth_factor (K,)``, ``proj_down (K, R)`` in the raw-input basis,
    ``proj_up (N, R)`` and ``bias (N,)`` are bf16 or fp16. ``info`` is what the solver found (α, error, ...). Its
    tensors are not to be exchanged for others.
    """

    fmt: Format
    tensors: dict[str, Tensor]
    smooth_factor: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    bias: Tensor | None = None
    act_unsigned: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # from the weight
    ready: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # what callers find out

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.fmt.logical_shape(self.tensors["weight"])

    @property
    def rank(self) -> int:
        """Rank of the 16-bit branch, 0 for none."""
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    @property
    def parts(self) -> dict[str, Tensor]:
        """All tensors there are, by name."""
        rest = {name: getattr(self, name) for name in ("smooth_factor", "proj_down", "proj_up", "bias")}
        return self.tensors | {name: tensor for name, tensor in rest.items() if tensor is not None}

    def widened(self, up: Tensor, down: Tensor) -> "QuantizedLinear":
        """With ``up (N, R)`` and ``down (R, K)`` in the branch, in their dtype."""
        proj_down, proj_up = down.t(), up
        if self.proj_down is not None and self.proj_up is not None:
            proj_down = torch.cat([self.proj_down.to(down.dtype), proj_down], dim=1)
            proj_up = torch.cat([self.proj_up.to(up.dtype), up], dim=1)
        wider = replace(self, proj_down=proj_down, proj_up=proj_up)
        wider.derived = self.derived  # its weight is the same
        return wider

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.numel() * t.element_size() for t in self.state_dict("").values())

    def forward(self, x: Tensor) -> Tensor:
        """The reference result ``(..., N)`` for ``x (..., K)``: float32 arithmetic, returned in x's dtype.

        float64 inputs are computed in float64, for checking against exact formulas.
        """
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        return linear_forward(
            x,
            self.fmt,
            self.tensors,
            self.smooth_factor,
            self.proj_down,
            self.proj_up,
            self.bias,
            self.act_unsigned,
            compute,
        )

    __call__ = forward

    def dequantized_weight(self) -> Tensor:
        """The effective weight ``(N, K)`` float32: ``Q(R) diag(1/λ) + proj_up proj_downᵀ``."""
        weight = self.fmt.unpack(self.tensors, torch.float32)
        if self.smooth_factor is not None:
            weight = weight / self.smooth_factor.float()
        if self.proj_down is not None and self.proj_up is not None:
            weight = weight + self.proj_up.float() @ self.proj_down.float().t()
        return weight

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The on-disk tensors, named ``<prefix>.<tensor>`` (a missing final dot is added)."""
        conf: dict[str, Any] = {"format": self.fmt.disk_name}
        if self.fmt.has_branch:
            conf["act_unsigned"] = self.act_unsigned
        tensors = self.parts | {"comfy_quant": torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)}
        return {dotted(prefix) + name: t.contiguous() for name, t in tensors.items()}

    @classmethod
    def from_state_dict(cls, sd: dict[str, Tensor], prefix: str = "") -> "QuantizedLinear":
        """Read a layer back; :class:`SVDQuantError` names the key that is missing or has the wrong form."""
        prefix = dotted(prefix)
        conf = layer_config(sd, prefix)
        fmt = by_disk_name(conf.get("format", ""))
        if fmt is None:
            known = ", ".join(f.disk_name for f in FORMATS.values())
            raise SVDQuantError(f"{prefix}comfy_quant: format '{conf.get('format')}' is not one of {known}.")
        tensors = {name: sd.get(prefix + name) for name in ("weight", "weight_scale", *fmt.extra_tensors)}
        branch: dict[str, Any] = {name: sd.get(prefix + name) for name in ("smooth_factor", "proj_down", "proj_up")}
        check_layer(prefix, fmt, tensors, branch if fmt.has_branch else {}, sd.get(prefix + "bias"))
        return cls(
            fmt=fmt,
            tensors={name: t for name, t in tensors.items() if t is not None},
            bias=sd.get(prefix + "bias"),
            act_unsigned=bool(conf.get("act_unsigned", False)),
            **(branch if fmt.has_branch else {}),
        )


def dotted(prefix: str) -> str:
    """``layer`` and ``layer.`` both mean the tensors ``layer.*``; the empty prefix means none."""
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def layer_config(sd: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The JSON of ``<prefix>comfy_quant``."""
    marker = sd.get(prefix + "comfy_quant")
    if marker is None:
        raise SVDQuantError(f"{prefix}comfy_quant is missing: this layer is not quantized, or the file is incomplete.")
    try:
        conf = json.loads(bytes(marker.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise SVDQuantError(f"{prefix}comfy_quant is not JSON ({error}): the file is damaged.") from None
    if not isinstance(conf, dict):
        raise SVDQuantError(f"{prefix}comfy_quant is not a JSON object: the file is damaged.")
    return conf


def check_layer(
    prefix: str,
    fmt: Format,
    tensors: dict[str, Tensor | None],
    branch: dict[str, Tensor | None],
    bias: Tensor | None,
) -> None:
    """Raise :class:`SVDQuantError` unless every tensor is there with the shape and dtype of the format."""
    weight = tensors["weight"]
    if weight is None or weight.dim() != 2:
        found = "missing" if weight is None else f"{tuple(weight.shape)}"
        raise SVDQuantError(f"{prefix}weight: expected a matrix of {fmt.disk_name} codes, found {found}.")
    n, k = fmt.logical_shape(weight)
    if fmt.group is not None and k % fmt.group:
        raise SVDQuantError(f"{prefix}weight: {k} input features are not a multiple of {fmt.group}.")
    down = branch.get("proj_down")
    rank = down.shape[-1] if down is not None and down.dim() else 0
    wanted = fmt.expected(n, k)
    if branch:
        wanted |= {"smooth_factor": ((k,), FLOATS), "proj_down": ((k, rank), FLOATS), "proj_up": ((n, rank), FLOATS)}
    if bias is not None:
        wanted |= {"bias": ((n,), FLOATS)}
    for name, (shape, dtypes) in wanted.items():
        tensor = bias if name == "bias" else {**tensors, **branch}.get(name)
        if tensor is None:
            raise SVDQuantError(f"{prefix}{name} is missing: expected shape {shape}. The file is incomplete.")
        shapes = (shape, (n,)) if name in fmt.by_row else (shape,)
        if tuple(tensor.shape) not in shapes or tensor.dtype not in dtypes:
            allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise SVDQuantError(
                f"{prefix}{name}: expected shape {' or '.join(map(str, shapes))} of {allowed}, found "
                f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}."
            )

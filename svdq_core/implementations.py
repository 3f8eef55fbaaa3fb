"""The ways to run a quantized linear: our Triton kernels, comfy-kitchen's compiled ones, plain torch.

Each takes ``x (M, K)`` in bf16 or fp16 and a layer on the same device and returns ``(M, N)`` in x's dtype, with
branch and bias. Names are ``<library>[-<what>]``. Which one runs is :mod:`.backends`' choice.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from .. import triton_kernels
from .deferred import operands
from .formats import FORMATS, GELU_SHIFT
from .linear import RANKS, QuantizedLinear, linear_forward

ACTIVATIONS = ("auto", "4 bit", "8 bit")  # what a user may ask for; it applies to int4 files


@dataclass(frozen=True)
class Implementation:
    """``activations`` is what the input is rounded to. ``tolerance_db`` is how far the result may be from plain
    torch's with the same activations, ``|difference|² / |result|²``, on random data.

    -40 dB is the rounding of the 16-bit result and of a few activations that lie on a border; more is allowed to
    arithmetic that rounds on purpose elsewhere (weights widened to 8 bit, smoothing in 16 bit). A result 5 % too large
    is at -26 dB; swapped nibbles, a wrong scale or a lost branch end above -10 dB.
    """

    name: str
    fmt: str
    activations: str
    tolerance_db: float
    run: Callable[..., Tensor]
    before: str = ""  # what the input is that it takes: a :class:`.deferred.Deferred`'s ``before``

    @cached_property
    def library(self) -> str:
        return self.name.split("-")[0]

    def why_not(self, arch: str) -> str | None:
        """Why it cannot run on a class of device (``sm89``, ``gfx1100``, ``cpu``); None if it can, as far as known."""
        if self.library == "kitchen":
            return kitchen_why_not(arch, KITCHEN_OPS[self.name])
        if self.library != "triton":
            return None
        if not has_matrix_units(arch):
            return f"the Triton kernels are for sm80 and later and for gfx94, gfx95, gfx11 and gfx12, not for {arch}"
        return triton_kernels.why_not() or ("no e4m3 units" if "fp8" in self.name and not has_e4m3(arch) else None)

    def takes(self, k: int, n: int) -> bool:
        """Whether it takes a weight (n, k): comfy-kitchen's tiles are 128 outputs wide and take no part of one."""
        return n % 128 == 0 or self.name != "kitchen-w4a4"


@cache
def taking(implementation: Implementation, before: str) -> Implementation | None:
    """``implementation`` as it takes inputs that have ``before`` to be computed; None if it does not, but their value.

    Our own kernels for inputs of 4 and 8 bit do. It has a name of its own: it may fail where the other does not.
    """
    if implementation.library != "triton" or implementation.activations == "16 bit":
        return None
    return replace(implementation, name=f"{implementation.name}-after-{before}", before=before)


def has_matrix_units(arch: str) -> bool:
    """Whether Triton compiles our 8-bit products for it: not before sm80; RDNA without WMMA might even hang."""
    if arch.startswith("sm"):
        return int(arch[2:]) >= 80
    return arch == "cpu" or arch.startswith(("gfx94", "gfx95", "gfx11", "gfx12"))


def has_e4m3(arch: str) -> bool:
    """Whether the matrix units take float8_e4m3fn; gfx942's take another kind."""
    return arch in ("sm89", "cpu") or arch.startswith(("gfx12", "gfx95")) or (arch[:2] == "sm" and int(arch[2:]) >= 90)


KITCHEN_OPS = {
    "kitchen-w4a4": ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"),
    "kitchen-w4a16": ("gemv_awq_w4a16",),
}


def kitchen_why_not(arch: str, ops: tuple[str, ...]) -> str | None:
    """Why comfy-kitchen's compiled kernels cannot run; it would take its own plain torch, under the same name."""
    if arch in ("sm70", "sm75"):
        return "comfy-kitchen needs sm80"
    try:
        from comfy_kitchen.registry import registry
    except ImportError:
        return "comfy-kitchen is not installed"
    try:
        compiled = all(registry.get_capable_backend(op) in ("cuda", "hip") for op in ops)
    except Exception as error:  # an older comfy-kitchen, which does not know the op or has another registry
        return f"this comfy-kitchen does not offer {' and '.join(ops)} ({type(error).__name__})"
    return None if compiled else "comfy-kitchen has no compiled kernels for this device"


def branch(x: Tensor, layer: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """``proj_down (K, R)``, ``proj_up (N, R)`` and the bias in x's dtype; R is 0 without a branch.

    R is filled up with zeros to a multiple of RANKS: others load slowly, and Triton would compile every kernel once
    more for them.
    """
    if x.dtype in layer.ready:
        return layer.ready[x.dtype]
    n, k = layer.shape
    down, up, bias = layer.proj_down, layer.proj_up, layer.bias
    if down is None or up is None:
        down, up = (torch.empty(size, 0, dtype=x.dtype, device=x.device) for size in (k, n))
    if missing := -down.shape[1] % RANKS:
        down, up = (torch.nn.functional.pad(each, (0, missing)) for each in (down, up))
    found = down.to(x.dtype), up.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if all(a is b for a, b in zip(found, (layer.proj_down, layer.proj_up, layer.bias))):  # takes no memory
        layer.ready[x.dtype] = found
    return found


def once(layer: QuantizedLinear, name: str, make: Callable[[], Tensor]) -> Tensor:
    """A few numbers that follow from a layer's weight: made once and kept, unless that is captured into a graph, which
    computes them later. A tape may make them again for layers that are met for the first time."""
    found = layer.derived.get(name)
    if found is None:
        found = make()
        if not capturing(found.device):
            layer.derived[name] = found
    return found


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a CUDA graph, which cannot wait for a result."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def smoothing(layer: QuantizedLinear) -> Tensor:
    """λ (K,); every format with a branch has it on disk."""
    assert layer.smooth_factor is not None
    return layer.smooth_factor


def torch_linear(x: Tensor, layer: QuantizedLinear, grid: str | None = None) -> Tensor:
    """Unpack the weight, multiply in x's dtype; activations on the grid of the format ``grid`` (default: their own)."""
    return linear_forward(
        x, layer.fmt, layer.tensors, layer.smooth_factor, layer.proj_down, layer.proj_up, layer.bias,
        layer.act_unsigned, x.dtype, FORMATS[grid] if grid else None,
    )  # fmt: skip


def triton_w4a4(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """INT4 codes on both sides, group-64 scales in the main loop."""
    from ..triton_kernels.gemm_w4a4 import gemm_w4a4
    from ..triton_kernels.quantize_act import quantize_act

    down, up, bias = branch(x, layer)
    rows, before = operands(x)
    codes, scales, hidden = quantize_act(rows, smoothing(layer), down, layer.act_unsigned, **before)
    weight, weight_scale = layer.tensors["weight"], layer.tensors["weight_scale"]
    return gemm_w4a4(codes, scales, weight, weight_scale, hidden, up, bias, layer.act_unsigned)


def triton_mlp(x: Tensor, first: QuantizedLinear, second: QuantizedLinear) -> Tensor:
    """Two layers with GELU (tanh) between; the first one's epilogue quantizes, its 16-bit output is never written."""
    from ..triton_kernels.gemm_w4a4 import gemm_w4a4
    from ..triton_kernels.gemm_w4a4_gelu import gemm_w4a4_gelu
    from ..triton_kernels.quantize_act import quantize_act

    (down, up, bias), (next_down, next_up, next_bias) = branch(x, first), branch(x, second)
    rows, before = operands(x)
    codes, scales, hidden = quantize_act(rows, smoothing(first), down, first.act_unsigned, **before)
    t = first.tensors
    codes, scales, hidden = gemm_w4a4_gelu(
        codes, scales, t["weight"], t["weight_scale"], hidden, up, bias, first.act_unsigned,
        smoothing(second), next_down, second.act_unsigned,
    )  # fmt: skip
    t = second.tensors
    return gemm_w4a4(
        codes, scales, t["weight"], t["weight_scale"], hidden, next_up, next_bias, second.act_unsigned
    )  # fmt: skip


def mlp_scratch(m: int, first: QuantizedLinear, second: QuantizedLinear) -> int:
    """Bytes of the partial sums that :func:`triton_mlp` needs for ``m`` tokens."""
    from ..triton_kernels.gemm_w4a4_gelu import TILES

    places, rank = -(-first.shape[0] // (64 * TILES)), -(-second.rank // RANKS) * RANKS
    return 4 * places * m * rank


def torch_mlp(x: Tensor, first: QuantizedLinear, second: QuantizedLinear) -> Tensor:
    """The same in plain torch."""
    return torch_linear(torch.nn.functional.gelu(torch_linear(x, first), approximate="tanh"), second)


def triton_w4a8(x: Tensor, layer: QuantizedLinear, kind: str) -> Tensor:
    """8-bit activations; the GEMM widens the 4-bit weight as it goes."""
    from ..triton_kernels.gemm_w4a8 import gemm_w4a8, row_scale_of
    from ..triton_kernels.quantize_token import quantize_token

    down, up, bias = branch(x, layer)
    rows, before = operands(x)
    codes, scales, hidden = quantize_token(rows, smoothing(layer), down, layer.act_unsigned, kind, **before)
    weight, weight_scale = layer.tensors["weight"], layer.tensors["weight_scale"]
    row_scale = once(layer, "row_scale", lambda: row_scale_of(weight_scale))
    return gemm_w4a8(codes, scales, weight, weight_scale, hidden, up, bias, row_scale)


def triton_widened(x: Tensor, layer: QuantizedLinear, kind: str) -> Tensor:
    """8-bit activations; the weight is widened to 8 bit once per call, into memory that the next layer uses again."""
    from ..triton_kernels.gemm_w8a8 import gemm_w8a8
    from ..triton_kernels.quantize_token import quantize_token
    from ..triton_kernels.widen_w4 import widen_w4

    down, up, bias = branch(x, layer)
    act_kind = unsigned_kind(layer) if kind == "int8" else kind
    rows, before = operands(x)
    codes, scales, hidden = quantize_token(rows, smoothing(layer), down, layer.act_unsigned, act_kind, **before)
    weight, row_scale, weight_sum = widen_w4(layer.tensors["weight"], layer.tensors["weight_scale"], act_kind)
    return gemm_w8a8(
        codes, scales, weight, row_scale, hidden, up, bias, weight_sum if act_kind == "uint8" else None
    )  # fmt: skip


def triton_w8a8(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """INT8 files."""
    from ..triton_kernels.gemm_w8a8 import gemm_w8a8
    from ..triton_kernels.quantize_token import quantize_token

    down, up, bias = branch(x, layer)
    kind, weight = unsigned_kind(layer), layer.tensors["weight"]
    rows, before = operands(x)
    codes, scales, hidden = quantize_token(rows, smoothing(layer), down, layer.act_unsigned, kind, **before)
    row_scale = once(layer, "row_scale", lambda: layer.tensors["weight_scale"][0].float())
    weight_sum = once(layer, "weight_sum", lambda: weight.sum(dim=1, dtype=torch.int32)) if kind == "uint8" else None
    return gemm_w8a8(codes, scales, weight, row_scale, hidden, up, bias, weight_sum)


def unsigned_kind(layer: QuantizedLinear) -> str:
    """The int8 grid of a layer's activations."""
    return "uint8" if layer.act_unsigned else "int8"


def triton_nvfp4(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """e2m1 on both sides: the block-scaled MMA of sm 100 and 120, widened in registers elsewhere."""
    from ..triton_kernels.gemm_nvfp4 import gemm_nvfp4
    from ..triton_kernels.quantize_nvfp4 import quantize_nvfp4

    down, up, bias = branch(x, layer)
    rows, before = operands(x)
    codes, scales, hidden = quantize_nvfp4(rows, smoothing(layer), down, layer.act_unsigned, **before)
    weight, scale = layer.tensors["weight"], layer.tensors["weight_scale"]
    return gemm_nvfp4(codes, scales, weight, scale, layer.tensors["weight_scale_2"], hidden, up, bias)


def triton_w4a16(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """Modulation linears; a branch can only come from a LoRA."""
    from ..triton_kernels.gemm_w4a16 import gemm_w4a16

    t = layer.tensors
    codes = (t["weight"], t["weight_scale"], t["weight_zero"])
    if not layer.rank:
        return gemm_w4a16(x, *codes, layer.bias)
    down, up, bias = branch(x, layer)
    return gemm_w4a16(x, *codes, bias, x @ down, up)


def kitchen_w4a4(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """INT4 tensor cores where the part has them (sm 80 to 89); the down-projection is a product of its own.

    Its smoothing and the shift of unsigned activations are in 16 bit.
    """
    import comfy_kitchen

    # It would keep codes and scales of every shape it has seen, for good. It asks at every call.
    os.environ.setdefault("COMFY_KITCHEN_SVDQUANT_REUSE_WORKSPACE", "0")
    (down, up, bias), scales = branch(x, layer), layer.tensors["weight_scale"].to(x.dtype)
    x, unsigned = x.contiguous(), layer.act_unsigned
    codes, act_scales, hidden = comfy_kitchen.quantize_svdquant_w4a4(
        x + GELU_SHIFT if unsigned else x, smoothing(layer).to(x.dtype), down, act_unsigned=unsigned, lora_x=x
    )
    weight = layer.tensors["weight"].view(torch.int8)
    y = comfy_kitchen.scaled_mm_svdquant_w4a4(codes, weight, act_scales, scales, hidden, up, bias, unsigned)
    return y[: x.shape[0]]  # it pads M to 256


def kitchen_w4a16(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """Modulation linears."""
    import comfy_kitchen

    t, (down, up, bias) = layer.tensors, branch(x, layer)
    scale, zero = t["weight_scale"].to(x.dtype), t["weight_zero"].to(x.dtype)
    y = comfy_kitchen.gemv_awq_w4a16(x, t["weight"].view(torch.int8), scale, zero, bias)
    return y.addmm_(x @ down, up.t()) if up.shape[1] else y


IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {
    (fmt, name): Implementation(name, fmt, activations, tolerance, run)
    for fmt, name, activations, tolerance, run in (
        ("int4", "triton-w4a4", "4 bit", -40.0, triton_w4a4),
        ("int4", "triton-w4a8-int8", "8 bit", -36.0, partial(triton_w4a8, kind="int8")),
        ("int4", "triton-w4a8-fp8", "8 bit", -29.0, partial(triton_w4a8, kind="fp8")),
        ("int4", "triton-widened-int8", "8 bit", -36.0, partial(triton_widened, kind="int8")),
        ("int4", "triton-widened-fp8", "8 bit", -29.0, partial(triton_widened, kind="fp8")),
        ("int4", "kitchen-w4a4", "4 bit", -30.0, kitchen_w4a4),
        ("int4", "torch", "4 bit", -40.0, torch_linear),
        ("int4", "torch-w4a8", "8 bit", -40.0, partial(torch_linear, grid="int8")),
        ("int8", "triton-w8a8", "8 bit", -40.0, triton_w8a8),
        ("int8", "torch", "8 bit", -40.0, torch_linear),
        ("nvfp4", "triton-nvfp4", "4 bit", -40.0, triton_nvfp4),
        ("nvfp4", "torch", "4 bit", -40.0, torch_linear),
        ("awq", "triton-w4a16", "16 bit", -40.0, triton_w4a16),
        ("awq", "kitchen-w4a16", "16 bit", -40.0, kitchen_w4a16),
        ("awq", "torch", "16 bit", -40.0, torch_linear),
    )
}

# Where both layers of an MLP would take triton-w4a4. An activation that lies on a border may cross it in the last digit
# of a GELU, so this is compared less closely.
FUSED_MLP = Implementation("triton-w4a4-mlp", "int4", "4 bit", -28.0, triton_mlp)

"""Solve one linear: smoothing, low-rank branch, residual (SVDQuant, arXiv 2411.05007, section 4)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import SVDQuantError
from .formats import GELU_SHIFT, Format, get_format
from .formats.awq import AWQ
from .gptq import gptq, hessian_factor
from .linear import QuantizedLinear
from .lowrank import as_stored, better_branch, lowrank_branch
from .smoothing import quantized_input, smoothing_factor


@dataclass(frozen=True)
class SolveSettings:
    """How hard to try. ``alphas`` is the search grid (None in it stands for no smoothing).

    In each of the ``passes`` the residual is rounded with the best scales, and the branch fitted to what that leaves.
    Without any, "rtn" rounds it as it comes.
    """

    rank: int | None = None  # None: the format's own
    residual: str = "gptq"
    passes: int = 1
    alphas: tuple[float | None, ...] = (None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    search_tokens: int = 512  # tokens the α search looks at; the residual is solved on all of them
    seed: int = 0


PRESETS: dict[str, SolveSettings] = {
    "naive": SolveSettings(rank=0, residual="rtn", passes=0, alphas=(None,)),
    "fast": SolveSettings(residual="rtn", alphas=(None, 0.3, 0.5, 0.7), search_tokens=256),
    "balanced": SolveSettings(),
    "best": SolveSettings(passes=3, alphas=(None, *(i / 20 for i in range(1, 20))), search_tokens=2048),
}


@dataclass
class Candidate:
    """One α of one shared input, and what it costs on the search tokens."""

    alpha: float | None
    smooth: Tensor
    unsigned: bool
    error: float = math.inf
    branches: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def solve_linear(
    weight: Tensor,
    samples: Tensor | None,
    *,
    bias: Tensor | None = None,
    rank: int | None = 32,
    fmt: str = "int4",
    residual: str = "gptq",
    act_unsigned: bool = False,
    settings: SolveSettings | None = None,
    check: Callable[[], None] = lambda: None,
) -> QuantizedLinear:
    """Quantize ``weight (N, K)`` for inputs like ``samples (T, K)``; float tensors of any device.

    ``samples`` None means that only the weight's statistics are known. ``act_unsigned`` allows the unsigned
    activation grid (inputs after GELU); the solver takes it where it lowers the error. ``check`` is called
    often and may raise to interrupt. Solved in float32 on the weight's device, where the result lies, too.

    Raises :class:`SVDQuantError` for shapes, dtypes or values that cannot be quantized.
    """
    if residual not in ("gptq", "rtn"):
        raise SVDQuantError(f"Unknown residual method '{residual}'. Choose gptq or rtn.")
    settings = replace(settings or PRESETS["balanced"], rank=rank, residual=residual)
    return solve_shared_input([weight], samples, [bias], get_format(fmt), settings, act_unsigned, check)[0]


def solve_shared_input(
    weights: list[Tensor],
    samples: Tensor | None,
    biases: list[Tensor | None],
    fmt: Format,
    settings: SolveSettings,
    may_be_unsigned: bool = False,
    check: Callable[[], None] = lambda: None,
    x_absmax: Tensor | None = None,
) -> list[QuantizedLinear]:
    """Quantize linears that read the same input: λ is shared, chosen for the sum of their errors.

    ``x_absmax (K,)`` are the channel maxima over more inputs than the samples hold, if they are known.
    """
    dtype = torch.float16 if weights[0].dtype == torch.float16 else torch.bfloat16
    checked = [check_weight(w, b, samples, fmt) for w, b in zip(weights, biases, strict=True)]
    x = sample_matrix(samples, checked[0])
    if isinstance(fmt, AWQ):
        return [solve_w4a16(w, x, b, fmt, dtype) for w, b in zip(checked, biases, strict=True)]
    rank = fmt.default_rank if settings.rank is None else settings.rank
    seen = x.abs().amax(dim=0)
    x_absmax = seen if x_absmax is None else torch.maximum(seen, x_absmax.to(seen))
    w_absmax = torch.stack([w.abs().amax(dim=0) for w in checked]).amax(dim=0)
    search = spread_rows(x, settings.search_tokens)
    best = Candidate(None, torch.ones_like(x_absmax), False)
    for unsigned in (False, True) if may_be_unsigned and fmt.has_unsigned else (False,):
        shifted_absmax = x_absmax + GELU_SHIFT if unsigned else x_absmax
        for alpha in settings.alphas:
            check()
            smooth = torch.ones_like(x_absmax)
            if alpha is not None:
                smooth = smoothing_factor(shifted_absmax, w_absmax, alpha, dtype)
            candidate = Candidate(alpha, smooth, unsigned)
            try_candidate(candidate, checked, search, fmt, rank, dtype, settings.seed)
            if candidate.error < best.error or not best.branches:
                best = candidate
    factor = None
    if settings.residual == "gptq" or (settings.passes and rank):
        factor = hessian_factor(x / best.smooth) if samples is not None else torch.diag(best.smooth)
    return [
        finish(w, x, b, branch, best, factor, fmt, settings, dtype, check)
        for w, b, branch in zip(checked, biases, best.branches, strict=True)
    ]


def try_candidate(
    candidate: Candidate, weights: list[Tensor], x: Tensor, fmt: Format, rank: int, dtype: torch.dtype, seed: int
) -> None:
    """Fill in the branches and the output error after the branch and both quantizers (residual by RTN)."""
    shift = GELU_SHIFT if candidate.unsigned else 0.0
    exact_input = x / candidate.smooth
    rounded_input = quantized_input(x, candidate.smooth, fmt, shift) - shift / candidate.smooth  # as the bias has it
    candidate.error = 0.0
    for w in weights:
        branch = stored_branch(w * candidate.smooth, candidate.smooth, rank, dtype, seed)
        rest = less(w, candidate.smooth, branch)
        codes, scales = fmt.round_weight(rest, dtype)
        rounded = codes * fmt.spread(scales, rest.shape[1])
        candidate.error += float((exact_input @ rest.t() - rounded_input @ rounded.t()).square().sum())
        candidate.branches.append(branch)


def less(w: Tensor, smooth: Tensor, branch: tuple[Tensor, Tensor]) -> Tensor:
    """What a branch leaves of the smoothed weight ``(N, K)``."""
    up, down = branch
    return (w * smooth).addmm_(up, (down * smooth.unsqueeze(1)).t(), alpha=-1)


def stored_branch(smoothed: Tensor, smooth: Tensor, rank: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """``proj_up (N, R)`` and ``proj_down (K, R)`` (raw-input basis) in float32, rounded as ``dtype`` stores them.

    The residual is taken against these rounded factors, so rounding the branch costs nothing.
    """
    return as_stored(*lowrank_branch(smoothed, rank, seed), smooth, dtype)


def finish(
    w: Tensor,
    x: Tensor,
    bias: Tensor | None,
    branch: tuple[Tensor, Tensor],
    chosen: Candidate,
    factor: Tensor | None,
    fmt: Format,
    settings: SolveSettings,
    dtype: torch.dtype,
    check: Callable[[], None],
) -> QuantizedLinear:
    """Quantize the residual of the chosen candidate and measure the layer's error on all samples.

    ``factor (K, K)`` is the :func:`.gptq.hessian_factor` of ``x / λ``, where the settings need it.
    """
    for _ in range(max(1, settings.passes)):
        rest = less(w, chosen.smooth, branch)
        if settings.residual == "gptq":
            assert factor is not None
            codes, scales = gptq(rest, factor, fmt, dtype, check)
        else:
            importance = (x / chosen.smooth).square().mean(dim=0) if settings.passes else None
            codes, scales = fmt.round_weight(rest, dtype, importance)
        tensor_scale = fmt.tensor_scale(rest)
        del rest
        tensors = fmt.pack(codes, scales, dtype, tensor_scale)
        rounded = codes.mul_(fmt.spread(scales, w.shape[1]))
        if factor is None or not settings.passes:
            break
        check()
        missing, before = (w * chosen.smooth).sub_(rounded), branch
        branch = better_branch(branch, missing, factor, chosen.smooth, dtype, settings.seed)
        del missing
        if branch is before:  # so would all further passes be
            break
    stored_bias = bias
    if chosen.unsigned:  # Σ_k (shift / λ_k) R_nk is what the shift adds to every output
        added = rounded @ (GELU_SHIFT / chosen.smooth)
        stored_bias = (0 if bias is None else bias.to(w)) - added
    del codes, rounded
    up, down = branch
    layer = QuantizedLinear(
        fmt=fmt,
        tensors=tensors,
        smooth_factor=chosen.smooth.to(dtype),
        proj_down=down.to(dtype),
        proj_up=up.to(dtype),
        bias=None if stored_bias is None else stored_bias.to(w.device, dtype),
        act_unsigned=chosen.unsigned,
        info={"alpha": chosen.alpha, "rank": up.shape[1]},
    )
    layer.info["error_db"] = output_error_db(layer, w, bias, x)
    return layer


def solve_w4a16(w: Tensor, x: Tensor, bias: Tensor | None, fmt: AWQ, dtype: torch.dtype) -> QuantizedLinear:
    """4-bit weights under 16-bit activations: no smoothing, no branch."""
    tensors = fmt.solve(w, x.square().mean(dim=0), dtype)
    layer = QuantizedLinear(fmt, tensors, bias=None if bias is None else bias.to(w.device, dtype))
    layer.info = {"alpha": None, "rank": 0, "error_db": output_error_db(layer, w, bias, x)}
    return layer


def output_error_db(layer: QuantizedLinear, w: Tensor, bias: Tensor | None, x: Tensor) -> float:
    """``10 log10(‖y - ŷ‖² / ‖x Wᵀ‖²)`` over the samples (dB, lower is better); the bias is no signal."""
    noise = signal = 0.0
    for rows in x.split(1024):
        product = rows @ w.t()
        exact = product if bias is None else product + bias.to(w)
        noise += float((layer.forward(rows) - exact).square().sum())
        signal += float(product.square().sum())
    return 10 * math.log10(max(noise, 1e-30) / max(signal, 1e-30))


def check_weight(weight: Tensor, bias: Tensor | None, samples: Tensor | None, fmt: Format) -> Tensor:
    """The weight as float32, or :class:`SVDQuantError` saying why it cannot be quantized."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise SVDQuantError(f"A weight must be a float matrix (N, K), found {tuple(weight.shape)} of {weight.dtype}.")
    n, k = weight.shape
    if k % (fmt.group or 2):
        raise SVDQuantError(f"{fmt.name} needs in_features to be a multiple of {fmt.group}, found {k}.")
    if samples is not None and (samples.dim() != 2 or samples.shape[1] != k or samples.shape[0] == 0):
        raise SVDQuantError(f"Calibration samples must be (T, {k}) with T ≥ 1, found {tuple(samples.shape)}.")
    if bias is not None and tuple(bias.shape) != (n,):
        raise SVDQuantError(f"A bias must be ({n},), found {tuple(bias.shape)}.")
    wanted = weight.float()
    if not torch.isfinite(wanted).all():
        raise SVDQuantError("The weight holds NaN or infinity.")
    return wanted


def sample_matrix(samples: Tensor | None, weight: Tensor) -> Tensor:
    """Samples ``(T, K)`` as float32 on the weight's device; without any, unit noise stands in.

    Weight-only statistics: with inputs of equal size everywhere, λ depends on the weight alone.
    """
    if samples is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(256, weight.shape[1], generator=generator).to(weight.device)
    x = samples.to(weight.device, torch.float32)
    if not torch.isfinite(x).all():
        raise SVDQuantError("The calibration samples hold NaN or infinity.")
    return x


def spread_rows(x: Tensor, count: int) -> Tensor:
    """``count`` rows evenly spread over ``x (T, K)``: samples lie in the order of prompts and timesteps."""
    if x.shape[0] <= count:
        return x
    return x[torch.linspace(0, x.shape[0] - 1, count, device=x.device).long()]

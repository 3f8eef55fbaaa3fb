"""What stands in front of a linear and its quantizer computes: the same for every quantizer's tests."""

from importlib import import_module
from typing import Any

import torch
from comfyui_svdquant.svdq_core.packing import unpack_int4, unpack_uint4
from hypothesis import strategies as st
from torch import Tensor

# What, batch, tokens, columns of x, columns of the tail: whole blocks of the kernels' columns, as FLUX has them.
WHOLE = [("norm", 1, 37, 1024, 0), ("gelu", 1, 37, 512, 1024), ("rms", 1, 37, 1024, 0), ("silu", 1, 37, 512, 1024)]


def cases(unit: int) -> st.SearchStrategy[tuple]:
    """Shapes with columns in multiples of ``unit``, and a seed."""
    columns, batch, tokens = st.integers(1, 12).map(lambda n: n * unit), st.integers(1, 3), st.integers(1, 20)
    seed = st.integers(0, 2**31)
    norm = st.tuples(st.sampled_from(["norm", "rms"]), batch, tokens, columns, st.just(0), seed)
    after = st.sampled_from(["gelu", "silu"])
    return norm | st.tuples(after, st.just(1), tokens, columns | st.just(0), columns, seed)


def draw(what: str, batch: int, tokens: int, k: int, tail: int, *rest: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, what it stands for, and the arguments by name; on the CPU. The last argument is the dtype."""
    *seed, dtype = rest
    g = torch.Generator().manual_seed(*seed or [0])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = (random(batch * tokens, k) * torch.where(torch.rand(k, generator=g) < 0.05, 30.0, 1.0) + 3).to(dtype)
    if what == "gelu":
        wide = (2 * random(tokens, tail + 16)).to(dtype)[:, 16:]  # a part of wider rows, as linear1 gives it
        after = torch.nn.functional.gelu(wide.double(), approximate="tanh").to(dtype)
        return x, torch.cat([x, after], 1), {"tail": wide}
    if what == "silu":
        gate, wide = (2 * random(tokens, 2 * tail)).to(dtype).chunk(2, 1)
        after = (torch.nn.functional.silu(gate.double()) * wide.double()).to(dtype)
        return x, torch.cat([x, after], 1), {"tail": wide, "gate": gate}
    mult, shift = (random(batch, k) + 1).to(dtype), random(batch, k).to(dtype)
    if what == "rms":  # the product of a weight and a modulation is in float32
        normed = torch.nn.functional.rms_norm(x.double(), (k,), eps=1e-6).unflatten(0, (batch, tokens))
        mult = mult.float() * 1.01
        return x, (normed * mult.double().unsqueeze(1)).flatten(0, 1).to(dtype), {"mult": mult}
    normed = torch.nn.functional.layer_norm(x.double(), (k,), eps=1e-6).unflatten(0, (batch, tokens))
    y = (normed * mult.double().unsqueeze(1) + shift.double().unsqueeze(1)).flatten(0, 1)
    return x, y.to(dtype), {"mult": mult, "shift": shift}


def check(op: str, x: Tensor, y: Tensor, before: dict[str, Tensor], rest: tuple[Any, ...], on: torch.device) -> None:
    """What a quantizer makes of x and what stands before it is what it makes of y.

    y is float64 rounded once. In float32 arithmetic a last digit of it falls the other way for few elements, and then
    a code, and a scale where that was the largest of its group.
    """
    quantize = getattr(import_module(f"comfyui_svdquant.triton_kernels.{op}"), op)
    g = torch.Generator().manual_seed(1)
    k = y.shape[1]
    smooth = (torch.rand(k, generator=g) + 0.5).to(x.dtype).to(on)
    down = (torch.randn(k, 16, generator=g) / k**0.5).to(x.dtype).to(on)
    moved = {name: t.to(on) for name, t in before.items()}
    for name in moved.keys() & {"tail", "gate"}:  # their rows stay parts of wider ones
        moved[name] = torch.cat([moved[name][:, :16], moved[name]], 1)[:, 16:]
    found = [t.cpu().double() for t in quantize(x.to(on), smooth, down, *rest, **moved)]
    wanted = [t.cpu().double() for t in quantize(y.to(on), smooth, down, *rest)]
    for name, each, other in zip(("codes", "scales", "hidden"), found, wanted):
        assert each.shape == other.shape and each.isfinite().all(), name
    m, scales = y.shape[0], found[1].reshape(y.shape[0], -1)
    (values, step), (others, _) = (decoded(op, rest, each[0], each[1].reshape(m, -1)) for each in (found, wanted))
    assert ((values - others).abs() <= 1.13 * step).all()  # a code next to the other at most; 1.13: another e4m3 scale
    same = (scales == wanted[1].reshape(m, -1)).repeat_interleave(k // scales.shape[1], 1)
    for name, each, other in (
        ("values", values[same], others[same]),
        *zip(("scales", "hidden"), found[1:], wanted[1:]),
    ):
        differing = int((each != other).sum())
        assert differing <= 2 + 0.02 * each.numel() or x.dtype == torch.float32, (name, differing, each.numel())
    eps = torch.finfo(x.dtype).eps
    step = 0.13 if op == "quantize_nvfp4" else max(2.1 * eps, 1e-5)  # e4m3 has three bits after the first
    assert ((found[1] - wanted[1]).abs() <= step * wanted[1]).all()
    room = (4 * eps * y.double().abs() + 1e-5) @ down.cpu().double().abs()
    assert ((found[2] - wanted[2]).abs() <= room).all()


def check_huge(op: str, rest: tuple[Any, ...], on: torch.device) -> None:
    """Infinite and NaN where torch's are, in that row; zero where an exponential, or a sum of squares, overflows."""
    quantize = getattr(import_module(f"comfyui_svdquant.triton_kernels.{op}"), op)
    most, dtype = torch.finfo(torch.bfloat16).max, torch.bfloat16
    x = torch.tensor([-most, -1e4, -90, -88, -87, -1, -0.0, 0, 1, 88, 1e4, most]).repeat(3, 16)
    x[1, 70], x[2, 70] = torch.inf, torch.nan
    g = torch.Generator().manual_seed(0)
    tail = (x.sign() * (torch.rand(x.shape, generator=g) < 0.5) * 0.5).to(dtype)
    x, mult = x.to(dtype), torch.rand(1, 192, generator=g)
    smooth, down = torch.ones(192, dtype=dtype, device=on), (torch.randn(192, 16, generator=g) / 16).to(dtype).to(on)
    gated = (torch.nn.functional.silu(x.double()) * tail.double()).to(dtype)
    normed = (torch.nn.functional.rms_norm(x.float(), (192,), eps=1e-6) * mult).to(dtype)
    other_stride = torch.cat([x, x], 1).to(on)[:, :192]
    for y, head, before in (
        (gated, tail[:, :0], {"tail": tail.to(on), "gate": other_stride}),
        (normed, x, {"mult": mult.to(on)}),
    ):
        found, wanted = quantize(head.to(on), smooth, down, *rest, **before), quantize(y.to(on), smooth, down, *rest)
        assert found[1][0].float().isfinite().all() and found[2][0].isfinite().all()
        assert found[1][1].float().isnan().any() and found[1][2].float().isnan().any()
        for name, each, other in zip(("codes", "scales", "hidden"), found, wanted):
            rows = 1 if name == "codes" else 3  # those of a NaN stand for nothing
            each, other = each[:rows].float(), other[:rows].float()
            torch.testing.assert_close(each, other, rtol=0, atol=0, equal_nan=True, msg=name)


def decoded(op: str, rest: tuple[Any, ...], codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """What float64 codes and scales (M, S) stand for, and how far the next code is, both (M, K)."""
    if op == "quantize_act":
        numbers = (unpack_uint4 if rest[0] else unpack_int4)(codes.to(torch.int8)).double()
        steps = torch.ones_like(numbers)
    elif op == "quantize_nvfp4":
        nibbles = unpack_uint4(codes.to(torch.uint8).view(torch.int8)).long()
        sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        numbers = sizes[nibbles & 7] * torch.where(nibbles >= 8, -1.0, 1.0)
        steps = torch.full_like(numbers, 2.0)
    else:
        numbers = codes + (128 if rest[1] == "uint8" else 0)
        steps = (numbers.abs() / 8).clamp(min=2.0**-9) if rest[1] == "fp8" else torch.ones_like(numbers)
    wide = scales.repeat_interleave(numbers.shape[1] // scales.shape[1], 1)
    return numbers * wide, steps * wide

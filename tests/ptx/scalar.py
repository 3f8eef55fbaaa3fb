"""Instructions of one thread: arithmetic, logic, conversions (PTX ISA, sections 9.7.1 to 9.7.6 and 9.7.9).

Each entry of `OPS` is ``f(parts, *values)``: the parts of the instruction after its name (``("rn", "f32")``), and one
array per source, of the NumPy type of the instruction's own type; the result is an array with the destination's bits.
"""

from collections.abc import Callable

import numpy as np
import torch

TYPES = {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
TYPES |= {f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "bf16": np.dtype("u2"), "pred": np.dtype("?")}
TYPES |= {"e4m3x2": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "f32x2": np.dtype("u8")}

Values = np.ndarray


def from_bf16(bits: Values) -> Values:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Values) -> Values:
    """Nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_e4m3(x: Values) -> Values:
    """Nearest, ties to even, beyond 448 to 448 (``satfinite``)."""
    clipped = torch.from_numpy(np.ascontiguousarray(x, np.float32)).clamp(-448, 448)
    return clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_e4m3(bits: Values) -> Values:
    return torch.from_numpy(np.ascontiguousarray(bits, np.uint8)).view(torch.float8_e4m3fn).float().numpy()


def toward_zero(exact: Values, dtype: type) -> Values:
    """Float64 to a narrower float without rounding up."""
    near = exact.astype(dtype)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(exact), np.nextafter(near, dtype(0)), near)


def off_by(x: Values, steps: int) -> Values:
    """Float32 up to so many neighbours away: what an approximate instruction may return, always the same for one x."""
    mixed = (x.view(np.uint32).astype(np.uint64) * 0x9E3779B1 >> 16) % np.uint64(2 * steps + 1)
    bits = x.view(np.int32) + mixed.astype(np.int32) - np.int32(steps)
    usual = np.isfinite(x) & (np.abs(x) > 1e-37) & (np.abs(x) < 1e38)
    return np.where(usual, bits.view(np.float32), x)


def fused(a: Values, b: Values, c: Values) -> Values:
    """a b + c of float32; the product is exact in float64, whose rounding of the sum is then rounded again."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def halves(bits: Values, dtype: type) -> Values:
    """The two numbers of a packed type: (T,) -> (T, 2)."""
    return np.ascontiguousarray(bits)[:, None].view(dtype)


def packed(parts: tuple[str, ...], f: Callable[..., Values], *values: Values) -> Values:
    """``f`` on each half of ``f16x2``, ``bf16x2`` or ``f32x2``."""
    kind = parts[-1]
    if kind == "bf16x2":
        result = to_bf16(f(*(from_bf16(halves(v, np.uint16)) for v in values)))
    else:
        half = np.float16 if kind == "f16x2" else np.float32
        result = np.ascontiguousarray(f(*(halves(v, half) for v in values)).astype(half))
    return result.view(TYPES[kind])[:, 0]


def arithmetic(f: Callable[..., Values]) -> Callable[..., Values]:
    def run(parts: tuple[str, ...], *values: Values) -> Values:
        if parts[-1].endswith("x2"):
            return packed(parts, f, *values)
        if parts[-2:] in MIXED:
            return f(*(from_bf16(v) if v.dtype == np.uint16 else v.astype(np.float32) for v in values))
        if parts[-1] == "bf16":
            return to_bf16(f(*(from_bf16(v) for v in values)))
        return f(*values)

    return run


def wide(values: tuple[Values, ...]) -> list[Values]:
    return [v.astype({"i": np.int64, "u": np.uint64}[v.dtype.kind]) for v in values]


def mul(parts: tuple[str, ...], a: Values, b: Values) -> Values:
    if parts[0] == "wide":
        a, b = wide((a, b))
        return (a * b).astype({"s16": np.int32, "u16": np.uint32}.get(parts[-1], a.dtype))
    return arithmetic(np.multiply)(parts, a, b)


def mad(parts: tuple[str, ...], a: Values, b: Values, c: Values) -> Values:
    return mul(parts, a, b) + c


def fma(parts: tuple[str, ...], a: Values, b: Values, c: Values) -> Values:
    assert parts[0] == "rn", parts
    return arithmetic(fused)(parts, a, b, c)


def div(parts: tuple[str, ...], a: Values, b: Values) -> Values:
    if parts[-1] == "f32":
        return a / b if parts[0] == "rn" else off_by(a / b, 2)  # full: 2 units in the last place
    safe = np.where(b == 0, 1, b)
    quotient = np.abs(a.astype(np.int64)) // np.abs(safe.astype(np.int64)) if a.dtype.kind == "i" else a // safe
    return (np.sign(a) * np.sign(safe) * quotient).astype(a.dtype) if a.dtype.kind == "i" else quotient


def rem(parts: tuple[str, ...], a: Values, b: Values) -> Values:
    return a - div(parts, a, b) * b


def largest(parts: tuple[str, ...], a: Values, b: Values) -> Values:
    return np.maximum(a, b) if "NaN" in parts or a.dtype.kind != "f" else np.fmax(a, b)


def smallest(parts: tuple[str, ...], a: Values, b: Values) -> Values:
    if "xorsign" in parts:
        return np.copysign(np.fmin(np.abs(a), np.abs(b)), np.where(np.signbit(a) ^ np.signbit(b), -1, 1)).astype(
            a.dtype
        )
    return np.minimum(a, b) if "NaN" in parts or a.dtype.kind != "f" else np.fmin(a, b)


def shift_left(parts: tuple[str, ...], a: Values, by: Values) -> Values:
    bits = a.dtype.itemsize * 8
    return np.where(by < bits, a << (by % bits).astype(a.dtype), 0).astype(a.dtype)


def shift_right(parts: tuple[str, ...], a: Values, by: Values) -> Values:
    bits = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by < bits, a >> (by % bits).astype(a.dtype), 0).astype(a.dtype)


def bfe(parts: tuple[str, ...], a: Values, position: Values, length: Values) -> Values:
    """Bits from ``position`` on; s32 repeats the highest of them."""
    position, length = position.astype(np.int64), length.astype(np.int64)
    field = (a.astype(np.int64) & 0xFFFFFFFF) >> position & (1 << length) - 1
    if parts[-1] == "s32":
        field = np.where(field >> np.maximum(length - 1, 0) & 1, field - (1 << length), field)
    return field.astype(a.dtype)


def bfi(parts: tuple[str, ...], a: Values, b: Values, position: Values, length: Values) -> Values:
    """b with the lowest bits of a from ``position`` on."""
    position, length = position.astype(np.int64), length.astype(np.int64)
    field = ((1 << length) - 1) << position
    bits = b.astype(np.int64) & ~field | a.astype(np.int64) << position & field
    return (bits & 0xFFFFFFFF).astype(b.dtype)


def prmt(parts: tuple[str, ...], a: Values, b: Values, selectors: Values) -> Values:
    pool = np.stack([a, b], axis=1).view(np.uint8)  # (T, 8)
    result = np.empty((len(a), 4), np.uint8)
    for i in range(4):
        selector = selectors >> np.uint32(4 * i) & 15
        byte = np.take_along_axis(pool, (selector & 7).astype(np.int64)[:, None], axis=1)[:, 0]
        result[:, i] = np.where(selector & 8, (byte.view(np.int8) >> 7).view(np.uint8), byte)
    return result.view(np.uint32)[:, 0]


COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARE |= {"gt": np.greater, "ge": np.greater_equal}


def setp(parts: tuple[str, ...], a: Values, b: Values) -> Values | tuple[Values, Values]:
    """Ordered comparisons are false for NaN; those that end in u are true, and so is ``ne`` in NumPy but not here."""
    name, kind = parts[0], parts[-1]
    if kind.startswith("bf16"):
        a, b = (from_bf16(halves(v, np.uint16) if kind == "bf16x2" else v) for v in (a, b))
    elif kind == "f16x2":
        a, b = halves(a, np.float16), halves(b, np.float16)
    result = COMPARE[name.removesuffix("u")](a, b)
    if a.dtype.kind == "f":
        unordered = np.isnan(a) | np.isnan(b)
        result = result | unordered if name.endswith("u") else result & ~unordered
    return (result[:, 0], result[:, 1]) if kind.endswith("x2") else result


def convert(parts: tuple[str, ...], *values: Values) -> Values:
    """``cvt``: from the last part's type to the one before it, rounding to nearest or (rz) toward zero."""
    target, source = parts[-2:]
    x = from_bf16(values[0]) if source == "bf16" else values[0]
    if target in ("bf16x2", "f16x2") and source == "f32":
        pair = np.stack([convert((*parts[:-2], target[:-2], source), v) for v in reversed(values)], axis=1)
        return np.ascontiguousarray(pair).view(np.uint32)[:, 0]
    if (target, source) == ("f16x2", "e4m3x2"):
        return from_e4m3(halves(x, np.uint8)).astype(np.float16).view(np.uint32)[:, 0]
    if target == "e4m3x2" and source == "f16x2":
        return to_e4m3(halves(x, np.float16).astype(np.float32)).view(np.uint16)[:, 0]
    if target == "e4m3x2":
        return to_e4m3(np.stack(values[::-1], axis=1)).view(np.uint16)[:, 0]
    if target == "bf16":
        return to_bf16(x)
    if target == "f16" and "rz" in parts:
        return toward_zero(x.astype(np.float64), np.float16)
    if target in ("f16", "f32") or x.dtype.kind in "iu":
        return x.astype(TYPES[target])
    raise NotImplementedError(f"cvt.{'.'.join(parts)}")


def reciprocal(parts: tuple[str, ...], a: Values) -> Values:
    """One unit in the last place off; ftz: numbers below 2**-126 are zeros."""
    assert parts == ("approx", "ftz", "f32"), parts
    result = off_by(1 / np.where(np.abs(a) < 2.0**-126, np.copysign(np.float32(0), a), a), 1)
    return np.where(np.abs(result) < 2.0**-126, np.copysign(np.float32(0), result), result)


OPS: dict[str, Callable[..., Values]] = {
    "add": arithmetic(np.add),
    "sub": arithmetic(np.subtract),
    "mul": mul,
    "mad": mad,
    "fma": fma,
    "div": div,
    "rem": rem,
    "max": largest,
    "min": smallest,
    "abs": arithmetic(np.abs),
    "neg": arithmetic(np.negative),
    "and": lambda parts, a, b: a & b,
    "or": lambda parts, a, b: a | b,
    "xor": lambda parts, a, b: a ^ b,
    "not": lambda parts, a: ~a,
    "shl": shift_left,
    "shr": shift_right,
    "bfe": bfe,
    "bfi": bfi,
    "prmt": prmt,
    "setp": setp,
    "selp": lambda parts, a, b, p: np.where(p, a, b),
    "cvt": convert,
    "ex2": lambda parts, a: off_by(np.exp2(a), 2),
    "rcp": reciprocal,
    "rsqrt": lambda parts, a: off_by(1 / np.sqrt(a), 1),
}


MIXED = (("f32", "bf16"), ("f32", "f16"))  # sums in float32 of which all but the last one come narrower (9.7.5)


def sources(op: tuple[str, ...]) -> list[str]:
    """The type by which each source is read."""
    name, kind = op[0], op[-1]
    if op[-2:] in MIXED and name in ("add", "sub", "fma"):
        return [kind, kind, "f32"] if name == "fma" else [kind, "f32"]
    if name == "mad" and op[1] == "wide":
        return [kind, kind, f"{kind[0]}{int(kind[1:]) * 2}"]
    if name in ("shl", "shr"):
        return [kind, "u32"]
    if name == "bfi":
        return [kind, kind, "u32", "u32"]
    if name == "bfe":
        return [kind, "u32", "u32"]
    if name == "selp":
        return [kind, kind, "pred"]
    if name == "prmt":
        return ["b32"] * 3
    return [kind] * 3

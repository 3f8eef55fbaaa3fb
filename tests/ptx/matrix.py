"""Instructions of a warp and of four: fragments, products, shuffles (PTX ISA, sections 9.7.9.6, 9.7.14, 9.7.15).

A warp's registers are arrays ``(warps, 32 lanes, ...)``. Where an element of a fragment lies is written as the standard
does: by ``group = lane // 4`` and ``quad = lane % 4``.
"""

from functools import cache

import numpy as np

from .scalar import from_bf16, from_e4m3, toward_zero

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BITS = {"s8": 8, "e4m3": 8, "bf16": 16, "f16": 16, "e2m1": 4}


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bytes along the last axis as numbers: float32 that holds them exactly."""
    raw = np.ascontiguousarray(raw)
    if kind == "s8":
        return raw.view(np.int8).astype(np.float32)
    if kind == "e4m3":
        return from_e4m3(raw)
    if kind == "e2m1":
        return E2M1[np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)]
    half = raw.view(np.uint16)
    return from_bf16(half) if kind == "bf16" else half.view(np.float16).astype(np.float32)


@cache
def places(which: str, per_word: int) -> np.ndarray:
    """(rows, columns) -> index of the element among a warp's, for ``a`` (16, K), ``b`` (K, 8) and ``c`` (16, 8)."""
    words = {"a": 4, "b": 2, "c": 4}[which]
    lane, word, i = np.meshgrid(np.arange(32), np.arange(words), np.arange(per_word), indexing="ij")
    group, quad = lane // 4, lane % 4
    if which == "a":
        row, column = group + 8 * (word % 2), quad * per_word + i + 4 * per_word * (word // 2)
    elif which == "b":
        row, column = quad * per_word + i + 4 * per_word * word, group
    else:
        row, column = group + 8 * (word // 2), quad * 2 + word % 2
    at = np.empty((row.max() + 1, column.max() + 1), int)
    at[row, column] = np.arange(lane.size).reshape(lane.shape)
    return at


def fragment(words: list[np.ndarray], which: str, kind: str) -> np.ndarray:
    """A warp's matrix from its registers, each (warps, 32)."""
    raw = np.stack(words, axis=-1).view(np.uint8).reshape(len(words[0]), -1)
    return decode(raw, kind)[:, places(which, 32 // BITS[kind])]


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str, fraction: int | None) -> np.ndarray:
    """a b + c, in int32 or float32. ``fraction``: bits that the sums keep of fp8 products below the largest."""
    if c.dtype == np.int32:
        return (a @ b).astype(np.int64).astype(np.int32) + c  # depth 64 or less: exact in float32
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "e4m3" and fraction is not None:
            products = a.astype(np.float64)[..., :, :, None] * b.astype(np.float64)[..., None, :, :]
            terms = np.concatenate([products, c.astype(np.float64)[..., :, None, :]], axis=-2)
            step = np.exp2(np.frexp(np.abs(terms).max(axis=-2, keepdims=True))[1] - 1.0 - fraction)
            return (np.trunc(terms / step) * step).sum(axis=-2).astype(np.float32)
        exact = a.astype(np.float64) @ b.astype(np.float64) + c.astype(np.float64)
        return toward_zero(exact, np.float32)


def block_scales(words: np.ndarray, thread: int, rows: int) -> np.ndarray:
    """Scales of ``scale_vec::4X``, (warps, rows, 4): a row's four e4m3 are in one register of one lane of its quad."""
    row = np.arange(rows)
    lane = row % 8 * 4 + thread * (2 if rows == 16 else 1) + row // 8
    return from_e4m3(np.ascontiguousarray(words[:, lane])[..., None].view(np.uint8))


def shuffle(mode: str, values: np.ndarray, by: np.ndarray, clamp: np.ndarray) -> np.ndarray:
    """``shfl.sync`` of (warps, 32): idx takes a lane, bfly the lane that differs by these bits."""
    lane = np.arange(32)
    segment, limit = clamp >> 8 & 31, clamp & 31
    source = (lane & segment) | (by & ~segment & 31) if mode == "idx" else lane ^ by
    inside = source <= ((lane & segment) | (limit & ~segment & 31))
    return np.take_along_axis(values, np.where(inside, source, lane).astype(np.int64), axis=1)


def load_matrices(space, addresses: np.ndarray, count: int, trans: bool) -> list[np.ndarray]:
    """``ldmatrix``: 8 × 8 of 16 bit, a row of 16 bytes at each of 8 lanes' addresses -> ``count`` registers."""
    lane, result = np.arange(32), []
    for i in range(count):
        rows = addresses[:, 8 * i : 8 * i + 8]
        at = (rows[:, :, None] + 2 * np.arange(8, dtype=np.uint64)).reshape(-1)
        space.aligned(rows.reshape(-1), 16)
        matrix = space.load(at, 2).reshape(-1, 8, 8)
        matrix = matrix.transpose(0, 2, 1) if trans else matrix
        pair = [matrix[:, lane // 4, lane % 4 * 2 + j].astype(np.uint32) for j in (0, 1)]
        result.append(pair[0] | pair[1] << 16)
    return result


def store_matrices(space, addresses: np.ndarray, words: list[np.ndarray], trans: bool) -> None:
    """``stmatrix``, the way back."""
    lane = np.arange(32)
    for i, word in enumerate(words):
        matrix = np.empty((len(word), 8, 8), np.uint16)
        for j in (0, 1):
            matrix[:, lane // 4, lane % 4 * 2 + j] = (word >> np.uint32(16 * j)).astype(np.uint16)
        matrix = matrix.transpose(0, 2, 1) if trans else matrix
        rows = addresses[:, 8 * i : 8 * i + 8]
        space.aligned(rows.reshape(-1), 16)
        at = (rows[:, :, None] + 2 * np.arange(8, dtype=np.uint64)).reshape(-1)
        space.store(at, np.ascontiguousarray(matrix).reshape(-1))


def described(space, descriptor: int, rows: int, width: int, kind: str, along_rows: bool) -> np.ndarray:
    """(rows, numbers in ``width`` bytes) of ``wgmma`` (section 9.7.15.5.1) or ``tcgen05.mma`` (9.7.16.4.1).

    Bits 61 to 63 say how it lies in memory; ``wgmma`` knows the upper two of them.
    ``along_rows``: rows, not columns, lie side by side in memory (``tnsp``; 16 bit only).
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    atom = {0: 16, 2: 128, 4: 64, 6: 32}[descriptor >> 61]
    mask = {16: 0, 128: 7, 64: 3, 32: 1}[atom]
    size = max(BITS[kind] // 8, 1)  # two e2m1 go together
    row, column = np.meshgrid(np.arange(rows), np.arange(width // size), indexing="ij")
    if along_rows:
        assert atom > 16, "leading and stride trade places where nothing is swizzled"
        byte = row * size
        at = byte // atom * leading + column // 8 * stride + column % 8 * atom + byte % atom
    else:
        byte = column * size
        at = row // 8 * stride + row % 8 * atom + byte % atom + byte // atom * leading
    at = start + at
    at ^= (at >> 7 & mask) << 4
    raw = space.load(at.reshape(-1).astype(np.uint64), size).reshape(rows, -1)
    return decode(raw.view(np.uint8), kind)


@cache
def sums(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every ``wgmma`` sum: (128 threads, columns / 2 registers)."""
    thread, i = np.meshgrid(np.arange(128), np.arange(columns // 2), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2

"""Tensor memory, the products in it, and the barriers that tell of them (PTX ISA, sections 9.7.16 and 9.7.13.15).

Products are as late as they may: they happen when somebody waits for the barrier that they are committed to, so that
sums that are read before are old, and operands that are overwritten before are wrong. Loads and stores are at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from . import matrix
from .memory import POISON
from .scalar import from_e4m3
from .text import Instruction

if TYPE_CHECKING:
    from .machine import Block, Mask

COLUMNS = 512
FORMATS = {"f16": ("f16", "bf16"), "f8f6f4": ("e4m3",), "mxf4nvf4": (None, "e2m1"), "i8": (None, "s8")}  # by number
DEPTH = 32  # bytes of a row of A or of a column of B that one instruction multiplies, whatever the type


@dataclass
class TensorMemory:
    """A block's tensor memory, with what is on its way to it."""

    cells: np.ndarray = field(default_factory=lambda: np.empty((128, COLUMNS), np.uint32))
    taken: dict[int, int] = field(default_factory=dict)  # first column -> columns
    queue: list[Callable[[], None]] = field(default_factory=list)  # products and arrivals at barriers, in order
    phases: dict[int, int] = field(default_factory=dict)  # barrier's address -> how many phases it has completed

    def take(self, columns: int) -> int:
        """Not at column 0 where that can be: other blocks may have been first."""
        assert columns in (32, 64, 128, 256, 512), columns
        first = COLUMNS - columns - sum(self.taken.values())
        assert first >= 0, "more tensor memory than there is"
        self.taken[first] = columns
        self.cells.view(np.uint8)[:, 4 * first : 4 * (first + columns)] = POISON
        return first

    def columns(self, address: int, count: int) -> slice:
        first = address & 0xFFFF
        if not any(start <= first and first + count <= start + n for start, n in self.taken.items()):
            raise IndexError(f"columns {first} to {first + count - 1} of tensor memory are not the block's")
        return slice(first, first + count)

    def arrive(self, barrier: int) -> None:
        self.phases[barrier] += 1

    def complete(self, barrier: int, parity: int) -> bool:
        """Whether the phase of this parity is over; what is on its way happens now, as far as that needs it."""
        while self.phases[barrier] & 1 == parity and self.queue:
            self.queue.pop(0)()
        return self.phases[barrier] & 1 != parity


def value(b: Block, arg, mask: Mask, kind: str = "b32") -> int:
    """An operand that must be the same in all threads that run; an address with its offset."""
    base, offset = arg if isinstance(arg, tuple) else (arg, 0)
    values = b.read(base, kind) if mask is None else b.read(base, kind)[mask]
    assert (values == values[0]).all(), f"{arg} differs among threads"
    return int(values[0]) + offset


def allocate(i: Instruction, b: Block, mask: Mask) -> None:
    assert b.whole(mask).sum() == 1, "for one warp"
    place = np.array([value(b, i.args[0], mask)], np.uint64)
    b.shared.store(place, np.array([b.tensor.take(i.args[1])], np.uint32))


def give_back(i: Instruction, b: Block, mask: Mask) -> None:
    assert b.whole(mask).sum() == 1, "for one warp"
    assert not b.tensor.queue, "products that nobody waited for"
    assert b.tensor.taken.pop(value(b, i.args[0], mask), None) == i.args[1], "other columns than were taken"


@cache
def places(shape: str, repeat: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Lane and column of each of a warp's registers, (32, registers): section 9.7.16.2.3."""
    together = {"16x128b": 1, "16x256b": 2}.get(shape, 0)  # registers side by side in a row; a pair of rows, repeated
    thread, j = np.arange(32)[:, None], np.arange(repeat * max(2 * together, 1))
    if together:
        column = thread % 4 * together + j % together
        return thread // 4 + j // together % 2 * 8, j // (2 * together) * 4 * together + column
    if shape == "16x32bx2":
        return thread % 16, j + thread // 16 * split
    assert shape == "32x32b", shape
    return thread, j


def transfer(i: Instruction, b: Block, mask: Mask) -> None:
    """``tcgen05.ld`` and ``st``: a warp's registers from and to the 32 lanes that it may access."""
    loads, rest = i.op[1] == "ld", list(i.args)
    names = rest.pop(0 if loads else -1)
    lane, column = places(i.op[4], int(i.op[5][1:]), *rest[1:] or [0])
    values = np.stack([b.warps(name) for name in names], axis=-1)
    for warp in np.flatnonzero(b.whole(mask)):
        at = value(b, rest[0], np.arange(b.count) // 32 == warp)
        assert (((at >> 16) + lane) // 32 == warp % 4).all(), "lanes of another warp"
        part = b.tensor.cells[:, b.tensor.columns(at, column.max() + 1)]
        if loads:
            values[warp] = part[(at >> 16) + lane, column]
        else:
            part[(at >> 16) + lane, column] = values[warp]
    for j, name in enumerate(names if loads else []):
        b.write(name, values[:, :, j].reshape(-1), mask)


def scales(memory: TensorMemory, address: int, rows: int) -> np.ndarray:
    """(rows, 4), section 9.7.16.10.7: four to a cell, 32 rows to a column, and all that for each 32 lanes again."""
    cells = memory.cells[:, memory.columns(address, -(-rows // 32))].reshape(4, 32, -1)
    assert (cells == cells[0]).all(), "scales differ from warp to warp"
    return from_e4m3(np.ascontiguousarray(cells[0].T).view(np.uint8)).reshape(-1, 4)[:rows]


def lanes(address: int, rows: int) -> np.ndarray:
    """Of the rows of D, and of A where that is in tensor memory: layouts F and D of section 9.7.16.10.5."""
    row = np.arange(rows)
    return (address >> 16) + {64: row // 16 * 32 + row % 16, 128: row}[rows]


def inside(memory: TensorMemory, address: int, rows: int, width: int, kind: str, along_rows: bool) -> np.ndarray:
    """A from tensor memory, a cell as full as it gets; arguments and result as of `matrix.described`."""
    assert not along_rows
    cells = memory.cells[lanes(address, rows), memory.columns(address, width // 4)]
    return matrix.decode(cells.view(np.uint8), kind)


Operand = Callable[[int, int, str, bool], np.ndarray]  # `inside` or `matrix.described`, from a place


def product(
    memory: TensorMemory, kind: str, target: int, left: Operand, right: Operand, form: int, by: list[int], adding: bool
) -> None:
    """D = A B + D (section 9.7.16.10); ``form``: the instruction descriptor (9.7.16.4.2)."""
    rows, columns = (form >> 24 & 31) << 4, (form >> 17 & 63) << 3
    known = 7 << 7 | 7 << 10 | 3 << 15 | 63 << 17 | 31 << 24
    sums = 0 if by else 2 << 4 if kind == "i8" else 1 << 4  # float32, or int32
    assert form & ~known == sums, f"sparse, negated, saturating, or other sums: {form:#x}"
    kinds = FORMATS[kind][form >> 7 & 7], FORMATS[kind][form >> 10 & 7]
    assert kinds[0] and kinds[0] == kinds[1], kinds
    x = left(rows, DEPTH, kinds[0], bool(form >> 15 & 1))
    y = right(columns, DEPTH, kinds[1], bool(form >> 16 & 1))
    if by:
        x, y = (v * np.repeat(scales(memory, at, len(v)), 16, axis=1) for v, at in zip((x, y), by, strict=True))
    at = lanes(target, rows), memory.columns(target, columns)
    cells = memory.cells.view(np.int32 if kind == "i8" else np.float32)
    before = cells[at] if adding else np.zeros((rows, columns), cells.dtype)
    cells[at] = matrix.multiply(x, y.T, before, kinds[0], None)


def factor(b: Block, arg, mask: Mask) -> Operand:
    """A or B: an address in tensor memory (in brackets), or a descriptor of shared memory."""
    if isinstance(arg, tuple):
        return partial(inside, b.tensor, value(b, arg, mask))
    descriptor = value(b, arg, mask, "b64")
    assert descriptor >> 46 & 0x7F == 1, "not tcgen05's descriptor"
    return partial(matrix.described, b.shared, descriptor)


BLOCK16 = (("block_scale", "scale_vec::4X"), ("block_scale", "block16"))  # two names of a scale for 16 elements


def mma(i: Instruction, b: Block, mask: Mask) -> None:
    assert mask is not None and mask.sum() == 1, "one thread starts a product"
    kind, scaled = i.op[3].removeprefix("kind::"), i.op[4:] in BLOCK16
    (target, left, right, form), by, add = i.args[:4], i.args[4:-1], i.args[-1]
    assert scaled == (kind == "mxf4nvf4") and (scaled or not i.op[4:]) and len(by) == 2 * scaled, i.text
    factors = factor(b, left, mask), factor(b, right, mask)
    numbers = value(b, form, mask), [value(b, arg, mask) for arg in by], bool(value(b, add, mask, "pred"))
    b.tensor.queue.append(partial(product, b.tensor, kind, value(b, target, mask), *factors, *numbers))


def commit(i: Instruction, b: Block, mask: Mask) -> None:
    b.tensor.queue.append(partial(b.tensor.arrive, value(b, i.args[0], mask, "b64")))


def barrier(i: Instruction, b: Block, mask: Mask) -> None:
    """``mbarrier.init`` and ``inval``: either way nothing else is left where it lies."""
    at = value(b, i.args[0], mask)
    b.shared.store(np.array([at], np.uint64), np.full(8, POISON, np.uint8).view(np.uint64))
    if i.op[1] == "init":
        assert i.args[1] == 1, "a barrier for more than the products"
        b.tensor.phases[at] = 0
    else:
        del b.tensor.phases[at]


def over(i: Instruction, b: Block, mask: np.ndarray) -> np.ndarray:
    """Which threads' phase ``mbarrier.try_wait.parity`` finds completed."""
    (base, offset), parity, done = i.args[1], b.read(i.args[2], "u32"), np.zeros(b.count, bool)
    at = b.read(base, "u32")
    for thread in np.flatnonzero(mask):
        done[thread] = b.tensor.complete(int(at[thread]) + offset, int(parity[thread]))
    return done


def elect(i: Instruction, b: Block, mask: Mask) -> None:
    """Any lane may be a warp's leader: here the last, since 0 would be right by accident."""
    b.whole(mask)
    lane, leads = i.args[0].split("|")
    b.write(lane, np.full(b.count, 31, np.uint32), mask)
    b.write(leads, np.arange(b.count) % 32 == 31, mask)


RUN = {"alloc": allocate, "dealloc": give_back, "ld": transfer, "st": transfer, "mma": mma, "commit": commit}
RUN = {f"tcgen05.{name}": f for name, f in RUN.items()}
RUN |= {"mbarrier.init": barrier, "mbarrier.inval": barrier, "elect.sync": elect}

"""Runs a program, one block of threads after the other; all threads of a block in step (PTX ISA, section 9.7.12)."""

import re
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from . import matrix, tensor_memory
from .memory import POISON, Copies, Space
from .scalar import OPS, TYPES, sources
from .text import Instruction, Program

Mask = np.ndarray | None  # which threads run; None: all
REGISTER = {0: np.dtype("?"), 1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


@cache
def constant(value: int, kind: str, count: int) -> np.ndarray:
    dtype = TYPES[kind]
    if kind == "pred":
        return np.full(count, bool(value))
    bits = value & (1 << 8 * dtype.itemsize) - 1
    return np.full(count, bits, f"u{dtype.itemsize}").view(dtype)


class Block:
    """Registers, shared memory and the running threads of one block; its methods are instructions with a state."""

    def __init__(
        self, program: Program, place: tuple[int, int, int], params: dict, memory: Space, shared: int, arch: str
    ):
        self.program, self.params, self.memory, self.arch = program, params, memory, arch
        self.count = program.threads
        self.registers: dict[str, np.ndarray] = {}
        self.shared = Space([(0, np.full(shared, POISON, np.uint8))])
        self.copies = Copies(memory, self.shared, np.zeros(self.count, int))
        self.tensor = tensor_memory.TensorMemory()
        thread = np.arange(self.count, dtype=np.uint32)
        self.special = {
            f"%ctaid.{axis}": np.full(self.count, p, np.uint32) for axis, p in zip("xyz", place, strict=True)
        }
        self.special |= {"%tid.x": thread, "global_smem": np.zeros(self.count, np.uint64)}

    def read(self, arg, kind: str) -> np.ndarray:
        """An operand of all threads, as this type; a wider register gives its low bits."""
        dtype = TYPES[kind]
        if isinstance(arg, int):
            return constant(arg, kind, self.count)
        value = self.registers.get(arg, self.special.get(arg))
        if value is None:  # compilers read registers that were never written where it does not matter what they hold
            return constant(-1, kind, self.count)
        if value.dtype.itemsize != dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        return value.view(dtype)

    def write(self, name: str, value: np.ndarray, mask: Mask) -> None:
        if name == "_":
            return
        dtype = REGISTER[self.program.size(name)]
        if value.dtype.itemsize != dtype.itemsize:  # a narrow result in a wide register
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
        value = np.ascontiguousarray(value).view(dtype)
        if mask is not None:
            value = np.where(mask, value, self.registers.get(name, np.zeros(self.count, dtype)))
        self.registers[name] = value

    def warps(self, arg, kind: str = "b32") -> np.ndarray:
        return self.read(arg, kind).reshape(-1, 32)

    def active(self, mask: Mask) -> np.ndarray:
        """Which threads run."""
        return np.ones(self.count, bool) if mask is None else mask

    def whole(self, mask: Mask) -> np.ndarray:
        """Which warps run."""
        lanes = self.active(mask).reshape(-1, 32)
        assert (lanes.all(1) == lanes.any(1)).all(), "an instruction for whole warps, in part of one"
        return lanes.any(1)


def address(b: Block, arg: tuple, space: Space) -> np.ndarray:
    base, offset = arg
    return b.read(base, "u64" if space is b.memory else "u32").astype(np.uint64) + np.uint64(offset & (1 << 64) - 1)


def as_list(arg) -> list:
    return arg if isinstance(arg, list) else [arg]


def simple(i: Instruction, b: Block, mask: Mask) -> None:
    target, *args = i.args
    values = (b.read(arg, kind) for arg, kind in zip(args, sources(i.op), strict=False))
    result = OPS[i.op[0]](i.op[1:], *values)
    if isinstance(result, tuple):
        for name, value in zip(target.split("|"), result, strict=True):
            b.write(name, value, mask)
    else:
        b.write(target, result, mask)


def move(i: Instruction, b: Block, mask: Mask) -> None:
    """Registers, and packing and unpacking of them."""
    target, source = i.args
    kind, size = i.op[-1], TYPES[i.op[-1]].itemsize
    if isinstance(target, list):
        part = size // len(target)
        pieces = np.ascontiguousarray(b.read(source, kind))[:, None].view(f"u{part}")
        for at, name in enumerate(target):
            b.write(name, np.ascontiguousarray(pieces[:, at]), mask)
    elif isinstance(source, list):
        part = f"b{size * 8 // len(source)}"
        pieces = np.stack([b.read(name, part) for name in source], axis=1)
        b.write(target, pieces.view(f"u{size}")[:, 0], mask)
    else:
        b.write(target, b.read(source, kind), mask)


def load(i: Instruction, b: Block, mask: Mask) -> None:
    if i.op[1] == "param":
        b.write(i.args[0], np.full(b.count, b.params[i.args[1][0]]).astype(TYPES[i.op[-1]]), mask)
        return
    space = b.memory if i.op[1] == "global" else b.shared
    names, dtype = as_list(i.args[0]), TYPES[i.op[-1]]
    at, active = address(b, i.args[1], space), b.active(mask)
    space.aligned(at[active], dtype.itemsize * len(names))
    for j, name in enumerate(names):
        value = np.zeros(b.count, f"u{dtype.itemsize}")
        value[active] = space.load(at[active] + np.uint64(j * dtype.itemsize), dtype.itemsize)
        b.write(name, value.view(dtype), mask)


def store(i: Instruction, b: Block, mask: Mask) -> None:
    space = b.memory if i.op[1] == "global" else b.shared
    names, kind = as_list(i.args[1]), i.op[-1]
    at, active = address(b, i.args[0], space), b.active(mask)
    size = TYPES[kind].itemsize
    space.aligned(at[active], size * len(names))
    for j, name in enumerate(names):
        space.store(at[active] + np.uint64(j * size), b.read(name, kind).view(f"u{size}")[active])


def atomic(i: Instruction, b: Block, mask: Mask) -> None:
    """Whose former value nobody reads."""
    assert i.op[1] == "global" and i.op[-2:] == ("add", "u32"), i.text
    active = b.active(mask)
    b.memory.add_to(address(b, i.args[1], b.memory)[active], b.read(i.args[2], "u32")[active])


def copy(i: Instruction, b: Block, mask: Mask) -> None:
    thread = np.flatnonzero(b.active(mask))
    if i.op[2] == "commit_group":
        b.copies.commit(thread)
    elif i.op[2] == "wait_group":
        b.copies.wait(thread, i.args[0])
    else:
        target, source = address(b, i.args[0], b.shared), address(b, i.args[1], b.memory)
        size = i.args[2]
        read = b.read(i.args[3], "u32") if len(i.args) > 3 else np.full(b.count, size)
        b.copies.start(thread, target[thread], source[thread], size, read[thread])


def matrices(i: Instruction, b: Block, mask: Mask) -> None:
    warps, trans = b.whole(mask), "trans" in i.op
    if i.op[0] == "stmatrix":
        at = address(b, i.args[0], b.shared).reshape(-1, 32)[warps]
        matrix.store_matrices(b.shared, at, [b.warps(name)[warps] for name in i.args[1]], trans)
        return
    at = address(b, i.args[1], b.shared).reshape(-1, 32)[warps]
    for name, value in zip(i.args[0], matrix.load_matrices(b.shared, at, len(i.args[0]), trans), strict=True):
        everywhere = np.zeros((len(warps), 32), np.uint32)
        everywhere[warps] = value
        b.write(name, everywhere.reshape(-1), mask)


FRACTION = {"sm89": 13, "sm90": 13}  # bits of an fp8 sum, as others measured (arXiv 2411.10958, 2412.19437)


def mma(i: Instruction, b: Block, mask: Mask) -> None:
    """``mma.sync``: m16n8k16 of 16 bit, m16n8k32 of 8, m16n8k64 of e2m1 with a scale for each 16."""
    scaled = "block_scale" in i.op
    kind, number = (i.op[-4], "f32") if scaled else (i.op[-3], i.op[-1])
    b.whole(mask)
    left = matrix.fragment([b.warps(name) for name in i.args[1]], "a", kind)
    right = matrix.fragment([b.warps(name) for name in i.args[2]], "b", kind)
    if scaled:
        (_, thread_a), (_, thread_b) = i.args[5], i.args[7]
        left = left * np.repeat(matrix.block_scales(b.warps(i.args[4]), thread_a, 16), 16, axis=2)
        by_column = np.repeat(matrix.block_scales(b.warps(i.args[6]), thread_b, 8), 16, axis=2)
        right = right * by_column.transpose(0, 2, 1)
    at = matrix.places("c", 1)
    c = np.stack([b.warps(name, number) for name in i.args[3]], axis=-1).reshape(len(left), -1)[:, at]
    result = np.empty((len(left), 128), c.dtype)
    result[:, at] = matrix.multiply(left, right, c, kind, FRACTION.get(b.arch))
    for j, name in enumerate(i.args[0]):
        b.write(name, np.ascontiguousarray(result[:, j::4]).reshape(-1), mask)


def wgmma(i: Instruction, b: Block, mask: Mask) -> None:
    """``wgmma.mma_async``, for each four warps. At once: ptxas lets nobody read the sums before they are there."""
    if i.op[1] != "mma_async":
        return
    assert mask is None, "wgmma in part of a block"
    _, columns, depth = (int(n) for n in re.findall(r"\d+", i.op[4]))
    number, kind = i.op[5], i.op[6]
    names, left, right, add, *rest = i.args
    transposed = [bool(t) for t in rest[2:]] or [False, False]
    row, column = matrix.sums(columns)
    width = depth * matrix.BITS[kind] // 8
    adding = b.read(add, "pred")
    old = np.stack([b.read(name, number) for name in names], axis=-1)
    new = np.empty_like(old)
    for first in range(0, b.count, 128):
        threads = slice(first, first + 128)
        if isinstance(left, list):
            words = [b.warps(name)[first // 32 : first // 32 + 4] for name in left]
            a = matrix.fragment(words, "a", kind).reshape(64, -1)
        else:
            a = matrix.described(b.shared, int(b.read(left, "u64")[first]), 64, width, kind, transposed[0])
        at = matrix.described(b.shared, int(b.read(right, "u64")[first]), columns, width, kind, transposed[-1])
        c = np.zeros((64, columns), old.dtype)
        if adding[first]:
            c[row, column] = old[threads]
        new[threads] = matrix.multiply(a, at.T, c, kind, FRACTION.get(b.arch))[row, column]
    for j, name in enumerate(names):
        b.write(name, new[:, j].copy(), mask)


def shuffle(i: Instruction, b: Block, mask: Mask) -> None:
    b.whole(mask)
    values, by, clamp = (b.warps(arg) for arg in i.args[1:4])
    b.write(i.args[0], matrix.shuffle(i.op[2], values, by, clamp).reshape(-1), mask)


def reduce(i: Instruction, b: Block, mask: Mask) -> None:
    b.whole(mask)
    values = b.warps(i.args[1], i.op[-1])
    assert i.op[2] == "max", i.text
    b.write(i.args[0], np.repeat(values.max(axis=1), 32), mask)


def nothing(i: Instruction, b: Block, mask: Mask) -> None:
    """An order among threads, which run in step, or a hint."""


RUN: dict[str, Callable[[Instruction, Block, Mask], None]] = {name: simple for name in OPS}
RUN |= {"mov": move, "ld": load, "st": store, "ldmatrix": matrices, "stmatrix": matrices, "mma": mma, "wgmma": wgmma}
RUN |= {"atom": atomic, "shfl": shuffle, "redux": reduce, "fence": nothing, "bar.warp": nothing, "cp.async": copy}
RUN |= tensor_memory.RUN
RUN |= dict.fromkeys(("tcgen05.wait::ld", "tcgen05.wait::st", "tcgen05.relinquish_alloc_permit"), nothing)


def step(i: Instruction) -> Callable[[Block, Mask], None] | None:
    """What the instruction does; None for those that only say where threads go on."""
    name = ".".join(i.op[:2])
    if i.op[0] in ("bra", "ret") or name in ("bar.sync", "barrier.sync", "mbarrier.try_wait"):
        return None
    run = RUN.get(name) or RUN.get(i.op[0])
    if run is None:
        raise NotImplementedError(f"no such instruction here: {i.text}")
    return partial(run, i)


class Runner:
    """The threads of a block by where they are. Those that are behind run first, so that all meet again."""

    def __init__(self, block: Block):
        self.block = block
        self.all = np.ones(block.count, bool)
        self.at = {0: self.all}  # instruction -> threads that are to run it
        self.waiting: dict[int, np.ndarray] = {}  # the same, at a barrier
        self.blocked: dict[int, np.ndarray] = {}  # the same, at an mbarrier

    def go(self, mask: np.ndarray, where: int) -> None:
        if mask is self.all or mask.any():
            both = self.at[where] | mask if where in self.at else mask
            self.at[where] = self.all if both is self.all or both.all() else both

    def wait(self, mask: np.ndarray, where: int) -> None:
        """``mbarrier.try_wait``: it lets through; the others try again when nobody else can go on."""
        i = self.block.program.code[where]
        done = tensor_memory.over(i, self.block, mask)
        self.block.write(i.args[0], done, mask)
        self.go(done, where + 1)
        if (mask & ~done).any():
            self.blocked[where] = self.blocked.get(where, np.zeros(self.block.count, bool)) | mask & ~done

    def release(self) -> None:
        """Everybody who still runs is at a barrier."""
        blocked, self.blocked = self.blocked, {}
        for where, mask in blocked.items():
            self.wait(mask, where)
        if self.at:
            return
        assert not self.blocked, "threads wait for products that nobody commits"
        assert len(self.waiting) == 1, f"threads wait at {len(self.waiting)} barriers for each other"
        ((where, mask),) = self.waiting.items()
        self.waiting = {}
        self.go(mask, where + 1)

    def run(self, steps: list) -> None:
        b, code, labels = self.block, self.block.program.code, self.block.program.labels
        while self.at or self.waiting or self.blocked:
            if not self.at:
                self.release()
            here = min(self.at)
            threads = self.at.pop(here)
            i = code[here]
            if i.guard is not None:
                guard = b.registers[i.guard]
                active = threads & (~guard if i.negated else guard)
            else:
                active = threads
            if i.op[0] == "bra":
                self.go(active, labels[i.args[0]])
                self.go(threads & ~active, here + 1)
            elif i.op[0] == "ret":
                self.go(threads & ~active, here + 1)
            elif i.op[0] == "mbarrier" and steps[here] is None:
                self.go(threads & ~active, here + 1)
                self.wait(active, here)
            elif steps[here] is None:  # a barrier
                self.waiting[here] = self.waiting.get(here, np.zeros(b.count, bool)) | active
            else:
                if active is self.all or active.any():
                    try:
                        steps[here](b, None if active is self.all or active.all() else active)
                    except Exception as error:
                        raise RuntimeError(f"{b.program.name}, instruction {here}: {i.text}") from error
                self.go(threads, here + 1)


def launch(
    program: Program, grid: tuple[int, int, int], args: list[int], memory: Space, shared: int, arch: str
) -> None:
    """Run it. ``args``: the values of its parameters, addresses for tensors."""
    params = dict(zip(program.params, args, strict=True))
    steps = [step(i) for i in program.code]
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    block = Block(program, (x, y, z), params, memory, shared, arch)
                    Runner(block).run(steps)
                    assert not block.tensor.taken, "tensor memory that nobody gave back"

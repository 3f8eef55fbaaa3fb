"""Global and shared memory (PTX ISA, section 9.7.9): every access must lie in a tensor, and be aligned."""

from dataclasses import dataclass, field

import numpy as np
import torch

POISON = 0xFF  # of shared memory that nobody wrote: NaN as a float


@dataclass
class Space:
    """Byte ranges that may be accessed: a tensor each, or a block's shared memory at address 0."""

    ranges: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def include(self, tensor: torch.Tensor) -> None:
        """The bytes from the first element of a tensor to its last."""
        if tensor.numel():
            span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            flat = tensor.detach().as_strided((span,), (1,)).view(torch.uint8)
            self.ranges.append((tensor.data_ptr(), flat.numpy()))

    def lanes(self, addresses: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per range: its elements of ``size`` bytes, which of the addresses lie in it, and the indices there."""
        found, left = [], np.ones(len(addresses), bool)
        for start, data in self.ranges:
            inside = (addresses >= start) & (addresses <= start + len(data) - size) & left
            if inside.any():
                left &= ~inside
                offset = (addresses[inside] - np.uint64(start)).astype(np.int64)
                found.append((data[: len(data) // size * size].view(f"u{size}"), inside, offset // size))
                if not left.any():
                    return found
        if left.any():
            raise IndexError(f"address {addresses[left][0]:#x} is in no tensor ({left.sum()} threads)")
        return found

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        self.aligned(addresses, size)
        result = np.empty(len(addresses), f"u{size}")
        for data, inside, index in self.lanes(addresses, size):
            result[inside] = data[index]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        self.aligned(addresses, values.dtype.itemsize)
        for data, inside, index in self.lanes(addresses, values.dtype.itemsize):
            data[index] = values[inside]

    def add_to(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """One after the other, at the same address as well."""
        self.aligned(addresses, values.dtype.itemsize)
        for data, inside, index in self.lanes(addresses, values.dtype.itemsize):
            np.add.at(data, index, values[inside])

    @staticmethod
    def aligned(addresses: np.ndarray, size: int) -> None:
        if (addresses % np.uint64(size)).any():
            raise ValueError(f"{size} bytes at an address that is no multiple of {size}")


@dataclass
class Copies:
    """``cp.async``: what is on its way is poison until the group is waited for."""

    source: Space
    target: Space
    groups: np.ndarray  # how many each thread has closed
    underway: list[tuple] = field(default_factory=list)  # size; per thread its number, group, target, source, read

    def start(self, thread: np.ndarray, target: np.ndarray, source: np.ndarray, size: int, read: np.ndarray) -> None:
        """``size`` bytes per thread, of which the first ``read`` are copied and the others zero."""
        for at in range(0, size, word := min(size, 8)):
            self.target.store(target + np.uint64(at), np.full(len(target), -1, f"i{word}").view(f"u{word}"))
        self.underway.append((size, thread, self.groups[thread], target, source, read))

    def commit(self, thread: np.ndarray) -> None:
        self.groups[thread] += 1

    def wait(self, thread: np.ndarray, left: int) -> None:
        """All but the latest ``left`` groups of these threads arrive."""
        until = np.zeros_like(self.groups)
        until[thread] = self.groups[thread] - left
        copies, self.underway = self.underway, []
        for size, *lanes in copies:
            ready = lanes[1] < until[lanes[0]]
            self.arrive(size, *(part[ready] for part in lanes[2:]))
            if not ready.all():
                self.underway.append((size, *(part[~ready] for part in lanes)))

    def arrive(self, size: int, target: np.ndarray, source: np.ndarray, read: np.ndarray) -> None:
        word = min(size, 8)
        for at in range(0, size, word):
            whole = read >= at + word
            if (~whole & (read > at)).any():
                raise NotImplementedError(f"cp.async that reads part of {word} bytes")
            values = np.zeros(len(target), f"u{word}")
            values[whole] = self.source.load(source[whole] + np.uint64(at), word)
            self.target.store(target + np.uint64(at), values)

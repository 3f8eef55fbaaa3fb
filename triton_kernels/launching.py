"""Where kernels are launched, so that others can hear what is launched with what, to do the same again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """``compiled`` is Triton's compiled kernel, None in its interpreter; all ``arguments`` in the kernel's order."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]

    def again(self) -> Any:
        """What launches it on the current stream of its device, given its arguments; tensors may be addresses.

        Triton does not look at them any more: they have to be of the same dtypes, aligned to 16 bytes as before, and
        numbers have to be the same ones.
        """
        return self.compiled[(*self.grid, 1, 1)[:3]]


class Heard(threading.local):
    """By thread: the lists to add to."""

    def __init__(self) -> None:
        self.lists: list[list[Any]] = []


HEARD = Heard()


OPTIONS = {"enable_fp_fusion": True}  # products and sums in one instruction: Triton 3.10 is to stop that by default


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """``kernel[grid](*arguments, **named)``."""
    compiled = kernel[grid](*arguments, **named, **OPTIONS)
    if HEARD.lists:
        given = dict(zip(kernel.arg_names, arguments)) | named
        ordered = [given[name] for name in kernel.arg_names]
        for heard in HEARD.lists:
            heard.append(Launch(compiled, grid, ordered))


@contextmanager
def hearing(heard: list[Any]) -> Iterator[None]:
    """Add a :class:`Launch` to ``heard`` for everything that this thread launches."""
    HEARD.lists.append(heard)
    try:
        yield
    finally:
        HEARD.lists.pop()

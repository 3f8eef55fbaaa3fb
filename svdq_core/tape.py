"""What a quantized linear asked of torch and of our kernels, written down once and done again without asking.

Which memory it takes, and which kernels it launches with what, follows from the form of its input and of its layer. To
find that out takes the host 170 µs, as long as a large GPU needs for the work; to do it again takes 25.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..triton_kernels.launching import Launch, hearing
from .deferred import pieces_of
from .linear import QuantizedLinear

aten = torch.ops.aten
EMPTY = (aten.new_empty.default, aten.empty.memory_format)
ALIGNED = 16  # bytes: Triton compiles a kernel for addresses that are, or for those that are not
PIECE = 256  # bytes: where a piece of shared memory may begin


class Op(NamedTuple):
    """One of torch's, and what it returned."""

    func: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    result: Any

    @property
    def is_view(self) -> bool:
        """Whether it only looks at one of its tensors otherwise. Its schema does not say: reshape may, or may copy."""
        tensors = [a for a in self.arguments if isinstance(a, Tensor)]
        if self.func._schema.is_mutable or not isinstance(self.result, Tensor):
            return False
        return any(a.untyped_storage().data_ptr() == self.result.untyped_storage().data_ptr() for a in tensors)


class Listener(TorchDispatchMode):
    """What torch is asked for while it is open."""

    def __init__(self, heard: list[Any]) -> None:
        super().__init__()
        self.heard = heard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.heard.append(Op(func, args, kwargs or {}, result))
        return result


class UnrepeatableError(Exception):
    """It cannot be done again, and why."""


Step = Callable[[list[Tensor], list[Any]], None]


@dataclass(frozen=True)
class Tape:
    """Steps from given tensors to a result. What only kernels see is an address in memory that they share."""

    steps: list[Step]
    shape: tuple[int, ...]
    shared: int  # bytes
    begins: list[int]  # in them
    made: list[tuple[tuple[int, ...], torch.dtype]]  # tensors that torch sees, too
    rest: list[Any]  # further arguments
    derives: bool = False  # whether it makes again what follows from a weight, and might have been kept

    def play(self, given: Sequence[Tensor]) -> Tensor | None:
        """The result for others of the same form, on the current stream; None if one of them is not aligned.

        The current device has to be theirs.
        """
        addresses = [tensor.data_ptr() for tensor in given]
        if not aligned(addresses):
            return None
        like = given[0]
        result, shared = like.new_empty(self.shape), like.new_empty(self.shared, dtype=torch.uint8)
        start = shared.data_ptr()
        made = [like.new_empty(shape, dtype=dtype) for shape, dtype in self.made]
        tensors, values = [*given, *made], [*addresses, *(tensor.data_ptr() for tensor in made)]
        values += [result.data_ptr(), *(start + begin for begin in self.begins), *self.rest]
        for step in self.steps:
            step(tensors, values)
        return result


def record(run: Callable[[], Tensor | None], given: Sequence[Tensor]) -> tuple[Tensor | None, Tape | None]:
    """``run()``, which depends on nothing but the form and the values of ``given``; and a tape, if there can be one.

    Whether the tape gives the same bits is tried at once, for which the host waits.
    """
    heard: list[Any] = []
    with hearing(heard), Listener(heard):
        result = run()
    if result is None:
        return None, None
    try:
        tape = Writer(given, heard, result).tape
        heard.clear()  # and the memory with it
        return result, tape if same(result, tape.play(given)) else None
    except Exception as error:  # another Triton, which launches otherwise; no memory for a second result
        logging.debug("SVDQuant: not on tape: %s", error)
        return result, None


def same(a: Tensor, b: Tensor | None) -> bool:
    """Whether all bits are."""
    return b is not None and torch.equal(a.view(torch.int16), b.view(torch.int16))


def aligned(addresses: Iterable[int]) -> bool:
    """Whether a tape can be played with tensors there."""
    return not reduce(or_, addresses) % ALIGNED


# ---- cases -----------------------------------------------------------------------------------------------

FORMS: dict[tuple[Any, ...], object] = {}
Form = tuple[object, tuple[Tensor, ...], int]


def form(layer: QuantizedLinear) -> Form:
    """What layers of one form have in common, the tensors of this one in their order, and how many are derived."""
    found: Form | None = layer.ready.get("form")
    if found is None or found[2] != len(layer.derived):
        tensors = layer.parts | layer.derived
        about = [(name, each.dtype, each.shape, each.stride()) for name, each in tensors.items()]
        shared = FORMS.setdefault((layer.fmt.name, layer.act_unsigned, *about), object())
        found = layer.ready["form"] = shared, tuple(tensors.values()), len(layer.derived)
    return found


def case_of(x: Tensor, layers: Sequence[QuantizedLinear], *rest: Any) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What a choice, and a tape, for ``x (..., K)`` and the layers hold for; and the tensors that are given."""
    pieces, before = pieces_of(x)
    forms = [form(layer) for layer in layers]
    key = (*rest, x.device, before, *[each[0] for each in forms], *[(p.dtype, p.shape, p.stride()) for p in pieces])
    return key, [*pieces, *(tensor for each in forms for tensor in each[1])]


# ---- writing ---------------------------------------------------------------------------------------------


class Writer:
    """Writes the :attr:`tape` of what was heard."""

    def __init__(self, given: Sequence[Tensor], heard: list[Any], result: Tensor) -> None:
        (needed, seen), read = to_do_again(heard), read_by_kernels(heard)
        empty = [each.result for each in heard if isinstance(each, Op) and each.func in EMPTY]
        inside = [tensor for tensor in empty if tensor.data_ptr() != result.data_ptr()]
        made = [tensor for tensor in inside if id(tensor) in seen]
        shared = [tensor for tensor in inside if id(tensor) not in seen and tensor.data_ptr() in read]
        if len(inside) != len(empty) - 1:
            raise UnrepeatableError("the result is not memory that kernels wrote to")
        self.tensors = {id(tensor): index for index, tensor in enumerate([*given, *made])}
        self.places: dict[int, int] = {}  # in the list of values, by the address that was heard
        for place, tensor in enumerate([*given, *made, result, *shared]):
            if tensor.numel() and self.places.setdefault(tensor.data_ptr(), place) != place:
                raise UnrepeatableError("two of the tensors are one")
        self.count = len(given) + len(made)
        self.first = self.count + 1 + len(shared)
        self.rest: list[Any] = []
        steps = [self.launch(each) if isinstance(each, Launch) else self.op(each) for each in needed]
        sizes = [-(-tensor.nbytes // PIECE) * PIECE for tensor in shared]
        self.tape = Tape(
            steps=steps,
            shape=tuple(result.shape),
            shared=sum(sizes),
            begins=[sum(sizes[:index]) for index in range(len(sizes))],
            made=[(tuple(tensor.shape), tensor.dtype) for tensor in made],
            rest=self.rest,
        )

    def launch(self, heard: Launch) -> Step:
        if heard.compiled is None:
            raise UnrepeatableError("Triton's interpreter")
        places = [self.address(a) if isinstance(a, Tensor) else self.value(a) for a in heard.arguments]
        return partial(launch_again, heard.again(), itemgetter(*places))

    def address(self, tensor: Tensor) -> int:
        """Its place in the values."""
        if not tensor.numel():
            return self.value(0)
        if tensor.data_ptr() not in self.places:
            raise UnrepeatableError("a kernel takes a tensor that nobody gave or made")
        return self.places[tensor.data_ptr()]

    def value(self, value: Any) -> int:
        """Its place in the values."""
        self.rest.append(value)
        return self.first + len(self.rest) - 1

    def op(self, heard: Op) -> Step:
        arguments = [self.tensors.get(id(a)) if isinstance(a, Tensor) else None for a in heard.arguments]
        known = len(arguments) - arguments.count(None)
        tensors = [leaf for leaf in tree_leaves((heard.arguments, heard.named)) if isinstance(leaf, Tensor)]
        if known != len(tensors) or not isinstance(heard.result, Tensor):
            raise UnrepeatableError(f"{heard.func} of tensors that nobody gave or made")
        self.tensors[id(heard.result)] = self.count
        self.count += 1
        self.places[heard.result.data_ptr()] = place = self.value(None)
        given = [(value if index is None else None, index) for value, index in zip(heard.arguments, arguments)]
        return partial(op_again, partial(heard.func, **heard.named), given, place, heard.result.dtype)


def launch_again(again: Callable[..., None], arguments: Callable[[list[Any]], Any], _: Any, values: list[Any]) -> None:
    again(*arguments(values))


def op_again(
    func: Callable[..., Tensor],
    given: list[tuple[Any, int | None]],
    place: int,
    dtype: torch.dtype,
    tensors: list[Tensor],
    values: list[Any],
) -> None:
    """``given`` are the op's arguments as they were, and which one of the tensors each of them is, if any."""
    result = func(*(value if index is None else tensors[index] for value, index in given))
    if result.dtype != dtype:
        raise UnrepeatableError(f"{result.dtype} instead of {dtype}, as under autocast")
    tensors.append(result)
    values[place] = result.data_ptr()


def to_do_again(heard: list[Any]) -> tuple[list[Any], set[int]]:
    """Launches, and ops that are more than memory or a view, or a view for one; ids of the tensors that ops take."""
    needed: list[Any] = []
    seen: set[int] = set()
    for each in reversed(heard):
        if isinstance(each, Launch):
            needed.append(each)
        elif each.func not in EMPTY and (not each.is_view or id(each.result) in seen):
            needed.append(each)
            seen |= {id(a) for a in each.arguments if isinstance(a, Tensor)}
    return needed[::-1], seen


def read_by_kernels(heard: list[Any]) -> set[int]:
    """Addresses of the tensors that kernels take."""
    launches = [each for each in heard if isinstance(each, Launch)]
    return {a.data_ptr() for each in launches for a in each.arguments if isinstance(a, Tensor)}

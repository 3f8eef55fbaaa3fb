"""torch's operators for CUDA tensors, run by the CPU's on tensors that share the emulated GPU's memory."""

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

DRIVER = ctypes.CDLL(None)

# Allocation, views and transfers are torch's own: they need no kernel.
OWN = {
    "empty.memory_format", "empty_strided", "resize_", "as_strided", "view", "view_as_real", "view_as_complex",
    "unfold", "_reshape_alias", "set_", "set_.source_Storage", "set_.source_Tensor",
    "set_.source_Storage_storage_offset", "record_stream", "_local_scalar_dense", "is_set_to",
}  # fmt: skip
WAITING = {"aten::nonzero", "aten::masked_select"}  # for the size of their result
INDICES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}  # may be on the CPU
COMPOSED = ("scaled_dot_product_attention", "convolution")  # which on CUDA are put together from CUDA's own parts

LIBRARY = torch.library.Library("aten", "IMPL")


def install() -> None:
    """For every operator that has a kernel for CUDA."""
    torch.cuda.init()
    warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
    for full in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        name, _, overload = full.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
        if op is not None and full.startswith("aten::") and full.removeprefix("aten::") not in OWN:
            LIBRARY.impl(op, by_cpu(op), "CUDA", allow_override=True)
    for name in COMPOSED:
        op = getattr(torch.ops.aten, name).default
        LIBRARY.impl(op, by_cpu(op), "CUDA")
    LIBRARY.impl(torch.ops.aten.copy_.default, copy_, "CUDA", allow_override=True)


def arrive() -> None:
    """What an operator on the current stream may see has arrived."""
    DRIVER.svdq_gpu_arrive(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))


def shared(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in the memory of one of the GPU."""
    storage = tensor.untyped_storage()
    found = torch.empty(0, dtype=tensor.dtype)
    if storage.nbytes() == 0:
        return found.set_(found.untyped_storage(), 0, tensor.shape, tensor.stride())
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    found.set_(raw, tensor.storage_offset(), tensor.shape, tensor.stride())
    return found.conj() if tensor.is_conj() else found


def memory_at(address: int) -> Tensor:
    """A tensor of the CPU from an address of the GPU to the end of what was allocated there."""
    start, size = ctypes.c_uint64(), ctypes.c_size_t()
    error = DRIVER.cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(size), ctypes.c_uint64(address))
    assert not error, f"no memory at {address:#x}"
    memory = (ctypes.c_uint8 * (start.value + size.value - address)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)


def span(tensor: Tensor) -> int:
    """Bytes from its first element to its last."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + reach) * tensor.element_size() if tensor.numel() else 0


def to_gpu(tensor: Tensor) -> Tensor:
    found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    ctypes.memmove(found.data_ptr(), tensor.data_ptr(), span(tensor))
    return found


def on_cpu(generator: torch.Generator) -> torch.Generator:
    """One that gives what comes next, and moves the GPU's on."""
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed((seed * 1000003 + offset) % 2**63)


def by_cpu(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """``op`` for tensors of the GPU; those of the CPU are refused as torch does, unless they are single numbers."""
    arguments = op._schema.arguments
    random = any(each.name == "generator" for each in arguments)

    def run(*args: Any, **kwargs: Any) -> Any:
        if op._schema.name in WAITING:
            torch.cuda.current_stream().synchronize()
        arrive()
        pairs: list[tuple[Tensor, Tensor]] = []  # the CPU's tensor, and the GPU's

        def lower(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_cuda:
                pairs.append((shared(value), value))
                return pairs[-1][0]
            if isinstance(value, Tensor) and value.dim() and op._schema.name not in INDICES:
                where = f"{op} got one of {tuple(value.shape)} on the CPU"
                raise RuntimeError(f"Expected all tensors to be on the same device, but {where}")
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return on_cpu(value) if isinstance(value, torch.Generator) else value

        def raised(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if written := [gpu for cpu, gpu in pairs if cpu is value]:
                return written[0]
            memory = value.untyped_storage().data_ptr() if value.numel() else None
            assert memory not in {cpu.untyped_storage().data_ptr() for cpu, _ in pairs}, f"{op} returns a view"
            return to_gpu(value)

        args, kwargs = tree_map(lower, (args, kwargs))
        if random and not isinstance(kwargs.get("generator"), torch.Generator):
            kwargs["generator"] = on_cpu(torch.cuda.default_generators[0])
        # a number in a tensor's place comes as the number: another overload takes it
        number = any(isinstance(a, (int, float)) and str(p.type) == "Tensor" for a, p in zip(args, arguments))
        result = (op.overloadpacket if number else op)(*args, **kwargs)
        for cpu, gpu in pairs:  # out= of another size
            if cpu.shape != gpu.shape:
                gpu.resize_(cpu.shape).as_strided_(cpu.shape, cpu.stride())
                ctypes.memmove(gpu.data_ptr(), cpu.data_ptr(), span(cpu))
        return tree_map(raised, result)

    return run


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Asynchronous where the memory of the CPU is pinned; there torch calls the driver, as for any plain copy."""
    plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    host = source if target.is_cuda else target
    if non_blocking and plain and target.shape == source.shape and not host.is_cuda and host.is_pinned():
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        size = ctypes.c_size_t(target.numel() * target.element_size())
        pointers = ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr())
        DRIVER.cudaMemcpyAsync(*pointers, size, 4, stream)
        return target
    if not non_blocking and target.is_cuda != source.is_cuda:
        torch.cuda.current_stream().synchronize()
    arrive()
    cpu = [shared(each) if each.is_cuda else each for each in (target, source)]
    torch.ops.aten.copy_.default(*cpu)
    return target

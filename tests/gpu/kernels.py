"""Triton's kernels on the emulated GPU: compiled for its part, and run as PTX by `tests/ptx`."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import operators


def install() -> None:
    """Triton's driver is this one; comfy-kitchen's kernels, which bring a CUDA runtime of their own, are not used."""
    driver.set_active(Driver())
    from comfy_kitchen.registry import registry

    for backend in ("cuda", "triton"):
        registry.disable(backend)


def reachable(argument: Any, kind: str) -> Any:
    """What a kernel gets, where the emulation can read and write it."""
    if isinstance(argument, Tensor):
        return operators.shared(argument)
    return operators.memory_at(argument) if kind.startswith("*") and argument else argument


class Driver:
    """What Triton asks of its driver."""

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.capability = 10 * major + minor

    @property
    def utils(self) -> Any:
        from ptx.driver import Utilities  # imports the plugin: not before it is used

        return Utilities(f"sm{self.capability}")

    @property
    def launcher_cls(self) -> type:
        from ptx.driver import Launcher

        class OnStream(Launcher):
            """With tensors of the GPU, or addresses of its memory, on torch's current stream."""

            def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
                assert stream == torch.cuda.current_stream().cuda_stream
                if any(isinstance(each, Tensor) and not each.is_cuda and each.dim() for each in rest):
                    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
                operators.arrive()
                head, arguments = rest[: -len(self.kinds)], rest[-len(self.kinds) :]
                with _disable_current_modes():  # a GPU asks torch for nothing
                    on_cpu = [reachable(each, kind) for each, kind in zip(arguments, self.kinds, strict=True)]
                    super().__call__(x, y, z, stream, *head, *on_cpu)

        return OnStream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def get_device_interface(self) -> Any:
        return torch.cuda

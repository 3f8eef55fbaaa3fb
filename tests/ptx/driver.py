"""Triton's driver of the GPU in NumPy: kernels are compiled for a real part and run on tensors of the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_svdquant import triton_kernels
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from triton_compile import SHARED

from . import machine, text
from .memory import Space


class Utilities:
    """What Triton asks before it launches."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch]}

    def load_binary(self, *args: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads of a block


class Launcher:
    """Runs one compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        self.kinds, self.shared = list(source.signature.values()), metadata.shared
        self.arch = f"sm{metadata.target.arch}"
        ptx = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        self.program = text.parse(Path(ptx).read_text(encoding="utf-8"))

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
        memory, values = Space(), []
        for kind, arg in zip(self.kinds, rest[3:], strict=True):  # behind two hooks and their data
            if kind == "constexpr":
                continue
            if isinstance(arg, torch.Tensor):
                memory.include(arg)
                arg = arg.data_ptr()
            values.append(arg)
        machine.launch(self.program, (x, y, z), [*values, 0, 0], memory, self.shared, self.arch)  # 0: no scratch


class Driver:
    """One part."""

    def __init__(self, arch: str):
        self.capability = int(arch.removeprefix("sm"))
        self.utils = Utilities(arch)
        self.launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Our kernels run as on this part (``sm89``), given tensors of the CPU."""
    folder = Path(triton_kernels.__file__).parent
    modules = [import_module(f"{triton_kernels.__name__}.{path.stem}") for path in folder.glob("*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver(arch))
        for module in modules:
            if hasattr(module, "arch"):
                patch.setattr(module, "arch", lambda device: arch)
        yield

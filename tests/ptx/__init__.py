"""An NVIDIA GPU in NumPy: it runs the PTX that Triton compiles, so that compiled kernels are tested without a GPU.

`text.py` reads PTX; `scalar.py`, `memory.py`, `matrix.py` and `tensor_memory.py` are its instructions; `machine.py`
runs a block of threads; `driver.py` puts all this under Triton. Semantics: PTX ISA 8.7, by section. What NVIDIA leaves
open is chosen against the kernels: approximate divisions and powers are off by as much as they may be, asynchronous
copies and the products of sm 100 come as late as they may, shared and tensor memory start as NaN, and an address that
is in no tensor is an error. Threads run in step, so a missing barrier is not seen, nor is anything about speed.
"""

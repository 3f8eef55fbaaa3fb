"""Triton's interpreter with the rounding of the hardware.

Without a GPU the kernel tests run there (`conftest.py` sets TRITON_INTERPRET). Triton 3.6's interpreter truncates
float32 to bf16, rounds half up to fp8, multiplies bf16 matrices as integers and rounds twice in a fused
multiply-add. A GPU does none of this, so these are replaced; everything else is Triton's.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

FLOATS = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
E4M3_MAX = 448.0


def as_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The interpreter's array (bf16 and fp8 are unsigned integers there) as the float tensor it stands for."""
    bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.itemsize}" if data.itemsize > 1 else "u1"))
    return bits.view(FLOATS[dtype])


def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """Round to nearest even; to e4m3 the largest value saturates, as ``cvt.rn.satfinite`` does."""
    x = as_torch(data, source)
    if target == tl.float8e4nv:
        x = x.float().clamp(-E4M3_MAX, E4M3_MAX)
    y = x.to(FLOATS[target])
    return y.view(BITS[y.element_size()]).numpy().view(f"u{y.element_size()}").reshape(data.shape)


def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: object) -> TensorHandle:
    """Integers exactly; floats with float32 products and sums."""
    if a.dtype in FLOATS:
        x, y = as_torch(a.data, a.dtype).float(), as_torch(b.data, b.dtype).float()
        return TensorHandle(torch.matmul(x, y).numpy().astype(d.data.dtype) + d.data, d.dtype.scalar)
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """The product of two float32 is exact in float64."""
    with np.errstate(invalid="ignore", over="ignore"):  # NaN, infinity
        fused = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(fused.astype(z.data.dtype), z.dtype.scalar)


def patch_tensor(tensor: type, scope: object, patch=interpreter._patch_lang_tensor) -> None:
    """Triton's, and a loop bound that newer NumPy understands."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def mend() -> None:
    """Replace them."""
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._convert_float = convert_float
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fma = create_fma

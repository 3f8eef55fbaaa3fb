"""Time the whole 4-bit linear against torch's 16-bit one, in one run, at FLUX.1's shapes."""

import statistics
import time
from collections.abc import Callable

import torch

from .formats import get_format
from .linear import linear_forward

FLUX_SHAPES = ((3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072))  # (K, N)


def bench(device: torch.device, tokens: int | None) -> None:
    """Print milliseconds and ratios per shape. The baseline is ``torch.nn.functional.linear`` in the same run."""
    gpu = device.type == "cuda"
    m = tokens or (4608 if gpu else 256)
    dtype = torch.bfloat16 if gpu else torch.float32
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}; torch {torch.__version__}; M = {m}; {str(dtype).removeprefix('torch.')}; implementation: plain torch"
    )
    print(f"{'K':>6} {'N':>6} {'16 bit':>10} {'4 bit':>10} {'speed-up':>9}")
    for k, n in FLUX_SHAPES:
        plain, quantized = linears(m, k, n, dtype, device)
        a, b = median_ms(plain, gpu), median_ms(quantized, gpu)
        print(f"{k:6} {n:6} {a:7.2f} ms {b:7.2f} ms {a / b:8.2f}x")


def linears(
    m: int, k: int, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """The 16-bit and the 4-bit linear of one shape, on random data."""
    fmt, rank = get_format("int4"), 32
    x = torch.randn(m, k, device=device, dtype=dtype)
    w = torch.randn(n, k, device=device)
    codes, scales = fmt.round_weight(w, torch.bfloat16)
    tensors = fmt.pack(codes, scales, torch.bfloat16, fmt.tensor_scale(w))
    smooth = torch.ones(k, device=device, dtype=torch.bfloat16)
    down, up = (torch.randn(s, rank, device=device, dtype=torch.bfloat16) / 32 for s in (k, n))
    w, bias = w.to(dtype), torch.zeros(n, device=device, dtype=dtype)
    return (
        lambda: torch.nn.functional.linear(x, w, bias),
        lambda: linear_forward(x, fmt, tensors, smooth, down, up, bias, False, dtype),
    )


def median_ms(run: Callable[[], torch.Tensor], gpu: bool, repeats: int = 9) -> float:
    """Median wall time of a call in milliseconds, after two warm-up calls."""
    times = []
    for i in range(repeats + 2):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)

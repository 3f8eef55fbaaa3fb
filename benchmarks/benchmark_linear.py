"""The whole 4-bit linear at FLUX.1's shapes: every implementation here and every peer that is installed, in one run.

    .venv/bin/python benchmarks/benchmark_linear.py [--tokens M] [--format int4] [--rank 32] [--json FILE] [--small]

A row is input to output: quantize, GEMM, branch, bias. The baseline is torch's linear in bf16, timed beside it, round
robin, so that a clock that falls falls for all. Two more rows make the branch's price visible: `rank 0` is the
implementation that `auto` chooses without a branch; `unfused` is that, and the branch as two products of torch. Peers:
comfy-kitchen's SVDQuant and INT8 (in ComfyUI's environment), bitsandbytes NF4 and SDNQ INT8 + SVD (if installed).
TOP/s counts 2 M N K operations, and is held against products of 8192³ on the same device in the same run.
`--small` is for trying the script without a GPU: its figures mean nothing.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from comfyui_svdquant.svdq_core import backends
from comfyui_svdquant.svdq_core.benchmark import FLUX_SHAPES, gpu_times
from comfyui_svdquant.svdq_core.formats import BRANCH_FORMATS, get_format
from comfyui_svdquant.svdq_core.implementations import IMPLEMENTATIONS, branch
from comfyui_svdquant.svdq_core.linear import QuantizedLinear
from torch import Tensor, nn

ROUNDS, CEILING = 15, 8192
SMALL_SHAPES = ((256, 768), (1024, 256))
Run = Callable[[], Tensor]


def ours(layer: QuantizedLinear, x: Tensor) -> dict[str, Run]:
    """`auto`, the price of its branch, and every implementation that is right on this device."""
    chosen = backends.choice(x, layer)
    bare = replace(layer, proj_down=None, proj_up=None)
    down, up, _ = branch(x, layer)
    runs: dict[str, Run] = {
        "auto": lambda: backends.linear(x, layer),
        "rank 0": lambda: chosen.run(x, bare),
        "unfused": lambda: chosen.run(x, bare).addmm_(x @ down, up.t()),
    }
    (n, k), size = layer.shape, backends.size_class(x.shape[0])
    for i in IMPLEMENTATIONS.values():
        possible = i.fmt == layer.fmt.name and i.why_not(backends.device_arch(x.device)) is None and i.takes(k, n)
        if possible and backends.is_right(i, x.device, x.dtype, layer.act_unsigned, size):
            runs[i.name] = lambda i=i: i.run(x, layer)
    return runs


def peers(weight: Tensor, bias: Tensor, x: Tensor, rank: int) -> dict[str, Run]:
    """What other packages make of the same 16-bit weight (N, K)."""
    makers = {"comfy_kitchen": kitchen_int8, "bitsandbytes": nf4, "sdnq": sdnq}
    runs = {}
    for package, make in makers.items():
        if importlib.util.find_spec(package):
            name, run = make(weight, bias, x, rank)
            runs[name] = run
    return runs


def kitchen_int8(weight: Tensor, bias: Tensor, x: Tensor, rank: int) -> tuple[str, Run]:
    import comfy_kitchen

    codes, scale = comfy_kitchen.quantize_int8_tensorwise(weight)
    return "comfy-kitchen INT8", lambda: comfy_kitchen.int8_linear(x, codes, scale, bias, x.dtype)


def nf4(weight: Tensor, bias: Tensor, x: Tensor, rank: int) -> tuple[str, Run]:
    from bitsandbytes.nn import Linear4bit

    linear = Linear4bit(*weight.t().shape, compute_dtype=x.dtype, quant_type="nf4")
    linear.load_state_dict({"weight": weight.cpu(), "bias": bias.cpu()})
    linear = linear.to(x.device)  # quantizes
    return "bitsandbytes NF4", lambda: linear(x)


def sdnq(weight: Tensor, bias: Tensor, x: Tensor, rank: int) -> tuple[str, Run]:
    from sdnq.quantizer import sdnq_post_load_quant

    linear = nn.Linear(*weight.t().shape, device=x.device, dtype=x.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    options = {"use_svd": True, "svd_rank": rank, "use_quantized_matmul": True, "add_skip_keys": False}
    model = sdnq_post_load_quant(nn.Sequential(linear), weights_dtype="int8", **options)
    return "SDNQ INT8 + SVD", lambda: model(x)


def ceilings(device: torch.device, dtype: torch.dtype, size: int) -> dict[str, float]:
    """TOP/s of torch's own square products: what the device reaches at most."""
    a = torch.randn(size, size, device=device)
    codes, fp8 = a.to(torch.int8), a.to(torch.float8_e4m3fn)
    half, one = a.to(dtype), torch.ones((), device=device)
    products: dict[str, Run] = {
        str(dtype).removeprefix("torch."): lambda: half @ half.t(),
        "int8": lambda: torch._int_mm(codes, codes.t()),
        "fp8": lambda: torch._scaled_mm(fp8, fp8.t(), one, one, out_dtype=torch.bfloat16),
    }
    reached = {}
    for name, run in products.items():
        try:
            reached[name] = 2e-9 * size**3 / milliseconds({name: run}, device)[name]
        except RuntimeError as error:  # a part without such units
            print(f"{name}: {backends.describe(error)}", file=sys.stderr)
    return reached


def milliseconds(runs: dict[str, Run], device: torch.device) -> dict[str, float]:
    """Median of ROUNDS calls each, in turns, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS + 2):
        for name, run in runs.items():
            ms = timed(run, device)
            if i >= 2:
                times[name].append(ms)
    return {name: statistics.median(each) for name, each in times.items()}


def timed(run: Run, device: torch.device) -> float:
    """Milliseconds of one call, on a GPU its own time."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    return gpu_times(run, 1)[0]


def shape_result(fmt: str, m: int, k: int, n: int, rank: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds by row, the choice of `auto`, and what ran."""
    layer, x = backends.random_layer(get_format(fmt), m, k, n, device, torch.bfloat16, rank)
    weight = layer.dequantized_weight().to(x.dtype)
    assert layer.bias is not None
    rows: dict[str, Run] = {"bf16": lambda: torch.nn.functional.linear(x, weight, layer.bias)}
    rows |= ours(layer, x) | peers(weight, layer.bias, x, rank)
    return {"m": m, "k": k, "n": n, "auto": backends.choice(x, layer).name, "ms": milliseconds(rows, device)}


def show(result: dict[str, Any], ceiling: dict[str, float]) -> None:
    m, k, n, times = result["m"], result["k"], result["n"], result["ms"]
    print(f"\nM {m}, K {k}, N {n}; auto is {result['auto']}")
    print(f"{'':22} {'ms':>9} {'bf16 / it':>10} {'it / rank 0':>12} {'TOP/s':>8}  of " + ", ".join(ceiling))
    for name, ms in times.items():
        rate = 2e-9 * m * n * k / ms
        shares = ", ".join(f"{rate / top:.2f}" for top in ceiling.values())
        print(f"{name:22} {ms:9.3f} {times['bf16'] / ms:10.2f} {ms / times['rank 0']:12.2f} {rate:8.1f}     {shares}")


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """`auto` against each other row: the mean over the shapes of how many times faster it is."""
    names = set.intersection(*(set(result["ms"]) for result in results)) - {"auto"}
    return {
        name: statistics.mean(result["ms"][name] / result["ms"]["auto"] for result in results) for name in sorted(names)
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="M (4608: a picture of 1024² and 512 text tokens)")
    parser.add_argument("--format", choices=BRANCH_FORMATS, default="int4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the results here, for benchmarks/results/")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script on a CPU")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.small:
        parser.error("there is no GPU; --small tries the script on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = arguments.tokens or (32 if arguments.small else 4608)
    print(backends.device_key(device))
    with torch.inference_mode():
        ceiling = ceilings(device, torch.bfloat16, 256 if arguments.small else CEILING)
        print("ceilings: " + ", ".join(f"{name} {rate:.1f} TOP/s" for name, rate in ceiling.items()))
        results = []
        for k, n in SMALL_SHAPES if arguments.small else FLUX_SHAPES:
            results.append(shape_result(arguments.format, tokens, k, n, arguments.rank, device))
            show(results[-1], ceiling)
    faster = summary(results)
    print("\nauto is, on average, faster than: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in faster.items()))
    if arguments.json:
        body = {"ceilings_tops": ceiling, "shapes": results, "auto_is_faster_than": faster}
        record.write(arguments.json, "benchmark_linear.py", argv, backends.device_key(device), body)


if __name__ == "__main__":
    main()

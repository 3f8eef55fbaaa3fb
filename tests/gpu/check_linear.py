"""Run by `test_gpu.py` on the emulated GPU: one quantized linear per format, as ComfyUI calls it. Prints JSON."""

import json
from dataclasses import replace
from typing import Any

import torch
from comfyui_svdquant.svdq_core import backends, solve_linear
from comfyui_svdquant.svdq_core.formats import FORMATS
from comfyui_svdquant.svdq_core.implementations import torch_linear

from sampling import error_db

GPU = torch.device("cuda")
M, K, N, RANK = 8, 256, 128, 32


def message(call: Any) -> str:
    try:
        call()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing was raised"


def facts(fmt: str) -> dict[str, Any]:
    layer, x = backends.random_layer(FORMATS[fmt], M, K, N, GPU, torch.bfloat16, RANK)
    y = backends.linear(x, layer)
    chosen = backends.choice(x, layer)
    grid = "int8" if (fmt, chosen.activations) == ("int4", "8 bit") else None
    on_cpu = {name: tensor.cpu() for name, tensor in layer.tensors.items()}
    transposed = x.t().contiguous().t()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # a wait for the GPU is an error here
        captured = backends.linear(x, layer)
    with torch.cuda.stream(torch.cuda.Stream()):
        elsewhere = backends.linear(x, layer)
    return {
        "chosen": chosen.name,
        "device": str(y.device),
        "error": error_db(y, torch_linear(x, layer, grid)),
        "captured": error_db(captured, y),
        "on another stream": error_db(elsewhere, y),
        "not contiguous": error_db(backends.linear(transposed, layer), y),
        "empty": list(backends.linear(x[:0], layer).shape),
        "weight elsewhere": message(lambda: backends.linear(x, replace(layer, tensors=on_cpu))),
        "bias elsewhere": message(lambda: backends.linear(x, replace(layer, bias=layer.bias.cpu()))),
        "rejected": list(backends.REJECTED.values()),
    }


def waits() -> dict[str, str]:
    """What waits for the GPU is an error within a CUDA graph, or the linears would prove nothing there."""
    x, found = torch.ones(4, device=GPU), {}
    for name, call in {"copy": x.cpu, "number": x[0].item, "indices": x.nonzero}.items():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            found[name] = message(call)
    return found


def solved() -> dict[str, Any]:
    """A layer that was solved on the GPU lies there."""
    w, x = torch.randn(N, K, device=GPU) / K**0.5, torch.randn(64, K, device=GPU)
    y = solve_linear(w, x).forward(x)
    return {"device": str(y.device), "error": error_db(y, x @ w.t())}


if __name__ == "__main__":
    backends.CHECKED, backends.CHECKED_K = dict.fromkeys(backends.CHECKED, (33, 128)), 256  # PTX in NumPy is slow
    print(json.dumps({"linear": {fmt: facts(fmt) for fmt in FORMATS}, "waits": waits(), "solved": solved()}))

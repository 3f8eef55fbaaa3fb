"""Run by `test_tape.py` on the emulated GPU: what our implementations do, written down and done again. Prints JSON."""

import json
from dataclasses import replace
from typing import Any

import torch
from comfyui_svdquant.svdq_core import backends, tape
from comfyui_svdquant.svdq_core.deferred import Deferred
from comfyui_svdquant.svdq_core.formats import FORMATS
from comfyui_svdquant.svdq_core.implementations import FUSED_MLP, IMPLEMENTATIONS, Implementation, taking
from comfyui_svdquant.svdq_core.linear import QuantizedLinear
from torch import Tensor
from triton.runtime.jit import JITFunction

GPU = torch.device("cuda")
M, K, N = 5, 128, 64
ASKED: list[str] = []  # kernels that were launched the long way


def counted(kernel: JITFunction, *args: Any, **options: Any) -> Any:
    ASKED.append(kernel.fn.__name__)
    return launch(kernel, *args, **options)


launch, JITFunction.run = JITFunction.run, counted


def layer(fmt: str, k: int, n: int, unsigned: bool = False, rank: int = 16, other: bool = False) -> QuantizedLinear:
    """Two of the same form."""
    found, _ = backends.random_layer(FORMATS[fmt], M, k, n, GPU, torch.bfloat16, rank, unsigned)
    if other:
        found = replace(found, tensors=found.tensors | {"weight": found.tensors["weight"].flip(0)})
    if fmt == "awq":
        found = found.widened(*(torch.randn(*size, device=GPU).bfloat16() for size in ((n, 16), (16, k))))
    return found


def inputs(before: str, other: bool = False) -> Tensor:
    torch.manual_seed(int(other))
    x, tail, row = (torch.randn(*size, device=GPU).bfloat16() for size in ((1, M, K), (1, M, K), (1, 1, K)))
    if before in ("gelu", "silu"):
        gate = tail[..., : K // 2] if before == "silu" else None
        return Deferred(x[..., : K // 2], tail[..., K // 2 :], gate=gate)
    if before == "rms":
        return Deferred(x, None, row, weight=row[0, 0].float())
    return Deferred(x, None, row, row.clone()) if before == "norm" else x


def ways() -> dict[str, tuple[Implementation, str, bool]]:
    """By name: the implementation, what stands before the input, and whether it is unsigned."""
    found = {
        "w4a4": ("int4", "triton-w4a4", "", False),
        "w4a8": ("int4", "triton-w4a8-int8", "norm", False),
        "widened": ("int4", "triton-widened-int8", "gelu", True),
        "fp8": ("int4", "triton-widened-fp8", "", False),
        "int8": ("int8", "triton-w8a8", "silu", True),
        "nvfp4": ("nvfp4", "triton-nvfp4", "rms", False),
        "awq": ("awq", "triton-w4a16", "", False),
    }
    return {
        name: (way(IMPLEMENTATIONS[fmt, each], before), before, u) for name, (fmt, each, before, u) in found.items()
    }


def way(implementation: Implementation, before: str) -> Implementation:
    found = taking(implementation, before) if before else implementation
    assert found
    return found


def again(
    way: Implementation, before: str, here: list[QuantizedLinear], there: list[QuantizedLinear]
) -> dict[str, Any]:
    """Written down with some tensors, played with others."""
    x, y = inputs(before), inputs(before, other=True)
    for layers in (here, there):
        backends.run(way, inputs(before), *layers)  # what follows from a weight is made at the first call
    case, given = tape.case_of(x, here)
    found, written = tape.record(lambda: backends.run(way, x, *here), given)
    wanted, (same_case, others) = backends.run(way, y, *there), tape.case_of(y, there)
    ASKED.clear()
    played = written.play(others) if written else None
    return {
        "written": written is not None,
        "same case": case == same_case,
        "same bits": played is not None and torch.equal(played, wanted),
        "of another input": not torch.equal(found, wanted),
        "asked": list(ASKED),
    }


def mlp() -> dict[str, Any]:
    pairs = [[layer("int4", K, N, other=other), layer("int4", N, K, True, other=other)] for other in (False, True)]
    return again(way(FUSED_MLP, "norm"), "norm", *pairs)


def through_the_linear() -> dict[str, Any]:
    """As ComfyUI calls it: chosen, written down, played; and what cannot be played."""
    backends.FORCED, backends.is_right = "triton-w4a4", lambda *about: True
    here, x = layer("int4", K, N), inputs("")
    y = backends.linear(x, here)
    backends.linear(x, here)
    (case,) = backends.TAPES
    ASKED.clear()
    found = {"played": torch.equal(backends.linear(x, here), y), "asked": list(ASKED)}
    odd = torch.empty(x.numel() + 1, device=GPU, dtype=x.dtype)[1:].view_as(x).copy_(x)
    found["not aligned"] = torch.equal(backends.linear(odd, here), y)
    found["after that"] = backends.TAPES[case] is not None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = backends.linear(x, here)
    found["captured"] = torch.equal(captured, y)
    found["wide"] = torch.equal(backends.linear(torch.cat([x, x], 1), here)[:, :M], y)
    found["gradient"] = backends.linear(x.clone().requires_grad_(), here).requires_grad

    def fails(*arguments: Any) -> None:
        raise RuntimeError("cannot be launched")

    backends.TAPES[case].steps[0] = fails
    found["failed"] = torch.equal(backends.linear(x, here), y) and backends.TAPES[case] is None
    found["rejected"] = list(backends.REJECTED.values())
    return found


def derived() -> dict[str, Any]:
    """What follows from a weight, for layers that stay and for those that are new at every call."""
    backends.FORCED = "triton-w4a8-int8"
    backends.forget()
    layers, x = [layer("int4", K, N, other=bool(i % 2)) for i in range(4)], inputs("")
    run = IMPLEMENTATIONS["int4", backends.FORCED].run
    wanted = [run(x[0], replace(each)) for each in layers]
    rounds = [[torch.equal(backends.linear(x, each)[0], y) for each, y in zip(layers, wanted)] for _ in range(3)]
    kept = [list(each.derived) for each in layers]
    ASKED.clear()
    new = [torch.equal(backends.linear(x, replace(each))[0], y) for each, y in zip(layers, wanted)]
    return {"right": all(map(all, rounds)), "kept": kept, "new": all(new), "asked": list(ASKED)}


def leftover() -> int:
    """Bytes that a tape keeps."""
    here, x = layer("int4", K, N), inputs("")
    run = IMPLEMENTATIONS["int4", "triton-w4a4"].run
    _, given = tape.case_of(x, [here])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    written = tape.record(lambda: run(x[0], here).unsqueeze(0), given)[1]
    assert written
    return torch.cuda.memory_allocated() - before


def main() -> None:
    layers = {}
    for name, (implementation, before, unsigned) in ways().items():
        pair = [[layer(implementation.fmt, K, N, unsigned, other=other)] for other in (False, True)]
        layers[name] = again(implementation, before, *pair)
    found = {"linear": through_the_linear(), "derived": derived(), "leftover": leftover()}
    print(json.dumps({"again": layers | {"mlp": mlp()}, **found}))


if __name__ == "__main__":
    main()

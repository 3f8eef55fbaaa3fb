"""A full-size FLUX.1 with random weights in a real ComfyUI at 1024²: seconds per step and peak VRAM, 16 against 4 bit.

    .venv/bin/python benchmarks/benchmark_model.py [--loras 0 1 4] [--steps 10] [--json FILE] [--small]

The models are ComfyUI's own class with 19 double and 38 single blocks of width 3072 (12 billion weights; the pooled
text is as wide as the context, 4096, which is nothing beside them), sampled by ComfyUI's KSampler with euler and
without CFG; 512 text tokens. A step is the difference between a long and a short run, so that loading and set-up do
not count. 4 bit is INT4 with rank 32 and W4A16 modulation, once for each setting of the loader's `activations`, and
once with torch's norms and GELUs between the linears. The LoRAs are of rank 16 on every linear of the blocks. Needs
about 40 GB of RAM and 7 GB of disk.
`--small` is a tiny model, for trying the script without a GPU: its figures mean nothing.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import record  # noqa: E402
from comfyui_svdquant.svdq_core import QuantizedLinear, backends  # noqa: E402
from comfyui_svdquant.svdq_core.families import FLUX  # noqa: E402
from comfyui_svdquant.svdq_core.formats import get_format  # noqa: E402
from comfyui_svdquant.svdq_core.implementations import ACTIVATIONS  # noqa: E402
from comfyui_svdquant.svdq_core.recipes import W4A16, plan  # noqa: E402

import small_flux  # noqa: E402
from host.install import host_path  # noqa: E402

FULL = {"hidden": 3072, "depth": 19, "single": 38, "context": 4096, "guidance": True}
SMALL = {"hidden": 256, "depth": 1, "single": 1, "context": 128, "guidance": True}
RANK, LORA_RANK, TEXT_TOKENS = 32, 16, 512


def quantized(sd: dict[str, Tensor]) -> dict[str, QuantizedLinear]:
    """Random layers of a 4-bit model, by name; the shapes and the recipe are those of ``sd``."""
    shapes = {k.removesuffix(".weight"): tuple(t.shape) for k, t in sd.items() if k.endswith(".weight")}
    layers = {}
    for group in plan(FLUX, shapes, "the model"):
        for name in group.names:
            layers[name] = random_layer(*shapes[name], group.kind == W4A16, group.after_gelu)
    return layers


def random_layer(n: int, k: int, modulation: bool, unsigned: bool) -> QuantizedLinear:
    """Uniform codes, and scales that keep the output's size near the input's."""
    codes = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
    tensors = {"weight": codes, "weight_scale": torch.full((k // 64, n), 0.2 / k**0.5).bfloat16()}
    bias = torch.zeros(n, dtype=torch.bfloat16)
    if modulation:
        tensors["weight_zero"] = torch.zeros(k // 64, n, dtype=torch.bfloat16)
        return QuantizedLinear(get_format("awq"), tensors, bias=bias)
    down, up = (torch.randn(size, RANK).bfloat16() / size**0.5 for size in (k, n))
    return QuantizedLinear(get_format("int4"), tensors, torch.ones(k).bfloat16(), down, up, bias, unsigned)


def lora(sd: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """One of rank LORA_RANK on every linear of the blocks."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for key, weight in sd.items():
        if "blocks." in key and key.endswith(".weight") and weight.dim() == 2:
            name, (n, k) = f"diffusion_model.{key.removesuffix('.weight')}", weight.shape
            out[f"{name}.lora_A.weight"] = (torch.randn(LORA_RANK, k, generator=generator) / k**0.5).bfloat16()
            out[f"{name}.lora_B.weight"] = (torch.randn(n, LORA_RANK, generator=generator) / 100).bfloat16()
    return out


def models(sd: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Any]]:
    """The 16-bit model, then the 4-bit one with each kind of activations, and without what is deferred to the
    quantizers (docs/kernels.md); one at a time in memory."""
    import comfy.sd
    from comfyui_svdquant.svdq_core.host.load import load_svdquant

    yield "bf16", comfy.sd.load_diffusion_model_state_dict(dict(sd), model_options={"dtype": torch.bfloat16})
    path = small_flux.write(folder / "4bit.safetensors", sd, quantized(sd))
    for activations in ACTIVATIONS:
        yield f"int4, activations {activations}", load_svdquant(path, torch.bfloat16, activations)
    on_gpu, gelu = backends.on_gpu, backends.gelu
    backends.on_gpu, backends.gelu = lambda: False, partial(torch.nn.functional.gelu, approximate="tanh")
    yield "int4, auto, none deferred", load_svdquant(path, torch.bfloat16)  # in ComfyUI's own blocks
    backends.on_gpu, backends.gelu = on_gpu, gelu


def measure(model: Any, size: int, steps: int, context: int) -> dict[str, float | None]:
    """Seconds per step, and the most memory that torch had allocated on the GPU."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    sample(model, size, 2, context)
    short, long = (sample(model, size, n, context) for n in (2, 2 + steps))
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    return {"seconds_per_step": (long - short) / steps, "peak_vram_gib": peak}


def sample(model: Any, size: int, steps: int, context: int) -> float:
    """Seconds of a KSampler run."""
    import nodes

    text = torch.randn(1, TEXT_TOKENS, context, generator=torch.Generator().manual_seed(0))
    conditioning = [[text, {"pooled_output": text[:, 0], "guidance": 3.5}]]
    latent = {"samples": torch.zeros(1, 16, size // 8, size // 8)}
    synchronize()
    start = time.perf_counter()
    nodes.common_ksampler(model, 1, steps, 1.0, "euler", "simple", conditioning, conditioning, latent)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows(sd: dict[str, Tensor], size: int, steps: int, context: int, counts: list[int]) -> Iterator[dict[str, Any]]:
    """A result for each model and number of LoRAs."""
    import comfy.model_management
    import comfy.sd

    loras = [lora(sd, seed) for seed in range(max(counts))]
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models(sd, Path(folder)):
            for count in counts:
                patched = model
                for each in loras[:count]:
                    patched = comfy.sd.load_lora_for_models(patched, None, each, 0.8, 0)[0]
                weights = {"weights_gib": model.model_size() / 2**30}
                yield {"model": name, "loras": count} | weights | measure(patched, size, steps, context)
            comfy.model_management.unload_all_models()
            del model, patched
            gc.collect()
            comfy.model_management.soft_empty_cache()


def main(argv: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loras", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the results here, for benchmarks/results/")
    parser.add_argument("--small", action="store_true", help="a tiny model at 64², to try the script on a CPU")
    arguments = parser.parse_args(argv)
    if not gpu and not arguments.small:
        parser.error("there is no GPU; --small tries the script on the CPU.")
    sys.path.insert(0, str(host_path()))
    from comfy.cli_args import args

    args.cpu = not gpu
    shape, size = (SMALL, 64) if arguments.small else (FULL, 1024)
    device = backends.device_key(torch.device("cuda" if gpu else "cpu"))
    print(f"{device}; {size}², {TEXT_TOKENS} text tokens, {arguments.steps} steps")
    results = []
    with torch.inference_mode():
        sd = small_flux.random_flux(**shape)
        print(f"{'model':28} {'LoRAs':>5} {'s/step':>8} {'bf16 / it':>10} {'weights':>12} {'peak VRAM':>12}")
        for row in rows(sd, size, arguments.steps, shape["context"], arguments.loras):
            results.append(row)
            base = next(r for r in results if r["loras"] == row["loras"])
            ratio = base["seconds_per_step"] / row["seconds_per_step"]
            peak = "" if row["peak_vram_gib"] is None else f"{row['peak_vram_gib']:8.2f} GiB"
            cells = f"{row['seconds_per_step']:8.3f} {ratio:10.2f} {row['weights_gib']:8.2f} GiB {peak:>12}"
            print(f"{row['model']:28} {row['loras']:5} {cells}", flush=True)
    if arguments.json:
        record.write(arguments.json, "benchmark_model.py", argv, device, {"rows": results})


if __name__ == "__main__":
    main()

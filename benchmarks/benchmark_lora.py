"""LoRA at FLUX.1's size: what attaching, changing and switching take, and what each step pays.

    .venv/bin/python benchmarks/benchmark_lora.py [--tokens M]

In a real ComfyUI in this process. The model is a FLUX.1-dev whose file is a hole (all zeros, no disk taken), the LoRAs
are random, on every linear of the blocks. The baselines are in the same run: the model without LoRA, and ComfyUI's
bypass mode, which also leaves quantized weights alone.
"""

import argparse
import json
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host.install import host_path  # noqa: E402

RANK, LORA_RANKS, REPEATS = 32, (16, 64, 128), 7
HIDDEN, DOUBLE, SINGLE = 3072, 19, 38


def linears() -> dict[str, tuple[int, int]]:
    """(N, K) of the linears of FLUX.1's blocks, by BFL's names."""
    h, out = HIDDEN, {}
    for i in range(DOUBLE):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{i}.{stream}"
            out |= {f"{prefix}_mod.lin": (6 * h, h), f"{prefix}_attn.qkv": (3 * h, h), f"{prefix}_attn.proj": (h, h)}
            out |= {f"{prefix}_mlp.0": (4 * h, h), f"{prefix}_mlp.2": (h, 4 * h)}
    for i in range(SINGLE):
        prefix = f"single_blocks.{i}"
        out |= {f"{prefix}.modulation.lin": (3 * h, h)}
        out |= {f"{prefix}.linear1": (7 * h, h), f"{prefix}.linear2": (h, 5 * h)}
    return out


def tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of everything in a 4-bit FLUX.1-dev."""
    h, out = HIDDEN, {}
    plain = {"img_in": (h, 64), "txt_in": (h, 4096), "final_layer.linear": (64, h)}
    plain |= {"final_layer.adaLN_modulation.1": (2 * h, h)}
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        plain |= {f"{name}.in_layer": (h, width), f"{name}.out_layer": (h, h)}
    for name, (n, k) in plain.items():
        out |= {f"{name}.weight": ("BF16", (n, k)), f"{name}.bias": ("BF16", (n,))}
    for name, (n, k) in linears().items():
        out |= {f"{name}.weight": ("I8" if "mod" not in name else "U8", (n, k // 2)), f"{name}.bias": ("BF16", (n,))}
        out[f"{name}.weight_scale"] = ("BF16", (k // 64, n))
        if "mod" in name:
            out[f"{name}.weight_zero"] = ("BF16", (k // 64, n))
        else:
            out |= {f"{name}.smooth_factor": ("BF16", (k,)), f"{name}.proj_down": ("BF16", (k, RANK))}
            out[f"{name}.proj_up"] = ("BF16", (n, RANK))
    for i, count in (("double", DOUBLE), ("single", SINGLE)):
        norms = ("img_attn.norm", "txt_attn.norm") if i == "double" else ("norm",)
        for block in range(count):
            out |= {
                f"{i}_blocks.{block}.{n}.{w}_norm.weight": ("BF16", (128,)) for n in norms for w in ("query", "key")
            }
    return out


def write_hole(path: Path) -> Path:
    """The file of a 4-bit FLUX.1-dev with nothing but zeros, and the layers' markers."""
    header: dict[str, Any] = {}
    markers, position = [], 0

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal position
        size = torch.Size(shape).numel() * (2 if dtype == "BF16" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size

    for name, (dtype, shape) in tensors().items():
        add(name, dtype, shape)
    for name in linears():
        form = (
            {"format": "awq_w4a16"} if "mod" in name else {"format": "svdquant_w4a4", "act_unsigned": "mlp.2" in name}
        )
        marker = json.dumps(form).encode()
        markers.append((position, marker))
        add(f"{name}.comfy_quant", "U8", (len(marker),))
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        for place, marker in markers:
            file.seek(8 + len(data) + place)
            file.write(marker)
        file.truncate(8 + len(data) + position)
    return path


def write_lora(path: Path, rank: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    sd = {}
    for name, (n, k) in linears().items():
        sd[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator).bfloat16()
        sd[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator).bfloat16()
    save_file(sd, path)
    return path


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attaching(folder: Path) -> None:
    """The node, and what happens when the sampler starts, for one LoRA of each rank and four at once.

    read: the file, once. node: SVDQuant LoRA when the file is known. attach: when the sampler starts; strength: with
    another strength; off: back to none. bypass: attaching in ComfyUI's bypass mode, node and sampler.
    """
    import comfy.sd
    from comfyui_svdquant.svdq_core.host.load import load_svdquant
    from comfyui_svdquant.svdq_core.host.lora import load_lora, read_cached
    from comfyui_svdquant.svdq_core.lora_files import read_lora

    model = load_svdquant(write_hole(folder / "flux1-dev.safetensors"))
    print(f"\n{'LoRA':>10} {'file':>9} {'read':>8} {'node':>8} {'attach':>8} {'strength':>8} {'off':>8} {'bypass':>8}")
    for count, rank in [*((1, rank) for rank in LORA_RANKS), (4, 16)]:
        paths = [write_lora(folder / f"{i}.safetensors", rank, i) for i in range(count)]
        read = sum(seconds(lambda path=path: read_lora(path), 1) for path in paths)

        def patched(strength: float = 0.8, paths: list[Path] = paths) -> Any:
            each = model.clone()
            for path in paths:
                each.add_patches(load_lora(each, path, 128).patches, strength)
            return each

        def bypass(paths: list[Path] = paths) -> None:
            each = model
            for path in paths:
                each, _ = comfy.sd.load_bypass_lora_for_models(each, None, read_cached(path), 0.8, 0)
            each.inject_model()
            each.eject_model()

        patched()  # the files are read now
        node = seconds(patched, 3)
        one, other = patched(0.8), patched(0.5)
        attach, off, strength = [], [], []
        for _ in range(3):
            attach.append(seconds(lambda one=one: one.attach({}), 1))
            strength.append(seconds(lambda other=other: other.attach({}), 1))
            off.append(seconds(lambda: model.attach({}), 1))
        attach, strength, off = (statistics.median(each) for each in (attach, strength, off))
        bypassed = seconds(bypass, 3)
        size = sum(path.stat().st_size for path in paths) / 2**20
        row = (read, node, attach, strength, off, bypassed)
        print(f"{count} x r{rank:>4} {size:6.0f} MB " + " ".join(f"{1e3 * s:5.0f} ms" for s in row), flush=True)
        for path in paths:
            path.unlink()


def stepping(tokens: int) -> None:
    """One linear of each shape: 4 bit without LoRA, with one of each rank, with four, and in bypass mode."""
    columns = ["none", *(f"r{rank}" for rank in LORA_RANKS), "4 x r16", "bypass r16"]
    print(f"\n{'K':>6} {'N':>6} " + " ".join(f"{c:>11}" for c in columns) + "   (ms, and ratio to none)")
    for (n, k), _ in {shape: name for name, shape in linears().items() if "mod" not in name}.items():
        runs = [step(n, k, tokens, ranks) for ranks in ((), *((r,) for r in LORA_RANKS), (16,) * 4)]
        runs.append(step(n, k, tokens, (16,), bypass=True))
        times = [[] for _ in runs]
        for _ in range(REPEATS):
            for each, run in zip(times, runs):
                each.append(1e3 * seconds(run, 1))
        medians = [statistics.median(each) for each in times]
        cells = " ".join(f"{ms:6.1f} {ms / medians[0]:4.2f}" for ms in medians)
        print(f"{k:6} {n:6} {cells}", flush=True)


def step(n: int, k: int, tokens: int, ranks: tuple[int, ...], bypass: bool = False) -> Callable[[], Tensor]:
    """A call of a linear (N, K) with LoRAs of these ranks."""
    from comfy.weight_adapter.bypass import BypassForwardHook
    from comfy.weight_adapter.lora import LoRAAdapter
    from comfyui_svdquant.svdq_core import QuantizedLinear
    from comfyui_svdquant.svdq_core.formats import get_format
    from comfyui_svdquant.svdq_core.host.ops import SVDQuantOps

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    fmt, w = get_format("int4"), torch.randn(n, k) / k**0.5
    packed = fmt.pack(*fmt.round_weight(w, torch.bfloat16), torch.bfloat16, None)
    branch = (torch.randn(s, RANK).bfloat16() / 32 for s in (k, n))
    layer = QuantizedLinear(fmt, packed, torch.ones(k).bfloat16(), *branch, torch.zeros(n).bfloat16())
    linear = SVDQuantOps.Linear(k, n, dtype=dtype, device=device)
    linear.load_state_dict(layer.state_dict())
    like = torch.empty(0, device=device, dtype=dtype)
    values = [LoRAAdapter(set(), (torch.randn(n, r), torch.randn(r, k), None, None, None, None)) for r in ranks]
    if bypass:
        nn.Module.__setattr__(linear, "hook", BypassForwardHook(linear, values[0]))
        linear.hook.inject()
    else:
        linear.set_patches("w", [(0.8, value, 1.0, None, None) for value in values], like)
    x = torch.randn(tokens, k, device=device, dtype=dtype)
    return lambda: linear(x)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4608 if gpu else 256, help="M of the linears")
    tokens = parser.parse_args().tokens
    sys.path.insert(0, str(host_path()))
    from comfy.cli_args import args

    args.cpu = not gpu
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; M = {tokens}")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        attaching(Path(folder))
        stepping(tokens)


if __name__ == "__main__":
    main()

"""What the host needs to queue one of FLUX's blocks, 4 bit against 16 bit: a GPU that is faster than that waits.

    .venv/bin/python benchmarks/benchmark_host.py [--json FILE]
    SVDQ_GPU_IDLE=1 .venv/bin/python tests/gpu .venv/bin/python benchmarks/benchmark_host.py     without a GPU

In ComfyUI's own blocks, with all weights on the GPU; with `--dynamic-vram` as ComfyUI holds them unless told otherwise,
and looks after them at every call. They are small, so that no GPU is slower than the host; its time does not depend on
their size. Without a GPU there is one that does nothing (`tests/gpu/idle.py`; it needs a C compiler, as Triton does),
and the 16-bit products and the attention are allocations only.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import record  # noqa: E402
from comfyui_svdquant.svdq_core import backends, tape  # noqa: E402
from comfyui_svdquant.svdq_core.implementations import ACTIVATIONS  # noqa: E402

import small_flux  # noqa: E402
from host.install import host_path  # noqa: E402

IMAGE, TEXT = 600, 100  # tokens, of different classes of size
BLOCKS = {"double": 19, "single": 38}  # FLUX.1's
FORMATS = ("int4", "int8", "nvfp4")
QUEUED, ROUNDS = 5, 40  # calls between two looks at the clock: few enough for the driver's queue


def models(folder: Path) -> dict[str, Any]:
    """By name; 16 bit is the baseline."""
    import comfy.sd
    from comfyui_svdquant.svdq_core.host.load import load_svdquant

    sd = small_flux.state_dict(double=1, single=1)
    plain = small_flux.write(folder / "bf16.safetensors", sd, {})
    found = {"16 bit": comfy.sd.load_diffusion_model(str(plain), {"dtype": torch.bfloat16})}
    for fmt in FORMATS:
        path = small_flux.write(folder / f"{fmt}.safetensors", sd, small_flux.quantize(sd, fmt))
        for activations in ACTIVATIONS if fmt == "int4" else ["auto"]:
            found[f"{fmt}, {activations}"] = load_svdquant(path, torch.bfloat16, activations)
    lora = with_lora(load_svdquant(folder / "int4.safetensors", torch.bfloat16, ACTIVATIONS[0]))
    return found | {f"int4, {ACTIVATIONS[0]}, LoRA": lora}


def with_lora(model: Any) -> Any:
    """One of rank 16 on every linear with a branch."""
    from comfy.weight_adapter.lora import LoRAAdapter
    from comfyui_svdquant.svdq_core.host.ops import Linear

    patches = {}
    for name, linear in model.model.named_modules():
        if isinstance(linear, Linear) and linear.quantized:
            up, down = torch.randn(linear.out_features, 16) / 100, torch.randn(16, linear.in_features) / 100
            patches[f"{name}.weight"] = LoRAAdapter(set(), (up, down, 1.0, None, None, None))
    model.add_patches(patches)
    return model


def use_dynamic_vram() -> None:
    """As ComfyUI's main.py does."""
    import comfy_aimdo.control

    comfy_aimdo.control.init()  # before anything of ComfyUI's is imported
    import comfy.memory_management
    import comfy.model_patcher

    if not comfy_aimdo.control.init_devices([(0, 0)]):
        raise SystemExit("ComfyUI's dynamic VRAM does not work here.")
    comfy_aimdo.control.set_log_error()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def calls(model: Any) -> dict[str, Callable[[], Any]]:
    """Run a block of each kind, on inputs that nobody looks at."""
    import comfy.model_management

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    flux = model.model.diffusion_model
    image, text, vec = (random(*shape, small_flux.HIDDEN) for shape in ((1, IMAGE), (1, TEXT), (1,)))
    both, pe = torch.cat([image, text], 1), torch.randn(1, 1, IMAGE + TEXT, 64, 2, 2, device="cuda")
    double, single = flux.double_blocks[0], flux.single_blocks[0]
    return {"double": lambda: double(image, text, vec, pe), "single": lambda: single(both, vec, pe)}


def microseconds(run: Callable[[], Any]) -> float:
    """Median time until a call returns, of many in a row as in a model, once everything is compiled."""
    times = []
    for _ in range(ROUNDS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(QUEUED):
            run()
        times.append(1e6 * (time.perf_counter() - start) / QUEUED)
    return statistics.median(times[3:])


def through(model: str) -> list[str]:
    """The names of what a model's linears, without the modulation, have run through."""
    return sorted({way.name for case, way in backends.CHOSEN.items() if way and model.startswith(", ".join(case[:2]))})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, for benchmarks/results/")
    parser.add_argument("--dynamic-vram", action="store_true", help="hold weights as ComfyUI does by default")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU; see above for the one that does nothing.")
    sys.path.insert(0, str(host_path()))
    if os.environ.get("SVDQ_GPU_IDLE"):
        backends.is_right = tape.same = lambda *about: True  # nothing that it computes is
    device = backends.device_key(torch.device("cuda"))
    print(device + ("; dynamic VRAM" if arguments.dynamic_vram else ""))
    if arguments.dynamic_vram:
        use_dynamic_vram()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        rows: list[dict[str, Any]] = [
            {"model": name} | {kind: microseconds(run) for kind, run in calls(model).items()}
            for name, model in models(Path(folder)).items()
        ]
    print(f"{'model':16} {'double block':>13} {'single block':>13} {'a step':>9} {'it / 16 bit':>12}  through")
    for row in rows:
        row["step_ms"] = sum(count * row[kind] for kind, count in BLOCKS.items()) / 1e3
        row["ratio"] = row["step_ms"] / rows[0]["step_ms"]
        row["through"] = through(row["model"])
        line = "{model:16} {double:10.0f} µs {single:10.0f} µs {step_ms:6.1f} ms {ratio:12.2f}  "
        print(line.format(**row) + ", ".join(row["through"]))
    if arguments.json:
        record.write(arguments.json, "benchmark_host.py", argv, device, {"rows": rows})


if __name__ == "__main__":
    main()

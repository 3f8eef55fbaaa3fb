"""``svdquant``: quantize a file, say what a file is, time the linear layer; no server needed."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from .benchmark import bench
from .calibration import Samples
from .checkpoint import describe_file, file_sha256
from .errors import SVDQuantError
from .formats import BRANCH_FORMATS
from .quantize import Event, FileSource, Job, Report, quantize, refuse_overwriting
from .report import save_chart
from .solve import PRESETS


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status (0 fine, 1 refused, 130 interrupted)."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except SVDQuantError as error:
        print(f"svdquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsvdquant: interrupted; run the same command again to go on from here.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="svdquant", description="4-bit weights and activations for diffusion models.")
    commands = top.add_subparsers(required=True, metavar="{quantize,inspect,bench}")
    q = commands.add_parser("quantize", help="turn a 16-bit model file into a 4-bit one")
    q.add_argument("input", type=Path, help="16-bit model (.safetensors; ComfyUI, BFL or diffusers names)")
    q.add_argument("output", type=Path, help="4-bit file to write (.safetensors)")
    q.add_argument("--calibration", type=Path, help="activations (.safetensors: one (tokens, K) tensor per linear)")
    q.add_argument("--format", choices=BRANCH_FORMATS, default="int4")
    q.add_argument("--preset", choices=tuple(PRESETS), default="balanced", help="speed against quality")
    q.add_argument("--rank", type=int, help="rank of the 16-bit branch (default: 32, int8: 16)")
    q.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    q.add_argument("--seed", type=int, default=0)
    q.add_argument("--chart", type=Path, help="write the error-per-layer picture here (.png)")
    q.set_defaults(run=run_quantize)
    i = commands.add_parser("inspect", help="say what a model file is and which node loads it")
    i.add_argument("file", type=Path)
    i.add_argument("--layers", action="store_true", help="list every quantized layer")
    i.set_defaults(run=run_inspect)
    b = commands.add_parser("bench", help="time the 4-bit linear against 16 bit; on a GPU, choose its kernels by that")
    b.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    b.add_argument("--tokens", type=int, help="M (default: 4608 on a GPU, 256 on a CPU)")
    b.add_argument("--format", choices=BRANCH_FORMATS, default="int4")
    b.add_argument("--tiles", action="store_true", help="look for the fastest tiles of our kernels first: minutes")
    b.set_defaults(run=run_bench)
    return top


def run_quantize(arguments: argparse.Namespace) -> None:
    """``svdquant quantize``."""
    if arguments.output.suffix != ".safetensors":
        raise SVDQuantError(f"{arguments.output}: the output must end in .safetensors.")
    if arguments.output.resolve() == arguments.input.resolve():
        raise SVDQuantError(f"{arguments.output}: input and output are the same file.")
    source = FileSource(arguments.input)
    samples = Samples.load(arguments.calibration) if arguments.calibration else None
    if arguments.calibration and arguments.output.resolve() == arguments.calibration.resolve():
        raise SVDQuantError(f"{arguments.output}: output and calibration are the same file.")
    source.origin["key"] = source.origin["sha256"] = file_sha256(arguments.input)
    refuse_overwriting(arguments.output, source)
    job = Job(arguments.format, arguments.preset, arguments.rank, seed=arguments.seed)
    calibration = {"kind": "file", "file": arguments.calibration.name} if arguments.calibration else None
    with tqdm(unit="layer", dynamic_ncols=True) as bar:
        report = quantize(
            source,
            samples,
            arguments.output,
            job,
            device=arguments.device,
            calibration=calibration,
            on_event=bar_writer(bar),
        )
    if arguments.chart:
        save_chart(report.layers, f"{report.path.name}: error per layer", arguments.chart)
    print(report.summary())


def bar_writer(bar: tqdm) -> Callable[[Event], None]:
    """Shows events on a progress bar."""

    def show(event: Event) -> None:
        if event["stage"] == "solve":
            bar.total = event["total"]
            bar.set_postfix_str(f"{event['name']} {event['error_db']:.1f} dB", refresh=False)
            bar.update(event["index"] - bar.n)
        elif event["stage"] == "skip":
            bar.write(f"{event['name']} stays 16 bit: {event['reason']}")

    return show


def run_inspect(arguments: argparse.Namespace) -> None:
    """``svdquant inspect``."""
    info = describe_file(arguments.file)
    print(f"{arguments.file}: {info.text}, {info.details['bytes'] / 2**20:.1f} MiB.")
    print(f"Load it with: {info.loader_hint}")
    made = info.details.get("svdquant") or {}
    if not made.get("layers"):
        return
    report = Report(arguments.file, [{"name": name, **record} for name, record in made["layers"].items()])
    print(f"Made by {made.get('tool')}: {made.get('format')}, rank {made.get('rank')}, {made.get('preset')}")
    print(f"From {made['source'].get('file', 'a loaded model')}; calibration: {made['calibration'].get('kind')}")
    print(f"{len(report.layers)} layers, mean error {report.mean_error_db:.1f} dB")
    if arguments.layers:
        for layer in report.layers:
            alpha = "none" if layer["alpha"] is None else layer["alpha"]
            print(f"  {layer['name']:36} rank {layer['rank']:3}  alpha {alpha!s:>5}  {layer['error_db']:7.2f} dB")


def run_bench(arguments: argparse.Namespace) -> None:
    """``svdquant bench``."""
    started, device = time.monotonic(), torch.device(arguments.device)
    if arguments.tiles and device.type != "cuda":
        raise SVDQuantError("--tiles needs a GPU: the kernels' tiles are a GPU's.")
    bench(device, arguments.tokens, arguments.format, arguments.tiles)
    print(f"measured in {time.monotonic() - started:.0f} s", file=sys.stderr)

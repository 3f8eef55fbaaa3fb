"""Compile kernels for GPUs that are not here, and look at the machine code.

    .venv/bin/python tests/triton_compile.py quantize_act gemm_w4a4 [--arch sm90 ...] [--case signed ...]

prints one JSON line per (kernel file, case, architecture). It runs in a process of its own, because Triton compiles
only where it was imported without TRITON_INTERPRET, and because a compiler that crashes takes its process along.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

# What a block may use of shared memory (LDS on AMD), in bytes: CUDA C++ programming guide, table of compute
# capabilities; AMD's ISA guides.
SHARED = {"sm80": 166912, "sm86": 101376, "sm89": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376}
SHARED |= {"gfx942": 65536, "gfx1100": 65536, "gfx1201": 65536}
ARCHS = tuple(SHARED)
ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(
    path.stem for path in (ROOT / "triton_kernels").glob("*.py") if "def compile_cases" in path.read_text("utf-8")
)


def target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm"):
        return GPUTarget("cuda", int(arch[2:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_case(case: tuple, arch: str) -> Any:
    """Triton's compiled kernel of one entry of a file's `compile_cases`."""
    import triton
    from comfyui_svdquant.triton_kernels.launching import OPTIONS
    from triton.compiler import ASTSource

    kernel, types, constants, options = case
    names = [p.name for p in kernel.params]
    constants = dict(constants)
    options = {**options, **OPTIONS}
    constants |= {name: options.pop(name) for name in list(options) if name in names}
    types = {name: t for name, t in types.items() if name not in constants}
    constants |= {name: t for name, t in constants.items() if not isinstance(t, str)}
    types |= {name: constants.pop(name) for name, t in list(constants.items()) if isinstance(t, str) and t[:1] == "*"}
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        kind, _, divisor = types.get(name, "constexpr").partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor == "16":
            attrs[(i,)] = [["tt.divisibility", 16]]
        if kind.startswith("*") and not arch.startswith("sm"):  # as Triton says of tensors below 2 GB when it launches
            attrs[(i,)].append(["tt.pointer_range", 32])
    return triton.compile(ASTSource(kernel, signature, constants, attrs), target=target(arch), options=options)


def disassemble(compiled: Any, arch: str) -> list[str]:
    """SASS or GCN, one instruction per line, labels kept."""
    if not arch.startswith("sm"):
        return [line.strip() for line in compiled.asm["amdgcn"].splitlines() if line.strip()]
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        text = subprocess.run([tool, "-c", f.name], check=True, capture_output=True, text=True).stdout
    lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def opcode(line: str) -> str:
    """The instruction without its predicate and operands."""
    return re.sub(r"^@\S+ ", "", line).split(" ")[0].rstrip(";")


def is_matrix(opcode: str) -> bool:
    """Whether it runs on the matrix units."""
    return bool(re.match(r"(UTC)?[IHQO]G?MMA|v_mfma|v_s?wmma", opcode))


def main_loop(lines: list[str]) -> list[str]:
    """The longest of the loops (a backward branch and its target) that hold no other; one with products, if any has."""
    at: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        if label := re.match(r"^(\.?[\w.$]+):", line):
            at[label[1]] = i
        elif re.match(r"^(@\S+ )?(BRA|s_cbranch\w*|s_branch)\b", line):
            name = re.findall(r"`\((\.?[\w.$]+)\)|(\.LBB\w+)", line)
            name = next((a or b for a, b in name), None)
            if name in at:
                loops.append((at[name], i))
    bodies = [lines[a : b + 1] for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    products = [body for body in bodies if any(is_matrix(opcode(line)) for line in body)]
    return max(products or bodies, key=len, default=[])


def spills(compiled: Any, lines: list[str], arch: str) -> int:
    """Local memory instructions (NVIDIA), vector registers spilled to memory (AMD; scalar ones go to vector ones)."""
    if arch.startswith("sm"):
        return sum(opcode(line).startswith(("LDL", "STL")) for line in lines)
    return sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", "\n".join(lines)))


def registers(compiled: Any, lines: list[str], arch: str) -> int:
    """Per thread."""
    if not arch.startswith("sm"):
        return max((int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", "\n".join(lines))), default=0)
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", f.name], check=True, capture_output=True, text=True)
    return int(re.search(r"REG:(\d+)", text.stdout + text.stderr)[1])


def examine(case: tuple, arch: str) -> dict[str, Any]:
    compiled = compile_case(case, arch)
    lines = disassemble(compiled, arch)
    loop = [opcode(line) for line in main_loop(lines) if re.match(r"[@\w]", line) and not line.endswith(":")]
    text = compiled.asm["ptx"] if arch.startswith("sm") else compiled.asm["amdgcn"]
    matrix = Counter(
        re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*|\bv_mfma\w*|\bv_s?wmma\w*", text)
    )
    return {
        "matrix": dict(matrix),
        "shared": compiled.metadata.shared,
        "spills": spills(compiled, lines, arch),
        "registers": registers(compiled, lines, arch),
        "loop": dict(Counter(loop)),
    }


def compile_files(files: list[str], cache: Path, archs: list[str] | None = None) -> list[dict[str, Any]]:
    """Run this file in a process of its own; one result per (file, case, architecture), with `error` if it has none."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, __file__, *files, *(["--arch", *archs] if archs else [])]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode:  # the compiler crashed; the last line of stderr that says "compiling" tells at what
        last = [json.loads(line[10:]) for line in run.stderr.splitlines() if line.startswith("compiling ")]
        where = last[-1] if last else {"file": files[0], "case": "", "arch": ""}
        results.append({**where, "error": f"exit status {run.returncode}: {run.stderr[-2000:]}"})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--case", nargs="+")
    args = parser.parse_args()
    for file in args.files:
        module = importlib.import_module(f"comfyui_svdquant.triton_kernels.{file}")
        for arch in args.arch:
            for name, case in module.compile_cases(arch).items():
                if args.case and name not in args.case:
                    continue
                result = {"file": file, "case": name, "arch": arch}
                print("compiling", json.dumps(result), file=sys.stderr, flush=True)
                try:
                    result |= examine(case, arch)
                except Exception as error:
                    result["error"] = "".join(traceback.format_exception(error))[-2000:]
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

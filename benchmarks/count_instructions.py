"""Instructions in the main loops of the kernels, compiled for GPUs that need not be here.

    .venv/bin/python benchmarks/count_instructions.py [kernel ...]

prints a table and, for all kernels, writes docs/kernels_instructions.md.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import triton  # noqa: E402

from triton_compile import ARCHS, KERNELS, compile_files, is_matrix  # noqa: E402

# What an instruction of a loop is for, by its name, the first that fits. SASS (NVIDIA) | GCN and RDNA (AMD).
CLASSES = {
    "convert": r"I2F|F2I|F2F|HADD2\.F32|v_cvt",
    "scale": r"FMUL|FFMA|FADD|HFMA|HMUL|HADD|MUFU|FMNMX|FSEL|FSETP"
    r"|v_(pk_|dual_)?(mul|fma|fmac|add|sub|med3|max|min)_f|v_(rcp|div|exp)",
    "unpack": r"LOP3|PRMT|SHF|SGXT|IMAD\.(SHL|U32)|v_(and|or|lshl|lshr|ashr|perm|bfe|xor|cndmask|add3)",
    "move": r"MOV|IMAD\.MOV|CS2R|S2R|v_(dual_)?mov|v_accvgpr",
    "memory": r"LD|ST|ATOM|RED|ds_|global_|buffer_|scratch_",
}

HEAD = """# Instructions per matrix instruction

Written by `benchmarks/count_instructions.py` with Triton {version}; compiled, not run. For every kernel and GPU: the
loop with most matrix instructions, per thread of one program. "MMA" counts its matrix instructions; the columns after
it are other instructions per MMA, so fewer is leaner. They compare versions of one kernel on one part: an MMA of sm 90
(`wgmma`, 64 rows of four warps) does more than one of sm 80 (`mma.sync`, 16 × 8 of one warp) or of AMD's. Kernels
without any (MMA 0) have the instructions of a step of their longest loop there.

On AMD a loop may be laid out in pieces: a row with hardly any "scale" shows one of them only.

- convert: integer to float and the like; scale: float arithmetic (scales, quotients, GELU); unpack: bits of nibbles and
  bf16; move: registers; memory: loads and stores; rest: addresses, loop, barriers, waits.
- regs: registers per thread; shared: bytes of shared memory (LDS) per program. Of these cases none spills a register
  (`tests/test_compile_matrix.py`).
"""


def kind(opcode: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), "rest")


def row(r: dict[str, Any]) -> list[str]:
    """A line of the table."""
    mma = sum(n for opcode, n in r["loop"].items() if is_matrix(opcode))
    counts = dict.fromkeys([*CLASSES, "rest"], 0)
    for opcode, n in r["loop"].items():
        if not is_matrix(opcode):
            counts[kind(opcode)] += n
    per = [f"{n / max(mma, 1):.1f}" for n in (sum(counts.values()), *counts.values())]
    return [r["case"], r["arch"], str(mma), *per, str(r["registers"]), str(r["shared"])]


def tables(results: list[dict[str, Any]]) -> str:
    """One table per kernel."""
    head = ["case", "GPU", "MMA", "others per MMA", *CLASSES, "rest", "regs", "shared"]
    out = []
    for file in dict.fromkeys(r["file"] for r in results):
        rows = [head, ["---"] * len(head), *(row(r) for r in results if r["file"] == file)]
        out.append(f"\n## {file}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n")
    return "".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        results = [r for kernel in args.kernels or KERNELS for r in compile_files([kernel], Path(cache), list(ARCHS))]
    if bad := [r for r in results if "error" in r]:
        raise SystemExit("\n".join(f"{r['file']} {r['case']} {r['arch']}: {r['error']}" for r in bad))
    text = HEAD.format(version=triton.__version__) + tables(results)
    print(text)
    if not args.kernels:
        (ROOT / "docs" / "kernels_instructions.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

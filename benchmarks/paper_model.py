"""The predicted ratio to bf16 of the whole linear on GPUs that are not here. Not one of its figures was measured.

    .venv/bin/python benchmarks/paper_model.py

For FLUX.1's six shapes at M = 4608 and rank 32, averaged. Every part takes the time of its bound, one after another:

    bf16      2 M N K / bf16 rate
    quantize  M K elements: the larger of bytes / bandwidth and instructions / issue rate
    widen     N K elements, likewise
    GEMM      2 M N K / (rate · min(1, clocks of the MMA / clocks of what is issued beside it))
    branch    2 M R (K + N) / bf16 rate

So it leaves out waiting, launches, the last wave and the clock under load, for bf16 as well: it orders implementations,
and says what cannot be.
"""

from dataclasses import dataclass
from statistics import mean

from comfyui_svdquant.svdq_core.benchmark import FLUX_SHAPES, RANK

M = 4608


@dataclass(frozen=True)
class Part:
    """Published dense rates in TOP/s (bf16 and fp8 with float32 sums), memory in TB/s, SMs · 128 lanes · GHz in T/s."""

    name: str
    bf16: float
    int8: float
    fp8: float
    int4: float
    fp4: float
    memory: float
    issue: float


# NVIDIA's architecture papers and data sheets; 0: the part has no such unit, or Triton does not reach it.
PARTS = (
    Part("A100 80 GB (sm 80)", 312, 624, 0, 1248, 0, 2.04, 19.5),
    Part("RTX 3090 (sm 86)", 71, 284, 0, 568, 0, 0.94, 17.8),
    Part("RTX 4090 (sm 89)", 165, 660, 330, 1321, 0, 1.01, 41.3),
    Part("H100 SXM (sm 90)", 989, 1979, 1979, 0, 0, 3.35, 30.9),
    Part("H200 (sm 90)", 989, 1979, 1979, 0, 0, 4.8, 30.9),
    Part("B200 (sm 100)", 2250, 0, 4500, 0, 9000, 8.0, 35.0),
    Part("RTX 5090 (sm 120)", 210, 838, 419, 0, 1676, 1.79, 52.4),
)
# Clocks of the MMA by clocks of what is issued beside it, where that is below 1: docs/kernels_w4a4.md for ours, and for
# INT4 units the three float instructions per element and group that no kernel avoids, two clocks each on sm 80.
W4A4_SHARE = {"sm 80": 8 / 12.2, "sm 90": 128 / 344}
INT4_SHARE = {"sm 80": 8 / 24}
QUANTIZE_ACT = (2.56, 33.3)  # bytes and instructions per element of x: docs/kernels_w4a4.md
QUANTIZE_TOKEN = (3.0, 21.3)  # both passes: docs/kernels_w8.md
WIDEN = (1.5, 7.4)  # of the weight


def pass_over(part: Part, size: float, instructions: float) -> float:
    """Time per element, in 1e-12 s."""
    return max(size / part.memory, instructions / part.issue)


def seconds(part: Part, k: int, n: int, rate: float, share: float, quantize: tuple[float, float], widen: bool) -> float:
    """Of one linear; rates in TOP/s."""
    quantized = M * k * pass_over(part, *quantize)
    widened = n * k * pass_over(part, *WIDEN) if widen else 0.0
    return 1e-12 * (quantized + widened + 2 * M * n * k / (rate * share) + 2 * M * RANK * (k + n) / part.bf16)


def predicted(part: Part) -> dict[str, float]:
    """Ratio to bf16 by implementation, for those that the part has units for."""
    sm = part.name[part.name.index("(") + 1 : -1]
    ways = {
        "kitchen-w4a4": (part.int4, INT4_SHARE.get(sm, 1.0), QUANTIZE_ACT, False),
        "triton-w4a4": (part.int8, W4A4_SHARE.get(sm, 1.0), QUANTIZE_ACT, False),
        "triton-widened-int8": (part.int8, 1.0, QUANTIZE_TOKEN, True),
        "triton-widened-fp8": (part.fp8, 1.0, QUANTIZE_TOKEN, True),
        "triton-nvfp4": (part.fp4, 1.0, QUANTIZE_ACT, False),
    }
    return {
        name: mean(2e-12 * M * n * k / part.bf16 / seconds(part, k, n, rate, *rest) for k, n in FLUX_SHAPES)
        for name, (rate, *rest) in ways.items()
        if rate
    }


def main() -> None:
    names = ("kitchen-w4a4", "triton-w4a4", "triton-widened-int8", "triton-widened-fp8", "triton-nvfp4")
    print("| predicted, not measured | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for part in PARTS:
        ratios = predicted(part)
        print(f"| {part.name} | " + " | ".join(f"{ratios[n]:.1f}×" if n in ratios else "" for n in names) + " |")


if __name__ == "__main__":
    main()

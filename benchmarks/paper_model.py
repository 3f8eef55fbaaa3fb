"""The predicted ratio to bf16 on GPUs that are not here, of the linear and of a step. Not one figure was measured.

    .venv/bin/python benchmarks/paper_model.py

The linear: FLUX.1's six shapes at M = 4608 and rank 32, averaged. Every part takes the time of its bound, one after
another:

    bf16      2 M N K / bf16 rate
    quantize  M K elements: the larger of bytes / bandwidth and instructions / issue rate
    widen     N K elements, likewise
    GEMM      2 M N K / (rate · min(1, clocks of the MMA / clocks of what is issued beside it))
    branch    2 M R (K + N) / bf16 rate

A step: 19 double and 38 single blocks of it, attention at half the bf16 rate, and the passes over all tokens that the
model makes between the linears, at the memory's rate; "deferred": those are left out that the quantizers do on the way
(`triton_kernels/inputs.py`), with more instructions.

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
# Bytes per element of x, and instructions by what stands before it: the loops of the code for sm 90, per element.
QUANTIZE_ACT = (2.56, {"": 33.3, "norm": 47.2, "gelu": 42.6, "cat": 40.5})
QUANTIZE_TOKEN = (3.0, {"": 21.3, "norm": 39.0, "gelu": 43.4, "cat": 39.7})  # both passes; of uint8 for GELU
QUANTIZE_NVFP4 = (2.56, {"": 39.8, "norm": 43.5, "gelu": 41.9, "cat": 41.9})
WIDEN = (1.5, 7.4)  # of the weight

Way = tuple[float, float, tuple[float, dict[str, float]], bool]  # rate, share of it, quantizer, whether it widens

# (K, N) and what stands before it. Passes between the linears: reads and writes of M · 3072 values of 16 bit. "before"
# are norm and modulation (4 a time), GELU (8), the cat (10); the rest are norms of q and k (4), rope (4), the cats of
# text and image (6), gate and sum (5 a time).
SINGLE = [(3072, 21504, "norm"), (15360, 3072, "cat")]
DOUBLE = [(3072, 9216, "norm"), (3072, 3072, ""), (3072, 12288, "norm"), (12288, 3072, "gelu")]
BLOCKS = ((38, SINGLE, {"before": 4 + 8 + 10, "rest": 4 + 4 + 5}), (19, DOUBLE, {"before": 4 + 4 + 8, "rest": 24}))


def pass_over(part: Part, size: float, instructions: float) -> float:
    """Time per element, in 1e-12 s."""
    return max(size / part.memory, instructions / part.issue)


def seconds(part: Part, k: int, n: int, way: Way, before: str = "") -> float:
    """Of one linear; rates in TOP/s."""
    rate, share, (size, instructions), widen = way
    quantized = M * k * pass_over(part, size, instructions[before])
    widened = n * k * pass_over(part, *WIDEN) if widen else 0.0
    return 1e-12 * (quantized + widened + 2 * M * n * k / (rate * share) + 2 * M * RANK * (k + n) / part.bf16)


def step_seconds(part: Part, way: Way | None, deferred: bool) -> float:
    """Of the blocks of a step; None: bf16."""
    total = 0.0
    for count, linears, passes in BLOCKS:
        total += count * 1e-12 * 4 * M * M * 3072 / (part.bf16 / 2)
        total += count * 1e-12 * (passes["rest"] + (0 if deferred else passes["before"])) * M * 3072 * 2 / part.memory
        for k, n, before in linears:
            bf16 = 2e-12 * M * n * k / part.bf16
            total += count * (seconds(part, k, n, way, before if deferred else "") if way else bf16)
    return total


def ways(part: Part) -> dict[str, Way]:
    """By implementation, those that the part has units for."""
    sm = part.name[part.name.index("(") + 1 : -1]
    every: dict[str, Way] = {
        "kitchen-w4a4": (part.int4, INT4_SHARE.get(sm, 1.0), QUANTIZE_ACT, False),
        "triton-w4a4": (part.int8, W4A4_SHARE.get(sm, 1.0), QUANTIZE_ACT, False),
        "triton-widened-int8": (part.int8, 1.0, QUANTIZE_TOKEN, True),
        "triton-widened-fp8": (part.fp8, 1.0, QUANTIZE_TOKEN, True),
        "triton-nvfp4": (part.fp4, 1.0, QUANTIZE_NVFP4, False),
    }
    return {name: way for name, way in every.items() if way[0]}


def linear_ratio(part: Part, name: str) -> str:
    way = ways(part).get(name)
    if way is None:
        return ""
    return f"{mean(2e-12 * M * n * k / part.bf16 / seconds(part, k, n, way) for k, n in FLUX_SHAPES):.1f}×"


def step_ratio(part: Part, name: str) -> str:
    way = ways(part).get(name)
    if way is None:
        return ""
    bf16 = step_seconds(part, None, False)
    plain, deferred = (bf16 / step_seconds(part, way, each) for each in (False, True))
    return f"{plain:.2f}×" if name.startswith("kitchen") else f"{plain:.2f}× → {deferred:.2f}×"


def main() -> None:
    names = ("kitchen-w4a4", "triton-w4a4", "triton-widened-int8", "triton-widened-fp8", "triton-nvfp4")
    for title, ratio in (("the linear", linear_ratio), ("a step, and deferred", step_ratio)):
        print(f"| predicted, not measured: {title} | " + " | ".join(names) + " |")
        print("|---" * (len(names) + 1) + "|")
        for part in PARTS:
            print(f"| {part.name} | " + " | ".join(ratio(part, name) for name in names) + " |")
        print()


if __name__ == "__main__":
    main()

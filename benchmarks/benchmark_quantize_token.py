"""quantize_token at FLUX.1's shapes, against plain torch and a plain copy of the input; then with what stands
before it.

    .venv/bin/python benchmarks/benchmark_quantize_token.py

TB/s counts the input once and the results. The baseline is the copy: the least that reading x can take.
"""

import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.triton_kernels.common import arch
from comfyui_svdquant.triton_kernels.quantize_token import quantize_token
from comfyui_svdquant.triton_kernels.rounding import has_e4m3
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu, in_front


def main() -> None:
    device, int8 = gpu(), get_format("int8")
    for k in sorted({k for k, _ in SHAPES}):
        x = torch.randn(TOKENS, k, device=device, dtype=torch.bfloat16)
        smooth = (torch.rand(k, device=device) + 0.5).to(x.dtype)
        down = torch.randn(k, RANK, device=device, dtype=x.dtype)
        runs = {}
        for kind in ("int8", "fp8") if has_e4m3(arch(device)) else ("int8",):
            runs[kind] = lambda x=x, s=smooth, d=down, kind=kind: quantize_token(x, s, d, False, kind)
        runs |= {
            "uint8": lambda x=x, s=smooth, d=down: quantize_token(x, s, d, True, "uint8"),
            "without the branch": lambda x=x, s=smooth, d=down[:, :0]: quantize_token(x, s, d, False, "int8"),
            "torch": lambda x=x, s=smooth, d=down: (int8.round_activations(x.float() / s.float(), x.dtype), x @ d),
            "copy": lambda x=x: x.clone(),
        }
        work = TOKENS * (3 * k + 2 * RANK) * 1e-12
        compare(f"K {k}", runs, work, "TB/s")
        kind = (True, "uint8") if k > 3072 else (False, "int8")
        in_front(lambda x, s=smooth, d=down, kind=kind, **before: quantize_token(x, s, d, *kind, **before), x, work)


if __name__ == "__main__":
    main()

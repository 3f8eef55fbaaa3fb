"""quantize_act and quantize_act_norm at FLUX.1's shapes, against plain torch and a plain copy of the input.

    .venv/bin/python benchmarks/benchmark_quantize_act.py

TB/s counts the input once and the results. The baseline is the copy: the least that reading x can take.
"""

import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.triton_kernels.quantize_act import quantize_act, quantize_act_norm
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu


def main() -> None:
    device, int4 = gpu(), get_format("int4")
    for k in sorted({k for k, _ in SHAPES}):
        x = torch.randn(TOKENS, k, device=device, dtype=torch.bfloat16)
        smooth = (torch.rand(k, device=device) + 0.5).to(x.dtype)
        down, mod = torch.randn(k, RANK, device=device, dtype=x.dtype), torch.randn(1, k, device=device, dtype=x.dtype)
        runs = {
            "quantize_act": lambda x=x, s=smooth, d=down: quantize_act(x, s, d, False),
            "without the branch": lambda x=x, s=smooth, d=down[:, :0]: quantize_act(x, s, d, False),
            "quantize_act_norm": lambda x=x, s=smooth, d=down, m=mod: quantize_act_norm(x, m, m, s, d, False),
            "torch": lambda x=x, s=smooth, d=down: (int4.round_activations(x.float() / s.float(), x.dtype), x @ d),
            "copy": lambda x=x: x.clone(),
        }
        compare(f"K {k}", runs, TOKENS * (2.5 * k + k / 32 + 2 * RANK) * 1e-12, "TB/s")


if __name__ == "__main__":
    main()

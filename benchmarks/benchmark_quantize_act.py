"""quantize_act at FLUX.1's shapes, against plain torch and a plain copy of the input; then with what stands before it.

    .venv/bin/python benchmarks/benchmark_quantize_act.py

TB/s counts the input once and the results. The baseline is the copy: the least that reading x can take.
"""

import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.triton_kernels.quantize_act import quantize_act
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu, in_front


def main() -> None:
    device, int4 = gpu(), get_format("int4")
    for k in sorted({k for k, _ in SHAPES}):
        x = torch.randn(TOKENS, k, device=device, dtype=torch.bfloat16)
        smooth = (torch.rand(k, device=device) + 0.5).to(x.dtype)
        down = torch.randn(k, RANK, device=device, dtype=x.dtype)
        work = TOKENS * (2.5 * k + k / 32 + 2 * RANK) * 1e-12
        runs = {
            "quantize_act": lambda x=x, s=smooth, d=down: quantize_act(x, s, d, False),
            "without the branch": lambda x=x, s=smooth, d=down[:, :0]: quantize_act(x, s, d, False),
            "torch": lambda x=x, s=smooth, d=down: (int4.round_activations(x.float() / s.float(), x.dtype), x @ d),
            "copy": lambda x=x: x.clone(),
        }
        compare(f"K {k}", runs, work, "TB/s")
        in_front(lambda x, s=smooth, d=down, k=k, **before: quantize_act(x, s, d, k > 3072, **before), x, work)


if __name__ == "__main__":
    main()

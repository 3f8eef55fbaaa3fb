"""quantize_nvfp4 at FLUX.1's shapes, against plain torch and a plain copy of the input; then with what stands
before it.

    .venv/bin/python benchmarks/benchmark_quantize_nvfp4.py

TB/s counts the input once and the results. The baseline is the copy: the least that reading x can take.
"""

import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.triton_kernels.quantize_nvfp4 import quantize_nvfp4
from kernel_timing import RANK, SHAPES, TOKENS, compare, gpu, in_front


def main() -> None:
    device, nvfp4 = gpu(), get_format("nvfp4")
    for k in sorted({k for k, _ in SHAPES}):
        x = torch.randn(TOKENS, k, device=device, dtype=torch.bfloat16)
        smooth = (torch.rand(k, device=device) + 0.5).to(x.dtype)
        down = torch.randn(k, RANK, device=device, dtype=x.dtype)
        runs = {
            "quantize_nvfp4": lambda x=x, s=smooth, d=down: quantize_nvfp4(x, s, d, False),
            "without the branch": lambda x=x, s=smooth, d=down[:, :0]: quantize_nvfp4(x, s, d, False),
            "torch": lambda x=x, s=smooth, d=down: (nvfp4.round_activations(x.float() / s.float(), x.dtype), x @ d),
            "copy": lambda x=x: x.clone(),
        }
        work = TOKENS * (2.5 * k + k / 16 + 2 * RANK) * 1e-12
        compare(f"K {k}", runs, work, "TB/s")
        in_front(lambda x, s=smooth, d=down, k=k, **before: quantize_nvfp4(x, s, d, k > 3072, **before), x, work)


if __name__ == "__main__":
    main()

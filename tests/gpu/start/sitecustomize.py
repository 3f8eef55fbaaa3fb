"""Python imports this first where its folder is in PYTHONPATH: the process has the emulated GPU from then on."""

import os
import traceback

import torch

from gpu import idle, kernels, operators

if torch.cuda.is_available():  # a child may have been given no GPU
    try:
        if os.environ.get("SVDQ_GPU_IDLE"):
            idle.install()
        else:
            operators.install()
            kernels.install()
    except BaseException:  # of which Python would only speak
        traceback.print_exc()
        os._exit(1)

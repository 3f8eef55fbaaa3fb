"""`python -m comfyui_svdquant`: the command line, same as `svdquant`."""

import sys

from .svdq_core.cli import main

if __name__ == "__main__":
    sys.exit(main())

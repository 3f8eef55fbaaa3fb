"""``python tests/gpu COMMAND...`` runs a command with the emulated GPU: ``pytest tests/test_backends.py``, for one."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gpu

with tempfile.TemporaryDirectory() as folder:
    env = {**os.environ, **gpu.environment(gpu.build(Path(folder)))}
    sys.exit(subprocess.run(sys.argv[1:], env=env).returncode)

"""Python imports this first where its folder is in PYTHONPATH: the process has the emulated GPU from then on."""

from gpu import kernels, operators

operators.install()
kernels.install()

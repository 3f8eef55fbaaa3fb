"""How much device memory solving one layer takes, measured at scaled-down FLUX shapes (docs/memory.md)."""

import weakref

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.svdq_core.solve import SolveSettings, solve_shared_input
from torch.utils._python_dispatch import TorchDispatchMode

# (N, K) of FLUX.1's linears that are solved in 4 bit
FLUX_LINEARS = {"qkv": (9216, 3072), "proj": (3072, 3072), "mlp.0": (12288, 3072), "mlp.2": (3072, 12288),
                "linear1": (21504, 3072), "linear2": (3072, 15360)}  # fmt: skip
TOKENS = 1226  # what 4 GiB of RAM hold for every linear of a 12B model


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, as a device allocator would."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return out

    def watch(self, storage):
        key = storage._cdata
        if key in self.alive or storage.nbytes() == 0:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.alive.pop(key)


def predicted_peak(n, k, t):
    """The formula of docs/memory.md, in bytes: float32 copies of the weight, the samples and the Hessian."""
    return 4 * (8 * n * k + 5 * t * k + 3 * k * k)


def measured_peak(n, k, t, unsigned=False, fmt="int4", **changes):
    weight = torch.randn(n, k).bfloat16()
    samples = torch.randn(t, k).bfloat16()
    settings = SolveSettings(**{"alphas": (None, 0.5), "search_tokens": t // 2} | changes)
    with PeakBytes() as watch:
        solve_shared_input([weight], samples, [None], get_format(fmt), settings, unsigned)
    return watch.peak


@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "int8"])
@pytest.mark.parametrize("name", FLUX_LINEARS)
def test_scaled_layers_stay_within_the_formula(name, fmt):
    n, k = (size // 16 // 64 * 64 for size in FLUX_LINEARS[name])
    t = TOKENS // 16
    peak = measured_peak(n, k, t, unsigned=name == "mlp.2", fmt=fmt)
    assert 0.3 * predicted_peak(n, k, t) < peak <= predicted_peak(n, k, t)


def test_no_hessian_where_nothing_reads_it():
    """The preset naive, which is there to compare with."""
    n, k, t = 192, 960, 76
    assert measured_peak(n, k, t, rank=0, residual="rtn", passes=0) < measured_peak(n, k, t) - 4 * k * k


def test_the_formula_holds_at_twice_the_size():
    """Quadratic, as the arithmetic for the full size assumes: every term grows fourfold."""
    small, large = measured_peak(192, 960, 76), measured_peak(384, 1920, 152)
    assert large / small == pytest.approx(4, rel=0.05)


def test_modulation_linears_need_little():
    """W4A16: 18432 × 3072 in FLUX.1, at a sixteenth here. Nothing quadratic in K, so the weight's copies decide."""
    n, k = 18432 // 16, 192
    weight = torch.randn(n, k).bfloat16()
    with PeakBytes() as watch:
        solve_shared_input([weight], torch.randn(76, k).bfloat16(), [None], get_format("awq"), SolveSettings())
    assert watch.peak < 4 * 13 * n * k
    assert 4 * 13 * 18432 * 3072 < 3 * 2**30


def test_a_12b_model_fits_a_12_gb_gpu():
    worst = max(predicted_peak(n, k, TOKENS) for n, k in FLUX_LINEARS.values())
    assert worst < 6 * 2**30, f"{worst / 2**30:.1f} GiB"

"""Tiles that are looked for on request: what is tried, what is kept, and that the kernels take it."""

import pytest
import torch
from comfyui_svdquant.svdq_core import backends, benchmark
from comfyui_svdquant.svdq_core.formats import get_format
from comfyui_svdquant.svdq_core.implementations import IMPLEMENTATIONS
from comfyui_svdquant.svdq_core.tuning import tune
from comfyui_svdquant.triton_kernels import gemm_w4a4, gemm_w8a8, tiles

CPU = torch.device("cpu")
PLACE = (CPU, "gemm_w4a4", backends.SOME, 128, 64)
pytestmark = pytest.mark.usefixtures("cpu_kernels", "nothing_remembered")


@pytest.fixture
def case(monkeypatch):
    """A layer and a way to run it; with few tiles to try, which is all that the interpreter has time for."""
    monkeypatch.setattr(gemm_w4a4, "CHOICES", {"BLOCK_M": (64, 128), "BLOCK_N": (32,), "num_stages": (2, 3)})
    monkeypatch.setattr("comfyui_svdquant.triton_kernels.quantize_act.CHOICES", {})
    layer, x = backends.random_layer(get_format("int4"), 40, 128, 64, CPU, torch.bfloat16, 16)
    implementation = IMPLEMENTATIONS["int4", "triton-w4a4"]
    return implementation, layer, lambda: implementation.run(x, layer)


def faster(**wanted: int):
    """A clock by which every one of these values saves a tenth."""

    def milliseconds() -> float:
        found = dict(tiles.MEASURED.get(PLACE, ()))
        return 1.0 - 0.1 * sum(found.get(name) == value for name, value in wanted.items())

    return milliseconds


def test_what_is_faster_is_kept(case):
    implementation, layer, run = case
    found, before, after = tune(implementation, layer, run, faster(BLOCK_M=64, num_stages=3))
    assert found == {"tiles gemm_w4a4 512 128 64": {"BLOCK_M": 64, "num_stages": 3}}
    assert before == 1.0 and after == pytest.approx(0.8)


def test_a_little_faster_is_chance(case):
    implementation, layer, run = case
    found, before, after = tune(implementation, layer, run, lambda: 1.0 - 0.001 * len(tiles.MEASURED.get(PLACE, ())))
    assert found == {} and before == after


def test_what_fails_or_is_wrong_is_passed_over(case):
    implementation, layer, run = case

    def some():
        value = dict(tiles.MEASURED.get(PLACE, ()))
        if value.get("BLOCK_M") == 64:
            raise RuntimeError("out of resource: shared memory")
        return run() * (2 if value.get("BLOCK_N") else 1)

    found, _, after = tune(implementation, layer, some, faster(BLOCK_M=64, BLOCK_N=32, num_stages=2))
    assert found == {"tiles gemm_w4a4 512 128 64": {"num_stages": 2}} and after == pytest.approx(0.9)


def test_a_lost_gpu_ends_it(case):
    implementation, layer, run = case

    def lost():
        if tiles.MEASURED.get(PLACE):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return run()

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune(implementation, layer, lost, faster())


def test_kernels_take_what_is_stored(case, monkeypatch):
    """From the file, in the process after; of this device, kernel, shape and class of tokens alone."""
    _, layer, run = case
    wanted, launched, config = run(), [], gemm_w4a4.config
    monkeypatch.setattr(gemm_w4a4, "config", lambda *about: launched.append(config(*about)) or launched[-1])
    backends.store_measurements(CPU, {"tiles gemm_w4a4 512 128 64": {"BLOCK_M": 64, "BLOCK_N": 32}})
    for name, applies in (("the linear", True), ("others", False)):
        x = backends.random_layer(get_format("int4"), 40, 128, 64, CPU, torch.bfloat16, 16)[1]
        rows = x if applies else x[:3]
        monkeypatch.setattr(backends, "FORCED", "triton-w4a4")
        found = backends.linear(rows, layer)
        assert torch.equal(found, wanted[: len(rows)]), name
        assert ((launched[-1]["BLOCK_M"], launched[-1]["BLOCK_N"]) == (64, 32)) == applies
    assert gemm_w4a4.config("sm90", 512)["BLOCK_M"] == 128, "the cache of one is not the other's"


def test_tiles_of_long_rows_stay_what_they_must():
    """e4m3 is summed in parts whose number of steps follows from the tile."""
    found = gemm_w8a8.config("sm90", 4608, 3072, 12288, True, (("BLOCK_K", 64), ("BLOCK_N", 256)))
    assert found["PARTS"] == 2 * gemm_w8a8.config("sm90", 4608, 3072, 12288, True)["PARTS"] and found["BLOCK_N"] == 128


def test_the_bench_looks_for_them(case, monkeypatch, capsys):
    """Of what is not far from the fastest; and times what it found."""
    _, layer, _ = case
    clock = faster(BLOCK_M=64)
    monkeypatch.setattr(benchmark, "median_ms", lambda call, gpu: clock() if call() is not None else None)
    x = backends.random_layer(get_format("int4"), 40, 128, 64, CPU, torch.bfloat16, 16)[1]
    times = {"triton-w4a4": 1.0, "torch": 0.9, "triton-w4a8-int8": 9.0}
    found = benchmark.found_tiles(layer, lambda: x, times)
    assert found == {"tiles gemm_w4a4 512 128 64": {"BLOCK_M": 64}}
    assert "triton-w4a4: 1.000 ms with the tiles it ships with, 0.900 ms with the fastest" in capsys.readouterr().out
    backends.store_measurements(CPU, found)
    monkeypatch.setattr(backends, "device_arch", lambda device: "cpu")
    assert benchmark.measure(layer, lambda: x)["triton-w4a4"] == pytest.approx(0.9)

"""What a linear did on a GPU, done again: the same bits, with nothing asked, and given up where that is not certain."""

import sys

import pytest
import torch
from comfyui_svdquant.svdq_core import backends
from comfyui_svdquant.svdq_core.formats import FORMATS
from comfyui_svdquant.svdq_core.implementations import IMPLEMENTATIONS
from comfyui_svdquant.svdq_core.tape import case_of, record
from comfyui_svdquant.triton_kernels.launching import hearing

import gpu

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the emulated driver is preloaded")
WAYS = ("w4a4", "w4a8", "widened", "fp8", "int8", "nvfp4", "awq", "mlp")


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    return gpu.answer("check_tape.py", gpu.build(tmp_path_factory.mktemp("gpu")))


@LINUX
@pytest.mark.parametrize("way", WAYS)
def test_same_bits_for_other_tensors_of_the_same_form(way, facts):
    """Every implementation, with layers and inputs that it was not written down with."""
    found = facts["again"][way]
    assert found["written"] and found["same case"] and found["same bits"] and found["of another input"]
    assert not found["asked"], "no kernel is launched the long way"


@LINUX
def test_the_linear_plays_it(facts):
    found = facts["linear"]
    assert found["played"] and not found["asked"]
    assert found["captured"] and found["gradient"] and found["wide"]


@LINUX
def test_what_cannot_be_played_goes_the_long_way(facts):
    """An address that is not aligned, for that one call; a launch that fails, for good."""
    found = facts["linear"]
    assert found["not aligned"] and found["after that"]
    assert found["failed"] and not found["rejected"]


@LINUX
def test_what_follows_from_a_weight_is_kept_by_layers_that_stay(facts):
    """A tape would make it at every call. New layers, as of weights that are on their way, are played all the same."""
    found = facts["derived"]
    assert found["right"] and found["kept"] == [["row_scale"]] * 4
    assert found["new"] and not found["asked"]


@LINUX
def test_it_keeps_no_memory(facts):
    assert facts["leftover"] == 0


def test_only_what_kernels_make_is_written_down():
    """Anything else could depend on more than the form of what is given."""
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for run in (lambda: x + y, lambda: x.new_empty(3, 4).copy_(x), lambda: torch.cat([x, y]), lambda: x):
        result, tape = record(run, [x, y])
        assert torch.equal(result, run()) and tape is None
    assert record(lambda: None, [x]) == (None, None)


def test_interpreter_is_not_written_down(kernel_device):
    """On a GPU this very layer is."""
    layer, x = backends.random_layer(FORMATS["int4"], 5, 128, 64, kernel_device, torch.bfloat16, 16)
    run = IMPLEMENTATIONS["int4", "triton-w4a4"].run
    result, tape = record(lambda: run(x, layer), case_of(x, [layer])[1])
    assert torch.equal(result, run(x, layer)) and (tape is None) == (kernel_device.type == "cpu")


def test_launches_are_heard(kernel_device):
    """With all arguments, in the kernel's order, whether they were named or not."""
    layer, x = backends.random_layer(FORMATS["int4"], 5, 128, 64, kernel_device, torch.bfloat16, 16)
    heard = []
    with hearing(heard):
        y = IMPLEMENTATIONS["int4", "triton-w4a4"].run(x, layer)
    IMPLEMENTATIONS["int4", "triton-w4a4"].run(x, layer)
    quantize, gemm = heard
    assert quantize.arguments[0].data_ptr() == x.data_ptr()
    assert any(argument is layer.smooth_factor for argument in quantize.arguments)
    assert any(argument is y for argument in gemm.arguments) and len(gemm.arguments) > len(gemm.grid)


def test_cases():
    """What has another form is another case; what only has other numbers is the same one."""
    cpu = torch.device("cpu")

    def case(m=5, k=128, n=64, rank=16, dtype=torch.bfloat16, bias=True, activations="auto", wide=False):
        layer, x = backends.random_layer(FORMATS["int4"], m, k, n, cpu, dtype, rank)
        layer.bias = layer.bias if bias else None
        return case_of(torch.cat([x, x], 1)[:, :k] if wide else x, [layer], activations)[0]

    assert case() == case()
    others = [case(m=6), case(k=192), case(n=128), case(rank=32), case(dtype=torch.float16), case(bias=False)]
    others += [case(activations="8 bit"), case(wide=True)]
    assert len({case(), *others}) == len(others) + 1

"""The choice of kernels: the order, what overrides it, and what happens when an implementation is not what it says.

Kernels run in Triton's interpreter where there is no GPU; comfy-kitchen's ops run as its plain torch there.
"""

import json
import logging
import sys
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.svdq_core import backends, implementations
from comfyui_svdquant.svdq_core.formats import FORMATS, get_format
from comfyui_svdquant.svdq_core.implementations import FUSED_MLP, IMPLEMENTATIONS, branch, torch_linear, torch_mlp
from comfyui_svdquant.svdq_core.linear import linear_forward
from torch.utils._python_dispatch import TorchDispatchMode

from fp8 import need
from sampling import error_db

CPU = torch.device("cpu")
ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx1100", "gfx1201")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No measurements, and no memory of what ran before or after."""
    monkeypatch.setenv("LOCALAPPDATA" if backends.os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    backends.forget()
    yield
    backends.forget()


@pytest.fixture
def force(monkeypatch):
    """What SVDQUANT_BACKEND does at start."""
    return lambda name: monkeypatch.setattr(backends, "FORCED", name)


def layer_and_input(fmt="int4", m=37, k=128, n=128, dtype=torch.bfloat16, unsigned=False, rank=24, device=CPU):
    return backends.random_layer(get_format(fmt), m, k, n, device, dtype, rank, unsigned)


@pytest.fixture
def no_kitchen(monkeypatch):
    """comfy-kitchen has no kernels at all."""
    from comfy_kitchen.registry import BackendRegistry

    monkeypatch.setattr(sys.modules["comfy_kitchen.registry"], "registry", BackendRegistry())


@pytest.fixture
def hopper(no_kitchen, monkeypatch):
    """The CPU passes for an sm90 where the choice is made."""
    arch = backends.device_arch
    monkeypatch.setattr(backends, "device_arch", lambda device: "sm90" if device == CPU else arch(device))


def names(fmt="int4", activations="auto", size=0, k=3072, n=9216, forced="", device=CPU) -> list[str]:
    return [i.name for i in backends.ranked(device, fmt, activations, size, k, n, forced)]


# ---- the order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [backends.FEW, backends.SOME, 0])
def test_shipped_order(arch, fmt, size):
    """Only implementations that exist, none twice, plain torch among them: it is what always works."""
    order = backends.shipped_order(arch, fmt, size, 3072)
    assert len(set(order)) == len(order) and "torch" in order
    assert all((fmt, name) in IMPLEMENTATIONS for name in order)


@pytest.mark.parametrize(
    ("arch", "size", "k", "first"),
    [
        ("sm80", 0, 3072, "triton-widened-int8"),
        ("sm86", 0, 3072, "kitchen-w4a4"),  # INT4 tensor cores
        ("sm89", 512, 3072, "kitchen-w4a4"),
        ("sm90", 0, 3072, "triton-widened-fp8"),
        ("sm90", 0, 12288, "triton-widened-int8"),
        ("sm90", 512, 3072, "triton-w4a8-int8"),
        ("sm100", 0, 3072, "triton-widened-fp8"),
        ("sm120", 0, 3072, "triton-widened-int8"),
        ("gfx942", 0, 3072, "triton-widened-int8"),
        ("sm130", 0, 3072, "triton-widened-int8"),  # of tomorrow
    ],
)
def test_first_of_the_shipped_order(arch, size, k, first):
    assert backends.shipped_order(arch, "int4", size, k)[0] == first


def test_size_classes():
    assert [backends.size_class(m) for m in (1, 16, 17, 512, 513, 4608)] == [16, 16, 512, 512, 0, 0]


def test_activations_narrow_the_order(hopper):
    assert names(activations="4 bit") == ["triton-w4a4", "torch"]
    assert names(activations="8 bit")[-1] == "torch-w4a8" and "triton-w4a4" not in names(activations="8 bit")
    assert names("int8", "4 bit") == names("int8", "8 bit") == ["triton-w8a8", "torch"]


def test_cpu_and_forced(kernel_device):
    assert names() == names(forced="torch") == ["torch"]
    assert names(activations="8 bit", forced="torch") == ["torch-w4a8"]
    assert names(forced="triton-w4a8") == ["triton-w4a8-int8", "triton-w4a8-fp8", "torch"]
    assert names(activations="4 bit", forced="triton-widened-fp8") == ["triton-widened-fp8", "torch"]  # it has the say
    assert names("awq", forced="triton-w4a4", size=16) == ["torch"]
    assert names(forced="nonsense") == ["torch"]


def test_what_cannot_run_is_left_out(no_kitchen, monkeypatch):
    monkeypatch.setattr(backends, "device_arch", lambda device: "sm86")
    assert names()[0] == "triton-widened-int8", "without comfy-kitchen's compiled kernels"
    assert not [name for name in names() if "fp8" in name]
    monkeypatch.setattr(backends, "device_arch", lambda device: "sm89")
    backends.forget()
    assert [name for name in names() if "fp8" in name]
    from comfyui_svdquant import triton_kernels

    monkeypatch.setattr(triton_kernels, "why_not", lambda: "Triton is not installed")
    backends.forget()
    assert names() == ["torch"]


@pytest.mark.parametrize(
    ("arch", "runs"),
    [("sm75", False), ("sm80", True), ("sm120", True), ("gfx1030", False), ("gfx1100", True), ("gfx906", False)],
)
def test_architectures_of_the_triton_kernels(arch, runs, kernel_device):
    reason = IMPLEMENTATIONS["int4", "triton-w4a4"].why_not(arch)
    assert reason is None if runs else f"not for {arch}" in reason


def test_comfy_kitchen_is_asked_for_the_op(monkeypatch):
    """A backend that has only other ops is no reason to take comfy-kitchen: its plain torch would run."""
    from comfy_kitchen.backends import cuda
    from comfy_kitchen.registry import BackendRegistry

    registry = BackendRegistry()
    registry.register("eager", cuda, dict.fromkeys(("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4")))
    registry.register("cuda", cuda, {"quantize_svdquant_w4a4": None})
    monkeypatch.setattr(sys.modules["comfy_kitchen.registry"], "registry", registry)
    kitchen = IMPLEMENTATIONS["int4", "kitchen-w4a4"]
    assert "no compiled kernels" in kitchen.why_not("sm86")
    registry.register("cuda", cuda, dict.fromkeys(("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4")))
    assert kitchen.why_not("sm86") is None


def test_older_comfy_kitchen_without_the_op(no_kitchen, monkeypatch):
    """It raises when asked for what it does not know."""
    from comfy_kitchen.backends import cuda

    sys.modules["comfy_kitchen.registry"].registry.register("cuda", cuda, {"quantize_svdquant_w4a4": None})
    reason = IMPLEMENTATIONS["int4", "kitchen-w4a4"].why_not("sm89")
    assert "scaled_mm_svdquant_w4a4 (NoCapableBackendError)" in reason
    monkeypatch.setattr(backends, "device_arch", lambda device: "sm89")
    assert names()[0] == "triton-widened-int8"


def test_awq_for_many_tokens():
    assert backends.shipped_order("sm90", "awq", backends.FEW, 3072)[0] == "triton-w4a16"
    assert backends.shipped_order("sm90", "awq", backends.SOME, 3072) == ["torch"]


# ---- measured --------------------------------------------------------------------------------------------


def test_malformed_shape_keys(hopper):
    times = {"triton-w4a4": 1.0}
    backends.store_measurements(CPU, dict.fromkeys(("", "int4", "int4 0 a b", "int4 0 0 0", "int4 0 3072"), times))
    assert backends.nearest_times(CPU, "int4", 0, 3072, 3072) == {}


def test_other_kernels_are_another_device(monkeypatch):
    before = backends.device_key(CPU)
    assert backends.kernels_hash() in before
    monkeypatch.setattr(backends.Path, "read_bytes", lambda path: b"changed")
    assert backends.kernels_hash() not in before


def test_measured_times_decide(hopper):
    times = {"triton-w4a4": 2.0, "triton-widened-fp8": 1.0, "torch": 4.0, "triton-w4a8-int8": 5.0}
    path = backends.store_measurements(CPU, {backends.shape_key("int4", 0, 3072, 9216): times})
    assert names() == [
        "triton-widened-fp8",
        "triton-w4a4",
        "torch",
    ]  # what is slower than torch, or unknown, is not tried
    assert names(activations="8 bit")[0] == "triton-widened-fp8"
    assert (
        names(size=512) == [n for n in backends.shipped_order("sm90", "int4", 512, 3072) if n[0] != "k"][:6]
    )  # unmeasured
    assert names("int8") == ["triton-w8a8", "torch"]
    backends.store_measurements(CPU, {backends.shape_key("int4", 0, 12288, 3072): {"triton-w4a4": 1.0, "torch": 2.0}})
    assert len(json.loads(path.read_text())[backends.device_key(CPU)]) == 2
    assert names(k=10240, n=2560) == ["triton-w4a4", "torch"]  # the nearest shape
    assert names(k=3072, n=12288)[0] == "triton-widened-fp8"


def test_measured_elsewhere_does_not_count(hopper, monkeypatch):
    key = backends.shape_key("int4", 0, 3072, 9216)
    backends.store_measurements(CPU, {key: {"triton-w4a4": 1.0, "torch": 2.0}})
    assert names() == ["triton-w4a4", "torch"]
    for name, value in (("device_arch", lambda device: "sm89"), ("TOOL", "another version")):
        with monkeypatch.context() as other:
            other.setattr(backends, name, value)
            backends.device_key.cache_clear()
            backends.forget()
            assert names()[0] != "triton-w4a4"
    backends.device_key.cache_clear()


def test_measuring(hopper, kernel_device, monkeypatch):
    """What `svdquant bench` does on a GPU: all that is right is timed, and then the choice goes by that."""
    from comfyui_svdquant.svdq_core import benchmark

    layer, x = layer_and_input(m=16, k=64, n=64, device=kernel_device)
    wrong = replace(IMPLEMENTATIONS["int4", "triton-w4a4"], run=no_branch)
    monkeypatch.setitem(IMPLEMENTATIONS, ("int4", "triton-w4a4"), wrong)
    times = benchmark.measure(layer, lambda: x)
    assert {"torch", "torch-w4a8", "triton-widened-int8"} <= times.keys() and "triton-w4a4" not in times
    assert all(ms > 0 for ms in times.values())
    backends.store_measurements(kernel_device, {backends.shape_key("int4", 16, 64, 64): times})
    fastest = min(times, key=times.get)
    assert backends.choice(x, layer).name == fastest == names(size=16, k=64, n=64, device=kernel_device)[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b'{"a": {"b": {"c": "fast"}}}'])
def test_damaged_measurements(content, hopper, caplog):
    path = backends.measurements_file()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    shipped = names()
    assert len(shipped) > 4 and "cannot be read" in caplog.text and str(path) in caplog.text
    backends.store_measurements(CPU, {backends.shape_key("int4", 0, 3072, 9216): {"triton-w4a4": 1.0, "torch": 2.0}})
    assert names() == ["triton-w4a4", "torch"] and path.read_bytes() != content
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# ---- trust -----------------------------------------------------------------------------------------------


def swapped_nibbles(x, layer):
    """A real mistake: the packing of another format."""
    weight = layer.tensors["weight"].view(torch.uint8)
    swapped = (weight >> 4 | weight << 4).view(torch.int8)
    return torch_linear(x, replace(layer, tensors=layer.tensors | {"weight": swapped}))


def no_branch(x, layer):
    return torch_linear(x, replace(layer, proj_down=None, proj_up=None))


def not_a_number(x, layer):
    return torch_linear(x, layer) * float("nan")


def other_shape(x, layer):
    return torch_linear(x, layer)[:-1]


def fails(x, layer):
    raise RuntimeError("no kernel image is available for execution on the device\nmore lines")


def zeroed_rows(x, layer):
    """The last tile of rows is never written."""
    y = torch_linear(x, layer)
    y[-1:] = 0
    return y


def zeroed_columns(x, layer):
    y = torch_linear(x, layer)
    y[:, -1:] = 0
    return y


def too_large(x, layer):
    return torch_linear(x, layer) * 1.05


MISTAKES = {
    zeroed_rows: "its worst row is",
    zeroed_columns: "its worst column is",
    too_large: "its result is -26 dB off",
    swapped_nibbles: "dB off plain torch's",
    no_branch: "dB off plain torch's",
    not_a_number: "nan dB off",
    other_shape: "a result of shape",
    fails: "RuntimeError: no kernel image is available for execution on the device)",
}


def replace_triton(monkeypatch, run) -> None:
    """Register ``run`` as the first implementation, in the place of the real ones; -29 dB is what fp8 is allowed."""
    for name in ("triton-widened-int8", "triton-w4a8-int8"):
        implementation = replace(IMPLEMENTATIONS["int4", name], run=run, activations="4 bit", tolerance_db=-29.0)
        monkeypatch.setitem(IMPLEMENTATIONS, ("int4", name), implementation)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_implementation_is_not_used(mistake, monkeypatch, force, caplog):
    force("triton-widened-int8")
    replace_triton(monkeypatch, mistake)
    layer, x = layer_and_input(m=600)
    for _ in range(3):
        assert torch.equal(backends.linear(x, layer), torch_linear(x, layer))
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "triton-widened-int8 is not used on cpu" in message and MISTAKES[mistake] in message


def test_next_in_order_is_used(monkeypatch, force, caplog):
    force("triton")
    replace_triton(monkeypatch, fails)
    monkeypatch.setattr(backends, "shipped_order", lambda *_: ["triton-w4a8-int8", "triton-widened-fp8", "torch"])
    used = []
    second = IMPLEMENTATIONS["int4", "triton-widened-fp8"]

    def right(x, layer):
        used.append(x.shape)
        return torch_linear(x, layer)

    monkeypatch.setitem(IMPLEMENTATIONS, ("int4", second.name), replace(second, run=right, activations="4 bit"))
    layer, x = layer_and_input()
    assert torch.equal(backends.linear(x, layer), torch_linear(x, layer))
    assert len(used) == 2 and used[-1] == x.shape  # its check, and x
    backends.linear(x, layer)
    assert len(used) == 3, "checked once"


def test_failure_for_one_shape(monkeypatch, force, caplog):
    """Right on the small layer, but not able to run this one: the others go on using it."""
    force("triton-w4a8-int8")
    calls = []

    def some(x, layer):
        calls.append(layer.shape)
        if layer.shape == (192, 128):
            raise RuntimeError("out of resource: shared memory")
        return torch_linear(x, layer)

    replace_triton(monkeypatch, some)
    for n, tried in ((192, 1), (192, 0), (128, 1)):
        layer, x = layer_and_input(n=n)
        before = calls.count((n, 128))
        assert torch.equal(backends.linear(x, layer), torch_linear(x, layer))
        assert calls.count((n, 128)) - before == tried
    assert caplog.text.count("is not used on cpu for 128 inputs and 192 outputs (RuntimeError: out of resource") == 1


def test_it_is_chosen_once_until_it_fails(monkeypatch, force, caplog):
    """The host has no time to choose for every linear of a model."""
    force("triton-w4a8-int8")
    works, chosen, working = [True], [], backends.working
    monkeypatch.setattr(backends, "working", lambda *about: chosen.append(1) or working(*about))

    def some(x, layer):
        return 1 * torch_linear(x, layer) if works[0] else exec("raise RuntimeError('no longer')")

    replace_triton(monkeypatch, some)
    for works[0], times in ((True, 1), (True, 1), (False, 2), (True, 2)):
        layer, x = layer_and_input()
        assert torch.equal(backends.linear(x, layer), torch_linear(x, layer)) and len(chosen) == times
        (name,) = {way.name for way in backends.CHOSEN.values()}
        assert name == ("triton-w4a8-int8" if times == 1 else "torch")
    assert caplog.text.count("is not used on cpu for 128 inputs and 128 outputs (RuntimeError: no longer)") == 1


def test_out_of_memory_is_comfyuis_business(monkeypatch, force):
    force("triton-w4a8-int8")

    def hungry(x, layer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    replace_triton(monkeypatch, hungry)
    layer, x = layer_and_input()
    with pytest.raises(torch.OutOfMemoryError):
        backends.linear(x, layer)
    assert not backends.REJECTED


@pytest.mark.parametrize(
    "message",
    ["Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"],
)
def test_out_of_memory_in_other_words(message, monkeypatch, force):
    force("triton-w4a8-int8")

    def hungry(x, layer):
        raise RuntimeError(message)

    replace_triton(monkeypatch, hungry)
    layer, x = layer_and_input()
    with pytest.raises(torch.OutOfMemoryError):
        backends.linear(x, layer)
    assert not backends.REJECTED


@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_lost_gpu_ends_the_search(kind, monkeypatch, force):
    """After an illegal access every later call fails: nothing else is tried, and the user is told what to do."""
    force("triton-w4a8")

    def illegal(x, layer):
        raise kind("CUDA error: an illegal memory access was encountered")

    replace_triton(monkeypatch, illegal)
    layer, x = layer_and_input()
    with pytest.raises(RuntimeError, match=r"triton-w4a8-int8\. Restart ComfyUI with .*SVDQUANT_BACKEND=torch"):
        backends.linear(x, layer)
    assert not backends.REJECTED


@pytest.mark.parametrize("name", ["weight", "proj_up", "bias"])
def test_a_part_elsewhere_is_refused_by_name(name, force):
    """It is no failure of the implementations: they are used afterwards."""
    force("triton-w4a4")
    layer, x = layer_and_input()
    moved = {name: layer.parts[name].to("meta")}
    bad = replace(layer, tensors=layer.tensors | moved) if name == "weight" else replace(layer, **moved)
    for run in (backends.run_linear, lambda x, bad, a: backends.run_mlp(x, bad, layer, a)):
        with pytest.raises(ValueError, match=f"a quantized linear is on cpu, but its {name} is on meta"):
            run(x, bad, "auto")
    assert not backends.REJECTED


def test_missing_compiler_is_said_once(monkeypatch, force, caplog):
    force("triton-w4a8-int8")

    def uncompiled(x, layer):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    replace_triton(monkeypatch, uncompiled)
    for m, dtype, n in ((37, torch.bfloat16, 128), (3, torch.float16, 192)):
        layer, x = layer_and_input(m=m, dtype=dtype, n=n)
        assert torch.equal(backends.linear(x, layer), torch_linear(x, layer))
    assert caplog.text.count("is not used on cpu (RuntimeError: Failed to find C compiler") == 1


def test_log_says_what_runs(kernel_device, force, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    force("triton-w4a4")
    layer, x = layer_and_input(device=kernel_device)
    for _ in range(2):
        backends.linear(x, layer)
    name = backends.device_name(kernel_device)
    assert caplog.text.count(f"int4 (activations: auto) runs through triton-w4a4 on {name}") == 1
    assert caplog.text.count(f"compiling kernels for {name}, once") == 1
    from comfyui_svdquant import triton_kernels

    monkeypatch.setattr(triton_kernels, "why_not", lambda: "Triton is not installed")
    backends.forget()
    assert backends.choice(x, layer).name == "torch"
    record = caplog.records[-1]
    assert record.levelno == logging.WARNING and "not triton-w4a4: Triton is not installed" in record.getMessage()


@pytest.mark.parametrize(("value", "meant"), [(" Triton ", "triton"), ("triton-w4a8", "triton-w4a8"), ("", "")])
def test_what_the_variable_asks_for(value, meant, caplog):
    assert backends.forced_by(value) == meant and not caplog.records


def test_wrong_variable_is_ignored(caplog):
    assert backends.forced_by("tritn") == ""
    assert "SVDQUANT_BACKEND=tritn is ignored" in caplog.text and "triton-widened-int8" in caplog.text


def test_unchecked_is_not_captured(kernel_device, monkeypatch, force, caplog):
    """Whether a stream captures is asked of the GPU; what follows from it is the same here."""
    force("triton-w4a8-int8")
    monkeypatch.setattr(backends, "capturing", lambda device: True)
    layer, x = layer_and_input(device=kernel_device)
    for _ in range(2):
        assert torch.equal(backends.linear(x, layer), torch_linear(x, layer))
    assert caplog.text.count("triton-w4a8-int8 is not used in a CUDA graph") == 1 and not backends.REJECTED
    monkeypatch.setattr(backends, "capturing", lambda device: False)
    backends.linear(x, layer)
    assert [way.name for way in backends.CHOSEN.values()] == ["triton-w4a8-int8"], "chosen after the graph"


@pytest.mark.parametrize(("fmt", "name", "kept"), [("int4", "triton-w4a8-int8", 1), ("int8", "triton-w8a8", 2)])
def test_what_follows_from_the_weight_is_made_once(kernel_device, monkeypatch, fmt, name, kept):
    """Not while a CUDA graph is captured: it would be there only after the graph has run."""
    made = []
    monkeypatch.setattr(implementations, "capturing", lambda device: not made)
    layer, x = layer_and_input(fmt, unsigned=fmt == "int8", device=kernel_device)
    run = IMPLEMENTATIONS[fmt, name].run
    wanted = run(x, layer)
    assert not {"row_scale", "weight_sum"} & set(layer.derived)
    made.append(True)
    for _ in range(2):
        assert torch.equal(run(x, layer), wanted)
        assert len({"row_scale", "weight_sum"} & set(layer.derived)) == kept
    others, _ = layer_and_input(fmt, unsigned=fmt == "int8", device=kernel_device)
    assert not replace(layer, bias=None).derived and not others.derived


# ---- the linear ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_cpu_is_plain_torch(fmt, dtype):
    layer, x = layer_and_input(fmt)
    x = x.to(dtype)
    parts = (layer.smooth_factor, layer.proj_down, layer.proj_up, layer.bias, False, dtype)
    assert torch.equal(backends.linear(x, layer), linear_forward(x, layer.fmt, layer.tensors, *parts))


@pytest.mark.parametrize("unsigned", [False, True])
def test_w4a8_in_plain_torch(unsigned):
    """Closer to the same layer with unrounded activations; what is left is 8-bit rounding."""
    layer, x = layer_and_input(dtype=torch.float32, unsigned=unsigned, m=256)
    shift = 0.171875 if unsigned else 0.0
    weight = layer.fmt.unpack(layer.tensors, torch.float32)
    exact = ((x + shift) / layer.smooth_factor) @ weight.t() + x @ layer.proj_down @ layer.proj_up.t() + layer.bias
    four, eight = (error_db(backends.linear(x, layer, a), exact) for a in ("4 bit", "8 bit"))
    assert eight < four - 15 and eight < -35


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [key for key in IMPLEMENTATIONS if "torch" not in key[1]], ids="-".join)
def test_every_implementation_is_right(name, dtype, kernel_device):
    """The whole linear on the check's own layer, in fp16 with unsigned activations: what a GPU will have to pass."""
    need("fp8" if name[1].endswith("fp8") else "int8", kernel_device)
    unsigned = dtype == torch.float16 and name[0] in ("int4", "int8")
    size = backends.FEW if name[0] == "awq" else backends.SOME
    assert backends.check(IMPLEMENTATIONS[name], kernel_device, dtype, unsigned, size) is None


@pytest.mark.parametrize(("rank", "padded"), [(0, 0), (4, 16), (32, 32), (40, 48)])
def test_branch_is_filled_up(rank, padded):
    layer, x = layer_and_input(rank=rank)
    down, up, _ = branch(x, layer)
    assert down.shape == (128, padded) and up.shape == (128, padded)
    assert torch.equal(down @ up.t(), layer.proj_down @ layer.proj_up.t())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["triton-w4a4", "triton-widened-int8"])
def test_ragged_batches_and_other_dtypes(name, dtypes, kernel_device):
    """x (2, 19, K) not contiguous, in another dtype than the file's; a wide branch as LoRAs make it; no bias."""
    layer, _ = layer_and_input(dtype=dtypes[1], k=192, n=136, rank=75, device=kernel_device)
    layer.bias = None
    implementation = IMPLEMENTATIONS["int4", name]
    x = (
        torch.randn(192, 2, 19, generator=torch.Generator().manual_seed(1))
        .to(kernel_device, dtypes[0])
        .permute(1, 2, 0)
    )
    found = implementation.run(x.reshape(-1, 192), layer)
    wanted = torch_linear(x.reshape(-1, 192), layer, "int8" if "int8" in name else None)
    assert found.dtype == dtypes[0] and error_db(found, wanted.double()) < implementation.tolerance_db


def test_what_is_forced_runs(kernel_device, force):
    """SVDQUANT_BACKEND=triton on a CPU: the same choice and check as on a GPU, with an empty input, too."""
    force("triton-w4a4")
    layer, x = layer_and_input(device=kernel_device)
    wanted = IMPLEMENTATIONS["int4", "triton-w4a4"].run(x, layer)
    found = backends.linear(x[None], layer)
    assert torch.equal(found, wanted[None]) and not backends.REJECTED
    assert not torch.equal(found, torch_linear(x, layer)[None]), "this was plain torch"
    assert backends.linear(x[:0], layer).shape == (0, 128)
    assert torch.equal(backends.linear(x.float(), layer), torch_linear(x.float(), layer))


def test_only_who_traces_sees_the_op(kernel_device, force, monkeypatch):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func)
            return func(*args, **kwargs or {})

    force("triton-w4a4")
    ops, (layer, x) = [], layer_and_input(device=kernel_device)
    wanted = backends.linear(x, layer)
    monkeypatch.setattr(backends, "opaque_linear", None)
    assert torch.equal(backends.linear(x, layer), wanted)
    monkeypatch.undo()
    force("triton-w4a4")
    with Seen():
        assert torch.equal(backends.linear(x, layer), wanted)
    assert torch.ops.svdquant.linear.default in ops


def test_gradients(kernel_device, force):
    """Through the quantized tensor, as any linear of the model: the input's gradient is the effective weight's."""
    from comfyui_svdquant.svdq_core.host.layout import as_tensor

    force("triton-w4a4")
    layer, x = layer_and_input(device=kernel_device)
    weight = as_tensor(layer, torch.bfloat16)
    x.requires_grad_()
    torch.nn.functional.linear(x, weight, layer.bias).sum().backward()
    assert error_db(x.grad, weight.dequantize().double().sum(dim=0).expand(37, -1)) < -40


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_op_compiles_without_graph_breaks(fmt, kernel_device, force):
    """As TorchCompileModel would on a GPU: one opaque op in one graph, for any number of tokens."""
    force("triton")
    layer, _ = layer_and_input(fmt, device=kernel_device)

    def around(x):
        return backends.linear(torch.nn.functional.silu(x), layer) * 2

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")  # the default one calls a C++ compiler here
    for m in (5, 9):
        x = torch.randn(2, m, 128, generator=torch.Generator().manual_seed(m)).to(kernel_device, torch.bfloat16)
        assert error_db(compiled(x), around(x).double()) < -40  # silu may round once more or less


def test_opcheck(kernel_device, force):
    """torch's own checks of schema, fake implementation and tracing."""
    force("triton-w4a4")
    layer, x = layer_and_input(m=16, k=64, n=64, device=kernel_device)
    t = layer.tensors
    arguments = (x, t["weight"], t["weight_scale"], None, None, layer.smooth_factor, layer.proj_down, layer.proj_up)
    torch.library.opcheck(
        backends.opaque_linear,
        (*arguments, layer.bias, "int4", False, "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )


# ---- the MLP ---------------------------------------------------------------------------------------------


def two_layers(device, unsigned=True, rank=40):
    first, x = layer_and_input(m=37, k=128, n=192, device=device)
    second, _ = layer_and_input(k=192, n=128, unsigned=unsigned, rank=rank, device=device)
    return x, first, second


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
def test_fused_mlp_is_right(dtype, unsigned, kernel_device):
    assert backends.check(FUSED_MLP, kernel_device, dtype, unsigned, backends.SOME) is None


def test_mlp_is_fused_where_both_layers_are_ours(kernel_device, force, monkeypatch, caplog):
    force("triton-w4a4")
    x, first, second = two_layers(kernel_device)
    fused = backends.mlp(x[None], first, second, "auto")[0]
    assert torch.equal(fused, FUSED_MLP.run(x, first, second)) and not caplog.records
    after_another = backends.linear(torch.nn.functional.gelu(backends.linear(x, first), approximate="tanh"), second)
    assert error_db(fused, after_another.double()) < FUSED_MLP.tolerance_db
    force("torch")
    assert torch.equal(backends.mlp(x, first, second, "auto"), torch_mlp(x, first, second))
    assert backends.mlp(x[:0], first, second, "auto").shape == (0, 128)


def test_wrong_fused_mlp_is_not_used(kernel_device, force, monkeypatch, caplog):
    force("triton-w4a4")
    wrong = replace(FUSED_MLP, run=lambda x, first, second: torch_linear(torch_linear(x, first), second))  # no GELU
    monkeypatch.setattr(backends, "FUSED_MLP", wrong)
    x, first, second = two_layers(kernel_device)
    hidden = torch.nn.functional.gelu(backends.linear(x, first), approximate="tanh")
    for _ in range(2):
        assert torch.equal(backends.mlp(x, first, second, "auto"), backends.linear(hidden, second))
    assert (
        caplog.text.count(f"triton-w4a4-mlp is not used on {backends.device_name(kernel_device)} (its result is") == 1
    )


def test_mlp_with_too_much_scratch_is_not_fused(kernel_device, force, monkeypatch):
    """One place, 37 tokens, rank 40 as 48, in float32."""
    force("triton-w4a4")
    x, first, second = two_layers(kernel_device)
    used = []
    monkeypatch.setattr(backends, "FUSED_MLP", replace(FUSED_MLP, run=lambda *a: used.append(a) or torch_mlp(*a)))
    monkeypatch.setattr(backends, "MAX_SCRATCH", 37 * 48 * 4)
    backends.mlp(x, first, second, "auto")
    assert not used

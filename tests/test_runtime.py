"""The runtime inside a real ComfyUI: a 4-bit FLUX does exactly what its arithmetic says, whatever patches it.

The reference is `small_flux.twin`: ComfyUI's own 16-bit model with its own linears, where the quantized layers'
outputs come from `QuantizedLinear.forward`. Nothing of `svdq_core.host` takes part in it.
"""

import json
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.svdq_core import QuantizedLinear, SVDQuantError, read_checkpoint
from comfyui_svdquant.svdq_core.formats import FORMATS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import small_flux
from sampling import (
    assert_equal_tensors,
    assert_same,
    conditioning,
    denoised,
    error_db,
    load,
    loaded,
    quantized_weights,
    raw,
    sample,
    save,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def sixteen_bit(small_flux_files) -> dict[str, Tensor]:
    return load_file(small_flux_files["bf16"])


@pytest.fixture(scope="module")
def twin(host, small_flux_files):
    return small_flux.twin(small_flux_files["bf16"], small_flux_files["int4"])


# ---- loading ---------------------------------------------------------------------------------------------


def test_is_comfyuis_own_class(model, small_flux_files):
    import comfy.ldm.flux.model

    assert type(model.model.diffusion_model) is comfy.ldm.flux.model.Flux
    wanted = {n: tuple(x.shape) for n, x in effective_weights(small_flux_files["int4"]).items()}
    modules = {n: m for n, m in model.model.diffusion_model.named_modules() if hasattr(m, "weight_patch")}
    found = {n: tuple(m.weight.shape) for n, m in modules.items() if hasattr(m.weight, "_qdata")}
    assert found == wanted and len(modules) > len(found)


def effective_weights(path: Path) -> dict[str, Tensor]:
    return {name: small_flux.effective(layer)["weight"] for name, layer in small_flux.quantized_layers(path).items()}


def test_nothing_is_allocated_before_loading(host):
    from comfyui_svdquant.svdq_core.host.ops import SVDQuantOps

    linear = SVDQuantOps.Linear(1 << 20, 1 << 20)  # 4 TiB
    assert linear.weight is None and isinstance(linear, nn.Linear)


def test_memory_is_the_files(model, small_flux_files):
    """ComfyUI's own bookkeeping must see scales and branch too, and no 16-bit copy."""
    import comfy.model_management

    sixteen = sum(t.nbytes for k, t in read_checkpoint(small_flux_files["int4"])[0].items())
    kept = [m for m in model.model.diffusion_model.modules() if not hasattr(getattr(m, "weight", None), "_qdata")]
    widened = sum(p.nbytes // 2 for m in kept for p in m.parameters(recurse=False))  # bf16 in the file, fp32 here
    assert comfy.model_management.module_size(model.model.diffusion_model) == sixteen + widened


def test_state_dict_is_the_files(model, small_flux_files):
    wanted, _ = read_checkpoint(small_flux_files["int4"])
    found = model.model.diffusion_model.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key].to(tensor.dtype), tensor), key


@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "int8"])
def test_computes_the_exact_arithmetic(small_flux_files, fmt):
    wanted = sample(small_flux.twin(small_flux_files["bf16"], small_flux_files[fmt]))
    found = sample(load(small_flux_files[fmt]))
    assert_same(found, wanted)
    import comfy.sd

    original = sample(comfy.sd.load_diffusion_model(str(small_flux_files["bf16"])))
    assert -60 < error_db(found, original) < -8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_explicit_dtype(small_flux_files, twin, dtype):
    """Every layer runs in the chosen dtype, and is as exact as that dtype allows."""
    model, errors = load(small_flux_files["int4"], dtype), {}
    for name, layer in small_flux.quantized_layers(small_flux_files["int4"]).items():

        def check(module, args, out, name=name, layer=layer):
            assert args[0].dtype == out.dtype == module.weight.dtype == dtype
            errors[name] = error_db(out, layer.forward(args[0]).double())

        model.model.diffusion_model.get_submodule(name).register_forward_hook(check)
    found = sample(model, steps=1)
    assert len(errors) == len(quantized_weights_of(model)) and max(errors.values()) < -40
    assert error_db(found, sample(twin, steps=1)) < -12  # 16-bit scales round other activations another way


@pytest.mark.parametrize("file_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["bf16 and fp16", "fp16", "fp16 for big models", "neither"])
def test_auto_dtype_is_the_16_bit_models(tmp_path, monkeypatch, file_dtype, device):
    import comfy.model_management
    import comfy.sd

    sd = small_flux.state_dict(double=1, single=1, dtype=file_dtype)
    big = sum(t.numel() for t in sd.values())
    rules = {
        "bf16 and fp16": (lambda params: True, lambda params: True),
        "fp16": (lambda params: False, lambda params: True),
        "fp16 for big models": (lambda params: False, lambda params: params >= big),
        "neither": (lambda params: False, lambda params: False),
    }
    for name, rule in zip(("should_use_bf16", "should_use_fp16"), rules[device]):
        monkeypatch.setattr(
            comfy.model_management, name, lambda device=None, model_params=big, rule=rule, **_: rule(model_params)
        )
    original = comfy.sd.load_diffusion_model(str(small_flux.write(tmp_path / "16.safetensors", sd, {})))
    model = load(small_flux.write(tmp_path / "4.safetensors", sd, small_flux.quantize(sd)))
    assert model.model.get_dtype() == original.model.get_dtype()
    assert model.model.get_dtype_inference() == original.model.get_dtype_inference()


def test_parameters_are_the_16_bit_models(small_flux_files, sixteen_bit):
    from comfyui_svdquant.svdq_core.host.load import parameters

    for fmt in ("int4", "nvfp4", "int8"):
        assert parameters(read_checkpoint(small_flux_files[fmt])[0]) == sum(t.numel() for t in sixteen_bit.values())


def damaged(path: Path, target: Path, change) -> Path:
    sd = load_file(path)
    change(sd)
    save_file({key: tensor.clone() for key, tensor in sd.items()}, target)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("single_blocks.1.linear1.proj_up"), r"single_blocks\.1\.linear1\.proj_up is missing"),
        (lambda sd: sd.pop("img_in.bias"), None),
        (lambda sd: sd.pop("time_in.out_layer.weight"), r"time_in\.out_layer\.weight is missing"),
        (
            lambda sd: sd.update({"time_in.out_layer.weight": torch.zeros(256, 128)}),
            r"time_in\.out_layer\.weight: this model needs \(256, 256\), the file has \(256, 128\)",
        ),
        (
            lambda sd: sd.update({k: sd[k.replace("linear1", "linear2")] for k in sd if ".0.linear1." in k}),
            r"single_blocks\.0\.linear1\.weight: this model needs \(1792, 256\), the file has \(256, 1280\)",
        ),
        (
            lambda sd: sd.update({"single_blocks.0.linear1.comfy_quant": marker({"format": "int3"})}),
            r"single_blocks\.0\.linear1\.comfy_quant: format 'int3' is not one of",
        ),
    ],
)
def test_damaged_files(small_flux_files, tmp_path, caplog, change, message):
    path = damaged(small_flux_files["int4"], tmp_path / "damaged.safetensors", change)
    if message is None:  # as ComfyUI does with a 16-bit layer: warn and go on
        load(path)
        assert "img_in.bias" in caplog.text
    else:
        with pytest.raises(SVDQuantError, match=message):
            load(path)


def marker(conf: dict) -> Tensor:
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def test_16_bit_file_is_refused(small_flux_files):
    with pytest.raises(SVDQuantError, match="not quantized. Load it with Load Diffusion Model"):
        load(small_flux_files["bf16"])


# ---- patches ---------------------------------------------------------------------------------------------


def skip_layers(model):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, double_layers="1", single_layers="0").result[0]


def replace_blocks(model):
    model = model.clone()

    def double(args, extra):
        out = extra["original_block"](args)
        return {"img": out["img"] * 1.3, "txt": out["txt"]}

    def single(args, extra):
        return {"img": extra["original_block"](args)["img"] + 0.5}

    model.set_model_patch_replace(double, "dit", "double_block", 0)
    model.set_model_patch_replace(single, "dit", "single_block", 1)
    return model


def attention_input(model):
    """What regional prompts and PAG do: change q, k, v or the mask."""
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, pe, attn_mask, extra_options: {"q": q * 3, "v": v.flip(2)})
    return model


def attention_output(model):
    """What IP-Adapter and PuLID do: add to the attention's output."""
    model = model.clone()
    model.set_model_attn1_output_patch(lambda attn, extra_options: attn + 0.5 * attn.roll(1, dims=1))
    return model


def embedded_input(model):
    """What Redux-like patches do: change the embedded image and text."""
    model = model.clone()
    model.set_model_post_input_patch(lambda args: {**args, "img": args["img"] * 1.5})
    return model


def function_wrapper(model):
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"] * 0.9, args["timestep"], **args["c"]))
    return model


@pytest.mark.parametrize(
    "patch", [skip_layers, replace_blocks, attention_input, attention_output, embedded_input, function_wrapper]
)
def test_patch(model, twin, patch):
    wanted = sample(patch(twin))
    assert error_db(wanted, sample(twin)) > -20, "this patch does nothing"
    assert_same(sample(patch(model)), wanted)
    assert_same(sample(model), sample(twin))  # and the patch stays on its clone


def test_easycache(model, twin):
    """The builtin node; a threshold at which it skips some steps but not all."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    results = []
    for each in (model, twin):
        calls = []
        hook = each.model.diffusion_model.single_blocks[0].register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        cached = EasyCacheNode.execute(each, 1.0, 0.1, 0.95, False).result[0]
        results.append(sample(cached, steps=8))
        hook.remove()
        assert 1 < len(calls) < 8
    assert_same(*results)
    assert error_db(results[0], sample(model, steps=8)) > -60


def test_controlnet(model, twin, tmp_path):
    import comfy.controlnet
    import nodes

    net = comfy.controlnet.load_controlnet(str(small_flux.write_controlnet(tmp_path / "controlnet.safetensors")))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def controlled(each):
        positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
            conditioning(), conditioning(seed=1), net, hint, 0.7, 0.0, 1.0
        )
        return sample(each, positive=positive, negative=negative, cfg=2.0)

    wanted = controlled(twin)
    assert error_db(wanted, sample(twin, cfg=2.0)) > -20
    assert_same(controlled(model), wanted)


@pytest.mark.parametrize(
    "how",
    [
        {"batch": 2},
        {"cfg": 3.0},
        {"cfg": 3.0, "negative": (3, 2)},  # another prompt length than the positive one
        {"denoise": 0.6},
        {"latent": (2, 16, 10, 6)},  # another picture size
    ],
    ids=str,
)
def test_sampling(model, twin, how):
    if "negative" in how:
        how = how | {"negative": conditioning(*how["negative"])}
    if "latent" in how or "denoise" in how:
        shape = how.get("latent", (1, 16, 8, 8))
        how = how | {"latent": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    wanted = sample(twin, **how)
    assert_same(sample(model, **how), wanted)
    if wanted.shape == (1, 16, 8, 8):
        assert error_db(wanted, sample(twin)) > -40


# ---- merging -------------------------------------------------------------------------------------------


def test_merge(small_flux_files, model):
    """ModelMergeSimple takes the effective weights, either way round."""
    import comfy.sd
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    every = tuple(small_flux.quantized_layers(small_flux_files["int4"]))
    other = comfy.sd.load_diffusion_model(str(small_flux_files["other"]))
    reference = small_flux.twin(small_flux_files["bf16"], small_flux_files["int4"], every)
    for ratio, order in ((0.6, (1, 0)), (0.3, (0, 1))):
        results = []
        for each in (model, reference):
            models = [(each, other)[i] for i in order]
            results.append(sample(ModelMergeSimple().merge(*models, ratio)[0]))
        assert_same(*results)


# ---- moving ----------------------------------------------------------------------------------------------


def test_unload_and_reload(model):
    import comfy.model_management

    first, weights = sample(model), quantized_weights(model)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model), first)
    assert_equal_tensors(quantized_weights(model), weights)


@pytest.mark.parametrize("memory", [1, 2e6, 4e6])
def test_partly_loaded(model, memory):
    with loaded(model, 1e30) as each:
        wanted = denoised(each)
    with loaded(model, memory) as each:
        assert each.model.model_lowvram
        assert torch.equal(denoised(each), wanted)
        each.partially_unload(each.offload_device, 1e6)
        assert torch.equal(denoised(each), wanted)


class FakeStream:
    """A CUDA stream as far as ComfyUI's offloading looks at one."""

    waited = 0

    @staticmethod
    def as_context(stream):
        return torch.autograd.profiler.record_function("stream")

    def wait_stream(self, other):
        FakeStream.waited += 1


@pytest.mark.parametrize("buffers", [False, True], ids=["new tensors", "stream buffers"])
def test_offloaded_weights(model, twin, monkeypatch, buffers):
    """Weights on another device than the input: cpu:0 stands for a GPU, no tensor says it is there."""
    import comfy.model_management
    import comfy.ops
    from comfyui_svdquant.svdq_core.host import ops

    cast, gpu, copies = comfy.ops.cast_bias_weight, torch.device("cpu:0"), []
    with loaded(model, 1) as each:
        wanted = denoised(each)

        def elsewhere(module, **kwargs):
            weight, bias, stream = cast(module, **(kwargs | {"device": gpu}))
            copies.append(weight.data_ptr() != module.weight.data_ptr())
            if hasattr(weight, "_qdata"):
                assert weight._params.scale.data_ptr() != module.weight._params.scale.data_ptr()
            return weight, bias, stream

        monkeypatch.setattr(ops, "cast_bias_weight", elsewhere)
        if buffers:
            monkeypatch.setattr(comfy.model_management, "get_offload_stream", lambda device: FakeStream())
        before = FakeStream.waited
        assert torch.equal(denoised(each), wanted)
        assert copies and all(copies)
        assert (FakeStream.waited - before) == (len(copies) if buffers else 0)
        comfy.model_management.STREAM_CAST_BUFFERS.clear()


@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "int8", "awq"])
@pytest.mark.parametrize("rank", [0, 16])
def test_gather_and_scatter(fmt, rank):
    """ComfyUI's dynamic VRAM copies a weight into one buffer of bytes and takes it apart again."""
    from comfy.memory_management import interpret_gathered_like, tensors_to_geometries, vram_aligned_size
    from comfy.model_management import cast_to_gathered

    weight = make_weight(fmt, rank)
    bias = nn.Parameter(torch.randn(weight.shape[0]).bfloat16(), requires_grad=False)
    buffer = torch.zeros(vram_aligned_size([weight, bias]), dtype=torch.uint8)
    cast_to_gathered([weight, bias], buffer)
    found, found_bias = interpret_gathered_like(tensors_to_geometries([weight, bias]), buffer)
    assert_same_weight(found, weight)
    assert torch.equal(found_bias, bias)
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
    assert all(start <= t.data_ptr() < end for t in tensors_of(found) if t.numel())
    second = torch.zeros_like(buffer)
    cast_to_gathered([weight, bias], buffer, r2=second)
    assert_same_weight(interpret_gathered_like([weight, bias], second)[0], weight)


def make_layer(fmt: str = "int4", rank: int = 16, unsigned: bool = False) -> QuantizedLinear:
    """A layer of 128 inputs and 192 outputs."""
    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(2))
    return small_flux.quantize_layer(weight, weight[:, 0], FORMATS[fmt], unsigned, rank)


def make_weight(fmt: str = "int4", rank: int = 16, dtype: torch.dtype = torch.float32):
    from comfyui_svdquant.svdq_core.host.layout import as_tensor

    return as_tensor(make_layer(fmt, rank), dtype)


def assert_same_weight(found, wanted) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert len(tensors_of(found)) == len(tensors_of(wanted))
    for a, b in zip(tensors_of(found), tensors_of(wanted)):
        assert a.dtype == b.dtype and torch.equal(raw(a), raw(b))


# ---- dynamic VRAM ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(model):
    """One call of the model as normal loading gives it."""
    with loaded(model, 1e30) as each:
        return denoised(each)


def test_dynamic_vram(expected, dynamic_vram, small_flux_files):
    """The first call copies weights in, the second finds them there."""
    model = load(small_flux_files["int4"])
    assert model.is_dynamic()
    layer = model.model.diffusion_model.double_blocks[1].img_mlp[2]
    model.partially_load(model.load_device)
    assert layer._v.numel() >= sum(t.nbytes for t in tensors_of(layer.weight))
    for resident in (False, True):
        assert (layer._v_signature == 1) == resident
        assert torch.equal(denoised(model), expected)
    model.unpatch_model(model.offload_device)
    fixed = model.clone(disable_dynamic=True)  # what TorchCompileModel takes: the file is loaded again
    assert not fixed.is_dynamic() and fixed.model is not model.model
    assert_equal_tensors(quantized_weights(fixed), quantized_weights(model))


# ---- the tensor itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "int8", "awq"])
def test_tensor_operations_keep_all_parts(fmt):
    weight = make_weight(fmt)
    assert_same_weight(weight.clone(), weight)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(tensors_of(weight.clone()), tensors_of(weight)))
    assert_same_weight(weight.to("cpu"), weight)
    assert_same_weight(weight.detach(), weight)
    assert_same_weight(nn.Parameter(weight, requires_grad=False), weight)
    half = weight.to(torch.float16)
    assert half.dtype == torch.float16 and half.dequantize().dtype == torch.float16
    assert_same_weight(half.to(torch.float32), weight)
    empty = torch.empty_like(weight)
    for t in tensors_of(empty):
        t.zero_()
    assert_same_weight(empty.copy_(weight), weight)
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    assert len(parts) == len(tensors_of(weight))
    assert_same_weight(type(weight).__tensor_unflatten__(parts, context, None, None), weight)
    assert weight.t().t()._params.transposed is False
    assert torch.equal(weight.t().dequantize(), weight.dequantize().t())
    with pytest.raises(SVDQuantError, match="SVDQuant Quantize"):
        weight.requantize_from_float(weight.dequantize())


def test_the_layer_of_a_weight_is_kept_while_it_is_the_same(model):
    """And with it what implementations found out about it."""
    from comfyui_svdquant.svdq_core.host.layout import layer_of

    linear = model.model.diffusion_model.single_blocks[0].linear1
    weight, bias = linear.weight, linear.bias
    layer = layer_of(weight, bias)
    assert layer_of(weight, bias) is layer and layer.tensors["weight"] is weight._qdata
    for other in ((weight.clone(), bias), (weight, bias.clone())):
        assert layer_of(*other) is not layer and layer_of(*other).tensors["weight"] is other[0]._qdata
    up, down = torch.ones(linear.out_features, 16), torch.ones(16, linear.in_features)
    wider = torch.addmm(weight, up.bfloat16(), down.bfloat16())
    assert layer_of(wider, bias).rank == layer.rank + 16
    assert layer_of(weight, bias).rank == layer.rank


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "int8", "awq"])
def test_functional_linear(fmt, unsigned):
    """What any code that finds the weight may call, in and out of inference mode, and its gradient."""
    from comfyui_svdquant.svdq_core.host.layout import as_tensor, shift_bias
    from comfyui_svdquant.svdq_core.host.ops import product

    layer = make_layer(fmt, unsigned=unsigned and fmt != "awq")
    weight, x = as_tensor(layer, torch.float32), torch.randn(2, 3, 128)
    wanted, bias = layer.forward(x), layer.bias.float()
    for mode in (True, False):
        with torch.inference_mode(mode), torch.no_grad():
            assert error_db(nn.functional.linear(x, weight, bias), wanted) < -100
            assert error_db(nn.functional.linear(x[0], weight) + bias, wanted[0]) < -100
            assert error_db(torch.addmm(bias, x[0], weight.t()), wanted[0]) < -100
            assert error_db(x[0] @ weight.t() + bias, wanted[0]) < -100
    assert error_db(weight.dequantize(), small_flux.effective(layer)["weight"]) < -100
    shift = shift_bias(weight)
    assert (shift is None) == (not layer.act_unsigned)
    if shift is not None:
        assert error_db(bias + shift, small_flux.effective(layer)["bias"]) < -100
    for linear in (nn.functional.linear, product):
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.randn(5, 128, requires_grad=True)
            linear(x, as_tensor(make_layer(fmt), torch.float32), None).sum().backward()
        assert error_db(x.grad, weight.dequantize().sum(dim=0).expand(5, -1)) < -100


def test_importing_twice_is_safe(host, tmp_path):
    """A second copy of the plugin in custom_nodes registers the layout again; tensors of the first go on."""
    import importlib.util

    from comfyui_svdquant.svdq_core.host import layout

    weight, x = make_weight(), torch.randn(3, 128)
    wanted = nn.functional.linear(x, weight)
    spec = importlib.util.spec_from_file_location("comfyui_svdquant.svdq_core.host.layout_copy", layout.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert torch.equal(nn.functional.linear(x, weight), wanted)
    assert_same_weight(weight.clone(), weight)
    importlib.reload(layout)


# ---- saving ----------------------------------------------------------------------------------------------


def test_model_save(model):
    weights, wanted = quantized_weights(model), sample(model)
    again = load(save(model, "saved"))
    assert_equal_tensors(quantized_weights(again), weights)
    assert_same(sample(again), wanted)


def test_model_save_while_offloaded(model, tmp_path):
    """Then ComfyUI fetches each weight when safetensors asks for it."""
    import comfy.utils

    weights = quantized_weights(model)
    with loaded(model, 1) as each:
        sd = each.state_dict_for_saving()
        lazy = {k: t for k, t in sd.items() if type(t).__name__ == "LazyCastingParamPiece"}
        assert len(lazy) > 10
        comfy.utils.save_torch_file(sd, str(tmp_path / "saved.safetensors"), metadata={})
    assert_equal_tensors(quantized_weights(load(tmp_path / "saved.safetensors")), weights)


def quantized_weights_of(model) -> list[str]:
    return [n for n, m in model.model.diffusion_model.named_modules() if hasattr(getattr(m, "weight", None), "_qdata")]


# ---- torch.compile ---------------------------------------------------------------------------------------


def test_linear_compiles_without_graph_breaks(host):
    from comfyui_svdquant.svdq_core.host.ops import SVDQuantOps

    linear = SVDQuantOps.Linear(128, 192, dtype=torch.float32)
    layer = make_layer(unsigned=True)
    linear.load_state_dict(layer.state_dict())
    compiled = torch.compile(linear, fullgraph=True)
    for tokens in (5, 9):
        x = torch.randn(2, tokens, 128)
        assert error_db(compiled(x), layer.forward(x)) < -30


def test_compiled_model(small_flux_files, tmp_path):
    """The builtin node: as many graph breaks as ComfyUI's own model has, so every one is ComfyUI's."""
    import comfy.sd
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch._dynamo.utils import counters

    sd = small_flux.state_dict(double=1, single=1)
    original = comfy.sd.load_diffusion_model(str(small_flux.write(tmp_path / "16.safetensors", sd, {})))
    model, breaks = load(small_flux.write(tmp_path / "4.safetensors", sd, small_flux.quantize(sd))), []
    for each, backend in ((original, "eager"), (model, "inductor")):
        wanted = sample(each)
        torch.compiler.reset()
        counters.clear()
        found = sample(TorchCompileModel.execute(each, backend).result[0])
        assert counters["stats"]["unique_graphs"] > 0
        breaks.append(sum(counters["graph_break"].values()))
        assert error_db(found, wanted) < -15  # fused arithmetic rounds a few activations another way
    assert breaks[0] == breaks[1]

"""The MLP of a 4-bit model in ComfyUI: one op where nothing sits between, its children where something does.

The kernels run on the CPU, where ComfyUI is in the tests, because SVDQUANT_BACKEND asks for them.
"""

import pytest
import torch
from comfyui_svdquant.svdq_core import backends
from comfyui_svdquant.svdq_core.implementations import FUSED_MLP
from torch import nn

from sampling import denoised, error_db, load, loaded

pytestmark = pytest.mark.usefixtures("host", "cpu_kernels")


@pytest.fixture(scope="module")
def bf16_model(host, small_flux_files):
    return load(small_flux_files["int4"], torch.bfloat16)


@pytest.fixture(autouse=True)
def forced(nothing_remembered, monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "triton-w4a4")


@pytest.fixture
def fused(monkeypatch):
    """The inputs of every fused MLP."""
    calls, run = [], FUSED_MLP.run

    def counted(x, first, second):
        calls.append((tuple(x.shape), first.rank, second.rank))
        return run(x, first, second)

    object.__setattr__(FUSED_MLP, "run", counted)
    yield calls
    object.__setattr__(FUSED_MLP, "run", run)


def mlp_of(model) -> nn.Sequential:
    return model.model.diffusion_model.double_blocks[0].img_mlp


def test_class_and_keys(bf16_model):
    from comfyui_svdquant.svdq_core.host.fuse import MLP

    blocks = bf16_model.model.diffusion_model.double_blocks
    assert all(type(mlp) is MLP for block in blocks for mlp in (block.img_mlp, block.txt_mlp))
    assert "double_blocks.0.img_mlp.0.weight" in bf16_model.model.diffusion_model.state_dict()
    assert [type(module).__name__ for module in mlp_of(bf16_model)] == ["Linear", "GELU", "Linear"]


def test_one_op(bf16_model, fused):
    """Signed into unsigned, as FLUX has it; as close to the children one by one as to plain torch."""
    mlp, x = mlp_of(bf16_model), torch.randn(1, 19, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert mlp[2].weight._params.act_unsigned
    found = mlp(x)
    assert fused[-1] == ((19, 256), 16, 16)
    count = len(fused)
    wanted = nn.Sequential.forward(mlp, x)
    assert len(fused) == count and error_db(found, wanted.double()) < -30
    assert torch.equal(mlp(x[:0]), x[:0]) and len(fused) == count


def test_cpu_and_float32_are_as_before(bf16_model, fused, monkeypatch):
    mlp, x = mlp_of(bf16_model), torch.randn(1, 19, 256)
    assert torch.equal(mlp(x), nn.Sequential.forward(mlp, x))
    monkeypatch.setattr(backends, "FORCED", "")
    assert torch.equal(mlp(x.bfloat16()), nn.Sequential.forward(mlp, x.bfloat16()))
    assert not fused


def between(mlp) -> list:
    """Ways to see or change what is between, each with its undoing."""
    return [
        lambda: mlp[0].register_forward_hook(lambda *_: None).remove,
        lambda: mlp[2].register_forward_pre_hook(lambda *_: None).remove,
        lambda: mlp[1].register_forward_hook(lambda *_: None).remove,
        lambda: patched(mlp[2], "forward", mlp[2].forward),
        lambda: patched(mlp[0], "weight_patch", lambda weight: weight),
        lambda: patched(mlp[0], "weight_function", [lambda weight: weight]),
    ]


def patched(module, name: str, value):
    before = vars(module).get(name, nn)
    setattr(module, name, value)

    def undo():
        delattr(module, name) if before is nn else setattr(module, name, before)

    return undo


@pytest.mark.parametrize("which", range(6))
def test_what_sits_between_is_respected(bf16_model, fused, which):
    mlp, x = mlp_of(bf16_model), torch.randn(1, 3, 256).bfloat16()
    undo = between(mlp)[which]()
    mlp(x)
    assert not fused
    undo()
    mlp(x)
    assert fused


def test_lora_on_the_branch_is_fused_and_others_are_not(bf16_model, fused):
    from comfy.weight_adapter.lora import LoRAAdapter
    from comfy.weight_adapter.oft import OFTAdapter

    mlp, x = mlp_of(bf16_model), torch.randn(1, 19, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    lora = LoRAAdapter(set(), (torch.randn(256, 8) / 8, torch.randn(8, 1024) / 32, None, None, None, None))
    rotation = OFTAdapter(set(), (torch.randn(4, 64, 64) / 64, None, None, None))
    plain = mlp(x)
    try:
        mlp[2].set_patches("w", [(0.8, lora, 1.0, None, None)], x)
        with_lora = mlp(x)
        assert fused[-1] == ((19, 256), 16, 32)  # 8, and zeros up to 16
        assert error_db(with_lora, nn.Sequential.forward(mlp, x).double()) < -30 < error_db(with_lora, plain.double())
        count = len(fused)
        mlp[2].set_patches("w", [(0.8, rotation, 1.0, None, None)], x)
        assert torch.equal(mlp(x), nn.Sequential.forward(mlp, x)) and len(fused) == count
    finally:
        mlp[2].drop_adapters()


def test_whole_model(bf16_model, fused, monkeypatch):
    """Every double block's MLPs, and the result of plain torch but for the rounding of bf16."""
    with loaded(bf16_model, 1e30) as each:
        found = denoised(each)
        assert len(set(fused)) == 3 and len(fused) >= 5  # image, text, and the check
        monkeypatch.setattr(backends, "FORCED", "")
        assert error_db(found, denoised(each).double()) < -15


def test_compiles_without_graph_breaks(bf16_model, fused):
    mlp = mlp_of(bf16_model)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(1, tokens, 256).bfloat16()
        assert torch.equal(compiled(x), mlp(x))
    assert fused

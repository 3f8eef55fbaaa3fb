"""What the tests of the runtime share: sampling in a real ComfyUI in this process, and comparing results."""

from pathlib import Path

import torch
from torch import Tensor

import small_flux

STEPS, TOKENS = 2, 7


def load(path: Path, dtype: torch.dtype | None = None):
    from comfyui_svdquant.svdq_core.host.load import load_svdquant

    return load_svdquant(path, dtype)


def conditioning(length: int = TOKENS, seed: int = 0, width: int = small_flux.CONTEXT, **more) -> list:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, length, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, small_flux.POOLED, generator=generator), **more}]]


def sample(model, steps=STEPS, cfg=1.0, positive=None, negative=None, latent=None, denoise=1.0, batch=1) -> Tensor:
    """What KSampler returns for a 64×64 picture (4×4 image tokens)."""
    import nodes

    latent = torch.zeros(batch, 16, 8, 8) if latent is None else latent
    (out,) = nodes.common_ksampler(
        model,
        1,
        steps,
        cfg,
        "euler",
        "simple",
        positive or conditioning(),
        negative or conditioning(seed=1),
        {"samples": latent},
        denoise=denoise,
    )
    return out["samples"]


def error_db(found: Tensor, wanted: Tensor) -> float:
    return float(10 * ((found.double() - wanted).square().sum() / wanted.double().square().sum()).log10())


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Equal up to the order of float32 additions."""
    assert error_db(found, wanted) < -70


def quantized_weights(model) -> dict[str, Tensor]:
    """A copy of everything in the quantized weights of a loaded model."""
    weights = {}
    for name, module in model.model.diffusion_model.named_modules():
        if hasattr(getattr(module, "weight", None), "_qdata"):
            weight = module.weight
            weights |= {f"{name}.{i}": t.clone() for i, t in enumerate(weight.layout_cls.get_plain_tensors(weight))}
    return weights


def assert_equal_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(raw(found[key]), raw(tensor)), key


def raw(tensor: Tensor) -> Tensor:
    """The bytes: torch.equal does not take float8."""
    return tensor.reshape(-1).view(torch.uint8)


class loaded:
    """A patcher loaded with a given amount of memory for weights, outside ComfyUI's bookkeeping."""

    def __init__(self, patcher, memory: float):
        import comfy.model_management

        comfy.model_management.unload_all_models()
        self.patcher, self.memory = patcher, memory

    def __enter__(self):
        self.patcher.patch_model(self.patcher.load_device, lowvram_model_memory=self.memory)
        return self.patcher

    def __exit__(self, *exc):
        self.patcher.detach()


def denoised(patcher) -> Tensor:
    """One call of the loaded model."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    ((context, extra),) = conditioning()
    t = torch.tensor([0.6])
    return patcher.model.apply_model(x, t, c_crossattn=context, y=extra["pooled_output"])


def tensors_of(weight) -> tuple[Tensor, ...]:
    return weight.layout_cls.get_plain_tensors(weight)


def save(model, name: str) -> Path:
    """ModelSave's file."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    ModelSave().save(model, name)
    return Path(folder_paths.get_output_directory()) / f"{name}_00001_.safetensors"

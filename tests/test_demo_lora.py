"""The trained LoRAs on the demo model: as faithful on the branch of the 4-bit model as that model is."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from host.install import ROOT
from sampling import error_db, loaded, sample

DEMO = ROOT / "examples" / "demo"
PROMPTS = (
    "large white ring on red",
    "large orange triangle on purple",
    "large blue diamond on black",
    "pink star on green",
)
NOISE_DB = -26.0


class Models:
    """The demo model in this process, in 16 and 4 bit, with its two LoRAs."""

    def __init__(self, quantized: Path):
        import comfy.sd
        from comfyui_svdquant.svdq_core.host.load import load_svdquant

        self.sixteen = comfy.sd.load_diffusion_model(str(DEMO / "models" / "demo_flux.safetensors"))
        self.four = load_svdquant(quantized)

    def with_loras(self, model, strengths: dict[str, float]):
        import comfy.sd
        import comfy.utils

        for name, strength in strengths.items():
            lora = comfy.utils.load_torch_file(str(DEMO / "models" / f"demo_lora_{name}.safetensors"))
            model = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
        return model

    def latents(self, strengths: dict[str, float]) -> list[Tensor]:
        """What the 16-bit model makes of each prompt."""
        model = self.with_loras(self.sixteen, strengths)
        empty = torch.zeros(1, 16, 16, 16)
        return [
            sample(model, steps=8, cfg=3.0, positive=encoded(text), negative=encoded(""), latent=empty)
            for text in PROMPTS
        ]

    def velocities(self, model, strengths: dict[str, float], latents: list[Tensor]) -> Tensor:
        """One call of the model per prompt and noise level, on the 16-bit model's own pictures."""
        model = self.with_loras(model, strengths)
        generator, out = torch.Generator().manual_seed(0), []
        with loaded(model, 1e30):
            for text, latent in zip(PROMPTS, latents):
                ((context, extra),) = encoded(text)
                for t in (0.95, 0.8, 0.6, 0.4, 0.2):
                    x = (1 - t) * latent + t * torch.randn(latent.shape, generator=generator)
                    x0 = model.model.apply_model(x, torch.tensor([t]), c_crossattn=context, y=extra["pooled_output"])
                    out.append((x - x0) / t)
        return torch.cat(out)

    def errors(self, strengths: dict[str, float]) -> tuple[float, float]:
        """dB of the 4-bit model, and of the 16-bit one with noise of -26 dB added to the output of every linear."""
        latents = self.latents(strengths)
        exact = self.velocities(self.sixteen, strengths, latents)
        four = self.velocities(self.four, strengths, latents)
        with ExitStack() as hooks:
            for name, module in self.sixteen.model.diffusion_model.named_modules():
                if isinstance(module, torch.nn.Linear) and "_blocks" in name and "mod" not in name:
                    hooks.callback(module.register_forward_hook(add_noise).remove)
            noisy = self.velocities(self.sixteen, strengths, latents)
        return error_db(four, exact), error_db(noisy, exact)


def add_noise(module, args, y: Tensor) -> Tensor:
    rms = y.square().mean(dim=-1, keepdim=True).sqrt()
    return y + torch.randn(y.shape, generator=torch.Generator().manual_seed(y.numel())) * rms * 10 ** (NOISE_DB / 20)


def encoded(text: str) -> list:
    import text as demo_text  # the demo's text encoder

    context, pooled = demo_text.encode(demo_text.tokenize(text))
    return [[context, {"pooled_output": pooled}]]


@pytest.fixture(scope="module")
def models(demo_quantized, host):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        yield Models(demo_quantized.base / "models" / "diffusion_models" / "demo_balanced.safetensors")


@pytest.fixture(scope="module")
def without_lora(models) -> tuple[float, float]:
    return models.errors({})


@pytest.mark.parametrize("style", ["neon", "sticker"])
@pytest.mark.parametrize("strength", [-1.0, 0.5, 1.0, 1.5])
def test_lora_is_as_faithful_as_the_model(models, without_lora, style, strength):
    """Within 0.5 dB of the 4-bit model without a LoRA, beyond what the LoRA makes of the model itself.

    These LoRAs are strong (up to 60 % of a weight's norm). With some, equal noise in every linear of the 16-bit model
    is worse for its result than without a LoRA, too; that much is not the 4 bits' fault.
    """
    four, noisy = models.errors({style: strength})
    more_sensitive = max(0.0, noisy - without_lora[1])
    assert four < without_lora[0] + more_sensitive + 0.5
    assert without_lora[0] < -19 and four < -17


def test_both_loras_are_as_faithful_as_the_model(models, without_lora):
    four, noisy = models.errors({"neon": 0.5, "sticker": 0.5})
    assert four < without_lora[0] + max(0.0, noisy - without_lora[1]) + 0.5 and four < -17


def test_strength_zero_and_removal_are_bit_equal(models):
    latents = models.latents({})
    plain = models.velocities(models.four, {}, latents)
    patched = models.velocities(models.four, {"neon": 1.0}, latents)
    zero = models.with_loras(models.four, {"neon": 1.0, "sticker": 1.0})
    zero.patches = {key: [(0.0, *patch[1:]) for patch in patches] for key, patches in zero.patches.items()}
    assert error_db(patched, plain) > -20
    assert torch.equal(models.velocities(zero, {}, latents), plain)
    assert torch.equal(models.velocities(models.four, {}, latents), plain)

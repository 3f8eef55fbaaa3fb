"""ComfyUI's ModelPatcher for a 4-bit model: patches of quantized weights stay beside the codes.

Everything that nodes and third parties rely on is ComfyUI's own: ``add_patches`` collects patches, clones carry
them, hooks schedule them. Only what loading does with a patch of a quantized weight differs: ComfyUI would
dequantize, add and requantize; here the linear gets the patch as an adapter. So a LoRA is attached, changed or
removed without moving a weight.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher, ModelPatcherDynamic, get_key_weight
from comfy.utils import set_attr_param
from torch import Tensor

from .adapters import REDUCED_RANK, Patch, fits_beside
from .ops import DISK_NAMES, Linear

MODEL = "diffusion_model."


class BesidePatcher(ModelPatcher):
    """The part that ComfyUI's two patchers, with and without dynamic VRAM, have in common."""

    patches: dict[str, list[Patch]]
    patches_uuid: Any

    def quantized_linear(self, key: Any) -> Linear | None:
        """The linear whose 4-bit weight has this key."""
        if not isinstance(key, str) or not key.startswith(MODEL) or not key.endswith(".weight"):
            return None
        try:
            module = self.model.get_submodule(key.removesuffix(".weight"))
        except AttributeError:
            return None
        return module if isinstance(module, Linear) and module.quantized else None

    def stays_beside(self, key: str) -> bool:
        """Whether all patches of a key stay beside a 4-bit weight."""
        patches = self.patches.get(key, ())
        return bool(patches) and self.quantized_linear(key) is not None and all(map(fits_beside, patches))

    @contextmanager
    def ordinary_patches(self) -> Iterator[None]:
        """Within, ``patches`` has those alone that change weights in ComfyUI's way."""
        patches = self.patches
        self.patches = {key: p for key, p in patches.items() if not self.stays_beside(key)}
        try:
            yield
        finally:
            self.patches = patches

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        """As in ComfyUI; but the weights count as changed only where one has to change."""
        before = self.patches_uuid
        added = super().add_patches(patches, strength_patch, strength_model)
        if all(self.stays_beside(key if isinstance(key, str) else key[0]) for key in added):
            self.patches_uuid = before
        return added

    def clone_has_same_weights(self, clone: Any, allow_multigpu: bool = False) -> Any:
        same = super().clone_has_same_weights(clone, allow_multigpu)
        return same and signatures(self.patches) == signatures(clone.patches)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return adopt(super().clone(*args, **kwargs))  # ComfyUI names its own class for a non-dynamic delegate

    def memory_required(self, input_shape: Any) -> Any:
        """What sampling takes beside the weights: the adapters, too."""
        beside = {key: p for key, p in self.patches.items() if self.stays_beside(key)}
        adapters = sum(LowVramPatch(key, beside).memory_required() for key in beside)
        return super().memory_required(input_shape) + adapters

    def attach(self, extra: dict[str, list[Patch]]) -> None:
        """Give every quantized linear its adapters: this patcher's patches, then ``extra`` ones (from hooks)."""
        device, dtype = torch.device(self.load_device), self.model.get_dtype_inference()
        like = torch.empty(0, device=device, dtype=dtype)
        reduced = []
        for name, module in self.model.named_modules():
            if isinstance(module, Linear) and module.quantized:
                key = f"{name}.weight"
                patches = [*self.patches.get(key, ()), *extra.get(key, ())]
                module.set_patches(key, patches if all(map(fits_beside, patches)) else [], like)
                if module.adapters is not None and module.adapters.energy < 1:
                    reduced.append((module.adapters.energy, name))
        if reduced:
            energy, name = min(reduced)
            logging.warning(
                "SVDQuant: %d full-size differences are used as LoRAs of rank %d. The least faithful, %s, keeps "
                "%.1f %% of its energy.", len(reduced), REDUCED_RANK, name, 100 * energy,
            )  # fmt: skip

    def patch_model(self, *args: Any, **kwargs: Any) -> Any:
        """Called whenever this patcher's model is about to be used: its adapters take the place of others'."""
        self.attach({})
        return super().patch_model(*args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights:
            for module in self.model.modules():
                if isinstance(module, Linear):
                    module.drop_adapters()
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        with self.ordinary_patches():
            return super().load(*args, **kwargs)

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> Any:
        if not force_patch_weights:
            self.exchange_patches(device_to)
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)

    def exchange_patches(self, device_to: Any) -> None:
        """Other patches of 16-bit weights in a loaded model: ComfyUI would move the whole model out and in again."""
        loaded = self.model.current_weight_patches_uuid
        wanted = [key for key in self.patches if not self.stays_beside(key)]
        if loaded in (None, self.patches_uuid) or self.model.model_lowvram or self.is_dynamic():
            return
        if any(self.quantized_linear(key) for key in (*self.backup, *wanted)):  # merges change how much memory is used
            return
        for key in list(self.backup):
            before = self.backup.pop(key)
            set_attr_param(self.model, key, before.weight.to(device_to))
        for key in wanted:
            self.patch_weight_to_device(key, device_to)
        self.model.current_weight_patches_uuid = self.patches_uuid

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        with self.ordinary_patches():
            return super().partially_unload(*args, **kwargs)

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if self.stays_beside(key):
            return get_key_weight(self.model, key)[0]
        return super().patch_weight_to_device(key, *args, **kwargs)

    def patch_hooks(self, hooks: Any) -> None:
        """Scheduled LoRAs: adapters that come and go between steps."""
        super().patch_hooks(hooks)
        self.attach(self.get_combined_hook_patches(hooks))

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict[str, list[Patch]], key: str, *args: Any, **kwargs: Any
    ) -> None:
        patches = [*self.patches.get(key, ()), *combined_patches.get(key, ())]
        if self.quantized_linear(key) is None or not all(map(fits_beside, patches)):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, Tensor]:
        """Adapters are saved, too: low rank as a wider branch, anything else in a layer of 16 bit."""
        model = model or self.model
        state_dict = super().model_state_dict_for_saving(model, prefix)
        for name, module in model.named_modules():
            if isinstance(module, Linear) and module.adapters is not None:
                wider = module.wider_branch()
                if wider is None:
                    wider = module.merged()
                    for disk_name in DISK_NAMES:
                        state_dict.pop(f"{name}.{disk_name}", None)
                state_dict.update({f"{name}.{key}": tensor for key, tensor in wider.items()})
        return state_dict


class BesideDynamicPatcher(BesidePatcher, ModelPatcherDynamic):
    """With dynamic VRAM."""

    def load(self, *args: Any, dirty: bool = False, **kwargs: Any) -> Any:
        """Other patches make ComfyUI copy all weights in again; only those that are patched need it."""
        if dirty:
            patched = {key for key in self.patches if not self.stays_beside(key)}
            for name, module in self.model.named_modules():
                before = [getattr(module, f"{p}_lowvram_function", None) for p in ("weight", "bias")]
                if any(before) or {f"{name}.weight", f"{name}.bias"} & patched:
                    module._v_signature = None
        return super().load(*args, dirty=False, **kwargs)


def adopt(patcher: ModelPatcher) -> BesidePatcher:
    """The patcher that ComfyUI made, as ours."""
    patcher.__class__ = BesideDynamicPatcher if patcher.is_dynamic() else BesidePatcher
    return patcher


def signatures(patches: dict[str, list[Patch]]) -> dict[str, list[Any]]:
    """What makes patches the same, without comparing tensors."""
    return {key: [(p[0], id(p[1]), p[2], p[3]) for p in values] for key, values in patches.items()}

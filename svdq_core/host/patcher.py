"""ComfyUI's ModelPatcher for a 4-bit model: patches of quantized weights stay beside the codes.

Everything that nodes and third parties rely on is ComfyUI's own: ``add_patches`` collects patches, clones carry
them, hooks schedule them. Only what loading does with a patch of a quantized weight differs: ComfyUI would
dequantize, add and requantize; here the linear gets the patch as an adapter. So a LoRA is attached, changed or
removed without moving a weight.
"""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic, get_key_weight
from comfy.patcher_extension import CallbacksMP
from comfy.utils import set_attr_param
from torch import Tensor

from .adapters import REDUCED_RANK, Patch, fits_beside, signature
from .ops import DISK_NAMES, Linear

HOOKED = 4  # sets of adapters kept while hooks take turns
WORTH_TELLING = 0.9995  # share of energy below which a reduction is logged


class BesidePatcher(ModelPatcher):
    """The part that ComfyUI's two patchers, with and without dynamic VRAM, have in common.

    ``model.quantized_linears`` has the linears with 4-bit weights by the weight's key. The names of modules do not
    do: nodes that compile blocks put wrappers between them.
    """

    patches: dict[str, list[Patch]]
    patches_uuid: Any

    def beside(self, key: str, extra: dict[str, list[Patch]]) -> list[Patch]:
        """This patcher's patches of a 4-bit weight, then ``extra`` ones (from hooks), if all of them stay beside it."""
        patches = [*self.patches.get(key, ()), *extra.get(key, ())]
        return patches if key in self.model.quantized_linears and all(map(fits_beside, patches)) else []

    def stays_beside(self, key: str) -> bool:
        """Whether a key has patches, and all stay beside a 4-bit weight."""
        return bool(self.beside(key, {}))

    def ordinary(self) -> dict[str, list[Patch]]:
        """The patches that change weights in ComfyUI's way."""
        return {key: patches for key, patches in self.patches.items() if not self.stays_beside(key)}

    @contextmanager
    def ordinary_patches(self) -> Iterator[None]:
        """Within, ``patches`` has the ordinary ones alone."""
        patches = self.patches
        self.patches = self.ordinary()
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
        if signatures(self.patches) != signatures(clone.patches):
            return False
        return super().clone_has_same_weights(clone, allow_multigpu)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return adopt(super().clone(*args, **kwargs))  # ComfyUI names its own class for a non-dynamic delegate

    # Adapters

    def attach(self, extra: dict[str, list[Patch]], keep: int = 1) -> int:
        """Give every quantized linear its adapters, those for ``extra`` patches (from hooks) included.

        The last ``keep`` sets of each stay at hand. Returns the bytes that the adapters in use take. If memory runs
        out, all are dropped.
        """
        try:
            return self.attach_all(extra, keep)
        except Exception:
            self.drop_adapters()
            raise

    def attach_all(self, extra: dict[str, list[Patch]], keep: int) -> int:
        dtype = self.get_model_object("manual_cast_dtype") or self.model.get_dtype()
        like = torch.empty(0, device=self.load_device, dtype=dtype)
        reduced, size = [], 0
        for key, linear in self.model.quantized_linears.items():
            made = linear.set_patches(key, self.beside(key, extra), like, keep)
            if linear.adapters is not None:
                size += linear.adapters.nbytes
                if made and linear.adapters.energy < WORTH_TELLING:
                    reduced.append((linear.adapters.energy, key))
        if reduced:
            energy, key = min(reduced)
            logging.warning(
                "SVDQuant: %d full-size differences are used as LoRAs of rank %d. The least faithful, %s, keeps "
                "%.1f %% of its energy.", len(reduced), REDUCED_RANK, key, 100 * energy,
            )  # fmt: skip
        return size

    def drop_adapters(self) -> None:
        """Free the memory of all adapters."""
        for linear in self.model.quantized_linears.values():
            linear.drop_adapters()

    def patch_model(self, *args: Any, **kwargs: Any) -> Any:
        """Called whenever this patcher's model is about to be used: its adapters take the place of others'."""
        self.attach({})
        return super().patch_model(*args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights:
            self.drop_adapters()
        return super().unpatch_model(device_to, unpatch_weights)

    def patch_hooks(self, hooks: Any) -> None:
        """Scheduled LoRAs: adapters that come and go between steps, and between prompts in a step."""
        super().patch_hooks(hooks)
        self.attach(self.get_combined_hook_patches(hooks), keep=HOOKED)

    def clear_cached_hook_weights(self) -> None:
        """After sampling."""
        super().clear_cached_hook_weights()
        self.attach({})

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict[str, list[Patch]], key: str, *args: Any, **kwargs: Any
    ) -> None:
        if not self.beside(key, combined_patches):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    # Loading

    def load(self, *args: Any, **kwargs: Any) -> Any:
        with self.ordinary_patches():
            loaded = super().load(*args, **kwargs)
        self.model.loaded_with = self.loading_state()
        return loaded

    def loading_state(self) -> tuple[Any, ...]:
        """What else than patches decides how weights are loaded."""
        return dict(self.weight_wrapper_patches), self.force_cast_weights

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> Any:
        """The adapters take their memory first; weights get what is left."""
        linears = self.model.quantized_linears
        if not any(key in linears for key in self.backup):  # a merge is undone first
            before = sum(a.nbytes for linear in linears.values() if (a := linear.adapters))
            extra_memory -= self.attach({}) - before
        if not force_patch_weights:
            self.exchange_patches(device_to)
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)

    def exchange_patches(self, device_to: Any) -> None:
        """Other patches of 16-bit weights in a loaded model: ComfyUI would move the whole model out and in again."""
        model, loaded = self.model, self.model.current_weight_patches_uuid
        if loaded in (None, self.patches_uuid) or model.model_lowvram or self.is_dynamic():
            return
        if self.loading_state() != model.loaded_with or self.get_all_callbacks(CallbacksMP.ON_LOAD):
            return
        wanted = self.ordinary()
        if any(key in model.quantized_linears for key in (*self.backup, *wanted)):
            return  # merges change how much memory the weights take
        model.current_weight_patches_uuid = uuid.uuid4()  # nobody's, until all are done
        for key, before in list(self.backup.items()):
            set_attr_param(model, key, before.weight.to(device_to))
            del self.backup[key]
        for key in wanted:
            self.patch_weight_to_device(key, device_to)
        model.current_weight_patches_uuid = self.patches_uuid

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        with self.ordinary_patches():
            return super().partially_unload(*args, **kwargs)

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if self.stays_beside(key):
            return get_key_weight(self.model, key)[0]
        return super().patch_weight_to_device(key, *args, **kwargs)

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, Tensor]:
        """Adapters are saved, too: low rank as a wider branch, anything else in a layer of 16 bit."""
        state_dict = super().model_state_dict_for_saving(model, prefix)
        for name, module in (model or self.model).named_modules():
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
            patched = self.ordinary().keys()
            for name, module in self.model.named_modules():
                before = [getattr(module, f"{p}_lowvram_function", None) for p in ("weight", "bias")]
                if any(before) or {f"{name}.weight", f"{name}.bias"} & patched:
                    module._v_signature = None
        return super().load(*args, dirty=False, **kwargs)


def adopt(patcher: ModelPatcher) -> BesidePatcher:
    """The patcher that ComfyUI made, as ours."""
    patcher.__class__ = BesideDynamicPatcher if patcher.is_dynamic() else BesidePatcher
    if not hasattr(patcher.model, "quantized_linears"):
        patcher.model.loaded_with = None
        patcher.model.quantized_linears = {
            f"{name}.weight": module
            for name, module in patcher.model.named_modules()
            if isinstance(module, Linear) and module.quantized
        }
    return patcher


def signatures(patches: dict[str, list[Patch]]) -> dict[str, tuple[Any, ...]]:
    """:func:`signature` by key."""
    return {key: signature(values) for key, values in patches.items()}

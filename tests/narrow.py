"""Small models of ComfyUI's classes: widths that ComfyUI takes for granted are read from the file, as others are."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

Z_IMAGE = {
    "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip

LUMINA2 = {
    "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
}  # fmt: skip


def widths(model: str, sd: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What ComfyUI's config of a ``model`` lacks."""

    def shape(layer: str) -> tuple[int, ...]:
        return tuple(sd[f"{prefix}{layer}.weight"].shape)

    if model == "chroma":
        net = "distilled_guidance_layer"
        return {"out_dim": shape(f"{net}.out_proj")[0], "hidden_dim": shape(f"{net}.in_proj")[0]}
    if model == "qwen_image":
        return {"num_attention_heads": shape("img_in")[0] // 128, "joint_attention_dim": shape("txt_in")[1]}
    if model == "lumina2":
        z_image = f"{prefix}layers.0.adaLN_modulation.0.weight" in sd
        dim, head = shape("x_embedder")[0], 128 if z_image else 96
        kv = (shape("layers.0.attention.qkv")[0] - dim) // 2
        return {"n_heads": dim // head, "n_kv_heads": kv // head, **(Z_IMAGE if z_image else LUMINA2)}
    if model == "hunyuan_video" and f"{prefix}vector_in.in_layer.weight" in sd:
        return {"vec_in_dim": shape("vector_in.in_layer")[1]}
    if model == "anima":
        text = shape("blocks.0.cross_attn.k_proj")[1]
        blocks = len({key.split(".")[1] for key in sd if key.startswith(f"{prefix}blocks.")})
        return {"num_blocks": blocks, "num_heads": shape("x_embedder.proj.1")[0] // 128, "crossattn_emb_channels": text}
    return {"text_dim": shape("text_embedding.0")[1]} if model == "wan2.1" else {}


@contextmanager
def read_widths() -> Iterator[None]:
    """Within it ComfyUI's detection knows them."""
    import comfy.ldm.anima.model as anima
    import comfy.model_detection as detection

    comfyuis, adapter = detection.detect_unet_config, anima.LLMAdapter

    def detect(sd: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> Any:
        found = comfyuis(sd, prefix, *args, **kwargs)
        return found and found | widths(found.get("image_model", ""), sd, prefix)

    detection.detect_unet_config = detect
    anima.LLMAdapter = partial(adapter, 128, 128, 128, num_layers=1, num_heads=2)
    try:
        yield
    finally:
        detection.detect_unet_config, anima.LLMAdapter = comfyuis, adapter

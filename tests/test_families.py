"""Families besides FLUX.1: small random models of ComfyUI's own classes, quantized, loaded, sampled, with LoRAs.

ComfyUI takes some widths of these classes for granted; here it reads them from the file (`narrow.py`).
"""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_svdquant.svdq_core.checkpoint import describe_file, read_checkpoint
from comfyui_svdquant.svdq_core.dialects import DIFFUSERS_Z_IMAGE, renamed_by
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from comfyui_svdquant.svdq_core.families import (
    ANIMA,
    CHROMA,
    FLUX2,
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO15,
    KREA2,
    LTXAV,
    LTXAV23,
    LTXV,
    LUMINA2,
    QWEN_IMAGE,
    RECIPES,
    RELEASES,
    SD3,
    WAN,
    WAN_I2V,
    WAN_VACE,
    Z_IMAGE,
    facts_of,
    plan_model,
)
from comfyui_svdquant.svdq_core.recipes import W4A4, W4A16, W8A8, Recipe
from safetensors.torch import save_file
from torch import Tensor

import narrow
import small_flux
from host.prompts import run, template_up_to_the_vae
from host.server import ComfyServer
from narrow import read_widths
from sampling import assert_same, conditioning, error_db, load, sample
from test_quantize_node import graph

WIDTH, GUIDANCE, TEXT = 256, 64, small_flux.CONTEXT


@dataclass(frozen=True)
class Family:
    """``kept`` are the names of what stays in 16 bit."""

    recipe: Recipe
    make: Callable[[], dict[str, Tensor]]
    blocks: tuple[int, ...]
    layers: int
    after_gelu: int
    kept: set[str]
    lora: dict[str, str]  # a key in some trainer's dialect, and its layer
    kinds: set[str] = field(default_factory=lambda: {W4A4})
    sliced: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows of the layer, where not all
    width: int = WIDTH
    text: int = TEXT
    options: dict[str, Any] = field(default_factory=dict)  # what its text encoder gives besides
    config: dict[str, Any] = field(default_factory=dict)  # in the metadata of its files
    latent: tuple[int, ...] = (1, 16, 8, 8)

    def save(self, path: Path) -> None:
        save_file(self.make(), path, {"config": json.dumps({"transformer": self.config})} if self.config else None)


def random_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of sensible sizes for a model of ComfyUI's, on the meta device."""
    sd, other = small_flux.Weights(0, torch.bfloat16), small_flux.Weights(1, torch.bfloat16)
    for key, tensor in model.state_dict().items():
        name, _, end = key.rpartition(".")
        if tensor.dim() == 2 and end == "weight":
            sd.linear(name, *tensor.shape, bias=False)
            continue
        noise = torch.randn(tensor.shape, generator=other.generator) * 0.1
        sd[key] = (noise + 1 if tensor.dim() == 1 and end == "weight" else noise).to(tensor.dtype)
    return sd


def in_float32(sd: dict[str, Tensor], first: str) -> dict[str, Tensor]:
    """The first layer, a convolution, as ComfyUI loads it where it computes in float32, on a CPU."""
    return sd | {key: t.float() for key, t in sd.items() if key.startswith(first)}


def meta(cls: type[torch.nn.Module], **config: Any) -> torch.nn.Module:
    import comfy.ops

    return cls(**config, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)


def random_hunyuan(axes: list[int], single: int = 1, **config: Any) -> dict[str, Tensor]:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    known = {"in_channels": 64, "out_channels": 64, "vec_in_dim": None, "vision_in_dim": None, "guidance_embed": False}
    known |= {"context_in_dim": TEXT, "hidden_size": WIDTH, "num_heads": 2, "depth": 1, "depth_single_blocks": single}
    known |= {"axes_dim": axes, "patch_size": [1] * len(axes), "mlp_ratio": 4.0, "theta": 256, "qkv_bias": True}
    known |= dict.fromkeys(("byt5", "meanflow", "use_cond_type_embedding", "meanflow_sum"), False)
    return in_float32(random_weights(meta(HunyuanVideo, **known | config)), "img_in.")


def random_hunyuan_video() -> dict[str, Tensor]:
    config = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": small_flux.POOLED}
    return random_hunyuan([16, 56, 56], guidance_embed=True, **config)


def random_hunyuan_video15() -> dict[str, Tensor]:
    """Without single blocks, as published. Its channels for a first picture stay empty here."""
    config = {"in_channels": 65, "out_channels": 32, "vision_in_dim": 1152, "use_cond_type_embedding": True}
    return random_hunyuan([16, 56, 56], single=0, meanflow_sum=True, **config)


def random_qwen_image() -> dict[str, Tensor]:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    edit_2511 = {"default_ref_method": "index_timestep_zero"}  # an empty tensor's name is all that tells it
    config = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": TEXT}
    return random_weights(meta(QwenImageTransformer2DModel, **config, **edit_2511))


def random_z_image() -> dict[str, Tensor]:
    from comfy.ldm.lumina.model import NextDiT

    config = {"in_channels": 16, "dim": WIDTH, "cap_feat_dim": TEXT, "n_layers": 2, "qk_norm": True}
    return random_weights(meta(NextDiT, n_heads=2, n_kv_heads=2, **config, **narrow.Z_IMAGE))


def random_lumina2() -> dict[str, Tensor]:
    """Fewer keys and values than queries, as published."""
    from comfy.ldm.lumina.model import NextDiT

    config = {"in_channels": 16, "dim": 192, "cap_feat_dim": TEXT, "n_layers": 1, "qk_norm": True}
    return random_weights(meta(NextDiT, n_heads=2, n_kv_heads=1, **config, **narrow.LUMINA2))


def random_wan(model_type: str, channels: int = 16) -> dict[str, Tensor]:
    """Its first layer is in float32, as ComfyUI has it."""
    from comfy.ldm.wan.model import WanModel

    config = {"dim": WIDTH, "ffn_dim": 2 * WIDTH, "num_heads": 2, "num_layers": 2, "text_dim": TEXT}
    return random_weights(meta(WanModel, model_type=model_type, in_dim=channels, **config))


def random_vace() -> dict[str, Tensor]:
    from comfy.ldm.wan.model import VaceWanModel

    config = {"dim": WIDTH, "ffn_dim": 2 * WIDTH, "num_heads": 2, "num_layers": 2, "text_dim": TEXT}
    return random_weights(meta(VaceWanModel, vace_layers=1, vace_in_dim=96, **config))


LTX = {"num_attention_heads": 2, "attention_head_dim": 128, "caption_channels": TEXT, "cross_attention_dim": WIDTH}


def random_ltxv() -> dict[str, Tensor]:
    from comfy.ldm.lightricks.model import LTXVModel

    return random_weights(meta(LTXVModel, num_layers=2, **LTX))


LTX2 = LTX | {"audio_num_attention_heads": 2, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 128}
LTX2 |= {"connector_num_attention_heads": 1, "connector_attention_head_dim": TEXT}
LTX23 = LTX2 | {"caption_proj_before_connector": True, "caption_projection_first_linear": False}
LTX23 |= {"cross_attention_adaln": True, "apply_gated_attention": True, "connector_num_attention_heads": 2}
LTX23 |= {"audio_connector_num_attention_heads": 1}


def random_ltx2(config: dict[str, Any]) -> dict[str, Tensor]:
    from comfy.ldm.lightricks.av_model import LTXAVModel

    return random_weights(meta(LTXAVModel, num_layers=1, **config))


def random_krea2() -> dict[str, Tensor]:
    from comfy.ldm.krea2.model import SingleStreamDiT

    return random_weights(meta(SingleStreamDiT, features=WIDTH, heads=2, kvheads=1, layers=1, txtdim=40))


def random_anima() -> dict[str, Tensor]:
    from comfy.ldm.anima.model import Anima

    config = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16}
    config |= {"model_channels": WIDTH, "num_blocks": 1, "num_heads": 2, "crossattn_emb_channels": TEXT}
    config |= {"patch_spatial": 2, "patch_temporal": 1, "pos_emb_cls": "rope3d", "use_adaln_lora": True}
    return random_weights(meta(Anima, **config))


def random_sd3() -> dict[str, Tensor]:
    """As many heads of 64 as blocks, as published; the first looks at the picture twice."""
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    text = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128}}
    config = {"in_channels": 16, "depth": 2, "adm_in_channels": small_flux.POOLED, "context_embedder_config": text}
    config |= {"num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms", "x_block_self_attn_layers": [0]}
    return in_float32(random_weights(meta(MMDiT, input_size=None, **config)), "x_embedder.")


FAMILIES = [
    Family(
        FLUX2,
        small_flux.random_flux2,
        blocks=(1, 2),
        layers=12,
        after_gelu=0,
        kept={"img_in", "txt_in", "time_in", "guidance_in", "final_layer", "single_stream_modulation"}
        | {f"double_stream_modulation_{stream}" for stream in ("img", "txt")},
        lora={
            "transformer.transformer_blocks.0.attn.to_k": "double_blocks.0.img_attn.qkv",
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": "single_blocks.0.linear1",
            "base_model.model.double_blocks.0.txt_mlp.0": "double_blocks.0.txt_mlp.0",
            "single_blocks.1.linear2": "single_blocks.1.linear2",
            "lora_unet_double_blocks_0_img_mlp_2": "double_blocks.0.img_mlp.2",
        },
        sliced={"transformer.transformer_blocks.0.attn.to_k": (WIDTH, 2 * WIDTH)},
        latent=(1, 128, 4, 4),
    ),
    Family(
        CHROMA,
        lambda: small_flux.random_chroma(WIDTH, GUIDANCE),
        blocks=(1, 2),
        layers=12,
        after_gelu=2,
        kept={"img_in", "txt_in", "distilled_guidance_layer", "final_layer"},
        lora={
            "transformer.single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
            "base_model.model.double_blocks.0.img_attn.proj": "double_blocks.0.img_attn.proj",
            "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        },
    ),
    Family(
        HUNYUAN_VIDEO,
        random_hunyuan_video,
        blocks=(1, 1),
        layers=13,
        after_gelu=2,
        kept={"time_in", "vector_in", "guidance_in", "txt_in", "final_layer"},
        kinds={W4A4, W4A16},
        lora={
            "lora_unet_double_blocks_0_img_mlp_fc1": "double_blocks.0.img_mlp.0",
            "lora_unet_double_blocks_0_txt_attn_qkv": "double_blocks.0.txt_attn.qkv",
            "transformer.double_blocks.0.img_attn_proj": "double_blocks.0.img_attn.proj",
            "diffusion_model.single_blocks.0.modulation.linear": "single_blocks.0.modulation.lin",
            "base_model.model.double_blocks.0.txt_mlp.fc2": "double_blocks.0.txt_mlp.2",
            "transformer.transformer_blocks.0.attn.to_v": "double_blocks.0.img_attn.qkv",
            "transformer.single_transformer_blocks.0.proj_mlp": "single_blocks.0.linear1",
            "lora_transformer_single_transformer_blocks_0_proj_out": "single_blocks.0.linear2",
            "txt_in.individual_token_refiner.blocks.0.mlp.fc1": "txt_in.individual_token_refiner.blocks.0.mlp.0",
        },
        sliced={
            "transformer.transformer_blocks.0.attn.to_v": (2 * WIDTH, 3 * WIDTH),
            "transformer.single_transformer_blocks.0.proj_mlp": (3 * WIDTH, 7 * WIDTH),
        },
        latent=(1, 16, 3, 8, 8),
    ),
    Family(
        HUNYUAN_VIDEO15,
        random_hunyuan_video15,
        blocks=(1, 0),
        layers=10,
        after_gelu=2,
        kept={"time_in", "txt_in", "vision_in", "cond_type_embedding", "final_layer"},
        kinds={W4A4, W4A16},
        lora={
            "lora_unet_double_blocks_0_img_mod_linear": "double_blocks.0.img_mod.lin",
            "lora_unet_double_blocks_0_img_attn_q": "double_blocks.0.img_attn.qkv",
            "double_blocks.0.txt_attn_v": "double_blocks.0.txt_attn.qkv",
        },
        sliced={
            "lora_unet_double_blocks_0_img_attn_q": (0, WIDTH),
            "double_blocks.0.txt_attn_v": (2 * WIDTH, 3 * WIDTH),
        },
        latent=(1, 32, 3, 4, 4),
    ),
    Family(
        HUNYUAN_IMAGE,
        lambda: random_hunyuan([64, 64]),
        blocks=(1, 1),
        layers=13,
        after_gelu=2,
        kept={"time_in", "txt_in", "final_layer"},
        kinds={W4A4, W4A16},
        lora={
            "transformer.double_blocks.0.txt_attn_proj": "double_blocks.0.txt_attn.proj",
            "transformer.single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
        },
        latent=(1, 64, 4, 4),
    ),
    Family(
        QWEN_IMAGE,
        random_qwen_image,
        blocks=(2,),
        layers=28,
        after_gelu=4,
        kept={"img_in", "txt_in", "time_text_embed", "norm_out", "proj_out"},
        kinds={W4A4, W4A16},
        lora={
            "transformer_blocks.0.attn.to_k": "transformer_blocks.0.attn.to_k",
            "transformer.transformer_blocks.0.attn.to_out.0": "transformer_blocks.0.attn.to_out.0",
            "diffusion_model.transformer_blocks.1.txt_mlp.net.2": "transformer_blocks.1.txt_mlp.net.2",
            "base_model.model.transformer_blocks.1.img_mlp.net.0.proj": "transformer_blocks.1.img_mlp.net.0.proj",
            "lora_unet_transformer_blocks_0_img_mod_1": "transformer_blocks.0.img_mod.1",
            "lora_transformer_transformer_blocks_0_attn_to_v": "transformer_blocks.0.attn.to_v",
        },
        latent=(1, 16, 1, 8, 8),
    ),
    Family(
        Z_IMAGE,
        random_z_image,
        blocks=(2, 2, 2),
        layers=30,
        after_gelu=0,
        kept={"x_embedder", "cap_embedder", "t_embedder", "final_layer", "noise_refiner", "layers"},  # modulations
        lora={
            "diffusion_model.layers.0.attention.to_k": "layers.0.attention.qkv",
            "transformer.layers.1.attention.to_out.0": "layers.1.attention.out",
            "base_model.model.layers.1.feed_forward.w2": "layers.1.feed_forward.w2",
            "noise_refiner.0.feed_forward.w3": "noise_refiner.0.feed_forward.w3",
            "base_model.model.layers.0.adaLN_modulation.0": "layers.0.adaLN_modulation.0",
            "lora_unet_context_refiner_0_attention_qkv": "context_refiner.0.attention.qkv",
        },
        sliced={"diffusion_model.layers.0.attention.to_k": (WIDTH, 2 * WIDTH)},
    ),
    Family(
        LUMINA2,
        random_lumina2,
        blocks=(2, 2, 1),
        layers=28,
        after_gelu=0,
        kept={"x_embedder", "cap_embedder", "t_embedder", "final_layer"},
        kinds={W4A4, W4A16},
        lora={
            "diffusion_model.layers.0.attention.qkv": "layers.0.attention.qkv",
            "transformer.layers.0.attn.to_out.0": "layers.0.attention.out",
            "base_model.model.noise_refiner.0.feed_forward.linear_2": "noise_refiner.0.feed_forward.w2",
            "transformer.layers.0.norm1.linear": "layers.0.adaLN_modulation.1",
            "transformer.noise_refiner.0.attn.to_q": "noise_refiner.0.attention.qkv",
            "transformer.noise_refiner.0.attn.to_k": "noise_refiner.0.attention.qkv",
            "transformer.noise_refiner.0.attn.to_v": "noise_refiner.0.attention.qkv",
            "lora_unet_context_refiner_0_attention_qkv": "context_refiner.0.attention.qkv",
            "cap_embedder.1": "cap_embedder.1",
        },
        sliced={
            "transformer.noise_refiner.0.attn.to_q": (0, 192),
            "transformer.noise_refiner.0.attn.to_k": (192, 288),
            "transformer.noise_refiner.0.attn.to_v": (288, 384),
        },
        width=192,
    ),
    Family(
        WAN,
        lambda: random_wan("t2v"),
        blocks=(2,),
        layers=20,
        after_gelu=2,
        kept={"text_embedding", "time_embedding", "time_projection", "head"},
        kinds={W4A4, W8A8},
        lora={
            "diffusion_model.blocks.0.self_attn.q": "blocks.0.self_attn.q",
            "blocks.1.cross_attn.o": "blocks.1.cross_attn.o",
            "base_model.model.blocks.1.ffn.0": "blocks.1.ffn.0",
            "transformer.blocks.1.ffn.net.2": "blocks.1.ffn.2",
            "transformer.blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
            "base_model.model.time_projection.1": "time_projection.1",
            "text_embedding.2": "text_embedding.2",
            "lora_unet_blocks_0_self_attn_v": "blocks.0.self_attn.v",
        },
        latent=(1, 16, 3, 8, 8),
    ),
    Family(
        WAN_I2V,
        lambda: random_wan("i2v", 36),
        blocks=(2,),
        layers=24,
        after_gelu=2,
        kept={"text_embedding", "time_embedding", "time_projection", "head", "img_emb"},
        kinds={W4A4, W8A8},
        lora={
            "blocks.0.cross_attn.v_img": "blocks.0.cross_attn.v_img",
            "transformer.blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img",
        },
        latent=(1, 16, 3, 8, 8),
    ),
    Family(
        WAN_VACE,
        random_vace,
        blocks=(2, 1),
        layers=31,
        after_gelu=3,
        kept={"text_embedding", "time_embedding", "time_projection", "head", "vace_blocks"},  # before_proj
        kinds={W4A4, W8A8},
        lora={
            "diffusion_model.vace_blocks.0.self_attn.q": "vace_blocks.0.self_attn.q",
            "vace_blocks.0.before_proj": "vace_blocks.0.before_proj",
            "transformer.vace_blocks.0.attn2.to_v": "vace_blocks.0.cross_attn.v",
            "base_model.model.vace_blocks.0.proj_out": "vace_blocks.0.after_proj",
            "lora_unet_vace_blocks_0_ffn_2": "vace_blocks.0.ffn.2",
        },
        latent=(1, 16, 3, 8, 8),
    ),
    Family(
        ANIMA,
        random_anima,
        blocks=(1,),
        layers=16,
        after_gelu=1,
        kept={"x_embedder", "t_embedder", "final_layer", "llm_adapter"},
        kinds={W4A4, W4A16, W8A8},
        lora={
            "diffusion_model.blocks.0.self_attn.q_proj": "blocks.0.self_attn.q_proj",
            "lora_unet_blocks_0_mlp_layer2": "blocks.0.mlp.layer2",
            "base_model.model.blocks.0.mlp.layer1": "blocks.0.mlp.layer1",
            "net.blocks.0.self_attn.k_proj": "blocks.0.self_attn.k_proj",
            "blocks.0.adaln_modulation_mlp.2": "blocks.0.adaln_modulation_mlp.2",
            "lora_unet_blocks_0_cross_attn_v_proj": "blocks.0.cross_attn.v_proj",
        },
        latent=(1, 16, 1, 8, 8),
        options={"t5xxl_ids": torch.arange(5), "t5xxl_weights": torch.ones(5)},
    ),
    Family(
        SD3,
        random_sd3,
        blocks=(2,),
        layers=19,
        after_gelu=3,
        kept={"context_embedder", "t_embedder", "y_embedder", "final_layer"},
        kinds={W4A4, W4A16},
        lora={
            "transformer.transformer_blocks.0.attn.to_k": "joint_blocks.0.x_block.attn.qkv",
            "base_model.model.transformer_blocks.1.ff.net.2": "joint_blocks.1.x_block.mlp.fc2",
            "lora_unet_joint_blocks_0_context_block_mlp_fc1": "joint_blocks.0.context_block.mlp.fc1",
            "joint_blocks.0.x_block.attn2.proj": "joint_blocks.0.x_block.attn2.proj",
            "diffusion_model.joint_blocks.1.x_block.attn.proj": "joint_blocks.1.x_block.attn.proj",
            "lora_transformer_transformer_blocks_1_norm1_linear": "joint_blocks.1.x_block.adaLN_modulation.1",
        },
        sliced={"transformer.transformer_blocks.0.attn.to_k": (128, 256)},
        width=128,
    ),
    Family(
        KREA2,
        random_krea2,
        blocks=(1,),
        layers=8,
        after_gelu=0,
        kept={"first", "last", "tmlp", "tproj", "txtfusion", "txtmlp"},
        lora={
            "diffusion_model.blocks.0.attn.wk": "blocks.0.attn.wk",
            "transformer.transformer_blocks.0.attn.to_gate": "blocks.0.attn.gate",
            "base_model.model.transformer_blocks.0.attn.to_out.0": "blocks.0.attn.wo",
            "base_model.model.blocks.0.mlp.up": "blocks.0.mlp.up",
            "base_model.model.txtmlp.1": "txtmlp.1",
            "transformer_blocks.0.ff.down": "blocks.0.mlp.down",
            "lora_unet_txtfusion_refiner_blocks_0_mlp_gate": "txtfusion.refiner_blocks.0.mlp.gate",
        },
        text=12 * 40,
        latent=(1, 16, 1, 8, 8),
    ),
    Family(
        LTXV,
        random_ltxv,
        blocks=(2,),
        layers=20,
        after_gelu=2,
        kept={"patchify_proj", "adaln_single", "caption_projection", "proj_out"},
        kinds={W4A4, W8A8},
        lora={
            "transformer.transformer_blocks.0.attn1.to_q": "transformer_blocks.0.attn1.to_q",
            "diffusion_model.transformer_blocks.0.attn2.to_out.0": "transformer_blocks.0.attn2.to_out.0",
            "base_model.model.transformer_blocks.1.ff.net.0.proj": "transformer_blocks.1.ff.net.0.proj",
            "transformer_blocks.1.ff.net.2": "transformer_blocks.1.ff.net.2",
            "lora_unet_transformer_blocks_1_attn2_to_v": "transformer_blocks.1.attn2.to_v",
            "diffusion_model.patchify_proj": "patchify_proj",
            "base_model.model.adaln_single.linear": "adaln_single.linear",
        },
        latent=(1, 128, 3, 2, 2),
        options={"attention_mask": torch.tensor([[1] * 5 + [0] * 2])},
        config=LTX,
    ),
    Family(
        LTXAV,
        lambda: random_ltx2(LTX2),
        blocks=(1,),
        layers=28,
        after_gelu=2,
        kept={"patchify_proj", "adaln_single", "caption_projection", "proj_out", "video_embeddings_connector"}
        | {f"audio_{name}" for name in ("patchify_proj", "adaln_single", "caption_projection", "proj_out")}
        | {"audio_embeddings_connector", "av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single"}
        | {f"av_ca_{kind}_scale_shift_adaln_single" for kind in ("audio", "video")},
        kinds={W4A4, W8A8},
        lora={
            "diffusion_model.transformer_blocks.0.audio_attn1.to_q": "transformer_blocks.0.audio_attn1.to_q",
            "transformer.transformer_blocks.0.attn2.to_k": "transformer_blocks.0.attn2.to_k",
            "transformer_blocks.0.audio_to_video_attn.to_out.0": "transformer_blocks.0.audio_to_video_attn.to_out.0",
            "lora_unet_transformer_blocks_0_audio_ff_net_2": "transformer_blocks.0.audio_ff.net.2",
        },
        latent=(1, 128, 3, 2, 2),
        options={"unprocessed_ltxav_embeds": True},
        config=LTX2,
    ),
    Family(
        LTXAV23,
        lambda: random_ltx2(LTX23),
        blocks=(1,),
        layers=28,
        after_gelu=2,
        kept={"patchify_proj", "adaln_single", "proj_out", "video_embeddings_connector", "prompt_adaln_single"}
        | {f"audio_{name}" for name in ("patchify_proj", "adaln_single", "prompt_adaln_single", "proj_out")}
        | {"audio_embeddings_connector", "av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single"}
        | {f"av_ca_{kind}_scale_shift_adaln_single" for kind in ("audio", "video")}
        | {"transformer_blocks"},  # to_gate_logits
        kinds={W4A4, W8A8},
        lora={"transformer.transformer_blocks.0.attn1.to_out.0": "transformer_blocks.0.attn1.to_out.0"},
        text=WIDTH + TEXT,
        options={"unprocessed_ltxav_embeds": True},
        latent=(1, 128, 3, 2, 2),
        config=LTX23,
    ),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.recipe.name)
def family(request, host):
    with read_widths():
        yield request.param


@pytest.fixture(scope="module")
def files(host, family, tmp_path_factory) -> dict[str, Path]:
    """A random model, and what the quantizer makes of it after ComfyUI has sampled with it."""
    from comfyui_svdquant.svdq_core.host.calibrate import CalibrationSettings, blank_conditioning
    from comfyui_svdquant.svdq_core.host.model import ModelSource
    from comfyui_svdquant.svdq_core.host.quantize import quantize_model
    from comfyui_svdquant.svdq_core.quantize import Job

    folder = tmp_path_factory.mktemp(family.recipe.name)
    found = {form: folder / f"{form}.safetensors" for form in ("bf16", "int4")}
    family.save(found["bf16"])
    source = ModelSource(host.sd.load_diffusion_model(str(found["bf16"])))
    prompts, settings = [blank_conditioning(source, i) for i in range(2)], CalibrationSettings(steps=2, size=64)
    events: list[dict[str, Any]] = []
    report = quantize_model(source, prompts, found["int4"], Job("int4", "fast", 16), settings, events.append)
    assert len(report.layers) == family.layers and report.mean_error_db < -12
    assert any(event.get("preview") for event in events), "pictures of the calibration"
    return found


def test_what_is_quantized(family):
    sd = family.make()
    recipe, groups = plan_model({key: tuple(t.shape) for key, t in sd.items()}, "m")
    assert recipe is family.recipe and {g.kind for g in groups} == family.kinds
    assert sum(len(g.names) for g in groups if g.after_gelu) == family.after_gelu
    quantized = {f"{name}.weight" for g in groups for name in g.names}
    kept = {key for key, t in sd.items() if t.dim() == 2 and key.endswith(".weight") and key not in quantized}
    assert len(quantized) == family.layers and {key.split(".")[0] for key in kept} == family.kept


def test_what_a_file_is(family, files):
    info = describe_file(files["int4"])
    assert info.text.startswith(f"an SVDQuant file of {family.recipe.title} (") and info.kind == "svdquant"
    assert (info.details["release"], info.details["blocks"]) == (None, family.blocks)
    assert info.details["width"] == family.width
    assert describe_file(files["bf16"]).text == f"a 16-bit diffusion model ({family.recipe.title})"


def test_what_is_not_quantized_is_as_it_was(family, files):
    layers = small_flux.quantized_layers(files["int4"])
    wanted, found = (
        {key.replace(".scale", ".weight"): t for key, t in sd.items() if key.rpartition(".")[0] not in layers}
        for sd in (family.make(), read_checkpoint(files["int4"])[0])
    )
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor) and (found[key].dtype == tensor.dtype or not tensor.numel()), key


def sampled(model: Any, family: Family) -> Tensor:
    text, latent = conditioning(width=family.text, **family.options), torch.zeros(family.latent)
    if not family.recipe.sound:
        return sample(model, positive=text, negative=text, latent=latent)
    from comfy.nested_tensor import NestedTensor

    found = sample(model, positive=text, negative=text, latent=NestedTensor((latent, torch.zeros(1, 8, 17, 16))))
    return torch.cat([t.flatten() for t in found.unbind()])


def test_samples(host, family, files):
    """What the file says, to the last bits, and near the model that it was made from, as far as random ones are."""
    found = sampled(load(files["int4"], torch.float32), family)
    assert_same(found, sampled(small_flux.twin(files["bf16"], files["int4"]), family))
    assert -60 < error_db(found, sampled(host.sd.load_diffusion_model(str(files["bf16"])), family)) < -5


def test_lora(host, family, files, tmp_path):
    """In every dialect that trainers write: on the branch, and for a layer that stays in 16 bit as ComfyUI does it."""
    from comfyui_svdquant.svdq_core.host.lora import add_lora
    from comfyui_svdquant.svdq_core.host.preview import preview_lora

    generator, tensors, file = torch.Generator().manual_seed(1), {}, tmp_path / "lora.safetensors"
    layers, shapes = small_flux.quantized_layers(files["int4"]), {k: t.shape for k, t in family.make().items()}
    for key, name in family.lora.items():
        n, k = shapes[f"{name}.weight"]
        first, last = family.sliced.get(key, (0, n))
        down, up = torch.randn(4, k, generator=generator) / k**0.5, torch.zeros(n, 4)
        up[first:last] = torch.randn(last - first, 4, generator=generator)
        ends = ("lora_down", "lora_up") if key.startswith("lora_unet") else ("lora_A", "lora_B")
        tensors |= {f"{key}.{ends[0]}.weight": down, f"{key}.{ends[1]}.weight": up[first:last].contiguous()}
        if name in layers and layers[name].proj_up is not None:
            layers[name] = layers[name].widened(up, down)
        elif name in layers:
            layers[name] = with_update(layers[name], up @ down)
    save_file(tensors, file)
    twin = small_flux.computing(small_flux.twin(files["bf16"], files["int4"]), layers)
    model = load(files["int4"], torch.float32)
    plain, with_lora = sampled(model, family), model.clone()
    report = add_lora(with_lora, file, 1.0, 16)
    assert (report.unused, report.in_16_bit, report.keys) == ([], [], len(tensors))
    assert preview_lora(file, files["int4"])[0].keys == len(tensors)
    add_lora(twin, file, 1.0, 16)  # for layers that are in 16 bit; the others' forward is the layer's
    assert_same(sampled(with_lora, family), sampled(twin, family))
    assert error_db(sampled(with_lora, family), plain) > -25


def with_update(layer: Any, update: Tensor) -> Any:
    """A layer without a branch, and what a LoRA adds to it."""

    class Updated:
        def forward(self, x: Tensor) -> Tensor:
            return layer.forward(x) + torch.nn.functional.linear(x, update.to(x.dtype))

    return Updated()


@pytest.mark.parametrize(("name", "blocks", "width"), RELEASES)
def test_releases(name, blocks, width):
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    shapes = {f"{recipe.text[0]}.weight": (width, 128)}
    for part, count in zip(recipe.lists, blocks, strict=True):
        shapes |= {f"{part}.{i}.linear.weight": (width, width) for i in range(count)}
    assert facts_of(shapes, recipe)["release"] == RELEASES[name, blocks, width]
    shapes[f"{recipe.lists[0]}.{blocks[0]}.linear.weight"] = width, width
    assert facts_of(shapes, recipe)["release"] is None


def source_of(host, path: Path) -> Any:
    from comfyui_svdquant.svdq_core.host.model import ModelSource

    with read_widths():
        return ModelSource(host.sd.load_diffusion_model(str(path)))


def tokens_seen(source: Any, layers: list[str], options: dict[str, Any], size: int = 64) -> set[int]:
    """How many tokens the layers read at once, in calibration with a conditioning that holds these beside its text."""
    from comfyui_svdquant.svdq_core.host.calibrate import CalibrationSettings, blank_conditioning, calibrate

    ((context, blank),) = blank_conditioning(source, 0)
    seen = []
    for layer in source.modules(layers).values():
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    calibrate(source, [[[context, blank | options]]], CalibrationSettings(steps=1, size=size), lambda event: None)
    return set(seen)


def test_calibration_is_as_large_as_asked(host, tmp_path):
    """FLUX.2's latents are half as wide as the latents of an empty picture in ComfyUI."""
    save_file(small_flux.random_flux2(), tmp_path / "flux2.safetensors")
    source = source_of(host, tmp_path / "flux2.safetensors")
    assert tokens_seen(source, ["img_in"], {}, size=128) == {(128 // 16) ** 2}


@pytest.mark.parametrize(("theirs", "frames"), [(21, 5), (3, 3)])
def test_image_to_video_is_calibrated_with_its_pictures(host, tmp_path, theirs, frames):
    """What WanImageToVideo puts into a conditioning: pictures and a mask for every frame, CLIP's view of the first."""
    from comfy.clip_vision import Output
    from comfyui_svdquant.svdq_core.host.model import hash_nested

    save_file(random_wan("i2v", 36), tmp_path / "i2v.safetensors")
    source, view = source_of(host, tmp_path / "i2v.safetensors"), Output()
    view.penultimate_hidden_states = torch.randn(1, 257, 1280)
    options = {"concat_latent_image": torch.randn(1, 16, theirs, 8, 8), "clip_vision_output": view}
    options |= {"concat_mask": torch.ones(1, 1, theirs, 8, 8)}
    seen = tokens_seen(source, ["blocks.0.self_attn.q", "blocks.0.cross_attn.k_img"], options)
    assert seen == {frames * 16, 257} and options["concat_mask"].shape[2] == theirs

    def digest(view: Any) -> list[bytes]:
        told: list[bytes] = []
        hash_nested({"view": view}, told.append)
        return told

    other = Output()
    other.penultimate_hidden_states = view.penultimate_hidden_states.clone()
    assert digest(view) == digest(other), "as after a restart"
    other.penultimate_hidden_states += 1
    assert digest(view) != digest(other)


def test_vace_is_calibrated_with_its_frames(host, tmp_path):
    """What WanVaceToVideo puts into a conditioning, of another length and size than calibration has."""
    save_file(random_vace(), tmp_path / "vace.safetensors")
    options = {"vace_frames": [torch.randn(1, 32, 4, 6, 10)], "vace_mask": [torch.ones(1, 64, 4, 6, 10)]}
    source = source_of(host, tmp_path / "vace.safetensors")
    assert tokens_seen(source, ["vace_blocks.0.ffn.0"], options) == {4 * 16}


def test_guides_of_ltx_are_left_out(host, tmp_path):
    """What LTXVAddGuide puts into a conditioning: places in the user's own latent."""
    (family,) = (family for family in FAMILIES if family.recipe is LTXV)
    family.save(tmp_path / "ltxv.safetensors")
    source = source_of(host, tmp_path / "ltxv.safetensors")
    assert tokens_seen(source, ["patchify_proj"], {"keyframe_idxs": torch.zeros(1, 3, 4, 2)}) == {5 * 2 * 2}


WAN_VARIANTS = {  # by ComfyUI's class of the network: what else ComfyUI has, and what tells some of them apart
    "WAN21_Camera": ("model", "CameraWanModel", {"model_type": "camera", "in_dim": 32}, {}),
    "WAN21_HuMo": ("model", "HumoWanModel", {"in_dim": 36}, {}),
    "WAN22_S2V": ("model", "WanModel_S2V", {}, {}),
    "WAN21_SCAIL": ("model", "SCAILWanModel", {"in_dim": 20}, {}),
    "WAN21_SCAIL2": ("model", "SCAIL2WanModel", {"in_dim": 20}, {}),
    "WAN22_Animate": ("model_animate", "AnimateWanModel", {"in_dim": 36, "num_layers": 5}, {}),
    "WAN21_CausalAR": ("model", "WanModel", {}, {"causal_ar": True}),
    "WAN21_FlowRVS": ("model", "WanModel", {}, {"model_type": "flow_rvs"}),
}


BRINGS = {  # what ComfyUI's nodes put into their conditionings, for a video of another size
    "WAN21_Camera": {"camera_conditions": (1, 24, 4, 48, 80), "concat_latent_image": (1, 16, 4, 6, 10)},
    "WAN21_HuMo": {"audio_embed": (1, 13, 8, 5, 1280), "reference_latents": [(1, 16, 1, 6, 10)]},
    "WAN22_S2V": {"control_video": (1, 16, 4, 6, 10), "audio_embed": (1, 25, 1024, 16)}
    | {"reference_latents": [(1, 16, 1, 6, 10)], "reference_motion": (1, 16, 2, 6, 10)},
    "WAN21_SCAIL": {"pose_video_latent": (1, 16, 4, 3, 5), "reference_latents": [(1, 16, 1, 6, 10)]},
    "WAN22_Animate": {"pose_video_latent": (1, 16, 4, 6, 10), "face_video_pixels": (1, 3, 13, 512, 512)},
    "WAN21_CausalAR": {"time_dim_concat": (1, 16, 1, 6, 10)},
}


def brought(name: str) -> dict[str, Any]:
    def filled(shape: Any) -> Any:
        return [filled(each) for each in shape] if isinstance(shape, list) else torch.zeros(shape)

    return {key: filled(shape) for key, shape in BRINGS.get(name, {}).items()}


@pytest.mark.parametrize("name", WAN_VARIANTS)
def test_variants_of_wan(host, tmp_path, name):
    """Quantized by the same recipes, and loaded as what they were; whatever their conditionings bring."""
    from comfyui_svdquant.svdq_core.host.calibrate import CalibrationSettings, blank_conditioning, calibrate
    from comfyui_svdquant.svdq_core.host.model import ModelSource
    from comfyui_svdquant.svdq_core.quantize import FileSource, Job, quantize

    file, network, more, told = WAN_VARIANTS[name]
    config = {"dim": WIDTH, "ffn_dim": WIDTH, "num_heads": 2, "num_layers": 1, "text_dim": TEXT} | more
    model = meta(getattr(importlib.import_module(f"comfy.ldm.wan.{file}"), network), **config)
    bf16, int4 = tmp_path / "bf16.safetensors", tmp_path / "int4.safetensors"
    save_file(random_weights(model), bf16, {"config": json.dumps({"transformer": told})} if told else None)
    with read_widths():
        source = ModelSource(host.sd.load_diffusion_model(str(bf16)))
        assert source.origin["model"] == name and source.config == FileSource(bf16).config
        ((context, options),) = blank_conditioning(source, 0)
        prompts = [[[context, options]], [[context, options | brought(name)]]]
        calibrate(source, prompts, CalibrationSettings(steps=1, size=64), lambda event: None)
        quantize(source, None, int4, Job(preset="naive", rank=4))
        loaded, latent = load(int4, torch.float32), torch.zeros(1, 16, 3, 8, 8)
        assert type(loaded.model).__name__ == name
        assert_same(sample(loaded, latent=latent), sample(small_flux.twin(bf16, int4), latent=latent))


def test_a_model_that_must_see_a_picture_says_so(host, tmp_path):
    """WanDancer has no text in the picture's place, as image to video has."""
    from comfy.ldm.wan.model_wandancer import WanDancerModel

    config = {"dim": WIDTH, "ffn_dim": WIDTH, "num_heads": 2, "num_layers": 1, "text_dim": TEXT, "in_dim": 36}
    save_file(random_weights(meta(WanDancerModel, **config)), tmp_path / "m.safetensors")
    source = source_of(host, tmp_path / "m.safetensors")
    with pytest.raises(SVDQuantError, match=r"never ran blocks.0.cross_attn.k_img \(1 such.*picture"):
        tokens_seen(source, [], {})


def test_pictures_to_edit_are_seen_in_calibration(host, tmp_path):
    """Qwen-Image-Edit's, of any size, beside the picture that it makes; its latents have a frame, too."""
    save_file(random_qwen_image(), tmp_path / "m.safetensors")
    references = {"reference_latents": [torch.randn(1, 16, 1, 6, 10)]}
    source = source_of(host, tmp_path / "m.safetensors")
    assert tokens_seen(source, ["transformer_blocks.0.attn.to_q"], references) == {16 + 15}


def test_a_conditioning_that_does_not_fit_is_named(host, tmp_path):
    from comfy.clip_vision import Output

    save_file(random_wan("i2v", 36), tmp_path / "i2v.safetensors")
    source, view = source_of(host, tmp_path / "i2v.safetensors"), Output()
    view.penultimate_hidden_states = torch.randn(1, 257, 77)  # of another CLIP
    with pytest.raises(SVDQuantError, match=r"beside its text \(clip_vision_output\): .*77.* Connect the text's"):
        tokens_seen(source, [], {"clip_vision_output": view})


def test_what_a_file_told_of_a_model_is_kept(host, tmp_path):
    """LTX-2.3 by any loader: its shapes alone make ComfyUI take it for another."""
    import comfy.utils
    from comfy.model_detection import detect_unet_config
    from comfyui_svdquant.svdq_core.host.model import ModelSource

    (family,) = (family for family in FAMILIES if family.recipe is LTXAV23)
    family.save(tmp_path / "m.safetensors")
    shutil.copy(tmp_path / "m.safetensors", tmp_path / "m.SFT")
    sd, metadata = comfy.utils.load_torch_file(str(tmp_path / "m.safetensors"), return_metadata=True)
    wanted = detect_unet_config(sd, "", metadata=metadata)
    assert wanted != detect_unet_config(sd, "")
    models = [
        host.sd.load_diffusion_model(str(tmp_path / "m.SFT")),
        host.sd.load_diffusion_model_state_dict(dict(sd), metadata=metadata),
    ]
    for model in models:
        found = detect_unet_config(sd, "", metadata=ModelSource(model).config)
        assert {key: found[key] for key in wanted} == wanted


# ---- on a running ComfyUI ------------------------------------------------------------------------------------

TEMPLATES = {
    "flux2": "text_to_image_flux2",
    "qwen_image": "text_to_image_qwen_image",
    "z_image": "text_to_image_z_image",
    "hunyuan_video": "text_to_video_hunyuan",
    "wan": "text_to_video_wan",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_quantize_and_the_template(server: ComfyServer, host, tmp_path, name):
    """Quantized with nothing but the model connected; then the template, all but its text encoder and VAE."""
    family = next(family for family in FAMILIES if family.recipe.name == name)
    family.save(tmp_path / f"{name}_bf16.safetensors")
    server.add_model(tmp_path / f"{name}_bf16.safetensors")
    server.run(graph(f"{name}_bf16", file_name=f"{name}_int4", size=64, max_prompts=2))
    facts = server.get(f"/svdquant/file?name={name}_int4.safetensors")
    assert (facts["model"], facts["blocks"], facts["ranks"]) == (family.recipe.title, [*family.blocks], [16])
    nodes = template_up_to_the_vae(server, TEMPLATES[name])
    for id, node in [*nodes.items()]:
        if node["class_type"] in ("CLIPLoader", "DualCLIPLoader"):
            del nodes[id]
        elif node["class_type"] == "CLIPTextEncode":
            nodes[id] = {"class_type": "SVDQuantTestText", "inputs": {"width": TEXT, "seed": int(id)}}
        small = SMALL | {"unet_name": f"{name}_int4.safetensors"}
        node["inputs"] |= {key: value for key, value in small.items() if key in node["inputs"]}
    found = run(server, nodes)
    assert found.shape == family.latent and 0.1 < found.std() < 20


SMALL = {"width": 64, "height": 64, "length": 9, "steps": 4, "end_at_step": 2, "start_at_step": 0}


def z_image_in_diffusers_names(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, tensor in sd.items():
        name, _, end = key.rpartition(".")
        template = re.sub(r"\.\d+\.", ".{i}.", name, count=1)
        names = DIFFUSERS_Z_IMAGE.get(template, DIFFUSERS_Z_IMAGE.get(name, template))
        number = (re.search(r"\.(\d+)\.", key) or [None, "0"])[1]
        parts = (names,) if isinstance(names, str) else names
        for part, rows in zip(parts, tensor.chunk(len(parts))):
            out[f"{part.replace('{i}', number)}.{end}" if name else key] = rows.contiguous()
    return out


def test_z_image_in_diffusers_names(host, tmp_path):
    """As ComfyUI's own converter reads them."""
    import comfy.model_detection

    sd = random_z_image()
    theirs = z_image_in_diffusers_names(sd)
    assert len(theirs) == len(sd) + 12 and "all_x_embedder.2-1.weight" in theirs
    save_file(theirs, tmp_path / "z.safetensors")
    found = read_checkpoint(tmp_path / "z.safetensors")[0]
    wanted = comfy.model_detection.convert_diffusers_mmdit(dict(theirs), "")
    assert found.keys() == sd.keys() == wanted.keys()
    assert all(torch.equal(found[key], sd[key]) and torch.equal(wanted[key], sd[key]) for key in sd)


def test_hunyuan_video_in_tencents_names(host, tmp_path):
    """As ComfyUI's own converter reads them."""
    from comfy.supported_models import HunyuanVideo
    from comfyui_svdquant.svdq_core.host.lora import TENCENT_NAMES

    sd = random_hunyuan_video()
    theirs = {renamed_by(TENCENT_NAMES, key): tensor for key, tensor in sd.items()}
    assert {"double_blocks.0.img_attn_q_norm.weight", "single_blocks.0.modulation.linear.bias"} < theirs.keys()
    save_file(theirs, tmp_path / "h.safetensors")
    found = read_checkpoint(tmp_path / "h.safetensors")[0]
    wanted = HunyuanVideo.process_unet_state_dict(None, theirs)
    assert found.keys() == sd.keys() == wanted.keys()
    assert all(torch.equal(found[key], sd[key]) for key in sd)

"""Model families as data: which linear takes which treatment. A new family is a new ``Recipe``, not code.

Layer names are ComfyUI's (for FLUX those of black-forest-labs/flux). ``{i}`` stands for the block number.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from .errors import SVDQuantError
from .recipes import W4A4, W4A16, W8A8, LayerGroup, Recipe, Rule, plan

FLUX = Recipe(
    name="flux",
    title="FLUX.1",
    keys=(
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
    ),
    absent=("double_stream_modulation_img.lin.weight", "distilled_guidance_layer.in_proj.weight"),
    rules=(
        Rule("double_blocks.{i}.img_mod.lin", W4A16),
        Rule("double_blocks.{i}.txt_mod.lin", W4A16),
        Rule("double_blocks.{i}.img_attn.qkv"),
        Rule("double_blocks.{i}.img_attn.proj"),
        Rule("double_blocks.{i}.img_mlp.0"),
        Rule("double_blocks.{i}.img_mlp.2", after_gelu=True),
        Rule("double_blocks.{i}.txt_attn.qkv"),
        Rule("double_blocks.{i}.txt_attn.proj"),
        Rule("double_blocks.{i}.txt_mlp.0"),
        Rule("double_blocks.{i}.txt_mlp.2", after_gelu=True),
        Rule("single_blocks.{i}.modulation.lin", W4A16),
        Rule("single_blocks.{i}.linear1"),
        Rule("single_blocks.{i}.linear2"),
    ),
)

FLUX_LINEARS = tuple(rule for rule in FLUX.rules if rule.kind == W4A4)  # of blocks without modulations of their own

FLUX2 = Recipe(
    name="flux2",
    title="FLUX.2",
    keys=(
        "img_in.weight",
        "txt_in.weight",
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
    ),
    absent=(),
    # Its MLPs have a gated SiLU; modulations are shared by all blocks, 2 to 4 % of the weights: they stay 16 bit.
    rules=tuple(replace(rule, after_gelu=False) for rule in FLUX_LINEARS),
)

CHROMA = Recipe(
    name="chroma",
    title="Chroma",
    keys=(
        "img_in.weight",
        "txt_in.weight",
        "distilled_guidance_layer.in_proj.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
    ),
    absent=(),
    rules=FLUX_LINEARS,  # a network of its own makes all modulations
)

HUNYUAN_VIDEO = Recipe(
    name="hunyuan_video",
    title="HunyuanVideo",
    keys=(
        "img_in.proj.weight",
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "final_layer.linear.weight",
    ),
    absent=(),
    rules=FLUX.rules,  # the same blocks
    text=("txt_in.input_embedder",),
    frames=5,
)

HUNYUAN_VIDEO15 = replace(
    HUNYUAN_VIDEO,
    name="hunyuan_video15",
    title="HunyuanVideo 1.5",
    keys=tuple(key.replace("vector_in.in_layer", "vision_in.proj.1") for key in HUNYUAN_VIDEO.keys),
)

HUNYUAN_IMAGE = replace(
    HUNYUAN_VIDEO,
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    keys=tuple(key for key in HUNYUAN_VIDEO.keys if "vector_in" not in key),
    absent=("vector_in.in_layer.weight", "vision_in.proj.1.weight"),
    frames=1,
)

HUNYUANS = (HUNYUAN_VIDEO, HUNYUAN_VIDEO15, HUNYUAN_IMAGE)

QWEN_IMAGE = Recipe(
    name="qwen_image",
    title="Qwen-Image",
    keys=(
        "img_in.weight",
        "txt_in.weight",
        "txt_norm.weight",
        "transformer_blocks.0.img_mod.1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "transformer_blocks.0.img_mlp.net.0.proj.weight",
    ),
    absent=(),
    rules=(
        Rule("transformer_blocks.{i}.img_mod.1", W4A16),
        Rule("transformer_blocks.{i}.txt_mod.1", W4A16),
        *(Rule(f"transformer_blocks.{{i}}.attn.to_{c}", shares="img_attn") for c in "qkv"),
        *(Rule(f"transformer_blocks.{{i}}.attn.add_{c}_proj", shares="txt_attn") for c in "qkv"),
        Rule("transformer_blocks.{i}.attn.to_out.0"),
        Rule("transformer_blocks.{i}.attn.to_add_out"),
        Rule("transformer_blocks.{i}.img_mlp.net.0.proj"),
        Rule("transformer_blocks.{i}.img_mlp.net.2", after_gelu=True),
        Rule("transformer_blocks.{i}.txt_mlp.net.0.proj"),
        Rule("transformer_blocks.{i}.txt_mlp.net.2", after_gelu=True),
    ),
)

Z_IMAGE = Recipe(
    name="z_image",
    title="Z-Image",
    keys=(
        "x_embedder.weight",
        "cap_embedder.1.weight",
        "noise_refiner.0.attention.qkv.weight",
        "context_refiner.0.attention.qkv.weight",
        "layers.0.attention.qkv.weight",
        "layers.0.adaLN_modulation.0.weight",  # Lumina 2 has a SiLU in that place
    ),
    absent=("dec_net.cond_embed.weight",),  # works on pixels, not latents
    # The modulations read 256 features: 2 % of the weights, which stay 16 bit.
    rules=tuple(
        Rule(f"{blocks}.{{i}}.{name}", shares=shares)
        for blocks in ("context_refiner", "noise_refiner", "layers")
        for name, shares in (
            ("attention.qkv", None),
            ("attention.out", None),
            ("feed_forward.w1", "feed_forward"),
            ("feed_forward.w3", "feed_forward"),
            ("feed_forward.w2", None),
        )
    ),
    text=("cap_embedder.1",),
)

LUMINA2 = replace(
    Z_IMAGE,
    name="lumina2",
    title="Lumina 2",
    keys=(*Z_IMAGE.keys[:-1], "layers.0.adaLN_modulation.1.weight"),
    absent=(),
    # A tenth of the weights are modulations: they read 1024 features.
    rules=(
        *Z_IMAGE.rules,
        *(Rule(f"{blocks}.{{i}}.adaLN_modulation.1", W4A16) for blocks in ("noise_refiner", "layers")),
    ),
    pooled="clip_text_pooled_proj.1",  # of NewBie
)

PICTURE = "blocks.0.cross_attn.k_img.weight"  # of Wan 2.1's image to video
VACE = "vace_patch_embedding.weight"

WAN = Recipe(
    name="wan",
    title="Wan",
    keys=(
        "patch_embedding.weight",
        "text_embedding.0.weight",
        "time_projection.1.weight",
        "head.modulation",
        "blocks.0.self_attn.q.weight",
        "blocks.0.cross_attn.q.weight",
        "blocks.0.ffn.0.weight",
    ),
    absent=(PICTURE, VACE),
    # Keys and values of the cross-attention read the text. The paper keeps such in 16 bit; here they are a seventh of
    # all weights.
    rules=(
        *(Rule(f"blocks.{{i}}.self_attn.{c}", shares="self_attn") for c in "qkv"),
        Rule("blocks.{i}.self_attn.o"),
        Rule("blocks.{i}.cross_attn.q"),
        *(Rule(f"blocks.{{i}}.cross_attn.{c}", W8A8, shares="text") for c in "kv"),
        Rule("blocks.{i}.cross_attn.o"),
        Rule("blocks.{i}.ffn.0"),
        Rule("blocks.{i}.ffn.2", after_gelu=True),
    ),
    text=("text_embedding.0",),
    frames=5,
)

WAN_I2V = replace(
    WAN,
    name="wan_i2v",
    keys=(*WAN.keys, PICTURE),
    absent=(),
    rules=(*WAN.rules, *(Rule(f"blocks.{{i}}.cross_attn.{c}_img", W8A8, shares="picture") for c in "kv")),
)

WAN_VACE = replace(
    WAN,
    name="wan_vace",
    keys=(*WAN.keys, VACE),
    absent=(PICTURE,),
    # after_proj reads what the blocks add up to, which no norm has made even.
    rules=(
        *WAN.rules,
        *(replace(rule, name=f"vace_{rule.name}") for rule in WAN.rules),
        Rule("vace_blocks.{i}.after_proj", W8A8),
    ),
)


def ltx_attention(name: str, reads: str | None = None, kind: str = W4A4, queries: str = W4A4) -> tuple[Rule, ...]:
    """Its keys and values, of a ``kind``, read something else than its ``queries`` if a name for that is given."""
    layer = f"transformer_blocks.{{i}}.{name}"
    return (
        Rule(f"{layer}.to_q", queries, shares=None if reads else name),
        *(Rule(f"{layer}.to_{c}", kind, shares=reads or name) for c in "kv"),
        Rule(f"{layer}.to_out.0"),
    )


LTXV = Recipe(
    name="ltxv",
    title="LTX-Video",
    keys=(
        "patchify_proj.weight",
        "adaln_single.linear.weight",
        "caption_projection.linear_1.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn2.to_k.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    absent=("audio_adaln_single.linear.weight",),
    # As in Wan keys and values of the text are an eighth of all weights. attn2.to_q reads what the blocks add up to.
    rules=(
        *ltx_attention("attn1"),
        *ltx_attention("attn2", "text", W8A8, queries=W8A8),
        Rule("transformer_blocks.{i}.ff.net.0.proj"),
        Rule("transformer_blocks.{i}.ff.net.2", after_gelu=True),
    ),
    text=("caption_projection.linear_1",),
    masked=True,
    frames=5,
)

LTXAV = replace(
    LTXV,
    name="ltxav",
    title="LTX-2",
    keys=(*LTXV.keys, "audio_adaln_single.linear.weight", "transformer_blocks.0.audio_to_video_attn.to_q.weight"),
    absent=(),
    # Video and audio, each as in LTX-Video, and both looking at each other. What reads the sums has a norm here.
    rules=(
        *ltx_attention("attn1"),
        *ltx_attention("audio_attn1"),
        *ltx_attention("attn2", "text", W8A8),
        *ltx_attention("audio_attn2", "audio_text", W8A8),
        *ltx_attention("audio_to_video_attn", "audio"),
        *ltx_attention("video_to_audio_attn", "video"),
        Rule("transformer_blocks.{i}.ff.net.0.proj"),
        Rule("transformer_blocks.{i}.ff.net.2", after_gelu=True),
        Rule("transformer_blocks.{i}.audio_ff.net.0.proj"),
        Rule("transformer_blocks.{i}.audio_ff.net.2", after_gelu=True),
    ),
    masked=False,
    sound=True,
)

LTXAV23 = replace(
    LTXAV,
    name="ltxav23",
    title="LTX-2.3",
    keys=tuple(key for key in LTXAV.keys if "caption_projection" not in key),
    absent=("caption_projection.linear_1.weight",),
    text=("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.audio_attn2.to_k"),
)

KREA2 = Recipe(
    name="krea2",
    title="Krea 2",
    keys=(
        "first.weight",
        "txtfusion.projector.weight",
        "txtmlp.1.weight",
        "tproj.1.weight",
        "blocks.0.attn.wq.weight",
        "blocks.0.mlp.gate.weight",
    ),
    absent=(),
    # One layer makes the modulations of all blocks. The text's own blocks stay 16 bit.
    rules=(
        *(Rule(f"blocks.{{i}}.attn.{name}", shares="attn") for name in ("wq", "wk", "wv", "gate")),
        Rule("blocks.{i}.attn.wo"),
        Rule("blocks.{i}.mlp.gate", shares="mlp"),
        Rule("blocks.{i}.mlp.up", shares="mlp"),
        Rule("blocks.{i}.mlp.down"),
    ),
    text=("txtmlp.1",) * 12,  # of as many layers of the text encoder
)

ANIMA = Recipe(
    name="anima",
    title="Anima",
    keys=(
        "x_embedder.proj.1.weight",
        "t_embedder.1.linear_1.weight",
        "llm_adapter.blocks.0.cross_attn.q_proj.weight",  # Cosmos-Predict2 has none
        "blocks.0.self_attn.q_proj.weight",
        "blocks.0.adaln_modulation_mlp.1.weight",
        "blocks.0.mlp.layer1.weight",
    ),
    absent=(),
    # Modulations are an eleventh of the blocks' weights, keys and values of the text a sixteenth.
    rules=(
        *(
            Rule(f"blocks.{{i}}.adaln_modulation_{of}.{n}", W4A16)
            for of in ("self_attn", "cross_attn", "mlp")
            for n in (1, 2)
        ),
        *(Rule(f"blocks.{{i}}.self_attn.{c}_proj", shares="self_attn") for c in "qkv"),
        Rule("blocks.{i}.self_attn.output_proj"),
        Rule("blocks.{i}.cross_attn.q_proj"),
        *(Rule(f"blocks.{{i}}.cross_attn.{c}_proj", W8A8, shares="text") for c in "kv"),
        Rule("blocks.{i}.cross_attn.output_proj"),
        Rule("blocks.{i}.mlp.layer1"),
        Rule("blocks.{i}.mlp.layer2", after_gelu=True),
    ),
    text=("blocks.0.cross_attn.k_proj",),
)

SD3 = Recipe(
    name="sd3",
    title="Stable Diffusion 3",
    keys=(
        "x_embedder.proj.weight",
        "context_embedder.weight",
        "y_embedder.mlp.0.weight",
        "joint_blocks.0.context_block.attn.qkv.weight",
        "joint_blocks.0.x_block.attn.qkv.weight",
        "final_layer.linear.weight",
    ),
    absent=(),
    # The last block makes nothing of the text; 3.5 Medium looks at the picture twice in its first blocks.
    rules=(
        Rule("joint_blocks.{i}.context_block.adaLN_modulation.1", W4A16),
        Rule("joint_blocks.{i}.x_block.adaLN_modulation.1", W4A16),
        Rule("joint_blocks.{i}.context_block.attn.qkv"),
        Rule("joint_blocks.{i}.context_block.attn.proj", some=True),
        Rule("joint_blocks.{i}.context_block.mlp.fc1", some=True),
        Rule("joint_blocks.{i}.context_block.mlp.fc2", after_gelu=True, some=True),
        Rule("joint_blocks.{i}.x_block.attn.qkv"),
        Rule("joint_blocks.{i}.x_block.attn.proj"),
        Rule("joint_blocks.{i}.x_block.attn2.qkv", some=True),
        Rule("joint_blocks.{i}.x_block.attn2.proj", some=True),
        Rule("joint_blocks.{i}.x_block.mlp.fc1"),
        Rule("joint_blocks.{i}.x_block.mlp.fc2", after_gelu=True),
    ),
    text=("context_embedder",),
    pooled="y_embedder.mlp.0",
)

RECIPES: tuple[Recipe, ...] = (
    FLUX,
    FLUX2,
    CHROMA,
    *HUNYUANS,
    QWEN_IMAGE,
    Z_IMAGE,
    LUMINA2,
    WAN,
    WAN_I2V,
    WAN_VACE,
    LTXV,
    LTXAV,
    LTXAV23,
    KREA2,
    ANIMA,
    SD3,
)

FLUX_BLOCKS, FLUX_WIDTH = (19, 38), 3072
FLUX_RELEASES = {  # by what shapes tell: whether guidance is an input, and the channels that img_in reads
    (True, 64): "dev, Krea or Kontext",
    (False, 64): "schnell",
    (True, 384): "Fill",
    (True, 128): "Depth or Canny",
}
RELEASES: dict[tuple[str, tuple[int, ...], int], str] = {  # of the other families, by blocks and width
    ("flux2", (8, 48), 6144): "dev",
    ("flux2", (8, 24), 4096): "klein 9B",
    ("flux2", (5, 20), 3072): "klein 4B",
    ("hunyuan_video", (20, 40), 3072): "13B",
    ("hunyuan_video15", (54, 0), 2048): "8.3B",
    ("hunyuan_image", (20, 40), 3584): "17B",
    ("lumina2", (2, 2, 26), 2304): "Image 2.0",
    ("wan", (40,), 5120): "14B",
    ("wan_i2v", (40,), 5120): "2.1 14B image to video",
    ("wan_vace", (40, 8), 5120): "VACE 14B",
    ("wan_vace", (30, 15), 1536): "VACE 1.3B",
    ("wan", (30,), 3072): "2.2 5B",
    ("wan", (30,), 1536): "2.1 1.3B",
    ("sd3", (24,), 1536): "Medium (3 or 3.5)",
    ("sd3", (38,), 2432): "Large (3.5)",
    ("ltxav", (48,), 4096): "19B",
    ("ltxav23", (48,), 4096): "22B",
    ("ltxv", (48,), 4096): "13B",
    ("ltxv", (28,), 2048): "2B",
}

# What else people drop here, by a key only that family has; the first hit names it.
KNOWN_FAMILIES: tuple[tuple[str, str], ...] = (
    ("nerf_blocks.", "Chroma Radiance"),
    ("double_blocks.0.img_attn.norm.key_norm", "a FLUX-like model"),
    ("txt_in.individual_token_refiner.", "a part of HunyuanVideo or HunyuanImage, or one with q, k and v apart"),
    ("joint_blocks.0.", "a part of Stable Diffusion 3"),
    ("dec_net.cond_embed.", "Z-Image on pixels"),
    ("cap_embedder.", "a part of Z-Image or Lumina 2"),
    ("transformer_blocks.0.img_mod.1.", "a part of Qwen-Image"),
    ("vace_blocks.", "a VACE module of Wan"),
    ("blocks.0.attn1.", "Wan in diffusers' names"),
    ("blocks.0.self_attn.q.", "a part of Wan"),
    ("blocks.0.mlp.layer1.", "Cosmos-Predict2 or a part of Anima"),
    ("double_stream_blocks.0.", "HiDream"),
    ("visual_transformer_blocks.0.", "Kandinsky 5"),
    ("label_emb.0.0.weight", "Stable Diffusion XL"),
    ("input_blocks.0.0.weight", "Stable Diffusion 1.x or 2.x"),
    ("adaln_single.", "PixArt or a part of LTX-Video"),
    ("joint_transformer_blocks.0.", "AuraFlow"),
)


def facts_of(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, Any]:
    """Blocks and width of a model, and which release of its family it is (or is finetuned from) if its shapes tell."""
    blocks = tuple(
        len({key.split(".")[1] for key in shapes if key.startswith(f"{blocks}.")}) for blocks in recipe.lists
    )
    width = shapes[f"{recipe.text[0]}.weight"][0]
    release = RELEASES.get((recipe.name, blocks, width))
    if recipe is FLUX and (blocks, width) == (FLUX_BLOCKS, FLUX_WIDTH):
        release = FLUX_RELEASES.get(("guidance_in.in_layer.weight" in shapes, shapes["img_in.weight"][1]))
    return {"release": release, "blocks": blocks, "width": width}


def family_of(keys: Iterable[str]) -> str | None:
    """The name of a known model family whose key is among ``keys``, or None."""
    names = list(keys)
    return next((family for mark, family in KNOWN_FAMILIES if any(k.startswith(mark) for k in names)), None)


def find_recipe(keys: Collection[str], where: str) -> Recipe:
    """The recipe for a state dict, or :class:`SVDQuantError` that names what was seen (``where``: file or model)."""
    recipe = match_recipe(keys)
    if recipe is not None:
        return recipe
    present = set(keys)
    family = family_of(present)
    seen = f"It looks like {family}." if family else f"Its first keys are: {', '.join(sorted(present)[:6]) or 'none'}."
    known = ", ".join(dict.fromkeys(r.title for r in RECIPES))
    raise SVDQuantError(f"{where}: no quantization recipe for this architecture. {seen} Known so far: {known}.")


def plan_model(shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[Recipe, list[LayerGroup]]:
    """Recipe and groups of a whole model, from the shapes of its state dict by key."""
    recipe = find_recipe(shapes, where)
    layers = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2}
    return recipe, plan(recipe, layers, where)


def match_recipe(keys: Collection[str]) -> Recipe | None:
    """The recipe whose keys are all there, if any."""
    present = set(keys)
    for recipe in RECIPES:
        if present.issuperset(recipe.keys) and not present.intersection(recipe.absent):
            return recipe
    return None

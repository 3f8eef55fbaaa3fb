"""Recipes are data: what they match, in which order, and what they refuse."""

import pytest
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from comfyui_svdquant.svdq_core.families import FLUX, find_recipe
from comfyui_svdquant.svdq_core.recipes import W4A4, W4A16, Recipe, Rule, plan

from small_flux import random_flux


def shapes(sd):
    return {k.removesuffix(".weight"): tuple(t.shape) for k, t in sd.items() if k.endswith(".weight") and t.dim() == 2}


def test_flux_follows_the_paper():
    groups = plan(FLUX, shapes(random_flux(depth=2, single=3)), "m")
    kinds = {g.names[0].split(".", 2)[2]: g.kind for g in groups}
    assert kinds == {
        "img_mod.lin": W4A16, "txt_mod.lin": W4A16, "modulation.lin": W4A16,
        "img_attn.qkv": W4A4, "img_attn.proj": W4A4, "img_mlp.0": W4A4, "img_mlp.2": W4A4,
        "txt_attn.qkv": W4A4, "txt_attn.proj": W4A4, "txt_mlp.0": W4A4, "txt_mlp.2": W4A4,
        "linear1": W4A4, "linear2": W4A4,
    }  # fmt: skip
    assert {g.names[0].split(".", 2)[2] for g in groups if g.after_gelu} == {"img_mlp.2", "txt_mlp.2"}
    assert all(len(g.names) == 1 for g in groups)
    quantized = {g.names[0] for g in groups}
    kept = set(shapes(random_flux(depth=2, single=3))) - quantized
    assert {name.split(".")[0] for name in kept} == {"img_in", "txt_in", "time_in", "vector_in", "final_layer"}


def test_blocks_come_in_the_models_order():
    groups = plan(FLUX, shapes(random_flux(depth=1, single=12)), "m")
    blocks = [int(g.names[0].split(".")[1]) for g in groups if g.names[0].endswith("linear1")]
    assert blocks == list(range(12))
    assert groups[0].names[0].startswith("double_blocks")


def test_linears_that_share_an_input_are_grouped():
    qkv = [Rule(f"blocks.{{i}}.to_{c}", shares="qkv") for c in "qkv"]
    recipe = Recipe("split", "Split", ("blocks.0.to_q.weight",), (), (*qkv, Rule("blocks.{i}.out")))
    layers = {f"blocks.{i}.{n}": (8, 64) for i in range(2) for n in ("to_q", "to_k", "to_v", "out")}
    groups = plan(recipe, layers, "m")
    assert sorted(len(g.names) for g in groups) == [1, 1, 3, 3]
    assert {n.split(".")[1] for g in groups if len(g.names) == 3 for n in g.names[:1]} == {"0", "1"}


def test_a_missing_block_in_the_middle_is_named():
    layers = shapes(random_flux(single=3))
    for name in [n for n in layers if n.startswith("single_blocks.1.")]:
        del layers[name]
    with pytest.raises(SVDQuantError, match=r"m.safetensors: single_blocks.1.*missing"):
        plan(FLUX, layers, "m.safetensors")


def test_refusals_name_what_was_seen():
    with pytest.raises(SVDQuantError, match="looks like Chroma Radiance"):
        find_recipe(["img_in_patch.weight", "nerf_blocks.0.param_generator.weight"], "m")
    with pytest.raises(SVDQuantError, match="Its first keys are: a.weight"):
        find_recipe(["a.weight"], "m")
    with pytest.raises(SVDQuantError, match="looks like a VACE module of Wan"):
        find_recipe(["vace_blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.weight"], "m")
    with pytest.raises(SVDQuantError, match="looks like Cosmos-Predict2"):
        find_recipe(["blocks.0.self_attn.q_proj.weight", "blocks.0.mlp.layer1.weight"], "m")
    with pytest.raises(SVDQuantError, match="looks like Wan in diffusers' names"):
        find_recipe(["blocks.0.attn1.to_q.weight"], "m")
    assert find_recipe(random_flux(), "m") is FLUX

"""Reading LoRA files: every dialect gives the delta it was made from when the real ComfyUI applies it; bad files."""

import json
import logging
import pickle
import struct
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from comfyui_svdquant.svdq_core.lora_checks import describe_adapters
from comfyui_svdquant.svdq_core.lora_files import foreign_architecture, read_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from small_flux import random_flux

H, DEPTH, SINGLE, CONTEXT = 128, 2, 2, 64
SOME = settings(max_examples=8, deadline=None)
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


class Host:
    """A small FLUX in the real ComfyUI: which keys it maps, and what weights change by."""

    def __init__(self) -> None:
        import comfy.lora
        import comfy.lora_convert
        import comfy.sd

        sd = random_flux(H, DEPTH, SINGLE, context=CONTEXT, guidance=True)
        self.comfy = comfy
        self.model = comfy.sd.load_diffusion_model_state_dict(sd).model
        self.key_map = comfy.lora.model_lora_keys_unet(self.model, {})
        self.shapes = {
            k.removeprefix("diffusion_model."): tuple(t.shape)
            for k, t in self.model.state_dict().items()
            if k.startswith("diffusion_model.")
        }
        self.linears = {k.removesuffix(".weight"): s for k, s in self.shapes.items() if len(s) == 2}

    def deltas(self, tensors: dict) -> tuple[dict, list[str]]:
        """What ComfyUI adds to each weight and bias (float64; zeros are left out), and what it did not map."""
        handler = logging.Handler()
        missing: list[str] = []
        handler.emit = lambda record: missing.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        try:
            patches = self.comfy.lora.load_lora(self.comfy.lora_convert.convert_lora(tensors), self.key_map)
        finally:
            logging.getLogger().removeHandler(handler)
        out: dict = {}
        for target, patch in patches.items():
            key, offset, function = (*((target,) if isinstance(target, str) else target), None, None)[:3]
            name = key.removeprefix("diffusion_model.")
            weight = out.get(name, torch.zeros(self.shapes[name], dtype=torch.float64))
            change = [(1.0, patch, 1.0, offset, function)]
            out[name] = self.comfy.lora.calculate_weight(change, weight, key, intermediate_dtype=torch.float64)
        return {k: t for k, t in out.items() if t.any()}, [m for m in missing if "not loaded" in m]


@pytest.fixture(scope="module")
def host(comfy) -> Host:
    return Host()


def bfl_sites(host: Host) -> list:
    """(name in the file, layer, first row, rows, swapped halves) under black-forest-labs' names."""
    return [(name, name, 0, n, False) for name, (n, _) in host.linears.items()]


def diffusers_sites(host: Host) -> list:
    """The same layers under diffusers' names, q, k, v and mlp apart; norm_out has scale before shift."""
    embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}
    sites = [
        ("x_embedder", "img_in", 0, H, False),
        ("context_embedder", "txt_in", 0, H, False),
        ("proj_out", "final_layer.linear", 0, 64, False),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", 0, 2 * H, True),
    ]
    for name, layer in embedders.items():
        for a, b in (("linear_1", "in_layer"), ("linear_2", "out_layer")):
            sites.append((f"time_text_embed.{name}.{a}", f"{layer}.{b}", 0, H, False))
    for i in range(DEPTH):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for j, c in enumerate("qkv"):
            sites.append((f"{old}.attn.to_{c}", f"{new}.img_attn.qkv", j * H, H, False))
            sites.append((f"{old}.attn.add_{c}_proj", f"{new}.txt_attn.qkv", j * H, H, False))
        for a, b, rows in (
            ("attn.to_out.0", "img_attn.proj", H),
            ("attn.to_add_out", "txt_attn.proj", H),
            ("ff.net.0.proj", "img_mlp.0", 4 * H),
            ("ff.net.2", "img_mlp.2", H),
            ("ff_context.net.0.proj", "txt_mlp.0", 4 * H),
            ("ff_context.net.2", "txt_mlp.2", H),
            ("norm1.linear", "img_mod.lin", 6 * H),
            ("norm1_context.linear", "txt_mod.lin", 6 * H),
        ):
            sites.append((f"{old}.{a}", f"{new}.{b}", 0, rows, False))
    for i in range(SINGLE):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for j, c in enumerate("qkv"):
            sites.append((f"{old}.attn.to_{c}", f"{new}.linear1", j * H, H, False))
        sites.append((f"{old}.proj_mlp", f"{new}.linear1", 3 * H, 4 * H, False))
        sites.append((f"{old}.proj_out", f"{new}.linear2", 0, H, False))
        sites.append((f"{old}.norm.linear", f"{new}.modulation.lin", 0, 3 * H, False))
    return sites


def xlabs_sites(singles: int) -> list:
    sites = []
    for i in range(DEPTH):
        for j, stream in ((1, "img"), (2, "txt")):
            block = f"double_blocks.{i}"
            sites.append((f"{block}.processor.qkv_lora{j}", f"{block}.{stream}_attn.qkv", 0, 3 * H, False))
            sites.append((f"{block}.processor.proj_lora{j}", f"{block}.{stream}_attn.proj", 0, H, False))
    for i in range(singles):
        block = f"single_blocks.{i}"
        sites.append((f"{block}.processor.qkv_lora", f"{block}.linear1", 0, 3 * H, False))
        sites.append((f"{block}.processor.proj_lora", f"{block}.linear2", 0, H, False))
    return sites


def random_lora(
    host, sites, seed, dtype, down=".lora_A.weight", up=".lora_B.weight", alpha=False, prefix="", flat=False
):
    """A file's tensors for a random half of the sites, and the deltas that they mean."""
    g = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    chosen = [s for s in sites if torch.rand((), generator=g) < 0.5] or sites[:1]
    for name, layer, first, rows, swapped in chosen:
        n, k = host.linears[layer]
        rank = int(torch.randint(1, 6, (), generator=g))
        a, b = torch.randn(rank, k, generator=g).to(dtype), torch.randn(rows, rank, generator=g).to(dtype)
        key = prefix + (name.replace(".", "_") if flat else name)
        tensors |= {key + down: a, key + up: b}
        delta = b.double() @ a.double()
        if alpha:
            tensors[key + ".alpha"] = torch.rand((), generator=g) * 8
            delta = delta * (tensors[key + ".alpha"].item() / rank)
        if swapped:
            delta = torch.cat(delta.chunk(2)[::-1])
        whole = deltas.setdefault(layer + ".weight", torch.zeros(n, k, dtype=torch.float64))
        whole[first : first + rows] += delta
    return tensors, deltas


def check(host: Host, tensors: dict, expected: dict) -> None:
    found, missing = host.deltas(tensors)
    assert not missing
    assert found.keys() == expected.keys()
    for key, delta in expected.items():  # the same products in float64, summed in another order
        torch.testing.assert_close(found[key], delta.double(), rtol=1e-10, atol=1e-10, msg=key)


# Dialects that ComfyUI maps only in part or not at all: prefix, naming, suffixes.
PEFT = ["base_model.model.", "transformer.base_model.model.", "base_model.model.transformer."]
RENAMED = [
    *[(prefix, "bfl", ".lora_A.weight", ".lora_B.weight") for prefix in [*PEFT, "", "transformer."]],
    *[(prefix, "diffusers", ".lora_A.weight", ".lora_B.weight") for prefix in PEFT],
    ("base_model.model.", "bfl", ".lora_A.default.weight", ".lora_B.default.weight"),
    ("base_model.model.diffusion_model.", "bfl", ".lora_down.weight", ".lora_up.weight"),
    ("transformer.", "diffusers", ".lora_A.my_adapter.weight", ".lora_B.my_adapter.weight"),
    ("", "diffusers", ".lora_A.default.weight", ".lora_B.default.weight"),
]


@pytest.mark.parametrize(("prefix", "naming", "down", "up"), RENAMED)
@SOME
@given(seed=SEEDS, dtype=DTYPES, alpha=st.booleans())
def test_renamed_dialects(host, tmp_path_factory, prefix, naming, down, up, seed, dtype, alpha):
    sites = bfl_sites(host) if naming == "bfl" else diffusers_sites(host)
    tensors, expected = random_lora(host, sites, seed, dtype, down, up, alpha, prefix)
    path = tmp_path_factory.getbasetemp() / "renamed.safetensors"
    save_file(tensors, path, {"ss_base_model": "flux"})
    got, metadata = read_lora(path)
    assert metadata == {"ss_base_model": "flux"}
    assert describe_adapters(got) == describe_adapters(tensors) == {"lora": len([k for k in tensors if down in k])}
    check(host, got, expected)


@pytest.mark.parametrize("singles", [0, SINGLE])
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@SOME
@given(seed=SEEDS, dtype=DTYPES, alpha=st.booleans())
def test_xlabs(host, tmp_path_factory, singles, prefix, seed, dtype, alpha):
    sites = xlabs_sites(singles)
    tensors, expected = random_lora(host, sites, seed, dtype, ".down.weight", ".up.weight", alpha, prefix)
    path = tmp_path_factory.getbasetemp() / "xlabs.safetensors"
    save_file(tensors, path)
    got, _ = read_lora(path)
    assert describe_adapters(tensors) == describe_adapters(got)
    check(host, got, expected)


@pytest.mark.parametrize(
    ("prefix", "naming", "down", "up", "flat"),
    [
        ("lora_unet_", "bfl", ".lora_down.weight", ".lora_up.weight", True),  # kohya
        ("diffusion_model.", "bfl", ".lora_A.weight", ".lora_B.weight", False),
        ("transformer.", "diffusers", ".lora_A.weight", ".lora_B.weight", False),  # diffusers, ai-toolkit
        ("lora_transformer_", "diffusers", ".lora_down.weight", ".lora_up.weight", True),  # OneTrainer
        ("lycoris_", "diffusers", ".lora_down.weight", ".lora_up.weight", True),  # SimpleTuner
        ("", "diffusers", ".lora_A.weight", ".lora_B.weight", False),  # DiffSynth
        ("transformer.", "diffusers", ".lora.down.weight", ".lora.up.weight", False),
    ],
)
def test_known_dialects_are_kept(host, tmp_path, prefix, naming, down, up, flat):
    sites = bfl_sites(host) if naming == "bfl" else diffusers_sites(host)
    tensors, expected = random_lora(host, sites, 0, torch.bfloat16, down, up, True, prefix, flat)
    te = {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{half}.weight": torch.ones(2, 2)
        for half in ("lora_down", "lora_up")
    }
    got, _ = read_lora(write(tmp_path, tensors | te))
    assert got.keys() == tensors.keys() | te.keys()
    assert all(torch.equal(got[k], t) for k, t in tensors.items())
    check(host, {k: t for k, t in got.items() if k in tensors}, expected)


def test_other_adapters_are_kept(host, tmp_path):
    a = torch.ones
    layers = {
        "lokr": {"lokr_w1": a(4, 4), "lokr_w2_a": a(32, 2), "lokr_w2_b": a(2, 32), "alpha": torch.tensor(2.0)},
        "loha": {"hada_w1_a": a(H, 2), "hada_w1_b": a(2, H), "hada_w2_a": a(H, 2), "hada_w2_b": a(2, H)},
        "glora": {"a1.weight": a(2, H), "a2.weight": a(H, 2), "b1.weight": a(H, 2), "b2.weight": a(2, H)},
        "oft": {"oft_blocks": a(4, 32, 32)},
        "boft": {"oft_blocks": a(2, 4, 32, 32)},
        "dora": {"lora_down.weight": a(2, H), "lora_up.weight": a(H, 2), "dora_scale": a(H, 1)},
        "diff": {"diff": a(H, H), "diff_b": a(H)},
    }
    names = ["double_blocks_0_img_attn_proj", "double_blocks_0_txt_attn_proj", "double_blocks_1_img_attn_proj"]
    names += ["double_blocks_1_txt_attn_proj", "txt_in", "time_in_out_layer", "vector_in_out_layer"]
    tensors = {f"lora_unet_{n}.{k}": t for n, parts in zip(names, layers.values()) for k, t in parts.items()}
    tensors["lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm"] = a(128)
    got, _ = read_lora(write(tmp_path, tensors))
    assert got.keys() == tensors.keys()
    assert describe_adapters(got) == {kind: 1 for kind in (*layers, "lora", "norm")}
    assert not host.deltas({k: t for k, t in got.items() if "oft" not in k and "txt_in" not in k})[1]


def test_peft_dora_becomes_dora_scale(host, tmp_path):
    """PEFT saves the magnitude as a vector, which ComfyUI's formula would broadcast along the wrong axis."""
    name = "transformer_blocks.0.attn.to_out.0"
    pair = {
        f"transformer.{name}.lora_A.weight": torch.ones(2, H),
        f"transformer.{name}.lora_B.weight": torch.ones(H, 2),
    }
    for key in (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"):
        got, _ = read_lora(write(tmp_path, pair | {f"transformer.{name}{key}": torch.arange(1.0, H + 1)}))
        assert got[f"transformer.{name}.dora_scale"].shape == (H, 1)
        assert describe_adapters(got) == {"lora": 1, "dora": 1}
        assert not host.deltas(got)[1]


def test_bfl_control_lora_reaches_comfyui_unchanged(host, tmp_path):
    tensors = {
        "img_in.lora_A.weight": torch.ones(2, 128),
        "img_in.lora_B.weight": torch.ones(H, 2),
        "img_in.lora_B.bias": torch.ones(H),
        "single_blocks.0.norm.key_norm.scale": torch.ones(128),
    }
    got, _ = read_lora(write(tmp_path, tensors))
    assert got.keys() == tensors.keys()
    assert not host.deltas(got)[1]
    del tensors["single_blocks.0.norm.key_norm.scale"]  # now ComfyUI would not recognise it
    tensors["double_blocks.0.img_attn.norm.key_norm.scale"] = torch.ones(128)
    got, _ = read_lora(write(tmp_path, tensors))
    assert not host.deltas({k: t for k, t in got.items() if "lora" not in k})[1]
    assert "diffusion_model.img_in.diff_b" in got


def test_float8_is_widened(tmp_path):
    key = "diffusion_model.img_in"
    down = torch.randn(4, 64).to(torch.float8_e4m3fn)
    path = write(
        tmp_path, {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": torch.randn(H, 4).to(torch.float8_e5m2)}
    )
    got, _ = read_lora(path)
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    assert torch.equal(got[f"{key}.lora_A.weight"].float(), down.float())


# Nunchaku's files ------------------------------------------------------------------------------------------------


def pack(matrix: torch.Tensor, down: bool) -> torch.Tensor:
    """A half (channels, ranks) as Nunchaku stores it: every element's address, from PTX's operand B of m16n8k16.

    Of a 16×16 tile, lane 4·(n % 8) + (k // 2) % 4 holds 8 elements: n // 8, then k // 8, then k % 2. The reduction
    index k is the channel in the down half and the rank in the up half. Tiles follow each other rank first.
    """
    channels, ranks = matrix.shape
    c, r = torch.meshgrid(torch.arange(channels), torch.arange(ranks), indexing="ij")
    n, k = (r % 16, c % 16) if down else (c % 16, r % 16)
    lane = 4 * (n % 8) + (k // 2) % 4
    address = (c // 16 * (ranks // 16) + r // 16) * 256 + lane * 8 + n // 8 * 4 + k // 8 * 2 + k % 2
    out = torch.empty(channels * ranks, dtype=matrix.dtype)
    out[address.flatten()] = matrix.flatten()
    return out.view(channels, ranks)


def pad_ranks(down, up):
    extra = -down.shape[0] % 16
    return torch.cat([down, down.new_zeros(extra, down.shape[1])]), torch.cat([up, up.new_zeros(up.shape[0], extra)], 1)


def nunchaku_file(host: Host, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[dict, dict]:
    """A file as Nunchaku's converter writes it (base branch of rank 32 first), and the deltas of the LoRA in it."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    maybe = lambda: bool(torch.rand((), generator=g) < 0.7)  # noqa: E731
    tensors, expected = {}, {}

    def pair(n, k):
        rank = int(torch.randint(1, 20, (), generator=g)) if maybe() else 0
        return randn(rank, k), randn(n, rank)

    def store(name, down, up):
        down, up = pad_ranks(torch.cat([randn(32, down.shape[1]), down]), torch.cat([randn(up.shape[0], 32), up], 1))
        tensors[f"{name}.lora_down"] = pack(down.t().contiguous(), True)
        tensors[f"{name}.lora_up"] = pack(up, False)

    def store_modulation(name, down, up, splits):
        if down.shape[0]:
            down, up = pad_ranks(down, up)
            tensors[f"{name}.lora_down"] = down
            mixed = [up[s * H + j] for j in range(H) for s in range(splits)]
            tensors[f"{name}.lora_up"] = torch.stack(mixed)

    def expect(key, delta):
        if delta.any():
            expected[key] = delta.double()

    def product(down, up):
        return up.double() @ down.double()

    for i in range(DEPTH):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for context, stream in (("", "img"), ("_context", "txt")):
            for name, layer in (
                (f"qkv_proj{context}", "attn.qkv"),
                (f"out_proj{context}", "attn.proj"),
                (f"mlp{context}_fc1", "mlp.0"),
                (f"mlp{context}_fc2", "mlp.2"),
            ):
                down, up = pair(*host.linears[f"{new}.{stream}_{layer}"])
                store(f"{old}.{name}", down, up)
                expect(f"{new}.{stream}_{layer}.weight", product(down, up))
            down, up = pair(6 * H, H)
            store_modulation(f"{old}.norm1{context}.linear", down, up, 6)
            expect(f"{new}.{stream}_mod.lin.weight", product(down, up))
        if maybe():
            biases = {
                "attn.to_qkv": "img_attn.qkv",
                "norm1_context.linear": "txt_mod.lin",
                "ff.net.0.proj": "img_mlp.0",
            }
            for name, layer in biases.items():
                tensors[f"{old}.{name}.bias"] = expected[f"{new}.{layer}.bias"] = randn(
                    host.linears[f"{new}.{layer}"][0]
                )
            tensors[f"{old}.attn.norm_added_k.weight"] = expected[f"{new}.txt_attn.norm.key_norm.weight"] = randn(128)
    for i in range(SINGLE):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        qkv, mlp = pair(3 * H, H), pair(4 * H, H)
        store(f"{old}.qkv_proj", *qkv)
        store(f"{old}.mlp_fc1", *mlp)
        expect(f"{new}.linear1.weight", torch.cat([product(*qkv), product(*mlp)]))
        if maybe():  # as the converter splits one LoRA: the same up in both
            down, up = pair(H, 5 * H)
            out, mlp = (down[:, :H], up), (down[:, H:], up)
        else:
            out, mlp = pair(H, H), pair(H, 4 * H)
        store(f"{old}.out_proj", *out)
        store(f"{old}.mlp_fc2", *mlp)
        expect(f"{new}.linear2.weight", torch.cat([product(*out), product(*mlp)], dim=1))
        down, up = pair(3 * H, H)
        store_modulation(f"{old}.norm.linear", down, up, 3)
        expect(f"{new}.modulation.lin.weight", product(down, up))
        if maybe():
            tensors[f"{old}.proj_mlp.bias"] = randn(4 * H)
            whole = torch.cat([torch.zeros(3 * H, dtype=dtype), tensors[f"{old}.proj_mlp.bias"]])
            if maybe():
                whole[: 3 * H] = tensors[f"{old}.attn.to_qkv.bias"] = randn(3 * H)
            expected[f"{new}.linear1.bias"] = whole
            tensors[f"{old}.proj_out.bias"] = expected[f"{new}.linear2.bias"] = randn(H)
    plain = [s for s in diffusers_sites(host) if "blocks" not in s[0]]
    for site in plain if maybe() else ():
        more, deltas = random_lora(host, [site], seed, dtype)
        tensors, expected = tensors | more, expected | deltas
    if maybe():
        tensors["norm_out.linear.bias"] = randn(2 * H)
        expected["final_layer.adaLN_modulation.1.bias"] = torch.cat(tensors["norm_out.linear.bias"].chunk(2)[::-1])
    return tensors, expected


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_nunchaku(host, tmp_path_factory, seed, dtype):
    tensors, expected = nunchaku_file(host, seed, dtype)
    path = tmp_path_factory.getbasetemp() / "nunchaku.safetensors"
    save_file(tensors, path)
    got, _ = read_lora(path)
    assert all(k.startswith("diffusion_model.") for k in got)
    check(host, got, expected)


def test_nunchaku_keeps_the_rank_of_a_split_lora(host, tmp_path):
    """proj_out is split into two layers with one up: read back it has its rank once."""
    tensors, _ = nunchaku_file(host, 0)
    block = "single_transformer_blocks.0"
    down, up = torch.randn(4, 5 * H), torch.randn(H, 4)
    for name, part in (("out_proj", down[:, :H]), ("mlp_fc2", down[:, H:])):
        base_down, base_up = torch.randn(32, part.shape[1]), torch.randn(H, 32)
        whole_down, whole_up = pad_ranks(torch.cat([base_down, part]), torch.cat([base_up, up], 1))
        tensors[f"{block}.{name}.lora_down"] = pack(whole_down.t().contiguous(), True)
        tensors[f"{block}.{name}.lora_up"] = pack(whole_up, False)
    got, _ = read_lora(write(tmp_path, tensors))
    assert torch.equal(got["diffusion_model.single_blocks.0.linear2.lora_A.weight"], down)
    assert torch.equal(got["diffusion_model.single_blocks.0.linear2.lora_B.weight"], up)


def test_nunchaku_control_lora_widens_img_in(host, tmp_path):
    tensors, _ = nunchaku_file(host, 0)
    tensors |= {"x_embedder.lora_A.weight": torch.ones(2, 128), "x_embedder.lora_B.weight": torch.ones(H, 2)}
    got, _ = read_lora(write(tmp_path, tensors))
    assert got["diffusion_model.img_in.reshape_weight"].tolist() == [H, 128]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer_blocks.0.mlp_fc1.lora_up"), "transformer_blocks.0.mlp_fc1.lora_up is missing"),
        (
            lambda t: [t.pop(f"single_transformer_blocks.1.qkv_proj.lora_{h}") for h in ("down", "up")],
            "single_transformer_blocks.1.qkv_proj.lora_down is missing: .* writes every 4-bit layer",
        ),
        (
            lambda t: t.update(
                {f"single_transformer_blocks.0.qkv_proj_context.lora_{h}": torch.ones(16, 48) for h in ("down", "up")}
            ),
            "single_transformer_blocks.0.qkv_proj_context.lora_down is unexpected",
        ),
        (
            lambda t: t.update(
                {f"transformer_blocks.0.norm.linear.lora_{h}": torch.ones(48, 48) for h in ("down", "up")}
            ),
            "transformer_blocks.0.norm.linear.lora_down is unexpected",
        ),
        (
            lambda t: t.update(
                {f"single_transformer_blocks.0.mlp_fc2.lora_{h}": torch.ones(512, 48) for h in ("down", "up")}
            ),
            "single_transformer_blocks.0: expected as many inputs .* found 128 and 128, 512 and 128",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.mlp_fc1.lora_up": torch.ones(512, 40)}),
            r"transformer_blocks.0.mlp_fc1.lora_up: expected multiples of 16 .* found shape \(512, 40\)",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.mlp_fc1.lora_up": torch.ones(512, 16)}),
            "lora_up: .*at least 32 ranks",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.mlp_fc1.lora_up": torch.ones(512, 128)}),
            "transformer_blocks.0.mlp_fc1.lora_up: expected rank .* as in transformer_blocks.0.mlp_fc1.lora_down",
        ),
        (lambda t: t.update({"transformer_blocks.0.mlp_fc1.lora_up": torch.ones(512)}), "lora_up: expected 2 dim"),
        (
            lambda t: t.update({"transformer_blocks.0.strange.bias": torch.ones(8)}),
            "strange.bias: not among the tensors",
        ),
        (
            lambda t: t.update(
                {f"transformer_blocks.0.ff.net.2.lora_{h}.weight": torch.ones(2, 2) for h in ("A", "B")}
            ),
            "transformer_blocks.0.ff.net.2.lora_[AB].weight: an unpacked LoRA inside",
        ),
        (lambda t: t.update({"extra.lora_A.weight": torch.ones(2, H)}), "extra.lora_B.weight is not"),
    ],
)
def test_bad_nunchaku_files(host, tmp_path, change, message):
    tensors, _ = nunchaku_file(host, 1)
    change(tensors)
    refused(write(tmp_path, tensors), message)


def test_nunchaku_file_with_the_base_alone(tmp_path):
    tensors = {}
    for name in ("qkv_proj", "mlp_fc1", "out_proj", "mlp_fc2"):
        tensors |= {f"single_transformer_blocks.0.{name}.lora_{half}": torch.ones(16, 32) for half in ("down", "up")}
    refused(write(tmp_path, tensors), "nothing beyond the base model's own branch of 32 ranks")


# Bad files -------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: dict) -> Path:
    path = folder / "lora.safetensors"
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(SVDQuantError, match=message) as error:
        read_lora(path)
    assert str(error.value).startswith(f"{path}: ")


LAYER = "diffusion_model.double_blocks.0.img_attn.proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
GOOD = {A: torch.ones(4, 8), B: torch.ones(8, 4), f"{LAYER}.alpha": torch.tensor(4.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: None}, rf"{B} is there but {A} is not"),
        ({B: None}, rf"{A} is there but {B} is not"),
        ({A: torch.ones(3, 8)}, rf"{B} has rank 4 \(shape \(8, 4\)\), but {A} has rank 3"),
        ({A: torch.ones(4)}, rf"{A}: expected 2 dimensions, found shape \(4,\)"),
        ({A: torch.ones(4, 8, 1)}, rf"{A}: expected 2 dimensions as in {B}"),
        ({A: torch.ones(4, 8, 2), B: torch.ones(8, 4, 2)}, rf"{B}: expected 2 dimensions, found shape \(8, 4, 2\)"),
        (
            {A: torch.ones(0, 8), B: torch.ones(8, 0)},
            rf"{LAYER}.lora_[AB].weight: expected numbers, found none \(shape .*, so rank 0",
        ),
        ({A: torch.full((4, 8), torch.nan)}, rf"{A}: 32 of 32 values are NaN or infinite"),
        ({B: torch.tensor([[torch.inf, 0, 0, 0]] * 8)}, rf"{B}: 8 of 32 values are NaN or infinite"),
        ({A: torch.full((4, 8), torch.nan).to(torch.float8_e4m3fn)}, rf"{A}: 32 of 32 values are NaN"),
        ({A: torch.ones(4, 8, dtype=torch.int8)}, rf"{A}: expected floating-point numbers, found int8"),
        ({A: torch.ones(4, 8, dtype=torch.complex64)}, rf"{A}: expected floating-point numbers, found complex64"),
        (
            {f"{LAYER}.alpha": torch.tensor([1.0, 2.0])},
            rf"{LAYER}.alpha: expected one finite number, found shape \(2,\)",
        ),
        ({f"{LAYER}.alpha": torch.tensor(torch.inf)}, rf"{LAYER}.alpha: expected one finite number, found inf"),
        ({f"{LAYER}.alpha": torch.tensor(True)}, rf"{LAYER}.alpha: expected one finite number, found True of bool"),
        ({"x.lokr_w1": torch.ones(2, 2)}, "x.lokr_w1 needs lokr_w2, or lokr_w2_a and lokr_w2_b in x"),
        (
            {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2_a": torch.ones(2, 2), "x.lokr_w2_b": torch.ones(3, 2)},
            "x.lokr_w2_a has rank 2",
        ),
        ({"x.hada_w1_a": torch.ones(2, 2)}, "x.hada_w1_a needs hada_w1_a and hada_w1_b in x"),
        ({"x.a1.weight": torch.ones(2, 2)}, "x.a1.weight needs a1.weight and a2.weight in x"),
        ({"x.oft_blocks": torch.ones(2, 2)}, "x.oft_blocks: expected 3 dimensions"),
        ({"x.diff_b": torch.ones(2, 2)}, "x.diff_b: expected 1 dimension, found"),
        (
            {
                f"{LAYER}.lora_A.default.weight": torch.ones(4, 8),
                f"{LAYER}.lora_B.default.weight": torch.ones(8, 4),
            },
            rf"both mean {LAYER}.lora_[AB].weight. The file holds two LoRAs",
        ),
    ],
)
def test_bad_tensors_are_named(tmp_path, change, message):
    tensors = {k: t for k, t in (GOOD | change).items() if t is not None}
    refused(write(tmp_path, tensors), message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (random_flux(), "no LoRA but a 16-bit diffusion model .FLUX.1.. Load it with: Load Diffusion Model"),
        ({"decoder.conv_in.weight": torch.ones(2, 2)}, "no LoRA but a VAE"),
        ({"conditioner.x": torch.ones(2)}, "no LoRA but a full checkpoint"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "an embedding"),
        ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.ones(2, 2)}, "an IP-Adapter"),
        ({"whatever": torch.ones(2)}, "no adapter that is known here: .* found whatever"),
        ({f"{LAYER}.alpha": torch.ones(())}, "no adapter that is known here"),
        ({}, "no adapter that is known here: .* found none"),
    ],
)
def test_files_without_adapters(tmp_path, tensors, message):
    refused(write(tmp_path, tensors), message)


def test_files_that_are_no_safetensors(tmp_path):
    good = write(tmp_path, GOOD).read_bytes()
    length = int.from_bytes(good[:8], "little")
    path = tmp_path / "bad.safetensors"
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path, "no such file")
    for content, message in (
        (b"", "the file is empty"),
        (good[:5], "not a safetensors file"),
        (good[: 8 + length // 2], "truncated or damaged"),
        (good[:-1], "truncated or damaged"),
        (struct.pack("<Q", length + 10**6) + good[8:], "truncated or damaged"),
        (struct.pack("<Q", 2**63) + good[8:], "not a safetensors file"),
        (b"\n<!DOCTYPE html><html>Log in</html>" * 20, "a web page, not a LoRA"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (pickle.dumps({"state_dict": 1}), "Pickle can run code"),
        (b"PK\x03\x04" + bytes(99), "Pickle can run code"),
        (b"GGUF" + bytes(99), "a GGUF file"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "truncated or damaged"),
        (struct.pack("<Q", 100_004) + b'{"a":' + b"[" * 99_999, "truncated or damaged"),
        (
            header({"x.diff": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99]}}) + bytes(8),
            "truncated or damaged",
        ),
        (header({"x.diff": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}) + bytes(3), "F6_E2M3"),
        (
            header({"x.diff": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}) + bytes(2),
            "x.diff: expected float",
        ),
    ):
        path.write_bytes(content)
        refused(path, message)


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def test_a_million_tensors_are_refused(tmp_path):
    path = tmp_path / "million.safetensors"
    entry = '":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"k{i}{entry}' for i in range(1_000_000)) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused(path, "1000000 tensors. A LoRA has at most a few thousand")


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("Stable Diffusion XL", ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight"]),
        ("Stable Diffusion XL", ["unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_k.lora_A.weight"]),
        ("Stable Diffusion 1", ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_up.weight"]),
        ("Stable Diffusion 1", ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"]),
        ("Stable Diffusion 3", ["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"]),
        ("Stable Diffusion 3", ["transformer.transformer_blocks.23.attn.add_k_proj.lora_A.weight"]),
        ("Wan 2.x video", ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"]),
        ("Wan 2.x video", ["lora_unet_blocks_0_cross_attn_k_img.lora_down.weight"]),
        ("Wan 2.x video", ["lora_unet__blocks_0_cross_attn_k.lora_down.weight"]),
        (
            "Wan 2.x video",
            ["transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.ffn.net.2.lora_A.weight"],
        ),
        ("Qwen-Image", ["transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight"]),
        ("Qwen-Image", ["lora_unet_transformer_blocks_0_txt_mod_1.lora_down.weight"]),
        ("Qwen-Image", ["transformer_blocks.59.attn.to_q.lora_A.default.weight"]),
        ("HunyuanVideo", ["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"]),
        ("HunyuanVideo", ["lora_unet_double_blocks_0_img_mod_linear.lora_down.weight"]),
        ("HunyuanVideo", ["diffusion_model.double_blocks.19.img_attn.qkv.lora_A.weight"]),
        ("LTX", ["transformer.transformer_blocks.27.attn1.to_q.lora_A.weight"]),
        ("LTX-Video", ["diffusion_model.patchify_proj.lora_A.weight"]),
        ("Z-Image", ["diffusion_model.layers.0.attention.to_q.lora_A.weight"]),
        ("Z-Image or Lumina 2", ["lora_unet_context_refiner_0_attention_qkv.lora_down.weight"]),
        ("FLUX.2", ["diffusion_model.single_blocks.47.linear1.lora_A.weight"]),
        ("FLUX.2", ["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"]),
        ("Chroma", ["diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight"]),
        ("AuraFlow", ["transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight"]),
        ("HiDream", ["diffusion_model.double_stream_blocks.0.block.attn1.to_q.lora_A.weight"]),
        ("Cosmos", ["diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight"]),
        (None, ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"]),
        (None, ["lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0.lora_down.weight"]),
        (None, []),
    ],
)
def test_foreign_architectures(tmp_path, model, keys):
    assert (foreign_architecture(keys) or "").startswith(model or "")
    assert (foreign_architecture(keys) is None) == (model is None)
    if model and "lora_A.weight" in keys[0] and not keys[0].startswith("transformer.blocks."):  # left to ComfyUI
        pair = {keys[0]: torch.ones(2, 4), keys[0].replace("lora_A", "lora_B"): torch.ones(4, 2)}
        assert read_lora(write(tmp_path, pair))[0].keys() == pair.keys()


def test_a_full_flux_lora_is_not_foreign(host):
    """All 19 + 38 blocks, in every naming."""
    bfl = [
        f"double_blocks.{i}.{s}_{n}"
        for i in range(19)
        for s in ("img", "txt")
        for n in ("attn.qkv", "mlp.0", "mod.lin")
    ]
    bfl += [f"single_blocks.{i}.{n}" for i in range(38) for n in ("linear1", "linear2", "modulation.lin")]
    diffusers = list(host.comfy.utils.flux_to_diffusers({"depth": 19, "depth_single_blocks": 38, "hidden_size": H}))
    diffusers = [k.removesuffix(".weight") for k in diffusers if "to_qkv_mlp_proj" not in k]  # that one is FLUX.2's
    names = [*bfl, *(f"diffusion_model.{k}" for k in bfl), *(f"lora_unet_{k.replace('.', '_')}" for k in bfl)]
    names += [*diffusers, *(f"transformer.{k}" for k in diffusers)]
    names += [p + k.replace(".", "_") for p in ("lora_transformer_", "lycoris_") for k in diffusers]
    for suffix in (".lora_A.weight", ".lora_down.weight", ".lokr_w1", ".alpha"):
        assert foreign_architecture(name + suffix for name in names) is None


def test_every_normalised_key_is_one_that_comfyui_maps(host, tmp_path):
    """Whole files, all layers: nothing is left over."""
    for naming, sites in (
        ("bfl", bfl_sites(host)),
        ("diffusers", diffusers_sites(host)),
        ("xlabs", xlabs_sites(SINGLE)),
    ):
        down, up = (".down.weight", ".up.weight") if naming == "xlabs" else (".lora_A.weight", ".lora_B.weight")
        prefix = "" if naming == "xlabs" else "base_model.model."
        tensors = {}
        for name, layer, _, rows, _ in sites:
            tensors |= {
                prefix + name + down: torch.ones(2, host.linears[layer][1]),
                prefix + name + up: torch.ones(rows, 2),
            }
        got, _ = read_lora(write(tmp_path, tensors))
        layers = {k.rsplit(".lora_", 1)[0] for k in got}
        assert layers <= host.key_map.keys() and len(got) == len(tensors)


def test_files_stay_readable_by_others(tmp_path):
    """Reading does not touch the file."""
    path = write(tmp_path, GOOD)
    read_lora(path)
    assert load_file(path).keys() == GOOD.keys()

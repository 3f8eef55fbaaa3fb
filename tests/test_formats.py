"""Packing and number formats: exact round trips, exact rounding, hypothesis-drawn values."""

import pytest
import torch
from comfyui_svdquant.svdq_core.formats import BRANCH_FORMATS, FORMATS, by_disk_name, get_format
from comfyui_svdquant.svdq_core.formats.nvfp4 import GRID, round_e2m1
from comfyui_svdquant.svdq_core.packing import pack_int4, unpack_int4, unpack_uint4
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0))
def test_signed_codes_survive_packing(codes):
    packed = pack_int4(torch.tensor(codes))
    assert packed.dtype == torch.int8
    assert packed.shape[-1] == len(codes) // 2
    assert unpack_int4(packed).tolist() == codes


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0))
def test_unsigned_codes_survive_packing(codes):
    assert unpack_uint4(pack_int4(torch.tensor(codes))).tolist() == codes


def test_the_low_nibble_is_the_even_column():
    assert pack_int4(torch.tensor([1, 2])).tolist() == [0x21]
    assert pack_int4(torch.tensor([-1, -8])).view(torch.uint8).tolist() == [0x8F]


def test_comfy_kitchen_reads_our_packing(comfy):
    from comfy_kitchen.backends.eager.svdquant import _pack_int4_row_major, _unpack_int4_row_major

    codes = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_pack_int4_row_major(codes), pack_int4(codes))
    assert torch.equal(_unpack_int4_row_major(pack_int4(codes)).long(), codes)


def test_e2m1_rounds_to_the_nearest_value_ties_to_even():
    grid = torch.tensor(GRID)
    values = torch.linspace(-7, 7, 14001)
    distance = (values.abs().unsqueeze(1) - grid).abs()
    assert torch.equal((round_e2m1(values) - values).abs(), distance.min(dim=1).values)
    assert round_e2m1(torch.tensor([0.25, 0.75, 2.5, 3.5, 5.0, -2.5])).tolist() == [0.0, 1.0, 2.0, 4.0, 4.0, -2.0]


@pytest.mark.parametrize("name", BRANCH_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_weights_are_exactly_the_rounded_ones(name, dtype):
    fmt = get_format(name)
    w = torch.randn(48, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2, 48).unsqueeze(1)
    w[3] = 0  # an all-zero row must not divide by zero
    codes, scales = fmt.round_weight(w, dtype)
    tensors = fmt.pack(codes, scales, dtype, fmt.tensor_scale(w))
    assert torch.equal(fmt.unpack(tensors, torch.float32), codes * fmt.spread(scales, 256))
    for key, (shape, dtypes) in fmt.expected(48, 256).items():
        assert tuple(tensors[key].shape) == shape
        assert tensors[key].dtype in dtypes


@pytest.mark.parametrize(("name", "limit_db"), [("int4", -18), ("nvfp4", -19), ("int8", -38)])
def test_rounding_error_of_gaussian_weights(name, limit_db):
    fmt = get_format(name)
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    codes, scales = fmt.round_weight(w, torch.bfloat16)
    error = (codes * fmt.spread(scales, 1024) - w).square().sum() / w.square().sum()
    assert 10 * torch.log10(error) < limit_db


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.floats(1e-6, 1e4), st.booleans(), st.integers(0, 2**31))
def test_int4_activations_against_the_formula(tokens, groups, size, unsigned, seed):
    x = torch.randn(tokens, 64 * groups, generator=torch.Generator().manual_seed(seed)) * size
    x = x.abs() if unsigned else x
    got = get_format("int4").round_activations(x.clone(), torch.bfloat16, unsigned)
    for t in range(tokens):
        for g in range(groups):
            block = x[t, 64 * g : 64 * g + 64]
            top, low = (15, 0) if unsigned else (7, -7)
            scale = (block.abs().max() / top).to(torch.bfloat16).float()
            codes = torch.round(block / scale).clamp(low, top)
            assert torch.equal(got[t, 64 * g : 64 * g + 64], codes * scale)


@pytest.mark.parametrize("name", BRANCH_FORMATS)
def test_zeros_stay_zero_and_nan_shows(name):
    fmt = get_format(name)
    x = torch.zeros(2, 128)
    assert torch.equal(fmt.round_activations(x.clone(), torch.float16), x)
    x[1, 5] = float("nan")
    out = fmt.round_activations(x.clone(), torch.float16)
    assert out[1].isnan().any()
    assert torch.equal(out[0], torch.zeros(128))


def test_w4a16_uses_its_zero_point():
    """A weight that is all on one side of zero loses little: 15 steps span its own range."""
    w = 5 + torch.rand(8, 128, generator=torch.Generator().manual_seed(3))
    fmt = FORMATS["awq"]
    tensors = fmt.solve(w, torch.ones(128), torch.bfloat16)
    assert (fmt.unpack(tensors, torch.float32) - w).abs().max() < 1 / 15 + 0.03  # half a step and bf16's 5.x
    assert set(tensors) == {"weight", "weight_scale", "weight_zero"}


def test_formats_are_found_by_both_names():
    assert by_disk_name("svdquant_w4a4") is FORMATS["int4"]
    assert by_disk_name("awq_w4a16") is FORMATS["awq"]
    assert by_disk_name("float8_e4m3fn") is None
    with pytest.raises(ValueError, match="int4, nvfp4, int8"):
        get_format("int3")

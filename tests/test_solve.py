"""The solver against exact formulas in float64."""

import math

import pytest
import torch
from comfyui_svdquant import svdq_core
from comfyui_svdquant.svdq_core import solve
from comfyui_svdquant.svdq_core.formats import BRANCH_FORMATS, GELU_SHIFT, get_format
from comfyui_svdquant.svdq_core.gptq import DAMP, gptq, hessian_factor
from comfyui_svdquant.svdq_core.lowrank import better_branch, lowrank_branch
from comfyui_svdquant.svdq_core.packing import unpack_int4
from comfyui_svdquant.svdq_core.smoothing import smoothing_factor
from comfyui_svdquant.svdq_core.solve import (
    PRESETS,
    Candidate,
    SolveSettings,
    finish,
    solve_linear,
    solve_shared_input,
    try_candidate,
)

N, K, T = 96, 256, 384


def problem(seed=0, outliers=True):
    """A weight with a decaying spectrum and inputs with large channels: what SVDQuant is for."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g) / 16
    x = torch.randn(T, K, generator=g) @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=g) / 16)
    if outliers:
        x[:, torch.randperm(K, generator=g)[:6]] *= 50
    return w, x, torch.randn(N, generator=g) / 10


def db(got, exact):
    error = float((got.double() - exact.double()).square().sum() / exact.double().square().sum())
    return 10 * math.log10(max(error, 1e-300))


def forward64(layer, x):
    """The definition, in float64 from the stored tensors: y = Q(x/λ) Q(R)ᵀ + (x down) upᵀ + b."""
    sd = {k: t.double() for k, t in layer.state_dict("").items() if k not in ("weight", "comfy_quant")}
    codes = unpack_int4(layer.tensors["weight"]).double().reshape(-1, K // 64, 64)
    residual = (codes * sd["weight_scale"].t().unsqueeze(-1)).reshape(-1, K)
    top, low = (15, 0) if layer.act_unsigned else (7, -7)
    smoothed = (((x + GELU_SHIFT) if layer.act_unsigned else x) / sd["smooth_factor"].float()).reshape(-1, K // 64, 64)
    scale = smoothed.abs().amax(-1, keepdim=True) / top  # fp32 input: an fp32 scale
    rounded = ((smoothed / scale).round().clamp(low, top).double() * scale.double()).reshape(-1, K)
    return rounded @ residual.t() + (x.double() @ sd["proj_down"]) @ sd["proj_up"].t() + sd["bias"]


@pytest.mark.parametrize("unsigned", [False, True])
def test_forward_is_the_formula(unsigned):
    w, x, b = problem()
    x = torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x
    layer = solve_linear(w, x, bias=b, act_unsigned=unsigned)
    assert layer.act_unsigned == unsigned
    assert db(layer(x), forward64(layer, x)) < -100


@pytest.mark.parametrize("unsigned", [False, True])
def test_comfy_kitchen_computes_the_same(comfy, unsigned):
    """Its own operators on our tensors: other tools can run what we write."""
    import comfy_kitchen as ck

    w, x, b = problem()
    x = torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x
    layer = solve_linear(w, x, bias=b, act_unsigned=unsigned)
    sd = {k: t.float() if t.is_floating_point() else t for k, t in layer.state_dict("").items()}
    codes, scales, low = ck.quantize_svdquant_w4a4(
        x + GELU_SHIFT if unsigned else x, sd["smooth_factor"], sd["proj_down"], act_unsigned=unsigned, lora_x=x
    )
    y = ck.scaled_mm_svdquant_w4a4(
        codes, sd["weight"], scales, sd["weight_scale"], low, sd["proj_up"], sd["bias"], act_unsigned=unsigned
    )
    assert db(y[:T], layer(x)) < -80


def test_comfy_kitchen_computes_the_same_w4a16(comfy):
    import comfy_kitchen as ck

    w, x, b = problem(outliers=False)
    layer = solve_linear(w, x, bias=b, fmt="awq")
    sd = {k: t.float() if t.is_floating_point() else t for k, t in layer.state_dict("").items()}
    y = ck.gemv_awq_w4a16(x, sd["weight"], sd["weight_scale"], sd["weight_zero"], bias=sd["bias"])
    assert db(y, layer(x)) < -100


@pytest.mark.parametrize("fmt", [*BRANCH_FORMATS, "awq"])
@pytest.mark.parametrize("residual", ["rtn", "gptq"])
def test_every_format_is_close_and_reports_its_error(fmt, residual):
    w, x, b = problem(outliers=fmt != "awq")
    layer = solve_linear(w, x, bias=b, fmt=fmt, residual=residual)
    exact = x.double() @ w.double().t() + b.double()
    signal = x.double() @ w.double().t()
    error = 10 * math.log10(float((layer(x).double() - exact).square().sum() / signal.square().sum()))
    assert error < {"int4": -24, "nvfp4": -26, "int8": -42, "awq": -19}[fmt]
    assert layer.info["error_db"] == pytest.approx(error, abs=0.01)


def test_effective_weight():
    w, x, b = problem()
    layer = solve_linear(w, x, bias=b, fmt="int8")
    assert db(layer.dequantized_weight(), w) < -25
    one_hot = torch.eye(K)
    # int8 activations of a one-hot row are exact, so the layer itself must show the same weight
    assert db(layer(one_hot) - layer(torch.zeros(1, K)), layer.dequantized_weight().t()) < -40


def test_svdquant_beats_its_parts_on_outliers():
    """Smoothing alone and the branch alone lose to both, and naive loses to all (the paper's Table 3 order)."""
    w, x, b = problem()
    naive = PRESETS["naive"]
    smooth_only = SolveSettings(rank=0, residual="rtn")
    branch_only = SolveSettings(rank=32, residual="rtn", alphas=(None,))
    both = SolveSettings(rank=32, residual="rtn")
    error = {
        name: solve_shared_input([w], x, [b], get_format("int4"), s)[0].info["error_db"]
        for name, s in {"naive": naive, "smooth": smooth_only, "branch": branch_only, "both": both}.items()
    }
    assert error["both"] < min(error["smooth"], error["branch"]) - 1
    assert max(error["smooth"], error["branch"]) < error["naive"]


def test_gptq_beats_rounding_on_correlated_inputs():
    w, x, _ = problem(outliers=False)
    x = x @ torch.randn(K, K, generator=torch.Generator().manual_seed(9)) / 16
    rtn = solve_linear(w, x, residual="rtn").info["error_db"]
    assert solve_linear(w, x, residual="gptq").info["error_db"] < rtn - 0.5


def test_gptq_with_one_column_of_error_matches_the_closed_form():
    """After column 0 is rounded, the others must be the exact least-squares response to its error."""
    _, x, _ = problem(outliers=False)
    h = (x.t() @ x).double()
    h += torch.eye(K) * DAMP * h.diagonal().mean()
    factor = hessian_factor(x).double()
    assert db(factor.t() @ factor, torch.linalg.inv(h)) < -60
    error = 0.1
    moved = -error / factor[0, 0] * factor[0]  # what gptq() subtracts
    exact = torch.linalg.solve(h[1:, 1:], h[1:, 0]) * error
    assert db(moved[1:], exact) < -50


def test_gptq_survives_dead_and_duplicate_channels():
    w, x, _ = problem()
    x[:, 10] = 0
    x[:, 11] = x[:, 12]
    factor = hessian_factor(x[:8])  # fewer tokens than channels
    codes, _ = gptq(w, factor, get_format("int4"), torch.bfloat16, lambda: None)
    assert torch.isfinite(codes).all()


@pytest.mark.parametrize("shape", [(96, 256), (256, 96), (512, 512)])
def test_randomized_branch_is_as_good_as_the_exact_svd(shape):
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(*shape, generator=g) @ torch.diag(torch.linspace(3, 0.3, shape[1]))
    up, down = lowrank_branch(weight, 32)
    exact = torch.linalg.svdvals(weight.double())[32:].square().sum()
    left = (weight.double() - up.double() @ down.double().t()).square().sum()
    assert exact <= left * (1 + 1e-9) and left < exact * 1.005
    again = lowrank_branch(weight, 32)
    assert torch.equal(up, again[0]) and torch.equal(down, again[1])


def test_branch_of_rank_zero_and_beyond_the_matrix():
    weight = torch.randn(8, 64)
    assert lowrank_branch(weight, 0)[0].shape == (8, 0)
    up, down = lowrank_branch(weight, 100)
    assert db(up @ down.t(), weight) < -100


def test_smoothing_formula():
    x_max, w_max = torch.tensor([100.0, 1.0, 1.0, 1.0]), torch.tensor([0.1, 0.1, 0.4, 0.1])
    for alpha in (0.0, 0.3, 1.0):
        exact = x_max**alpha / w_max ** (1 - alpha)
        got = smoothing_factor(x_max, w_max, alpha, torch.float32)
        assert torch.allclose(got / got[1], exact / exact[1], rtol=1e-5)
        assert got.log().mean().abs() < 1e-5


def test_dead_channels_do_not_upset_smoothing():
    got = smoothing_factor(torch.tensor([0.0, 1e30, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5, torch.float16)
    assert torch.isfinite(got).all() and (got > 0).all()


def test_shared_inputs_share_their_smoothing():
    w, x, b = problem()
    other = problem(seed=1)[0] * 3
    a, c = solve_shared_input([w, other], x, [b, None], get_format("int4"), PRESETS["fast"])
    assert torch.equal(a.smooth_factor, c.smooth_factor)
    assert a.info["alpha"] == c.info["alpha"]
    assert c.bias is None
    for layer, weight in ((a, w), (c, other)):
        assert layer.info["error_db"] < -20
        assert db(layer.dequantized_weight(), weight) < -10


def test_unsigned_is_taken_only_where_it_helps():
    w, x, b = problem()
    after_gelu = torch.nn.functional.gelu(x, approximate="tanh")
    signed = solve_linear(w, after_gelu, bias=b)
    unsigned = solve_linear(w, after_gelu, bias=b, act_unsigned=True)
    assert unsigned.act_unsigned and unsigned.info["error_db"] < signed.info["error_db"]
    assert not solve_linear(w, x - 3, bias=b, act_unsigned=True).act_unsigned


def test_unsigned_without_bias_stores_one():
    w, x, _ = problem()
    x = torch.nn.functional.gelu(x, approximate="tanh")
    layer = solve_linear(w, x, act_unsigned=True)
    assert layer.bias is not None and db(layer(x), x.double() @ w.double().t()) < -20


@pytest.mark.parametrize("fmt", [*BRANCH_FORMATS, "awq"])
def test_state_dict_round_trip_is_bit_equal(fmt):
    w, x, b = problem()
    layer = solve_linear(w, x, bias=b, fmt=fmt)
    for prefix in ("", "a.b", "a.b."):
        back = svdq_core.QuantizedLinear.from_state_dict(layer.state_dict(prefix), prefix)
        assert torch.equal(back(x), layer(x))
        assert back.shape == (N, K) and back.act_unsigned == layer.act_unsigned


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    w, x, b = problem()
    layer = solve_linear(w.to(dtype), x.to(dtype), bias=b.to(dtype))
    stored = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert {layer.tensors["weight_scale"].dtype, layer.proj_down.dtype, layer.smooth_factor.dtype} == {stored}
    y = layer(x.to(dtype))
    assert y.dtype == dtype and torch.isfinite(y).all()
    assert db(y.float(), x @ w.t() + b) < -20


def test_same_seed_same_bytes():
    w, x, b = problem()
    torch.manual_seed(1)
    first = solve_linear(w, x, bias=b).state_dict("")
    torch.manual_seed(2)
    torch.rand(10)
    state = torch.get_rng_state()
    second = solve_linear(w, x, bias=b).state_dict("")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(torch.get_rng_state(), state), "the solver must leave the global random state alone"


def test_weight_only_statistics():
    w, x, b = problem(outliers=False)
    layer = solve_linear(w, None, bias=b)
    assert db(layer(x), x @ w.t() + b) < -17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.randn(8, 100)), "multiple of 64, found 100"),
        (dict(weight=torch.randint(0, 9, (8, 64))), "float matrix"),
        (dict(weight=torch.full((8, 64), float("nan"))), "weight holds NaN"),
        (dict(samples=torch.randn(4, 128)), r"must be \(T, 64\).*\(4, 128\)"),
        (dict(samples=torch.full((4, 64), float("inf"))), "samples hold NaN or infinity"),
        (dict(samples=torch.randn(0, 64)), "T ≥ 1"),
        (dict(bias=torch.randn(9)), r"bias must be \(8,\)"),
        (dict(fmt="int2"), "Unknown format 'int2'"),
        (dict(residual="magic"), "gptq or rtn"),
    ],
)
def test_bad_input_is_explained(change, message):
    arguments = dict(weight=torch.randn(8, 64), samples=torch.randn(16, 64)) | change
    weight, samples = arguments.pop("weight"), arguments.pop("samples")
    with pytest.raises(svdq_core.SVDQuantError, match=message):
        solve_linear(weight, samples, **arguments)


def test_tokens_of_zeros():
    w, _, b = problem()
    layer = solve_linear(w, torch.zeros(16, K), bias=b)
    assert torch.isfinite(layer(torch.randn(4, K))).all()


def test_interrupt_reaches_the_inner_loops():
    calls = 0

    def stop():
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt

    w, x, _ = problem()
    with pytest.raises(KeyboardInterrupt):
        solve_linear(w, x, check=stop)
    assert calls == 12


# ---- the best scales, and the branch once more ---------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_best_scales_lose_least_of_those_tried(fmt):
    """Against trying every factor for every group by itself; some importances are zero."""
    fmt, g = get_format(fmt), torch.Generator().manual_seed(3)
    w, importance = torch.randn(12, 128, generator=g), torch.rand(128, generator=g).sub_(0.2).clamp_(min=0)
    whole = fmt.tensor_scale(w)
    found = fmt.best_scales(w, importance, torch.bfloat16, whole)
    losses = []
    for factor in fmt.factors:
        scales = fmt.weight_scales(w, torch.bfloat16, whole, factor)
        q = fmt.weight_codes(w / fmt.spread(scales, 128)) * fmt.spread(scales, 128)
        losses.append(((w - q).square() * importance).unflatten(1, (-1, fmt.group)).sum(-1))
    q = fmt.weight_codes(w / fmt.spread(found, 128)) * fmt.spread(found, 128)
    lost = ((w - q).square() * importance).unflatten(1, (-1, fmt.group)).sum(-1)
    assert torch.allclose(lost, torch.stack(losses).amin(0), rtol=1e-5, atol=1e-9)
    assert lost.sum() < 0.9 * losses[0].sum()


def lost_at_outputs(missing, branch, x, smooth):
    """Σ of the outputs' squared errors, and damping's, in float64."""
    up, down = (half.double() for half in branch)
    error = missing.double() - up @ (down * smooth.double().unsqueeze(1)).t()
    h = (x / smooth).double().t() @ (x / smooth).double()
    h += DAMP * h.diagonal().mean() * torch.eye(len(h))
    return float(torch.trace(error @ h @ error.t()))


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_the_better_branch_is_the_best_one(rank):
    """Within a hundredth of the exact solution, which weights the SVD by the inputs; rounded to 16 bit."""
    w, x, _ = problem()
    smooth = torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5
    factor, missing = hessian_factor(x / smooth), w * smooth
    plain = lowrank_branch(missing, rank)
    plain = plain[0], plain[1] / smooth.unsqueeze(1)
    found = better_branch(plain, missing, factor, smooth, torch.bfloat16, 0)
    root = torch.linalg.inv(factor.double())
    u, s, v = torch.linalg.svd(missing.double() @ root)
    exact = u[:, :rank] * s[:rank], (v[:rank] @ factor.double() / smooth).t()
    least = lost_at_outputs(missing, exact, x, smooth)
    assert least * (1 - 1e-3) <= lost_at_outputs(missing, found, x, smooth) < least * 1.01
    assert least < 0.9 * lost_at_outputs(missing, plain, x, smooth)
    assert torch.equal(found[0], found[0].bfloat16().float()) and torch.equal(found[1], found[1].bfloat16().float())


def test_a_branch_that_is_better_stays():
    """INT8 leaves so little that rounding a new branch to 16 bit would cost more than it is worth."""
    w, x, _ = problem(outliers=False)
    branch = tuple(half.bfloat16().float() for half in lowrank_branch(w, 16))
    missing = branch[0] @ branch[1].t() + 1e-6 * w
    found = better_branch(branch, missing, hessian_factor(x), torch.ones(K), torch.bfloat16, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, branch))
    assert better_branch((w[:, :0], x[:0].t()), w, hessian_factor(x), torch.ones(K), torch.bfloat16, 0)[0].numel() == 0


def test_a_pass_that_changes_nothing_is_the_last(monkeypatch):
    """INT8 mostly keeps its branch: a second pass would round the same residual once more."""
    rounded = []
    monkeypatch.setattr(solve, "gptq", lambda *args: rounded.append(1) or gptq(*args))
    w, x, _ = problem()
    for fmt, count in (("int8", 1), ("int4", 3)):
        rounded.clear()
        solve_shared_input([w], x, [None], get_format(fmt), SolveSettings(passes=3, alphas=(0.5,)))
        assert len(rounded) == count


def test_passes_pay():
    """On tokens that the solver has not seen, too."""
    w, x, b = problem()
    seen, unseen = x[::2], x[1::2]

    def error(residual, passes, fmt="int4"):
        settings = SolveSettings(residual=residual, passes=passes, alphas=(None, 0.5))
        layer = solve_shared_input([w], seen, [b], get_format(fmt), settings)[0]
        return db(layer(unseen), unseen.double() @ w.double().t() + b.double())

    assert error("rtn", 1) < error("rtn", 0) - 0.5
    assert error("gptq", 1) < error("gptq", 0) - 0.1
    assert error("gptq", 3) < error("gptq", 1) + 0.01
    assert error("gptq", 1, "nvfp4") < error("gptq", 0, "nvfp4") - 0.1


def test_the_search_knows_the_error_of_the_layer():
    """Also of a shifted input, whose shift the bias takes back with the rounded weight."""
    w, x, b = problem(outliers=False)
    x = torch.nn.functional.gelu(x, approximate="tanh")
    for unsigned in (False, True):
        candidate = Candidate(None, torch.ones(K), unsigned)
        try_candidate(candidate, [w], x, get_format("int4"), 32, torch.bfloat16, 0)
        settings = SolveSettings(residual="rtn", passes=0, alphas=(None,))
        layer = finish(
            w, x, b, candidate.branches[0], candidate, torch.eye(K), get_format("int4"), settings, torch.bfloat16,
            lambda: None,
        )  # fmt: skip
        measured = 10 ** (layer.info["error_db"] / 10) * float((x @ w.t()).square().sum())
        assert candidate.error == pytest.approx(measured, rel=0.01)

"""The activation collector: bounded, spread, deterministic, exact maxima."""

import pytest
import torch
from comfyui_svdquant.svdq_core.calibration import ActivationCollector, Samples, tokens_within
from comfyui_svdquant.svdq_core.errors import SVDQuantError
from torch import nn


def run(tokens, expected, calls, seed=0):
    """Each call feeds 50 tokens whose first channel tells the call, the second the token."""
    layer = nn.Linear(8, 4)
    with ActivationCollector({"l": layer}, tokens, expected, seed) as collector:
        for call in range(calls):
            x = torch.zeros(2, 25, 8)
            x[..., 0] = call
            x[..., 1] = torch.arange(50.0).view(2, 25)
            x[0, 0, 2] = -call
            layer(x)
    return collector


def test_every_call_is_represented_and_memory_is_bounded():
    collector = run(tokens=64, expected=16, calls=16)
    samples = collector.samples()
    assert samples.tokens["l"].shape == (64, 8) and samples.tokens["l"].dtype == torch.bfloat16
    assert samples.tokens["l"][:, 0].unique().numel() == 16
    assert samples.absmax["l"][:3].tolist() == [15, 49, 15]


def test_more_calls_than_expected_stay_within_the_budget_and_fair():
    means = [run(64, 16, 160, seed).samples().tokens["l"] for seed in range(20)]
    assert all(tokens.shape[0] == 64 for tokens in means)
    mean = torch.cat(means)[:, 0].float().mean()
    assert 65 < mean < 95, "a uniform sample of calls 0...159 has mean 79.5"


def test_deterministic_for_a_seed():
    first, second, other = (run(32, 8, 30, seed).samples().tokens["l"] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_hooks_are_gone_after_an_error():
    layer = nn.Linear(8, 4)
    with pytest.raises(RuntimeError), ActivationCollector({"l": layer}, 8, 1):
        raise RuntimeError
    assert not layer._forward_pre_hooks


def test_a_layer_that_never_runs_is_named():
    collector = ActivationCollector({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)}, 8, 1)
    with collector:
        collector.layers["a"](torch.ones(3, 8))
    with pytest.raises(SVDQuantError, match=r"never ran b \(1 such"):
        collector.samples()


def test_the_budget_of_a_12b_model():
    """FLUX.1: 19 double blocks with two streams, 38 single ones; in_features of every linear that is solved."""
    stream = [3072, 3072, 3072, 3072, 12288]
    widths = 19 * 2 * stream + 38 * [3072, 3072, 15360]
    assert tokens_within(4 * 2**30, widths) == 1226
    assert 2 * sum(widths) * 1226 <= 4 * 2**30
    assert tokens_within(64 * 2**30, widths) == 2048
    assert tokens_within(1, widths) == 1


def test_samples_round_trip(tmp_path):
    samples = run(64, 16, 16).samples()
    samples.save(tmp_path / "s.calibration", {})
    back = Samples.load(tmp_path / "s.calibration")
    assert torch.equal(back.tokens["l"], samples.tokens["l"]) and torch.equal(back.absmax["l"], samples.absmax["l"])

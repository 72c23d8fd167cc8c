"""Scores put together, functions as scores, and the names of both."""

import pytest
import tiny
import torch
from torch import Tensor, nn

from retouch import SelectConfig, errors, scores
from retouch.eligible import candidates
from retouch.scores import Fisher, Gradient, Magnitude, Random, as_score


def of(score, model: nn.Module, data=None) -> dict[str, Tensor]:
    config = SelectConfig(score="magnitude", density=1.0, target_modules=None)
    found = candidates(model, config)
    return score(model, {n: c for n, c in found.items() if c.state == "masked"}, data, None)


def double(model, eligible, data, loss_fn):
    return {name: 2 * c.param.detach() for name, c in eligible.items()}


def test_arithmetic() -> None:
    model = tiny.bert()
    weight = {n: p.detach() for n, p in model.named_parameters()}
    m = Magnitude()
    for score, want in [
        (m + 1, lambda w: w.abs() + 1), (1 - m, lambda w: 1 - w.abs()),
        (2 * m - m, lambda w: w.abs()), (m / (m + 1e-8), lambda w: w.abs() / (w.abs() + 1e-8)),
        (1 / (m + 1) ** 0.5, lambda w: 1 / (w.abs() + 1).sqrt()), (m * double, lambda w: w.abs() * 2 * w),
        (1.5 + m, lambda w: w.abs() + 1.5), (abs(0.1 - m), lambda w: (0.1 - w.abs()).abs()),
        (scores.minimum(m, 0.05), lambda w: w.abs().clamp(max=0.05)),
        (scores.maximum(double, m), lambda w: torch.maximum(2 * w, w.abs())),
    ]:  # fmt: skip
        for name, found in of(score, model).items():
            torch.testing.assert_close(found, want(weight[name]))
    with pytest.raises(errors.HyperparameterError, match="no score"):
        m + "x"
    with pytest.raises(errors.HyperparameterError, match="op='%'"):
        scores.Combined("%", m, m)


def test_min_and_max_are_nan_where_a_side_is() -> None:
    def nan(model, eligible, data, loss_fn):
        return {n: torch.full(c.shape, float("nan")) for n, c in eligible.items()}

    for both in (scores.minimum(nan, 1.0), scores.maximum(0.0, nan), scores.minimum(nan, double)):
        assert all(bool(v.isnan().all()) for v in of(both, tiny.bert()).values())


def test_a_score_that_is_used_twice_is_computed_once() -> None:
    calls = []

    def counted(model, eligible, data, loss_fn):
        calls.append(1)
        return double(model, eligible, data, loss_fn)

    model, m, c = tiny.bert(), Magnitude(), as_score(counted)
    weight = {n: p.detach() for n, p in model.named_parameters()}
    for name, found in of(abs(c - m) / (scores.minimum(c, m) + 1) + counted, model).items():
        w, mag = weight[name], weight[name].abs()
        want = (2 * w - mag).abs() / (torch.minimum(2 * w, mag) + 1) + 2 * w
        torch.testing.assert_close(found, want)
    assert len(calls) == 1
    # equal scores are one, others are not, and references that hold tensors are not compared
    data = [tiny.labelled()]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    of(Gradient() * Gradient(), model, data)
    once = len(passes)
    of(Gradient() * Gradient(training=True), model, data)
    assert once == 1 and len(passes) == 3
    base = {n: torch.zeros_like(p) for n, p in weight.items()}
    twice = scores.Difference(base) + scores.Difference(dict(base))
    for name, found in of(twice, model).items():
        torch.testing.assert_close(found, 2 * weight[name].abs())


def test_needs_data() -> None:
    assert Fisher().needs_data and (Magnitude() + Fisher()).needs_data
    assert not Magnitude().needs_data and not (Magnitude() + Random(1)).needs_data


def test_functions_are_checked() -> None:
    model = tiny.bert()
    name = next(n for n, _ in model.named_parameters())
    for wrong, message in [
        (lambda *a: None, "returned a NoneType"),
        (lambda *a: {}, f"gave NoneType for {name}"),
        (lambda m, e, d, f: {n: c.param.detach().flatten() for n, c in e.items()}, "of shape"),
        (lambda m, e, d, f: {n: c.param.detach().int() for n, c in e.items()}, "gave torch.int32"),
    ]:
        with pytest.raises(errors.ScoreError, match=message):
            of(scores.as_score(wrong), model)
    found = of(scores.as_score(double), model)
    assert torch.equal(found[name], 2 * model.get_parameter(name))


def test_names() -> None:
    assert scores.as_score("fisher") == Fisher() and scores.as_score("random", 7) == Random(7)
    assert scores.as_score(Fisher) == Fisher()
    assert {"fisher", "gradient", "magnitude", "random", "sensitivity"} <= set(scores.score_names())
    for wrong in ("fishr", 3, None, int):
        with pytest.raises(errors.HyperparameterError, match="no score"):
            scores.as_score(wrong)
    with pytest.raises(errors.HyperparameterError, match="'fisher' is taken"):
        scores.register("fisher")(double)


def test_registered_functions_can_be_saved_and_others_cannot() -> None:
    scores.register("test-double")(double)
    kept = SelectConfig(score=double, density=0.1)
    assert kept.to_dict()["score"] == "test-double"
    model = tiny.bert()
    again = SelectConfig.from_dict(kept.to_dict())
    found = of(scores.as_score(again.score), model)
    assert torch.equal(next(iter(found.values())), 2 * next(model.parameters()))

    lost = SelectConfig(score=lambda *a: {}, density=0.1)
    again = SelectConfig.from_dict(lost.to_dict())
    assert again.to_dict() == lost.to_dict()
    with pytest.raises(errors.ScoreError, match="a function of the user"):
        scores.as_score(again.score)

"""Scores against literal references, and models that are left as they were."""

import itertools
import random

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from retouch import SelectConfig, errors, wrap
from retouch.batches import Batches
from retouch.eligible import candidates
from retouch.masks import Mask
from retouch.scores import Fisher, Gradient, GradStat, Magnitude, Random, Sensitivity

ALL = {"score": "magnitude", "density": 1.0, "target_modules": None}


def eligible(model: nn.Module, **changes):
    found = candidates(model, SelectConfig(**(ALL | changes)))
    return {name: c for name, c in found.items() if c.state == "masked"}


def of(score, model: nn.Module, data=None, loss_fn=None, **changes) -> dict[str, Tensor]:
    return score(model, eligible(model, **changes), data, loss_fn)


def one(score, *samples, batch: int = 1) -> list[float]:
    """The scores of a `Dot` model, whose gradients are the samples."""
    x = torch.tensor(samples, dtype=torch.float32)
    return of(score, tiny.Dot(x.shape[1]), list(x.split(batch)))["layer.weight"].tolist()


# --- oracles ---------------------------------------------------------------------------------------


def test_fish_oracle_squares_samples_and_not_their_mean() -> None:
    samples = (1.0, 0.5), (-1.0, 0.5)
    assert one(Fisher(), *samples) == [2.0, 0.5]
    assert one(Fisher(), *samples, batch=2) == [2.0, 0.5]
    assert one(Fisher(level="batch"), *samples, batch=2) == [0.0, 0.25]


def test_the_three_readings_of_spu() -> None:
    batches = (1.0,), (-1.0,), (-1.0,)
    assert one(GradStat(outer="cumulative"), *batches) == [0.0]  # 3 * 1 - 2 * 1 - 1
    assert one(GradStat(), *batches) == [-1.0]
    assert one(GradStat(map="abs"), *batches) == [3.0]
    assert one(Gradient(), *batches) == [1.0]


def test_linear_regression_by_hand() -> None:
    """F = sum of (residual * x) squared for half squared errors."""
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    target = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))

    def loss(model: nn.Module, batch) -> Tensor:
        inputs, wanted = batch
        return (0.5 * (model(inputs)[:, 0] - wanted).square()).sum()

    residual = (x @ model.weight[0] - target).detach()
    want = (residual[:, None] * x).square().sum(0)
    assert torch.equal(of(Fisher(), model, (x, target), loss)["weight"][0], want)


@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("outer", ["sum", "mean", "cumulative"])
def test_every_statistic_against_a_literal_one(level: str, outer: str) -> None:
    model = tiny.bert().eval()
    data = [tiny.labelled(3, seed=1), tiny.labelled(2, seed=2)]
    gradients = []
    for batch in data:
        size = len(batch["labels"])
        for i in range(size) if level == "sample" else [slice(None)]:
            rows = slice(i, i + 1) if level == "sample" else i
            model.zero_grad()
            model(**{k: v[rows] for k, v in batch.items()}).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    maps = {"id": lambda g: g, "abs": torch.abs, "square": torch.square}
    posts = {"id": lambda g: g, "abs": torch.abs, "sqrt": torch.sqrt}
    for (map_name, mapped), (post_name, post) in itertools.product(maps.items(), posts.items()):
        got = of(GradStat(level, map_name, outer, post_name), model, data)
        for name in got:
            parts = [mapped(g[name]) for g in gradients]
            weights = range(len(parts), 0, -1) if outer == "cumulative" else [1] * len(parts)
            want = sum(w * part for w, part in zip(weights, parts, strict=True))
            want = post(want / len(parts) if outer == "mean" else want)
            torch.testing.assert_close(
                got[name], want, rtol=1e-4, atol=1e-7, equal_nan=True, msg=f"{map_name} {name}"
            )


def test_sensitivity_is_gradient_times_weight() -> None:
    model, data = tiny.bert(), [tiny.labelled()]
    gradient, found = of(Gradient(), model, data), of(Sensitivity(), model, data)
    for name, p in model.named_parameters():
        assert torch.equal(found[name], gradient[name] * p.detach().abs())


def test_magnitude_and_random() -> None:
    model = tiny.bert().to(torch.bfloat16)
    for name, score in of(Magnitude(), model).items():
        param = model.get_parameter(name)
        assert torch.equal(score, param.detach().float().abs()) and score.dtype == torch.float32
    first, again, other = (of(Random(seed), model) for seed in (3, 3, 4))
    for name, score in first.items():
        assert 0 <= score.min() and score.max() < 1
        assert torch.equal(score, again[name]) and not torch.equal(score, other[name])
    key, query = (
        first[f"bert.encoder.layer.0.attention.self.{n}.weight"] for n in ("key", "query")
    )
    assert not torch.equal(key, query)


# --- invariances -----------------------------------------------------------------------------------


def test_per_sample_scores_do_not_depend_on_the_batch_size() -> None:
    model, ids = tiny.llama(), tiny.tokens(6)
    found = [
        of(Fisher(), model, [{"input_ids": x, "labels": x} for x in ids.split(size)])
        for size in (1, 2, 4, 6)
    ]
    for other in found[1:]:
        for name, value in other.items():  # batches of two and more go through the model whole
            torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-9)


@given(data=st.data())
def test_sums_over_samples_do_not_depend_on_their_order(data) -> None:
    # whole numbers, so that float32 sums are exact in any order
    samples = data.draw(
        st.lists(st.tuples(*[st.integers(-9, 9)] * 3), min_size=1, max_size=8), label="samples"
    )
    order = data.draw(st.permutations(samples), label="order")
    size = data.draw(st.integers(1, 8), label="batch size")
    for score in (Fisher(), GradStat("sample", "abs"), GradStat("sample", "id", "mean")):
        assert one(score, *samples) == one(score, *order, batch=size)


def test_autocast_of_the_caller_applies() -> None:
    model, data = tiny.bert(), [tiny.labelled()]
    with torch.autocast("cpu", torch.bfloat16):
        found = of(Gradient(), model, data)
        model.eval()
        model(**data[0]).loss.backward()
    plain = of(Gradient(), model, data)
    name = "bert.pooler.dense.weight"
    assert torch.equal(found[name], model.get_parameter(name).grad.abs())
    assert not torch.equal(found[name], plain[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    big = torch.tensor([[256.0, 1.0], [1.0, 1.0]], dtype=dtype)
    model = tiny.Dot(2).to(dtype)
    found = of(GradStat("sample"), model, [big])["layer.weight"]
    assert found.dtype == torch.float32 and found.tolist() == [257.0, 2.0]  # 257 is not bfloat16


def test_sparse_gradients() -> None:
    class Table(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(5, 3, sparse=sparse)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x).square().sum()

    x = torch.tensor([[0, 3, 3]])
    sparse, dense = (of(Fisher(), Table(s), x)["table.weight"] for s in (True, False))
    assert torch.equal(sparse, dense) and dense.count_nonzero() == 6


# --- what a score leaves behind ---------------------------------------------------------------------


class Noisy(nn.Module):
    """Moves buffers, and draws random numbers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        self.noise, self.mode = noise, self.training
        self.seen = self.seen.clone()  # another tensor in its place
        return (self.out(self.drop(self.norm(self.inner(x)))).sum() * noise).square()


def fingerprint(model: nn.Module):
    return (
        {n: (id(p), p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()},
        {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        [m.training for m in model.modules()],
        torch.get_rng_state(), random.getstate(), np.random.get_state()[1], np.random.get_state()[2],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        torch.is_grad_enabled(),
    )  # fmt: skip


def assert_same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(training: bool, fails: bool) -> None:
    model = Noisy()
    model.inner.bias.requires_grad_(False)
    model.norm.eval()
    x = torch.randn(5, 4)
    model(x).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: g.clone() for n, g in grads.items() if g is not None}
    before = fingerprint(model)
    modes = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = model(batch)
        modes.append((model.mode, model.norm.training))
        return value.repeat(2) if fails and len(modes) == 2 else value

    score = Gradient(training=training)
    with torch.no_grad():
        if fails:
            with pytest.raises(errors.ScoreError, match="wanted a loss"):
                of(score, model, [x, x], loss)
        else:
            of(score, model, [x, x], loss)
    assert_same(fingerprint(model), before)
    assert modes == [(training, training)] * 2
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or torch.equal(p.grad, copies[name])


def test_each_gradient_is_freed_before_the_next() -> None:
    model = tiny.llama()
    alive: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    of(Fisher(), model, tiny.text(3))
    assert len(alive) == 3 * len(list(model.parameters())) and set(alive) == {1}


def test_parameters_that_are_not_eligible_get_no_gradient() -> None:
    model, fired = tiny.llama(), []
    for name, p in model.named_parameters():
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    of(Gradient(), model, tiny.text(), target_modules=["q_proj"])
    assert {n.split(".")[-2] for n in fired} == {"q_proj"}
    assert all(p.requires_grad for p in model.parameters())


def test_gradient_checkpointing() -> None:
    plain, saving = tiny.llama(), tiny.llama()
    saving.activation_checkpointing_enable()
    a, b = (of(Fisher(), m, tiny.text(), target_modules=["q_proj"]) for m in (plain, saving))
    assert all(torch.equal(a[n], b[n]) for n in a)


# --- data ------------------------------------------------------------------------------------------


def test_forms_of_data() -> None:
    model, batch = tiny.bert(), tiny.labelled(4)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    want = of(Fisher(), model, batch)
    forms = {
        "list": [batch],
        "BatchEncoding": BatchEncoding(batch),
        "loader": DataLoader(rows, batch_size=2),
        "generator": ({k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)),
    }
    for form, data in forms.items():
        found = of(Fisher(), model, data)
        assert all(torch.allclose(want[n], found[n], rtol=1e-4) for n in want), form

    def loss(model: nn.Module, pair) -> Tensor:
        return model(input_ids=pair[0], labels=pair[1]).loss

    pair = batch["input_ids"], batch["labels"]
    for data in (pair, [pair], DataLoader(TensorDataset(*pair), batch_size=2), [list(pair)]):
        found = of(Fisher(), model, data, loss)
        assert all(torch.allclose(want[n], found[n], rtol=1e-4) for n in want)  # one by one

    # samples that only the loss function can put together
    def collating(model: nn.Module, batch: list) -> Tensor:
        return model(**{k: torch.stack([row["row"][k] for row in batch]) for k in rows[0]}).loss

    opaque = [[{"row": row} for row in rows[:3]], [{"row": rows[3]}]]
    found = of(Fisher(), model, opaque, collating)
    assert all(torch.allclose(want[n], found[n], rtol=1e-4) for n in want)


def test_tuples_and_tensors_without_a_loss_function() -> None:
    x = torch.tensor([[1.0, 2.0]])
    for data in (x, [x], (x,), [(x,)]):
        assert of(Gradient(), tiny.Dot(2), data)["layer.weight"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("samples", "max_batches", "sizes"),
    [
        (None, None, [3, 3, 2]), (4, None, [3, 1]), (3, None, [3]), (99, None, [3, 3, 2]),
        (None, 2, [3, 3]), (5, 1, [3]), (None, 0, []),
    ],
)  # fmt: skip
def test_limits(samples, max_batches, sizes) -> None:
    drawn = []

    def source():
        for part in torch.arange(8).split(3):
            drawn.append(len(part))
            yield {"x": part, "scalar": torch.tensor(1), "note": "kept"}

    found = list(Batches(source(), samples=samples, max_batches=max_batches))
    assert [len(b["x"]) for b in found] == sizes
    assert all(b["note"] == "kept" for b in found)
    assert len(drawn) == len(sizes)  # nothing is drawn and thrown away
    assert torch.equal(
        torch.cat([b["x"] for b in found] or [torch.arange(0)]), torch.arange(sum(sizes))
    )


# --- errors ----------------------------------------------------------------------------------------


def test_errors_of_data_and_losses() -> None:
    model, batch = tiny.bert(), tiny.labelled()
    cases = [
        (None, None, "needs data"),
        ([], None, "hold no batch"),
        (iter(()), None, "hold no batch"),
        (3, None, "got int, wanted batches"),
        ("text", None, "got str, wanted batches"),
        ([3], None, "a batch is a int"),
        ({"input_ids": batch["input_ids"]}, None, "gives no loss: put labels"),
        (batch, lambda m, b: m(**b).logits, "wanted a loss, which is one number"),
        (batch, lambda m, b: "loss", "gives no loss"),
        (batch, lambda m, b: m(**b).loss * float("nan"), "the loss of batch 0 is nan"),
        (batch, lambda m, b: m(**b).loss / 0, "the loss of batch 0 is inf"),
        (batch, lambda m, b: m(**b).loss.detach(), "does not depend on any eligible"),
        ({"a": 1, "b": "x"}, None, "no tensor with a dimension"),
        (batch | {"other": torch.ones(3, 2)}, None, "'other' has length 3, the batch 4"),
    ]
    for data, loss, message in cases:
        with pytest.raises(errors.ScoreError, match=message):
            of(Fisher(), model, data, loss)


def test_an_iterator_cannot_serve_two_scores() -> None:
    data = iter([tiny.labelled()])
    with pytest.raises(errors.ScoreError, match="an iterator can be read only once"):
        of(Fisher() + Gradient(), tiny.bert(), data)


def test_a_wrapped_model_is_refused() -> None:
    model = tiny.bert()
    wrap(torch.optim.SGD, Mask.full(model), lr=0.1)
    with pytest.raises(errors.EngineError, match="or after retouch"):
        of(Gradient(), model, tiny.labelled())
    assert of(Magnitude(), model)


def test_parameters_without_a_gradient_are_reported() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.warns(
        UserWarning, match=r"2 of the eligible parameters, whose score is 0: 1\.bias"
    ):
        found = of(Gradient(), model, torch.ones(1, 2), lambda m, x: m[0](x).sum())
    assert not found["1.weight"].any() and found["0.weight"].all()


@pytest.mark.parametrize("field", ["level", "map", "outer", "post"])
def test_statistics_that_do_not_exist(field: str) -> None:
    with pytest.raises(
        errors.HyperparameterError, match=f"GradStat: {field}='cube'; wanted one of"
    ):
        GradStat(**{field: "cube"})

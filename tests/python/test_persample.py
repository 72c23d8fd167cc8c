"""Scores of single samples from whole batches: those of a batch-1 loop, for every kind of model."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import tiny
import tiny_hf
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from retouch import SelectConfig, errors, ops, persample
from retouch.batches import single_samples
from retouch.eligible import candidates
from retouch.scores import Fisher, GradStat, TrueFisher

PAD = 0


def eligible(model: nn.Module, **changes):
    config = {"score": "magnitude", "density": 1.0, "target_modules": None} | changes
    return {
        n: c for n, c in candidates(model, SelectConfig(**config)).items() if c.state == "masked"
    }


@contextlib.contextmanager
def passes() -> Iterator[list[int]]:
    """How many samples each forward pass of a model that counts takes."""
    sizes: list[int] = []
    inner = persample._loss, persample.loss_of

    def whole(model, batch):
        sizes.append(len(batch["labels"]))
        return inner[0](model, batch)

    def alone(model, batch, loss_fn, number):
        if loss_fn is None:
            sizes.append(1)
        return inner[1](model, batch, loss_fn, number)

    with mock.patch.multiple(persample, _loss=whole, loss_of=alone):
        yield sizes


def loop(batches) -> list:
    """The same samples as batches of one, which never go together."""
    return [sample for batch in batches for sample in single_samples(batch)]


def compare(score, model, batches, sizes=None, rtol=1e-5, **changes) -> dict[str, Tensor]:
    """Asserts that batches give what single samples give, in passes of `sizes` samples."""
    found = eligible(model, **changes)
    want = score(model, found, loop(batches))
    with passes() as got_sizes:
        got = score(model, found, batches)
    if sizes is not None:
        assert got_sizes == sizes
    for name, value in want.items():
        # sums of squares of few elements have elements far below the rest, sums of both signs more so
        atol = rtol * float(value.abs().max()) + 1e-12
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


WHOLE = [2, 1, 1, 3]  # two that decide, each alone, the rest of five


def padded(rows: int = 5, length: int = 8, ignore: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Sequences of different lengths, padded, with labels where there are tokens."""
    ids = tiny.tokens(rows, length, seed=seed)
    lengths = torch.arange(rows) % (length - 2) + 3
    there = torch.arange(length) < lengths[:, None]
    labels = ids.where(there, -100) if ignore else ids
    return {
        "input_ids": ids.where(there, PAD), "attention_mask": there.long(), "labels": labels,
    }  # fmt: skip


def masked_bert(**changes):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, **changes,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


CAUSAL = {
    "llama": lambda: tiny.llama(),
    "llama of the Trainer tests": lambda: tiny_hf.llama(),
    "masked bert": lambda: masked_bert(tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_padded_token_losses(name: str) -> None:
    batch = padded()
    batch["labels"][1, :3] = -100  # samples with few labels count as much as those with many
    # a bias that BERT keeps for old files
    compare(
        Fisher(),
        CAUSAL[name](),
        [batch],
        WHOLE,
        exclude_modules=["predictions.bias"] if "bert" in name else None,
    )


def test_gpt2_without_its_tied_table() -> None:
    found = compare(
        Fisher(),
        tiny.gpt2(),
        [padded()],
        WHOLE,
        target_modules="all-linear",
        biases="masked",
        norms="masked",
    )
    assert any("c_attn.weight" in n for n in found) and any("ln_1.weight" in n for n in found)


def test_sequence_classification() -> None:
    batch = padded() | {"labels": torch.arange(5) % 3}
    compare(Fisher(), tiny.bert(), [batch], WHOLE)
    regression = tiny.bert(labels=1)
    compare(Fisher(), regression, [batch | {"labels": torch.randn(5)}], WHOLE)
    several = tiny.bert(problem_type="multi_label_classification")
    compare(Fisher(), several, [batch | {"labels": torch.rand(5, 3).round()}], WHOLE)


@pytest.mark.parametrize("post", ["id", "abs", "sqrt"])
@pytest.mark.parametrize("outer", ["sum", "mean"])
@pytest.mark.parametrize("map", ["id", "abs", "square"])
def test_every_statistic(map: str, outer: str, post: str) -> None:
    if (map, post) == ("id", "sqrt"):
        pytest.skip("the root of a signed sum")
    batches = [padded(3, ignore=False), padded(4, seed=1), padded(1, seed=2)]
    sizes = [2, 1, 1, 1, 4, 1]
    compare(GradStat("sample", map, outer, post), tiny.llama(), batches, sizes)


def test_cumulative_and_training_go_one_by_one() -> None:
    model, batch = tiny.bert(), padded() | {"labels": torch.arange(5) % 3}
    compare(GradStat("sample", outer="cumulative"), model, [batch], [1] * 5)
    with passes() as sizes:
        Fisher(training=True)(model, eligible(model), [batch])
    assert sizes == [1] * 5


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["query"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["position_embeddings", "LayerNorm"]},
        {"target_modules": ["layer.1.output.dense"]},
        {"target_modules": None, "embeddings": "frozen", "biases": "frozen"},
    ],
)
def test_eligible_subsets(changes) -> None:
    batch = padded() | {"labels": torch.arange(5) % 3}
    compare(Fisher(), tiny.bert(), [batch], WHOLE, **changes)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-6), (torch.bfloat16, 5e-2), (torch.float16, 5e-2)]
)
@pytest.mark.parametrize("map", ["square", "id"])
def test_other_dtypes(dtype: torch.dtype, rtol: float, map: str) -> None:
    compare(GradStat("sample", map), tiny.llama().to(dtype), [padded()], rtol=rtol)


def test_the_sum_stays_float32_in_half_precision() -> None:
    model, batch = tiny.llama().to(torch.bfloat16), padded()
    found = Fisher()(model, eligible(model), [batch])
    assert all(t.dtype == torch.float32 for t in found.values())


# --- what goes through the loop ----------------------------------------------------------------------


def test_tied_tables() -> None:
    for model in (tiny.gpt2(), tiny.llama(tied=True), masked_bert()):
        compare(Fisher(), model, [padded()], [1] * 5)


class Odd(nn.Module):
    """A parameter of its own in the middle of a model with a loss of torch's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4)) if kind == "own" else None
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.inner(x)
        if self.kind == "own":
            h = h * self.scale
        elif self.kind == "twice":
            h = self.inner(h.tanh())
        elif self.kind == "not called":
            h = nn.functional.linear(x, self.inner.weight, self.inner.bias)
        elif self.kind == "mixes":
            h = h - h.mean(0)
        elif self.kind == "samples second":
            h = self.inner(x[None].expand(len(x), -1, -1)).mean(0)
        loss = nn.functional.cross_entropy(self.out(h), labels)
        if self.kind == "weighted":
            loss = loss * labels.float().mean()
        elif self.kind == "decayed":
            loss = loss + self.out.weight.square().sum()
        return {"loss": loss}


KINDS = {
    "plain": WHOLE, "own": [1] * 5, "twice": None, "not called": None, "mixes": None,
    "weighted": None, "decayed": None, "samples second": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_no_sum_over_samples(kind: str) -> None:
    x = torch.randn(5, 4)
    batch = {"x": x, "labels": torch.tensor([1, 1, 0, 2, 0])}
    sizes = KINDS[kind]
    with passes() as got:
        compare(Fisher(), Odd(kind), [batch])
    compare(Fisher(), Odd(kind), [batch], sizes)
    if sizes is None:
        # none but the two that decide go together; their weights are equal, others are not
        assert max(got) <= 2 or kind == "weighted"


def test_losses_over_picked_tokens_go_one_by_one() -> None:
    """Rows of a loss that are not the batch's labels could be of any sample."""

    class Picks(Odd):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            there = labels >= 0
            return {
                "loss": nn.functional.cross_entropy(self.out(self.inner(x))[there], labels[there])
            }

    x = torch.randn(4, 2, 4)
    labels = torch.tensor([[0, -1], [-1, 1], [2, 1], [-1, 0]])  # as many as samples, two for one
    labels[3] = torch.tensor([-1, 0])
    batch = {"x": x, "labels": labels}
    with passes() as sizes:
        compare(Fisher(), Picks("plain"), [batch])
    assert max(sizes) <= 2


def test_a_user_loss_and_autocast_go_one_by_one() -> None:
    model, batch = tiny.llama(), padded()
    with passes() as sizes:
        Fisher()(model, eligible(model), [batch], lambda m, b: m(**b).loss)
    assert sizes == []
    with passes() as sizes, torch.autocast("cpu", torch.bfloat16):
        Fisher()(model, eligible(model), [batch])
    assert sizes == [1] * 5


def test_convolutions() -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4) % 3}
    compare(Fisher(), model, [batch], [1] * 4)
    compare(
        Fisher(), model, [batch], [2, 1, 1, 2], convs="frozen"
    )  # batch norms and the classifier


def test_a_sample_without_labels_is_an_error_as_alone() -> None:
    model, batch = tiny.llama(), padded()
    batch["labels"][3] = -100
    with pytest.raises(errors.ScoreError, match="the loss of batch 0 is nan"):
        Fisher()(model, eligible(model), [batch])


def test_positions_without_a_gradient_are_left_out() -> None:
    """Of the last layer only the first token is pooled; padding at the end has no loss."""
    shapes: dict[str, set[int]] = {}
    outer = persample._Sums.outer

    def record(self, name, left, right):
        shapes.setdefault(name, set()).add(left.shape[1])
        outer(self, name, left, right)

    with mock.patch.object(persample._Sums, "outer", record):
        batch = {"input_ids": tiny.tokens(5, 7), "labels": torch.arange(5) % 3}
        compare(Fisher(), tiny.bert(), [batch], WHOLE)
        layer = "bert.encoder.layer.{}.output.dense.weight"
        assert shapes[layer.format(1)] == {1} and shapes[layer.format(0)] == {7}
        shapes.clear()
        batch = padded(length=8)
        batch["labels"][:, 5:] = -100
        compare(Fisher(), tiny.llama(), [batch], WHOLE)
        assert shapes["lm_head.weight"] == {4}  # of token 0 to 3 the next one is asked for
    dy, x = torch.zeros(2, 3, 2), torch.randn(2, 3, 4)
    dy[1, 1, 1] = 1.0  # the first feature alone says nothing
    assert torch.equal(persample._felt(dy, x)[1], x[:, 1:2])
    assert persample._felt(torch.zeros(2, 3, 2), x)[0].shape == (2, 0, 2)


# --- what it leaves and takes --------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.llama().train()
    model.model.norm.weight.requires_grad_(False)
    before = {n: (id(p), p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    Fisher()(model, eligible(model), [padded()])
    assert before == {
        n: (id(p), p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()
    }
    assert all(m.training for m in model.modules()) and torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("map", ["abs", "square"])
def test_products_of_samples_go_to_the_kernel_once_for_each_layer_and_batch(map: str) -> None:
    model, batches = tiny.llama(), [padded(6), padded(4, seed=1)]
    found = eligible(model, target_modules="all-linear")
    kernel = ops._core.accumulate_outer_
    with mock.patch.object(ops._core, "accumulate_outer_", wraps=kernel) as counted:
        got = GradStat("sample", map)(model, found, batches)
    assert counted.call_count == 2 * len(found)
    with ops.force_torch():
        want = GradStat("sample", map)(model, found, batches)
    for name in found:
        atol = 1e-6 * float(want[name].max())
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=atol)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_no_tensor_of_all_samples_and_a_matrix() -> None:
    config = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    model = tiny.bert(**config)
    batch = {"input_ids": tiny.tokens(24, 4), "labels": torch.arange(24) % 3}
    with Largest() as largest:
        Fisher()(model, eligible(model), [batch])
    matrix = 64 * 96
    assert largest.elements < 3 * matrix < 24 * matrix  # activations are 24 * 4 * 96 elements


# --- labels from the model ------------------------------------------------------------------------------


class Softmax(nn.Module):
    """Softmax regression, whose Fisher information is known."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(features, classes, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.body(x), labels)}


@pytest.mark.parametrize("batch", [1, 6])
def test_true_fisher_of_softmax_regression(batch: int) -> None:
    model, x = Softmax(4, 3), torch.randn(6, 4)
    data = [{"x": a, "labels": torch.zeros(len(a), dtype=torch.long)} for a in x.split(batch)]
    chance = model.body(x).softmax(-1).detach()
    want = (chance * (1 - chance)).t() @ x.square()  # E (p - 1[c])^2 x^2, summed over samples
    got = TrueFisher(draws=3000)(model, eligible(model), data)["body.weight"]
    torch.testing.assert_close(got, want, rtol=0.08, atol=0.02)
    empirical = Fisher()(model, eligible(model), data)["body.weight"]
    assert ((empirical - want).abs() > 0.2 * want).any()  # else the test shows nothing


def test_draws_depend_on_seed_sample_and_position_alone() -> None:
    model, batch = tiny.llama(), padded()
    of = [TrueFisher(seed=s)(model, eligible(model), [batch]) for s in (1, 1, 2)]
    name = "lm_head.weight"
    assert torch.equal(of[0][name], of[1][name]) and not torch.equal(of[0][name], of[2][name])
    compare(TrueFisher(draws=2), model, [batch], [2, 1, 1, 3, 5])
    data = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    compare(TrueFisher(), model, data)
    other = batch | {"labels": torch.where(batch["labels"] < 0, -100, 3)}
    same = TrueFisher(seed=1)(model, eligible(model), [other])
    torch.testing.assert_close(same, of[0])  # the labels of the data do not matter


def test_true_fisher_means_and_errors() -> None:
    model, batch = tiny.bert(), padded() | {"labels": torch.arange(5) % 3}
    total = TrueFisher(draws=2)(model, eligible(model), [batch])
    mean = TrueFisher(draws=2, outer="mean")(model, eligible(model), [batch])
    assert all(torch.allclose(mean[n] * 5, total[n]) for n in total)
    for wrong in ({"level": "batch"}, {"outer": "cumulative"}, {"draws": 0}):
        with pytest.raises(errors.HyperparameterError):
            TrueFisher(**wrong)
    dot = tiny.Dot(2)
    with pytest.raises(errors.ScoreError, match="cross_entropy with class numbers"):
        TrueFisher()(dot, eligible(dot), torch.ones(2, 2))


def test_true_fisher_in_a_config(tmp_path) -> None:
    config = SelectConfig(score="true_fisher", density=0.1)
    config.save_pretrained(tmp_path)
    assert SelectConfig.from_pretrained(tmp_path) == config
    config = SelectConfig(score=TrueFisher(draws=3, seed=5), density=0.1)
    config.save_pretrained(tmp_path)
    assert SelectConfig.from_pretrained(tmp_path).score == TrueFisher(draws=3, seed=5)

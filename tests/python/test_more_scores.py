"""Scores of weights, inputs and references, and the units and budgets that came with them."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from retouch import SelectConfig, errors, ops, select
from retouch.eligible import as_matrices, candidates, from_matrices
from retouch.scores import (
    Activation,
    ConditionNumber,
    Constant,
    Difference,
    LowRankMagnitude,
    Stripes,
    Wanda,
)

ALL = SelectConfig(score="magnitude", density=0.5, convs="masked")


def matrix(model: nn.Module, name: str) -> Tensor:
    """The weight with output features first, one matrix per expert, by the layout of each model."""
    weight = dict(model.named_parameters())[name].detach()
    if type(model).__name__.startswith("GPT2"):
        return weight.t()[None]
    if type(model).__name__.startswith("GptOss") and weight.dim() == 3:
        return weight.transpose(1, 2)
    return weight if weight.dim() == 3 else weight.flatten(1)[None]


def back(model: nn.Module, name: str, matrices: Tensor) -> Tensor:
    weight = dict(model.named_parameters())[name]
    if type(model).__name__.startswith("GPT2"):
        return matrices[0].t()
    if type(model).__name__.startswith("GptOss") and weight.dim() == 3:
        return matrices.transpose(1, 2)
    return matrices.reshape(weight.shape)


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 2, bias=False), nn.Flatten(), nn.Linear(1, 1))


MODELS = [tiny.llama, tiny.gpt2, tiny.mixtral, tiny.quiet_gpt_oss, conv]


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_matrices_are_output_by_input_features(make) -> None:
    model = make()
    found = {n: c for n, c in candidates(model, ALL).items() if c.state == "masked"}
    assert found
    for name, c in found.items():
        wanted = matrix(model, name)
        assert c.matrix == tuple(wanted.shape)
        assert torch.equal(as_matrices(c.param.detach(), c), wanted)
        assert torch.equal(from_matrices(wanted.contiguous(), c), c.param)


def test_biases_are_no_matrices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(1, 1))
    for score in (LowRankMagnitude(1), ConditionNumber(), Stripes(2)):
        with pytest.raises(
            errors.HyperparameterError, match=r"0\.bias of shape \(2,\) is no matrix"
        ):
            select(model, SelectConfig(score=score, k=1, biases="masked"))


# --- singular values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_low_rank_magnitude_is_the_truncated_svd(make, rank: int) -> None:
    model = make()
    found = {n: c for n, c in candidates(model, ALL).items() if c.state == "masked"}
    for name, score in LowRankMagnitude(rank)(model, found).items():
        u, s, v = torch.linalg.svd(matrix(model, name).double(), full_matrices=False)
        s[:, rank:] = 0
        low = back(model, name, u @ torch.diag_embed(s) @ v).abs()
        assert score.shape == found[name].shape and score.dtype == torch.float32
        torch.testing.assert_close(score.double(), low, rtol=1e-6, atol=1e-9)
        whole = LowRankMagnitude(min(found[name].matrix[1:]))(model, {name: found[name]})[name]
        assert torch.equal(whole, found[name].param.detach().abs())


def test_condition_numbers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q

    def kappa(w: Tensor) -> float:
        model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False), nn.Linear(1, 1))
        model[0].weight.data = w
        found = {"0.weight": candidates(model, ALL)["0.weight"]}
        score = ConditionNumber()(model, found)["0.weight"]
        assert score.shape == w.shape and score.unique().numel() == 1
        return float(score[0, 0])

    assert kappa(torch.diag(torch.tensor([2.0, 1.0]))) == 2
    assert kappa(torch.eye(3)) == 1
    plain = kappa(weight)
    assert plain == pytest.approx(float(torch.linalg.cond(weight.double())), rel=1e-6)
    assert kappa(100 * weight) == pytest.approx(plain, rel=1e-5)
    assert kappa(turn @ weight) == pytest.approx(plain, rel=1e-5)
    assert kappa(torch.ones(3, 1) * torch.tensor([1.0, 0.0])) == float("inf")
    assert kappa(torch.zeros(2, 2)) == float("inf")


def test_the_condition_number_of_experts_is_their_mean() -> None:
    model = tiny.mixtral()
    found = {n: c for n, c in candidates(model, ALL).items() if c.kind == "expert"}
    for name, score in ConditionNumber()(model, found).items():
        wanted = torch.linalg.cond(matrix(model, name).double()).mean()
        assert float(score.flatten()[0]) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("score", [LowRankMagnitude(1), ConditionNumber()])
def test_weights_that_are_not_finite_are_named(score) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(1, 1))
    model[0].weight.data[1, 1] = float("nan")
    with pytest.raises(errors.ScoreError, match=r"0\.weight holds a value that is not finite"):
        select(model, SelectConfig(score=score, k=1))


# --- references --------------------------------------------------------------------------------------------


def changed(model: nn.Module) -> dict[str, Tensor]:
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i, name in enumerate(state):
        state[name].view(-1)[i % state[name].numel()] += i + 1.0
    return state


def test_references_of_every_form(tmp_path: Path) -> None:
    model = tiny.llama()
    state = changed(model)
    other = tiny.llama()
    other.load_state_dict(state)
    folder = tmp_path / "tuned"
    other.save_pretrained(folder)
    file = tmp_path / "tuned.safetensors"
    save_file(state, file)
    config = SelectConfig(score=Difference(state), k=5, target_modules=None)
    mask = select(model, config)
    names = list(state)
    assert set(mask) == set(names[-5:])
    assert all(s.flat().tolist() == [names.index(n) % s.numel] for n, s in mask.items())
    for reference in (other, folder, str(folder), file):
        assert select(model, config, score=Difference(reference)) == mask
    assert str(folder) in repr(Difference(folder)) and "dict" in repr(Difference(state))
    assert repr(Difference()) == "Difference(None)"


def test_configs_with_references_in_files() -> None:
    config = SelectConfig(score=Difference("org/model"), k=1)
    again = SelectConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.score == Difference("org/model")
    by_path = SelectConfig(score=Difference(Path("a/b")), k=1)
    assert SelectConfig.from_dict(by_path.to_dict()).score == Difference("a/b")
    assert SelectConfig(score=Difference(tiny.llama()), k=1).to_dict()["score"] == "custom"


def test_tied_names_are_found() -> None:
    model = tiny.llama(tied=True)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight") + 1
    mask = select(model, SelectConfig(score=Difference(state), threshold=0.5, target_modules=None))
    assert set(mask) == {"model.embed_tokens.weight"}


def test_references_that_do_not_fit() -> None:
    model = tiny.llama()
    state = changed(model)
    name = "model.layers.0.mlp.up_proj.weight"
    for wrong, message in (
        ({n: t for n, t in state.items() if n != name}, f"the reference has no {name}"),
        (state | {name: state[name][:3]}, rf"{name} has shape \(3, 16\) in the reference"),
    ):
        with pytest.raises(errors.ScoreError, match=message):
            select(model, SelectConfig(score=Difference(wrong), k=1))
    with pytest.raises(errors.EngineError, match="checkpoint path, a model or a state dict"):
        select(model, SelectConfig(score=Difference(3), k=1))


def test_differences_are_not_rounded_to_16_bits() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1)).to(torch.bfloat16)
    model[0].weight.data = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    found = {"0.weight": candidates(model, ALL)["0.weight"]}
    scores = Difference({"0.weight": torch.tensor([[1.0001, 1.0]])})(model, found)
    assert scores["0.weight"].tolist() == [[pytest.approx(1e-4, rel=1e-2), 0.0]]


# --- inputs ------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A linear layer that is called twice, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 3)
        self.unused = nn.Linear(2, 3)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.used(self.drop(x)) + self.used(input=y))


def test_statistics_of_inputs_by_hand() -> None:
    model = Two().train()
    found = {"used.weight": candidates(model, ALL)["used.weight"]}
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    data = [(x, y[0]), (x, y[0] * 2)]
    squares = torch.tensor([2 * 1 + 9 * 5, 2 * 4 + 1 * 5], dtype=torch.float32)  # of 6 tokens
    norm = Activation()(model, found, data)["used.weight"]
    assert torch.equal(norm, squares.sqrt().expand(3, 2))
    mean = Activation("mean_square")(model, found, data)["used.weight"]
    torch.testing.assert_close(mean, (squares / 6).expand(3, 2))
    weights = model.used.weight.detach().abs()
    assert torch.equal(Wanda()(model, found, data)["used.weight"], weights * squares.sqrt())
    assert model.training and not model.used._forward_pre_hooks
    seen = []

    def loss_fn(module, batch):
        seen.append(torch.is_grad_enabled())
        return module(*batch)

    assert torch.equal(Activation()(model, found, data, loss_fn)["used.weight"], norm)
    assert seen == [False, False]


def test_inputs_of_a_conv1d() -> None:
    model = tiny.gpt2()
    found = {n: c for n, c in candidates(model, ALL).items() if c.state == "masked"}
    inputs = {}
    handles = [
        model.get_submodule(n.rpartition(".")[0]).register_forward_pre_hook(
            lambda _, args, n=n: inputs.__setitem__(n, args[0].flatten(0, 1))
        )
        for n in found
    ]
    with torch.no_grad():
        model.eval()(**tiny.text())
    for handle in handles:
        handle.remove()
    for name, score in Activation()(model, found, [tiny.text()]).items():
        wanted = inputs[name].norm(dim=0)[:, None].expand(score.shape)  # stored [in, out]
        torch.testing.assert_close(score, wanted, rtol=1e-5, atol=1e-6)


def test_inputs_of_layers_that_share_a_weight() -> None:
    model = Two()
    model.unused.weight = model.used.weight
    model.forward = lambda x, y: model.head(model.used(x) + model.unused(y))
    found = {"used.weight": candidates(model, ALL)["used.weight"]}
    data = [(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))]
    score = Activation()(model, found, data)["used.weight"]
    assert torch.equal(score, torch.tensor([1.0, 2.0]).expand(3, 2))


def test_scores_of_inputs_that_cannot_be() -> None:
    model = Two()
    data = [(torch.ones(1, 2), torch.ones(1, 2))]
    with pytest.warns(UserWarning, match=r"no input reached unused\.weight, whose score is 0"):
        mask = select(model, SelectConfig(score="wanda", k=6), data=data)
    assert set(mask) == {"used.weight"}
    with pytest.raises(errors.ScoreError, match="needs data"):
        select(model, "wanda", k=1)
    with pytest.raises(errors.ScoreError, match="no batch"):
        select(model, "wanda", k=1, data=[])
    bad = [(torch.tensor([[float("inf"), 1.0]]), torch.ones(1, 2))]
    with pytest.raises(errors.ScoreError, match=r"an input of used\.weight is NaN or infinite"):
        select(model, "wanda", k=1, data=bad, exclude_modules=["unused"])
    with pytest.raises(errors.HyperparameterError, match="statistic='median'"):
        Wanda("median")
    for other, fields in ((conv(), {"convs": "masked"}), (tiny.mixtral(), {})):
        with pytest.raises(errors.HyperparameterError, match="not the weight of a linear layer"):
            select(other, SelectConfig(score="wanda", k=1, **fields), data=data)


# --- blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("aggregate", ["mean", "sum", "l2", "abs_of_mean"])
def test_blocks_by_cutting_them_out(make, aggregate: str) -> None:
    model, size, k = make(), 5, 3  # 5 divides none of the sides, so there are smaller blocks

    def own(model, eligible, data, loss_fn):
        return {n: c.param.detach() for n, c in eligible.items()}

    config = SelectConfig(
        score=own, k=k, granularity="block", block_size=size, aggregate=aggregate, convs="masked"
    )
    reduce = {
        "mean": lambda b: b.mean(), "sum": lambda b: b.sum(),
        "l2": lambda b: b.square().sum().sqrt(), "abs_of_mean": lambda b: b.mean().abs(),
    }[aggregate]  # fmt: skip
    blocks = []
    for name, c in candidates(model, config).items():
        if c.state != "masked":
            continue
        weights = matrix(model, name).double()
        marks = torch.arange(c.numel).reshape(weights.shape)
        place = back(model, name, marks).flatten().argsort()  # where each element is stored
        for e in range(weights.shape[0]):
            for i in range(0, weights.shape[1], size):
                for j in range(0, weights.shape[2], size):
                    cut = (e, slice(i, i + size), slice(j, j + size))
                    where = place[marks[cut].flatten()].sort().values.tolist()
                    blocks.append((float(reduce(weights[cut])), name, where))
    blocks.sort(key=lambda b: -b[0])
    wanted: dict[str, list[int]] = {}
    for _, name, where in blocks[:k]:
        wanted[name] = sorted(wanted.get(name, []) + where)
    mask = select(model, config)
    assert {n: s.flat().tolist() for n, s in mask.items()} == wanted
    with ops.force_torch():
        assert select(model, config) == mask


def test_blocks_in_each_tensor_at_random_and_all() -> None:
    model = tiny.llama()
    fields = {"granularity": "block", "block_size": 8}
    mask = select(model, "random", k=1, scope="tensor", **fields)
    assert len(mask) == 14 and {s.count for s in mask.values()} == {64}
    assert mask != select(model, "random", k=1, scope="tensor", seed=1, **fields)
    whole = select(model, "random", density=1.0, **fields)
    assert all(s.kind == "all" for s in whole.values())
    large = select(model, "random", k=1, granularity="block", block_size=999)
    assert [s.kind for s in large.values()] == ["all"]


# --- groups, and budgets of a LoRA -----------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_one_of_every_two_inputs(make) -> None:
    model = make()
    config = SelectConfig(score="magnitude", k=1, scope="group", group_size=2, convs="masked")
    mask = select(model, config)
    assert mask.count * 2 == mask.metadata["eligible"]
    for name, s in mask.items():
        on = torch.zeros(s.numel, dtype=torch.bool)
        on[s.flat().long()] = True
        weights = matrix(model, name).abs().reshape(-1, 2)
        c = candidates(model, config)[name]
        groups = as_matrices(on.reshape(s.shape), c).reshape(-1, 2)
        assert (groups.sum(1) == 1).all()
        assert torch.equal(weights[groups], weights.amax(1))
    assert select(model, config, k=None, density=0.5) == mask


def test_groups_must_fit() -> None:
    with pytest.raises(errors.HyperparameterError, match="have 16 elements, which cannot be cut"):
        select(tiny.llama(), SelectConfig(score="magnitude", k=2, scope="group", group_size=5))
    with pytest.raises(errors.BudgetError, match="cannot select 5 in each group"):
        select(tiny.llama(), SelectConfig(score="magnitude", k=5, scope="group", group_size=4))


def test_as_many_as_a_lora_has() -> None:
    model = tiny.llama()
    mask = select(model, "magnitude", lora_rank=2)
    for name, s in mask.items():
        assert s.count == min(2 * sum(model.get_parameter(name).shape), s.numel)
    experts = tiny.mixtral()
    mask = select(experts, "magnitude", lora_rank=1)
    for name, s in mask.items():
        count, rows, columns = matrix(experts, name).shape
        assert s.count == count * (rows + columns)
    assert select(model, "magnitude", lora_rank=99).count == 2 * 1920  # all


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "block", "k": 1}, "block_size=None with granularity='block'"),
        ({"block_size": 4, "k": 1}, "block_size is for granularity='block'"),
        ({"scope": "group", "k": 1}, "group_size=None with granularity='element'"),
        ({"group_size": 4, "k": 1}, "group_size for scope='group'"),
        (
            {"lora_rank": 4, "granularity": "row"},
            "lora_rank is a budget of elements in each tensor",
        ),
        ({"lora_rank": 4, "scope": "layer"}, "lora_rank is a budget of elements in each tensor"),
        ({"lora_rank": 4, "k": 3}, "got k and lora_rank"),
        ({"allocation": 0.1, "k": 3}, "allocation needs k_per_row"),
        ({"allocation": 1.5, "k_per_row": 3}, "allocation=1.5; wanted a fraction"),
        ({"granularity": "block", "block_size": 2, "scope": "row", "k": 1}, "wanted a scope of"),
        ({"aggregate": "median", "k": 1}, "abs_of_mean"),
    ],
)
def test_fields_that_do_not_fit(fields, message: str) -> None:
    with pytest.raises(errors.HyperparameterError, match=message):
        SelectConfig(score="magnitude", **fields)


def test_arguments_of_scores_are_checked() -> None:
    for make in (lambda: LowRankMagnitude(0), lambda: Stripes(0), lambda: Stripes(2, "diagonal")):
        with pytest.raises(errors.HyperparameterError, match="wanted"):
            make()
    for score in (LowRankMagnitude(3), Stripes(2, "column"), Wanda("mean_square"), Constant()):
        config = SelectConfig(score=score, k=1)
        assert SelectConfig.from_dict(json.loads(json.dumps(config.to_dict()))).score == score

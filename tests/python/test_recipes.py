"""The catalogue: its rows are sound, and each selects what its source says it does."""

import ast
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from tiny_hf import llama
from torch import Tensor, nn

import retouch
from retouch import SelectConfig, recipes, select
from retouch.eligible import candidates
from retouch.recipes import _modules
from retouch.scores import Difference, Gradient, GradStat, LowRankMagnitude, Stripes

ROOT = Path(__file__).parents[2]


class Plain(nn.Module):
    """Linear layers with the given weights, each in a layer of its own, and a head."""

    def __init__(self, *weights: list[list[float]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            values = torch.tensor(weight)
            self.layers.append(nn.Linear(values.shape[1], values.shape[0], bias=False))
            self.layers[-1].weight.data = values
        self.head = nn.Linear(1, 1)  # the last linear layer counts as the head

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def with_gradients(model: Plain, batch: list[Tensor]) -> Tensor:
    """A loss whose gradients are given: item i of the batch, [samples, *shape of layer i]."""
    parts = zip(model.layers, batch, strict=True)
    return sum((layer.weight * g).flatten(1).sum(1).mean() for layer, g in parts)


def chosen(mask: retouch.Mask, layer: int = 0) -> list[int]:
    name = f"layers.{layer}.weight"
    return mask[name].flat().tolist() if name in mask else []


def one(gradient: list[list[float]]) -> tuple[Tensor, ...]:
    return (torch.tensor(gradient)[None],)


# --- the registry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", recipes.list(), ids=lambda row: row.id)
def test_a_row_is_complete(row) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.id)
    for text in (row.title, row.scores, row.where, row.budget, row.cost, row.notes, row.source):
        assert text and text == text.strip() and "\n" not in text
    assert row.notes.endswith(".") and (not row.warning or row.warning.endswith("."))
    assert recipes.info(row.id) is row
    config = SelectConfig(**row.config)
    assert SelectConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if row.id == "magnitude":
        assert recipes.bibtex(row.id) == "" and not row.arxiv
        return
    assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv) and row.variant in ("paper", "released")
    assert row.year in (2000 + int(row.arxiv[:2]), 2000 + int(row.arxiv[:2]) + 1)
    entry = recipes.bibtex(row.id)
    assert entry.startswith(f"@misc{{{row.id},\n") and row.paper in entry and row.arxiv in entry
    assert ("author" in entry) == bool(row.authors)


def test_one_paper_has_one_title() -> None:
    titles = {}
    for row in recipes.list():
        assert titles.setdefault(row.arxiv, row.paper) == row.paper


def test_the_table_of_the_readme_is_generated() -> None:
    assert recipes.markdown() in (ROOT / "README.md").read_text(encoding="utf8")


def test_recipe_files_hold_declarations_only() -> None:
    folder = Path(recipes.__file__).parent
    for file in sorted(folder.glob("*.py")):
        if file.name in ("__init__.py", "_registry.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            assert not isinstance(node, ast.FunctionDef | ast.Lambda | ast.For | ast.ClassDef), file
            if isinstance(node, ast.BinOp):  # joined texts and dicts
                assert isinstance(node.op, ast.Add | ast.BitOr), file
                sides = (node.left, node.right)
                assert not any(isinstance(s, ast.Constant) and s.value == 0 for s in sides)
                numbers = [s for s in sides if isinstance(s, ast.Constant)]
                assert all(isinstance(s.value, str) for s in numbers), file


def test_patterns_name_what_they_say() -> None:
    def matches(pattern: str, model: nn.Module) -> set[str]:
        paths = [*dict(model.named_modules()), *dict(model.named_parameters())]
        return {p for p in paths if re.fullmatch(pattern, p)}

    def of(leaves: list[str], prefix: str) -> set[str]:
        return {f"{prefix}.{i}.{leaf}" for i in range(2) for leaf in leaves}

    bert, gpt2, small = tiny.bert(), tiny.gpt2(), tiny.llama()
    assert matches(_modules.FIRST_OF_MLP, bert) == of(["intermediate.dense"], "bert.encoder.layer")
    assert matches(_modules.FIRST_OF_MLP, gpt2) == of(["mlp.c_fc"], "transformer.h")
    assert matches(_modules.FIRST_OF_MLP, small) == of(
        ["mlp.gate_proj", "mlp.up_proj"], "model.layers"
    )
    assert matches(_modules.LAST_OF_MLP, bert) == of(["output.dense"], "bert.encoder.layer")
    assert matches(_modules.LAST_OF_MLP, gpt2) == of(["mlp.c_proj"], "transformer.h")
    assert matches(_modules.LAST_OF_MLP, small) == of(["mlp.down_proj"], "model.layers")
    assert matches(_modules.ATTENTION_INPUTS, bert) == of(
        [f"attention.self.{x}" for x in ("query", "key", "value")], "bert.encoder.layer"
    )
    assert matches(_modules.ATTENTION_INPUTS, gpt2) == of(["attn.c_attn"], "transformer.h")
    assert matches(_modules.ATTENTION_INPUTS, small) == of(
        [f"self_attn.{x}_proj" for x in "qkv"], "model.layers"
    )
    for model in (bert, gpt2, small, Plain([[1.0]])):
        names = set(dict(model.named_parameters()))
        inside = {n for n in names if re.search(r"(^|\.)\d+\.", n)}
        assert matches(_modules.IN_LAYERS, model) == inside
        assert matches(_modules.OUTSIDE_LAYERS, model) == names - inside
        assert matches(_modules.EVERYTHING, model) == names


# --- by chance or by kind -------------------------------------------------------------------------------


def test_sppft_freezes_layers_9_to_14() -> None:
    model = Plain(*[[[1.0]]] * 16)
    model.input_layernorm = nn.LayerNorm(1)
    frozen = {n for n, _ in model.named_parameters()} - set(select(model, "sppft"))
    assert frozen == {f"layers.{i}.weight" for i in range(9, 15)}


def test_perp_and_ln_tuning_by_kind() -> None:
    model = tiny.bert()
    norms = {n for n, _ in model.named_parameters() if "LayerNorm" in n}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    head = {"classifier.weight", "classifier.bias"}
    assert set(select(model, "perp")) == (norms | biases) - head
    assert set(select(model, "ln-tuning")) == norms | head


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_s2ft_takes_whole_channels(make) -> None:
    model = make()
    mask = select(model, "s2ft", density=0.1)
    assert all("down_proj" in n or "mlp.c_proj" in n for n in mask)
    kind = "columns" if make is tiny.llama else "rows"  # Conv1D is stored the other way round
    assert all(s.kind == kind for s in mask.values())
    width = model.config.hidden_size
    assert mask.count == (4 if make is tiny.llama else 12) * width  # of 2 * 24, of 2 * 64
    assert mask != select(model, "s2ft", density=0.1, seed=1)


def test_shira_masks_differ_between_matrices_of_one_shape() -> None:
    model = Plain([[1.0] * 10] * 10, [[1.0] * 10] * 10)
    mask = select(model, "shira-rand", density=0.1)
    assert len(chosen(mask, 0)) == len(chosen(mask, 1)) == 10 and chosen(mask, 0) != chosen(mask, 1)


def test_shira_struct() -> None:
    model = Plain([[1.0] * 4] * 5)
    rows = [0, 1, 2, 3, 5, 10, 12, 13, 14, 15]  # rows 0 and 3, and the diagonal
    assert chosen(select(model, "shira-struct", score=Stripes(3))) == rows
    columns = [0, 3, 4, 5, 7, 8, 10, 11, 12, 15, 16, 19]
    assert chosen(select(model, "shira-struct", score=Stripes(3, "column"))) == columns
    bare = [0, 1, 2, 3, 12, 13, 14, 15]
    assert chosen(select(model, "shira-struct", score=Stripes(3, diagonal=False))) == bare


def test_rocoft_takes_the_first() -> None:
    model = Plain([[1.0] * 3] * 4)
    assert chosen(select(model, "rocoft-row", k=2)) == [0, 1, 2, 3, 4, 5]
    assert chosen(select(model, "rocoft-column", k=2)) == [0, 1, 3, 4, 6, 7, 9, 10]


# --- by the weights --------------------------------------------------------------------------------------


def test_sara_is_strict_about_its_bound() -> None:
    bound = torch.tensor(2e-3)
    below = torch.nextafter(bound, torch.tensor(0.0))
    model = Plain([[0.001, -0.001, 0.5, float(bound), float(below), 0.0]])
    assert chosen(select(model, "sara")) == [0, 1, 4, 5]
    half = Plain([[0.001, -0.001, 0.5]]).to(torch.bfloat16)
    assert chosen(select(half, "sara")) == [0, 1]


def test_pafi_gives_ties_to_the_first_and_keeps_to_its_budget() -> None:
    model = Plain([[3.0, 1.0, 1.0, 2.0]], [[1.0, 1.0, 0.5, 4.0]])
    mask = select(model, "pafi", k=3)
    assert chosen(mask, 0) == [1, 2] and chosen(mask, 1) == [2]
    assert set(mask) == {"layers.0.weight", "layers.1.weight", "head.weight", "head.bias"}


def test_neuroada_takes_the_largest_of_each_neuron() -> None:
    weight = [[3.0, -5.0, 1.0], [0.0, 2.0, -4.0]]
    assert chosen(select(Plain(weight), "neuroada")) == [1, 5]
    assert chosen(select(Plain(weight[::-1]), "neuroada")) == [2, 4]  # follows its rows
    scaled = [[0.3, -0.5, 0.1], weight[1]]
    assert chosen(select(Plain(scaled), "neuroada")) == [1, 5]
    assert chosen(select(Plain(weight), "supertuning", density=0.5)) == [0, 1, 5]
    assert select(llama(), "neuroada", k_per_row=20).count == 20 * 448


def test_lift_of_rank_one_weights_is_magnitude() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(6, 1) @ torch.randn(1, 5)).tolist()
    lift = select(Plain(weight), "lift", score=LowRankMagnitude(1), lora_rank=1)
    assert lift.count == 6 + 5
    assert lift == select(Plain(weight), "magnitude", k=11)
    other = torch.randn(6, 5).tolist()
    assert select(Plain(other), "lift", score=LowRankMagnitude(1), lora_rank=1) != select(
        Plain(other), "magnitude", k=11
    )
    assert select(Plain(other), "lift").count == 30  # at most all


def test_kappatune_takes_the_best_conditioned() -> None:
    ill, fair, best = [[4.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]], [[0.0, 7.0], [7.0, 0.0]]
    singular = [[1.0, 1.0], [1.0, 1.0]]
    model = Plain(singular, ill, fair, best, singular)
    mask = select(model, "kappatune")
    assert set(mask) == {"layers.3.weight"} and mask["layers.3.weight"].kind == "all"
    assert set(select(model, "kappatune", k=3)) == {f"layers.{i}.weight" for i in (1, 2, 3)}


# --- by gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gps", "neuroada-grad"])
def test_gps_oracle(name: str) -> None:
    gradient = [[3.0, -5.0, 1.0], [0.0, 2.0, -4.0]]
    model = Plain([[0.0] * 3] * 2)
    assert chosen(select(model, name, data=[one(gradient)], loss_fn=with_gradients)) == [1, 5]


def test_tr_pts_gives_more_to_layers_that_hold_more_of_the_best() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(8, 10) + 1, torch.rand(8, 10) / 2
    first[3:, :] = 0.0  # 30 of the best 40 in the first, 10 in the second
    second[0, :] = 5.0
    model = Plain([[0.0] * 10] * 8, [[0.0] * 10] * 8)
    data = [(first[None], second[None])]
    mask = select(model, "tr-pts", data=data, loss_fn=with_gradients, allocation=0.25)
    for layer, k in ((0, 3), (1, 1)):
        rows = torch.tensor(chosen(mask, layer)) // 10
        assert torch.bincount(rows).tolist() == [k] * 8
    # a first selection of equal shares is GPS with the Fisher information
    even = [(first[None], first[None])]
    gps = select(
        model, "gps", score=recipes.info("tr-pts").config["score"], data=even,
        loss_fn=with_gradients, k_per_row=2,
    )  # fmt: skip
    assert gps == select(
        model, "tr-pts", data=even, loss_fn=with_gradients, allocation=0.3, k_per_row=2
    )
    # 25 hits and 10 are 2.5 to 1, rounded up
    first[2, 5:] = 0.0
    part = [(first[None], second[None])]
    mask = select(model, "tr-pts", data=part, loss_fn=with_gradients, allocation=0.21875)
    assert (len(chosen(mask, 0)), len(chosen(mask, 1))) == (24, 8)
    # a layer without hits gets the least, and no row more than all
    extreme = [(first[None] + 9, second[None] * 0)]
    mask = select(model, "tr-pts", data=extreme, loss_fn=with_gradients, allocation=0.5)
    assert len(chosen(mask, 1)) == 8
    lop_sided = [(first[None] + 9, second[None] / 100)]
    mask = select(model, "tr-pts", data=lop_sided, loss_fn=with_gradients, allocation=0.51)
    assert len(chosen(mask, 0)) == 80


def samples(*gradients: list[float]) -> tuple[Tensor, ...]:
    return (torch.tensor(gradients)[:, None, :],)


def test_the_order_of_sums_and_squares() -> None:
    """Which of +1 and -1 in one batch, and in two, a score sees."""
    model = Plain([[1.0, 1.0, 1.0, 1.0]])
    # coordinate 0 cancels within a batch, 1 between batches, 2 and 3 do not
    data = [
        samples([5.0, 3.0, 1.0, 0.0], [-5.0, 3.0, 1.0, 0.0]),
        samples([5.0, -3.0, 1.0, 0.0], [-5.0, -3.0, 1.0, 0.0]),
    ]

    def best(name: str) -> list[int]:
        budget = {"k_per_row": 1} if name == "neuroada-grad" else {"k": 1}
        if name == "fish":
            budget["counted_in_budget"] = False
        if name.startswith("spu"):
            budget["target_modules"] = "all-linear"
        return chosen(select(model, name, data=data, loss_fn=with_gradients, **budget))

    assert best("fish") == [0]  # squares of samples
    # SPU: 3, 3 - 3 = 0 and 1, 2 summed: the first batch counts twice
    assert best("spu") == [2] and best("spu-released") == [1]
    assert best("spt") == best("child-tuning-d") == best("rosa") == [1]  # squares of batches
    assert best("sam") == best("shira-grad") == best("shira-snip") == best("neuroada-grad") == [2]


def test_sift_and_rosa_look_at_the_first_batch_alone() -> None:
    model = Plain([[1.0, 1.0, 1.0]])
    data = [samples([1.0, -2.0, 0.0]), samples([9.0, 0.0, 0.0])]
    for name in ("sift", "rosa"):
        mask = select(model, name, k=1, data=data, loss_fn=with_gradients)
        assert chosen(mask) == [1]


def test_snip_weighs_gradients_by_weights() -> None:
    model = Plain([[0.1, -4.0, 1.0]])
    data = [samples([5.0, 1.0, 2.0])]
    assert chosen(select(model, "shira-grad", k=1, data=data, loss_fn=with_gradients)) == [0]
    assert chosen(select(model, "shira-snip", k=1, data=data, loss_fn=with_gradients)) == [1]


def test_smt_blocks_cancel_in_the_released_code_and_not_in_the_paper() -> None:
    cancels, small = [[1.0, -1.0], [-1.0, 1.0]], [[0.1, 0.1], [0.1, 0.1]]
    gradient = [[*a, *b] for a, b in zip(cancels, small, strict=True)]
    model = Plain([[0.0] * 4] * 2)
    options = {
        "target_modules": "all-linear", "block_size": 2, "k": 1, "data": [one(gradient)],
        "loss_fn": with_gradients,
    }  # fmt: skip
    assert chosen(select(model, "smt", **options)) == [2, 3, 6, 7]
    absolute = GradStat(post="abs", training=True)
    assert chosen(select(model, "smt", score=absolute, **options)) == [0, 1, 4, 5]


def test_irepair_takes_the_layer_with_the_largest_gradient() -> None:
    model = Plain([[0.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]])
    parts = ([[1.0, 0.0]], [[3.0, -4.0]], [[0.0, 2.0]])  # norms 1, 5, 2
    data = [tuple(torch.tensor(p)[None] for p in parts)]
    mask = select(model, "irepair-fixed", data=data, loss_fn=with_gradients)
    assert set(mask) == {"layers.1.weight"}


def test_child_tuning_leaves_what_is_outside_of_layers_free() -> None:
    model = tiny.bert()
    found = candidates(model, SelectConfig(**recipes.info("child-tuning-d").config))
    for name, c in found.items():
        assert c.state == ("masked" if ".layer." in name else "full"), name


# --- by inputs and references -------------------------------------------------------------------------------


def test_ssu_oracle() -> None:
    model = Plain([[3.0, 1.0], [4.0, 1.0]])
    data = [(torch.tensor([[1.0, 3.0]]),)]  # mean squares 1 and 9
    # sums 7 * 1 and 2 * 3: column 0 is frozen; norms 5 * 1 and 1.41 * 9: column 1 is
    for name, trained in (("ssu", [1, 3]), ("ssu-released", [0, 2])):
        mask = select(model, name, data=data)
        assert chosen(mask) == trained and set(mask) > {"head.weight"}
    even = [(torch.ones(1, 2),)]  # sums 5 and 6, norms 5 and 4.2
    for name, trained in (("ssu", [0, 2]), ("ssu-released", [1, 3])):
        assert chosen(select(Plain([[5.0, 3.0], [0.0, 3.0]]), name, data=even)) == trained


def test_supertuning_weighs_weights_by_inputs() -> None:
    model = Plain([[3.0, 2.0], [1.0, 1.5]])
    data = [(torch.tensor([[1.0, 3.0]]),)]  # 3, 6, 1, 4.5
    assert chosen(select(model, "supertuning-wanda", k=2, data=data)) == [1, 3]
    assert chosen(select(model, "supertuning", k=2)) == [0, 1]


@pytest.mark.parametrize("name", ["lt-sft", "lota"])
def test_tickets_are_what_moved_most(name: str) -> None:
    base = Plain([[1.0, 1.0, 1.0, 1.0]])
    tuned = Plain([[1.5, 1.0, -1.0, 1.1]])
    tuned.head.load_state_dict(base.head.state_dict())
    mask = select(base, name, score=Difference(tuned), k=2)
    assert chosen(mask) == [0, 2]
    assert ("head.weight" in mask) == (name == "lt-sft")
    with pytest.raises(retouch.errors.ScoreError, match="needs the model to compare with"):
        select(base, name)


def test_the_subnetwork_of_a_run_is_every_bit_that_changed() -> None:
    base = Plain([[1.0, 1.0, 1.0, 1.0, 1e-40]]).to(torch.bfloat16)
    tuned = Plain([[1.0, 1.0, 1.0078125, 1.0, 2e-40]]).to(torch.bfloat16)
    tuned.head.load_state_dict(base.head.state_dict())
    mask = select(base, "rl-subnetwork", score=Difference(tuned))
    assert set(mask) == {"layers.0.weight"} and chosen(mask) == [2, 4]


def test_a_recipe_can_be_changed() -> None:
    mask = select(llama(), "shira-wm", density=0.5)
    config = mask.metadata["config"]
    assert (
        config["recipe"] == "shira-wm" and config["density"] == 0.5 and config["scope"] == "tensor"
    )
    assert Gradient(training=True) == recipes.info("gps").config["score"]

"""What kind of thing each parameter is, and which may take part."""

import warnings

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from retouch import SelectConfig, errors, wrap
from retouch.eligible import as_units, candidates, from_units
from retouch.masks import Mask

EVERYTHING = SelectConfig(score="magnitude", density=0.5, target_modules=None)


def config(**changes) -> SelectConfig:
    return SelectConfig(**({"score": "magnitude", "density": 0.5} | changes))


def states(model: nn.Module, **changes) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"masked": set(), "full": set(), "frozen": set()}
    for name, c in candidates(model, config(**changes)).items():
        found[c.state].add(name)
    return found


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: c.kind for name, c in candidates(model, EVERYTHING).items()}


# --- kinds -----------------------------------------------------------------------------------------


def test_kinds_of_bert() -> None:
    found = kinds(tiny.bert())
    layer = "bert.encoder.layer.0."
    assert found["bert.embeddings.word_embeddings.weight"] == "embedding"
    assert found["bert.embeddings.LayerNorm.weight"] == "norm"
    assert found["bert.embeddings.LayerNorm.bias"] == "norm_bias"
    assert found[f"{layer}attention.self.query.weight"] == "linear"
    assert found[f"{layer}attention.self.query.bias"] == "bias"
    assert found["bert.pooler.dense.weight"] == "linear"
    assert found["classifier.weight"] == found["classifier.bias"] == "head"


def test_kinds_of_llama() -> None:
    found = kinds(tiny.llama())
    assert found["lm_head.weight"] == "output"
    assert found["model.embed_tokens.weight"] == "embedding"
    assert found["model.norm.weight"] == "norm"
    assert found["model.layers.0.input_layernorm.weight"] == "norm"


@pytest.mark.parametrize("model", [tiny.llama(tied=True), tiny.gpt2()])
def test_a_tied_table_is_one_embedding_with_both_names(model) -> None:
    found = candidates(model, EVERYTHING)
    table = next(iter(found.values()))
    assert table.kind == "embedding" and "lm_head.weight" in table.aliases
    assert "lm_head.weight" not in found
    assert "output" not in {c.kind for c in found.values()}


def test_a_bare_backbone_has_no_head() -> None:
    backbone = tiny.bert().bert
    assert kinds(backbone)["pooler.dense.weight"] == "linear"


def test_the_last_linear_of_a_plain_model_is_its_head() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert kinds(model) == {
        "0.weight": "linear", "0.bias": "bias", "1.weight": "norm", "1.bias": "norm_bias",
        "2.weight": "head", "2.bias": "head",
    }  # fmt: skip


def test_kinds_of_other_modules() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "conv": nn.Conv2d(3, 5, 2),
            "up": nn.ConvTranspose2d(3, 5, 2),
            "group": nn.GroupNorm(1, 3),
            "rms": nn.RMSNorm(3),
            "bag": nn.EmbeddingBag(3, 2),
            "rnn": nn.LSTM(2, 3),
            "head": nn.Linear(2, 2),
        }
    )
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    found = kinds(model)
    assert found["attention.in_proj_weight"] == found["attention.out_proj.weight"] == "linear"
    assert found["attention.in_proj_bias"] == found["rnn.bias_ih_l0"] == "bias"
    assert found["conv.weight"] == found["up.weight"] == "conv"
    assert found["group.weight"] == found["rms.weight"] == "norm"
    assert found["bag.weight"] == "embedding"
    assert found["rnn.weight_ih_l0"] == found["scale"] == "other"


def test_layers_are_list_positions() -> None:
    found = candidates(tiny.bert(), EVERYTHING)
    one = found["bert.encoder.layer.1.output.dense.weight"]
    assert (one.layer, one.position) == ("bert.encoder.layer.1", 1)
    assert found["classifier.weight"].layer is None
    plain = nn.Sequential()
    plain.add_module("first", nn.Linear(2, 2))
    plain.add_module("second", nn.Sequential(nn.Linear(2, 2)))
    inner = candidates(plain, EVERYTHING)["second.0.weight"]
    assert (inner.layer, inner.position) == ("second", 1)


# --- orientation -----------------------------------------------------------------------------------


def test_rows_are_output_features_in_every_storage_order() -> None:
    model = tiny.gpt2()
    c = candidates(model, EVERYTHING)["transformer.h.0.mlp.c_fc.weight"]
    assert c.kind == "linear" and c.shape == (16, 64)
    rows = as_units(c.param.detach(), c.row_dims)
    columns = as_units(c.param.detach(), c.column_dims)
    assert torch.equal(rows, c.param.t()) and torch.equal(columns, c.param)

    both = nn.ModuleList([nn.Conv1d(3, 5, 2), nn.ConvTranspose1d(3, 5, 2), nn.Linear(1, 1)])
    found = candidates(both, EVERYTHING)
    for name, outputs, inputs in (("0.weight", 5, 3), ("1.weight", 5, 3)):
        c = found[name]
        assert as_units(c.param.detach(), c.row_dims).shape == (outputs, inputs * 2)
        assert as_units(c.param.detach(), c.column_dims).shape == (inputs, outputs * 2)


@pytest.mark.parametrize(
    ("model", "transposed"), [(tiny.mixtral(), False), (tiny.quiet_gpt_oss(), True)]
)
def test_fused_experts(model, transposed: bool) -> None:
    found = candidates(model, config())
    up = next(c for name, c in found.items() if name.endswith("experts.gate_up_proj"))
    assert up.kind == "expert" and up.state == "masked"
    experts, hidden, features = 3, 8, 12
    assert up.shape == ((experts, hidden, features) if transposed else (experts, features, hidden))
    rows = as_units(up.param.detach(), up.row_dims)
    assert rows.shape == (experts * features, hidden)
    one = up.param[1, :, 2] if transposed else up.param[1, 2]
    assert torch.equal(rows[features + 2], one)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    data=st.data(),
)
def test_positions_in_units_are_found_again(shape: tuple[int, ...], data) -> None:
    dims = tuple(data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True)))
    flat = torch.arange(torch.tensor(shape).prod())
    units = as_units(flat.reshape(shape), dims)
    chosen = data.draw(st.sets(st.sampled_from(range(len(flat)))))
    positions = torch.tensor(sorted(chosen), dtype=torch.int32)
    want = sorted(units.reshape(-1)[positions.long()].tolist())
    found = from_units(positions, shape, dims)
    assert found.tolist() == want and found.dtype == torch.int32


# --- states ----------------------------------------------------------------------------------------


def test_by_default_all_linear_weights_compete() -> None:
    model = tiny.bert()
    found = states(model)
    assert found["masked"] == {n for n, k in kinds(model).items() if k == "linear"}
    assert not found["full"]
    assert states(tiny.llama())["masked"] == {
        n for n, k in kinds(tiny.llama()).items() if k == "linear"
    }


@pytest.mark.parametrize("word", [None, "all"])
def test_every_parameter_competes(word) -> None:
    model = tiny.bert()
    assert states(model, target_modules=word)["masked"] == dict(model.named_parameters()).keys()


def test_lists_name_modules_by_ending_or_in_full() -> None:
    model = tiny.bert()
    query = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert states(model, target_modules=["query"])["masked"] == query
    assert states(model, target_modules=("self.query",))["masked"] == query
    one = "bert.encoder.layer.1.attention.self.query"
    assert states(model, target_modules=[one])["masked"] == {f"{one}.weight"}
    # "dense" is not the ending "e" of anything, and no part of a name
    with pytest.raises(errors.HyperparameterError, match=r"'uery' \(near: .*query"):
        states(model, target_modules=["uery"])


def test_strings_are_regular_expressions_for_the_whole_name() -> None:
    model = tiny.bert()
    found = states(model, target_modules=r".*layer\.1\..*\.(query|key)")
    assert found["masked"] == {
        f"bert.encoder.layer.1.attention.self.{n}.weight" for n in ("query", "key")
    }


def test_a_block_stands_for_its_linear_weights_and_a_parameter_for_itself() -> None:
    model = tiny.bert()
    block = "bert.encoder.layer.0.attention"
    assert states(model, target_modules=["layer.0.attention"])["masked"] == {
        n for n, k in kinds(model).items() if n.startswith(block) and k == "linear"
    }
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    assert states(model, target_modules=["layer.0.attention.self.query.bias"])["masked"] == {bias}
    norm = states(model, target_modules=["embeddings.LayerNorm"])["masked"]
    assert norm == {"bert.embeddings.LayerNorm.weight"}


def test_embeddings_can_be_named_also_by_their_tied_name() -> None:
    model = tiny.llama(tied=True)
    assert states(model, target_modules=["lm_head"])["masked"] == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        ("heads", "head"), ("embeddings", "embedding"), ("norms", "norm"), ("biases", "bias"),
        ("norm_biases", "norm_bias"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", ["masked", "full", "frozen"])
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_flags(flag: str, kind: str, state: str, targets) -> None:
    model = tiny.bert()
    of_kind = {n for n, k in kinds(model).items() if k == kind}
    if flag == "norms":
        of_kind |= {n for n, k in kinds(model).items() if k == "norm_bias"}
    assert of_kind and of_kind <= states(model, target_modules=targets, **{flag: state})[state]


def test_flags_of_convolutions_and_outputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    assert states(net)["masked"] == {"1.weight"}
    assert states(net, convs="masked")["masked"] == {"0.weight", "1.weight"}
    model = tiny.llama()
    assert "lm_head.weight" in states(model, heads="full")["full"]
    assert "lm_head.weight" in states(model, heads="full", output_embeddings="masked")["masked"]
    tied = states(tiny.llama(tied=True), heads="full")  # it is an embedding, not a head
    assert "model.embed_tokens.weight" in tied["frozen"]


def test_a_named_parameter_is_stronger_than_a_flag_and_exclusion_than_all() -> None:
    model = tiny.bert()
    bias = "bert.pooler.dense.bias"
    assert bias in states(model, target_modules=[bias], biases="frozen")["masked"]
    found = states(model, modules_to_save=["classifier"], exclude_modules=["classifier", "pooler"])
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= found["frozen"]
    found = states(model, modules_to_save=["classifier", "word_embeddings"])
    assert {"classifier.weight", "classifier.bias"} <= found["full"]
    assert "bert.embeddings.word_embeddings.weight" in found["full"]


def test_layers() -> None:
    model = tiny.bert()
    found = states(model, layers=[1], heads="full", biases="masked")
    assert all("layer.0" not in n for n in found["masked"] | found["full"])
    assert any("layer.1" in n for n in found["masked"])
    assert "classifier.weight" in found["full"] and "bert.pooler.dense.bias" in found["masked"]


def test_requires_grad_plays_no_part_and_integers_are_frozen() -> None:
    model = tiny.bert().requires_grad_(False)
    assert states(model)["masked"]
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net.register_parameter("table", nn.Parameter(torch.ones(3, dtype=torch.int8), False))
    assert "table" in states(net, target_modules=None)["frozen"]


def test_a_wrapped_model_has_no_other_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = states(model)
    wrap(torch.optim.SGD, Mask.full(model), lr=0.1)
    assert states(model) == before


# --- errors ----------------------------------------------------------------------------------------


def test_names_that_match_nothing() -> None:
    model = tiny.bert()
    with pytest.raises(errors.HyperparameterError, match=r"'qury'.*near: query"):
        states(model, target_modules=["qury"])
    with pytest.raises(errors.HyperparameterError, match=r"give a list: \['query'\]"):
        states(model, target_modules="query")
    with pytest.raises(errors.HyperparameterError, match=r"'zzz' .among: "):
        states(model, target_modules=["zzz"])
    with pytest.raises(errors.HyperparameterError, match="no regular expression"):
        states(model, target_modules="(")
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        with pytest.warns(UserWarning, match=f"{field}: 'keyy'.*near: key.*matches nothing"):
            states(model, **({"target_modules": ["query"]} | {field: ["query", "keyy"]} | (
                {"biases": "full"} if field == "exclude_modules" else {}
            )))  # fmt: skip


def test_nothing_to_select_says_what_there_is() -> None:
    with pytest.raises(errors.HyperparameterError, match="2 head; see heads"):
        states(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(errors.HyperparameterError, match="its parameters are none"):
        states(nn.Sequential(nn.ReLU()))


def test_weights_on_the_meta_device_are_refused_if_they_take_part() -> None:
    with torch.device("meta"):
        layer = nn.Linear(2, 2)
    model = nn.ModuleList([layer, nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(errors.MaskError, match=r"0\.weight is on the meta device"):
        states(model)
    assert states(model, exclude_modules=["0"])["masked"] == {"1.weight"}


def test_no_warning_where_every_name_is_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states(tiny.bert(), target_modules=["query", "key"], exclude_modules=["layer.0"])

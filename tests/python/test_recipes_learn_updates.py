"""Recipes that change the step: as config, in `wrap`, in the Trainer, and that they learn."""

import copy
import io
import json

import pytest
import torch
from test_recipes_learn import data  # noqa: F401 - a fixture
from tiny_hf import llama, same, trainer, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from training import assert_frozen, bits, snapshot

import retouch
from retouch import SelectConfig, recipes
from retouch.errors import HyperparameterError
from retouch.optim import gates

KEYS = ("gate", "decay", "pull")
UPDATES = [row.id for row in recipes.list() if row.config.keys() & set(KEYS)]
ELEMENTS = {"score": "magnitude", "density": 0.3, "granularity": "element", "direction": "top"}
each = pytest.mark.parametrize("name", UPDATES)
LR = {"child-tuning-f": 1e-2}


def step(model, optimizer, batch) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_which_they_are() -> None:
    wanted = {"alphaadam", "cautious", "child-tuning-f", "gmt-gate", "gmt-micro", "l2-sp"}
    assert set(UPDATES) == wanted | {"magma", "mos", "skipupdate"}


@each
@pytest.mark.parametrize("changes", [{}, ELEMENTS], ids=["all", "elements"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learns(name, changes, dtype, data) -> None:  # noqa: F811
    model = llama().to(dtype)
    config = SelectConfig.named(name, **changes)
    with torch.no_grad():
        first = sum(float(model(**batch).loss) for batch in data)
    before = snapshot(model)
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=LR.get(name, 2e-2), weight_decay=0.1)
    for batch in data * 4:
        step(model, optimizer, batch)
    with torch.no_grad():
        last = sum(float(model(**batch).loss) for batch in data)
    assert last < first - 0.02, f"{first:.3f} -> {last:.3f}"
    assert_frozen(before, model, retouch.get_engine(model).mask)
    retouch.verify_untouched(model)
    delta = retouch.Delta.from_model(model)
    retouch.unwrap(model)
    delta.revert_(model)
    assert all(torch.equal(bits(p), bits(before[n])) for n, p in model.named_parameters())


@each
def test_it_is_not_plain_adamw_and_it_is_the_optimizer_told_by_hand(name, data) -> None:  # noqa: F811
    """A config that was dropped on the way would pass all tests of learning."""
    config = SelectConfig.named(name)
    found = {}
    for way in ("recipe", "by hand", "plain"):
        model = llama()
        options = {k: getattr(config, k) for k in KEYS if getattr(config, k) is not None}
        mask = retouch.select(model, name)
        if way == "recipe":
            optimizer = retouch.wrap(retouch.AdamW, name, model, lr=1e-2, weight_decay=0.1)
        else:
            kwargs = options if way == "by hand" else {}
            optimizer = retouch.wrap(
                retouch.AdamW, mask, model, lr=1e-2, weight_decay=0.1, **kwargs
            )
        for batch in data:
            step(model, optimizer, batch)
        found[way] = snapshot(model)
    equal = {n: torch.equal(bits(a), bits(found["by hand"][n])) for n, a in found["recipe"].items()}
    assert all(equal.values()), equal
    assert not same(found["recipe"], found["plain"])


@each
def test_a_resumed_run_goes_on_bit_for_bit(name, data) -> None:  # noqa: F811
    config = SelectConfig.named(name, **ELEMENTS)
    whole = llama()
    optimizer = retouch.wrap(retouch.AdamW, config, whole, lr=1e-2)
    for i, batch in enumerate(data):
        if i == 2:
            file = io.BytesIO()
            torch.save((whole.state_dict(), optimizer.state_dict()), file)
        step(whole, optimizer, batch)
    file.seek(0)
    state, options = torch.load(file, weights_only=True)
    again = llama()
    resumed = retouch.wrap(retouch.AdamW, None, again)  # all comes with the state
    again.load_state_dict(state)
    resumed.load_state_dict(options)
    for batch in data[2:]:
        step(again, resumed, batch)
    assert same(snapshot(whole), snapshot(again))


@each
def test_the_trial_step_of_a_distributed_checkpoint_is_none(name, data) -> None:  # noqa: F811
    """It makes the state by a step with gradients of 0; a gate may not learn or draw from that."""
    found = []
    for trial in (False, True):
        model = llama()
        optimizer = retouch.wrap(retouch.AdamW, name, model, lr=1e-2)
        if trial:
            get_optimizer_state_dict(model, optimizer)
        for batch in data[:2]:
            step(model, optimizer, batch)
        found.append(snapshot(model))
    assert same(*found)


@pytest.mark.parametrize("name", ["cautious", "alphaadam", "gmt-gate", "magma", "mos"])
@pytest.mark.parametrize("policy", ["P1", "P2"])
def test_on_a_mask_that_moves(name, policy, data) -> None:  # noqa: F811
    """Resumed in the middle, with clocks of their own where the gate has them."""
    changes = {
        **ELEMENTS,
        "schedule": retouch.Schedule(every=2, change="grow", rounds=3, ramp="linear"),
    }
    if name == "gmt-gate":
        changes["gate"] = {"policy": policy}
    elif policy == "P2":
        changes["schedule"] = retouch.Schedule(every=2, change="cycle", state="keep")
        changes |= {"direction": "random", "score": None}
    config = SelectConfig.named(name, **changes)
    whole, before = llama(), snapshot(llama())
    optimizer = retouch.wrap(retouch.AdamW, config, whole, lr=1e-2)
    for i, batch in enumerate(data + data):
        if i == 5:
            state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        step(whole, optimizer, batch)
    again = llama()
    resumed = retouch.wrap(retouch.AdamW, config, again, lr=1e-2)
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for batch in (data + data)[5:]:
        step(again, resumed, batch)
    assert same(snapshot(whole), snapshot(again))
    retouch.verify_untouched(whole)
    retouch.Delta.from_model(whole).revert_(whole)
    assert all(torch.equal(bits(p), bits(before[n])) for n, p in snapshot(whole).items())


# --- as data -----------------------------------------------------------------------------------------


def test_a_gate_is_saved_with_its_config(tmp_path) -> None:
    config = SelectConfig(score="magnitude", density=0.1, gate=gates.TopK(0.5, policy="P2"))
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "retouch_config.json").read_text())
    assert text["gate"] == gates.plain(gates.TopK(0.5, policy="P2"))
    assert text["gate"]["kind"] == "topk" and text["gate"]["density"] == 0.5
    assert SelectConfig.from_pretrained(tmp_path) == config
    assert isinstance(config.gate, gates.TopK)
    assert SelectConfig(score="magnitude", density=0.1, gate=text["gate"]) == config


def test_parts_of_a_gate_can_be_replaced() -> None:
    assert SelectConfig.named("cautious", gate={"scale": "paper"}).gate == gates.Cautious("paper")
    other = SelectConfig.named("cautious", gate={"kind": "magma", "p": 0.25})
    assert other.gate == gates.Magma(0.25)
    assert SelectConfig.named("cautious", gate=None).gate is None
    with pytest.raises(HyperparameterError, match="'cautious' has no 'alpha'; it has scale"):
        SelectConfig.named("cautious", gate={"alpha": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": "cautious"}, "'cautious' is no gate; wanted an object, or a dict whose 'kind'"),
        ({"decay": "bases"}, "decay='bases'; wanted one of weight, base; did you mean 'base'"),
        ({"pull": 1.0}, r"pull=1\.0; wanted a fraction in \(0, 1\)"),
        ({"pull": "much"}, "pull='much'; wanted a number"),
    ],
)
def test_mistakes_are_named(fields, message) -> None:
    with pytest.raises(HyperparameterError, match=message):
        SelectConfig(score="magnitude", density=0.1, **fields)


def test_an_optimizer_that_does_not_know_it() -> None:
    model = llama()
    ours = r"retouch\.wrap\(retouch\.AdamW, config, model\)"
    with pytest.raises(
        HyperparameterError, match=f"recipe 'cautious' asks for gate=.*AdamW.*{ours}"
    ):
        retouch.wrap(torch.optim.AdamW, "cautious", model, lr=1e-3)
    with pytest.raises(HyperparameterError, match=r"SGD does not know"):
        retouch.wrap(retouch.SGD, "magma", model, lr=1e-3)
    with pytest.raises(HyperparameterError, match=r"asks for pull=0\.1.*SGD"):
        retouch.wrap(torch.optim.SGD(model.parameters(), lr=1e-3), "mos", model)
    retouch.wrap(torch.optim.SGD, SelectConfig.named("l2-sp", decay="weight"), model, lr=1e-3)
    retouch.unwrap(model)
    assert not hasattr(model, "_retouch")  # and the model is as it was
    for name in ("mos", "l2-sp"):
        retouch.wrap(retouch.SGD, name, model, lr=1e-3, weight_decay=0.1)
        retouch.unwrap(model)


def test_what_an_optimizer_was_told_itself_stays() -> None:
    model = llama()
    named = dict(model.named_parameters())
    norms = [p for n, p in named.items() if "norm" in n]
    rest = [p for n, p in named.items() if "norm" not in n]
    groups = [{"params": rest}, {"params": norms, "gate": gates.TopK(0.5)}]
    optimizer = retouch.wrap(retouch.AdamW(groups, lr=1e-3), "cautious", model)
    kinds = [group["gate"]["kind"] for group in optimizer.param_groups]
    assert kinds == ["cautious", "topk"]


# --- oracles of the ways back to the base ----------------------------------------------------------------


class One(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[value]]))


@pytest.mark.parametrize("make", [retouch.SGD, retouch.AdamW, retouch.Lion])
@pytest.mark.parametrize(("base", "start", "wanted"), [(1.0, 0.0, 0.1), (3.0, 0.0, 0.3)])
def test_mos_oracle(make, base, start, wanted) -> None:
    """The mean of earlier tasks (of 2 and 4 in the second case) pulls by a tenth, without a step."""
    model = One(base)
    optimizer = retouch.wrap(make, SelectConfig.named("mos"), model, lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        model.weight.fill_(start)
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[wanted]]))
    with torch.no_grad():
        model.weight.fill_(base)  # at the base there is nothing to do
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert model.weight.item() == base


def test_a_pull_after_a_step_is_written_once_more() -> None:
    """Sparse values that a kernel has scattered already, in 16 bits: the weight holds the pulled one."""
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    config = SelectConfig(score="magnitude", density=0.5, target_modules=None, pull=0.25)
    base = model.weight.detach().clone()
    optimizer = retouch.wrap(retouch.SGD, config, model, lr=1.0)
    slot = retouch.get_engine(model).slots["weight"]
    model.weight.grad = torch.ones(8, 8, dtype=torch.bfloat16)
    optimizer.step()
    start = slot.base.float()
    wanted = (start - 1).lerp(start, 0.25)
    torch.testing.assert_close(slot.value.detach(), wanted)
    now = slot.selection.take(slot.param)
    assert torch.equal(bits(now), bits(slot.value.to(torch.bfloat16)))
    assert int((bits(model.weight) != bits(base)).sum()) == 32


def test_l2_sp_is_the_gradient_of_its_penalty() -> None:
    """lambda / 2 * |w - w0|^2 beside a loss whose gradient is 1."""
    model, w = One(2.0), 2.0
    optimizer = retouch.wrap(retouch.SGD, "l2-sp", model, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        optimizer.zero_grad()
        w -= 0.1 * (1 + 0.5 * (w - 2.0))
    assert model.weight.item() == pytest.approx(w, abs=1e-6) and w == pytest.approx(1.71475)


# --- the Trainer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cautious", "magma", "mos"])
def test_in_the_trainer_and_resumed(name, tmp_path) -> None:
    def start(out):
        run = trainer(tmp_path / out, max_steps=4, save_strategy="steps", save_steps=2)
        return retouch.attach(run, name)

    run = start("a")
    run.train()
    inner = retouch.get_engine(run.model).bindings()[0].optimizer
    config = SelectConfig.named(name)
    assert isinstance(inner, retouch.AdamW)
    for group in inner.param_groups:
        assert group["gate"] == gates.plain(config.gate) and group["pull"] == (config.pull or 0.0)
    again = start("b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(weights(run.model), weights(again.model))


def test_the_callback_passes_it_on(tmp_path) -> None:
    call = retouch.SelectiveUpdates("cautious", gate={"scale": "paper"})
    run = trainer(tmp_path / "a", max_steps=2, callbacks=[call])
    run.train()
    inner = retouch.get_engine(run.model).bindings()[0].optimizer
    assert inner.param_groups[0]["gate"] == gates.plain(gates.Cautious("paper"))
    run = trainer(tmp_path / "b", max_steps=2)
    retouch.attach(run, "cautious", optimizer=torch.optim.AdamW)
    with pytest.raises(HyperparameterError, match="asks for gate"):
        run.train()

"""Learned gates: their rules by hand, the identity at step 0, the base that comes back, real models."""

import json

import pytest
import tiny
import torch
from tiny_hf import llama, tokens
from torch import Tensor, nn
from training import assert_frozen, assert_same, snapshot

import retouch
from retouch import SelectConfig, errors, select
from retouch.gates import (
    Gates,
    HardConcrete,
    LearnedGates,
    Proximal,
    StraightThrough,
    install,
)
from retouch.masks import Mask


class Scale(nn.Module):
    """The loss is 3 * the only weight that counts; the head is none of the test's business."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Linear(1, 1, bias=False)
        self.body.weight.data.fill_(weight)
        self.head = nn.Linear(1, 1)

    def forward(self) -> Tensor:
        return 3.0 * self.body.weight.sum()


def only(gates) -> tuple[nn.Parameter, nn.Parameter]:
    return gates.changes[0], gates.gates[0]


def batches() -> list[dict[str, Tensor]]:
    samples = tokens(32)
    return [
        {k: torch.stack([s[k] for s in samples[i : i + 8]]) for k in samples[0]}
        for i in range(0, 32, 8)
    ]


def config(units, gate: str = "hard_concrete", **changes) -> SelectConfig:
    score = {k: changes.pop(k) for k in list(changes) if hasattr(LearnedGates, k)}
    fields = {"density": 0.1} | changes
    return SelectConfig(score=LearnedGates(gate=gate, units=units, **score), **fields)


# --- rules, by hand ------------------------------------------------------------------------------------


def test_taps_oracle() -> None:
    model = Scale()
    gates = install(model, "taps")
    change, gate = only(gates)
    assert gate.item() == pytest.approx(0.15) and change.item() == 0.0
    with torch.no_grad():
        gate.fill_(0.05)
        change.fill_(0.3)
    model().backward()  # closed: the base exactly, no gradient for the change, 3 * 0.3 for s
    assert model.body.weight.item() == 0.5
    assert change.grad.item() == 0.0 and gate.grad.item() == pytest.approx(0.9)
    assert gates.density() == 0.0
    with torch.no_grad():
        gate.fill_(0.15)
    gates.zero_grad()
    model().backward()
    assert model.body.weight.item() == pytest.approx(0.8)
    assert change.grad.item() == 3.0 and gate.grad.item() == pytest.approx(0.9)
    assert gates.density() == 1.0


def test_taps_threshold_is_the_same_in_the_model_and_in_the_mask() -> None:
    model = Scale()
    gates = install(model, "taps")
    change, gate = only(gates)
    bound = torch.tensor(0.1)
    with torch.no_grad():
        change.fill_(0.25)
        gate.fill_(bound)
    model()
    assert model.body.weight.item() == 0.75 and "body.weight" in gates.mask()
    with torch.no_grad():
        gate.fill_(torch.nextafter(bound, torch.tensor(0.0)))
    model()
    assert model.body.weight.item() == 0.5 and "body.weight" not in gates.mask()
    with torch.no_grad():
        gate.fill_(-0.5)  # the L1 penalty may push s through 0
    assert "body.weight" not in gates.mask()


def test_raw_gates_of_the_released_vision_transformer() -> None:
    model = Scale()
    gates = install(model, config("tensor", "raw", granularity="tensor", k=1, density=None))
    change, gate = only(gates)
    with torch.no_grad():
        gate.fill_(0.05)
        change.fill_(0.3)
    model().backward()
    assert model.body.weight.item() == pytest.approx(0.515)
    assert change.grad.item() == pytest.approx(0.15) and gate.grad.item() == pytest.approx(0.9)


def test_l1_penalty_over_gates_in_the_paper_and_over_52_in_the_code() -> None:
    for per, total in ((None, 0.15), (1, 0.15 * 14), (52, 0.15 * 14 / 52)):
        score = LearnedGates(per=per, penalty=2.0)
        gates = install(
            llama(), "taps", score=score, heads="frozen", norms="frozen", output_embeddings="frozen"
        )
        assert len(gates.gates) == 14
        penalty = gates.penalty()
        assert penalty.item() == pytest.approx(2 * total)
        penalty.backward()
        want = 2 / (per or 14)
        assert all(g.grad.item() == pytest.approx(want) for g in gates.gates)


def test_hard_concrete_by_hand() -> None:
    rule = HardConcrete()
    alpha = torch.tensor([0.0, 0.0, 0.0, 5.0, -5.0, 2.0])
    noise = torch.tensor([0.5, 0.7, 0.9, 0.5, 0.5, 0.5])
    # s = 0.5, 0.7, 0.9, 0.9933, 0.0067, 0.8808; 3 s - 1.5, clipped
    want = torch.tensor([0.0, 0.6, 1.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(rule.gate(alpha, noise), want)
    quiet = torch.tensor([0.0, 0.4])  # sigmoid(0.4) = 0.598688; 0.296063
    torch.testing.assert_close(rule.gate(quiet, None), torch.tensor([0.0, 0.296063]))
    # log(-l / r) = 0: sigmoid(alpha)
    torch.testing.assert_close(rule.cost(torch.tensor([0.0, 5.0])), torch.tensor([0.5, 0.9933071]))
    wide = HardConcrete(low=-0.1, high=1.1)  # log(0.1 / 1.1) = -2.3979
    torch.testing.assert_close(wide.cost(torch.tensor([0.0])), torch.tensor([0.9166667]))


@pytest.mark.parametrize("rule", [HardConcrete(), HardConcrete(-0.1, 1.1)])
def test_hard_concrete_is_open_as_often_as_its_penalty_says(rule) -> None:
    noise = torch.rand(200_000)
    for alpha in (-1.0, 0.0, 0.7):
        value = torch.full(noise.shape, alpha)
        share = (rule.gate(value, noise) > 0).double().mean().item()
        assert share == pytest.approx(rule.open(torch.tensor(alpha)).item(), abs=0.005)


def test_the_gradient_of_a_drawn_gate_is_that_of_its_own_noise() -> None:
    model = Scale()
    gates = install(model, config("element", density=1.0))
    change, gate = only(gates)
    with torch.no_grad():
        gate.fill_(0.1)
        change.fill_(0.3)
    model.train()
    inside = 0
    for _ in range(20):
        gates.zero_grad()
        model().backward()
        z = (model.body.weight.item() - 0.5) / 0.3
        assert change.grad.item() == pytest.approx(3 * z, abs=1e-4)
        if 0.001 < z < 0.999:
            s = (z + 1.5) / 3
            assert gate.grad.item() == pytest.approx(0.9 * 3 * s * (1 - s), rel=1e-2)
            inside += 1
        else:
            assert gate.grad.item() == 0.0
    assert 2 < inside < 18  # the noise changes from pass to pass


def test_proximal_steps_of_codyra() -> None:
    """The oracle of both variants; what lands on kappa itself is left to rounding, so not in it."""
    g = [0.010, 0.007, 0.004, -0.012, 0.0]
    for rule, wanted in (
        (Proximal(), [0.005, 0.002, 0.0, -0.007, 0.0]),
        (Proximal(released=True), [None, 0.0, 0.0, -0.007, 0.0]),
    ):
        value = torch.tensor(g)
        rule.shrink_(value, 0.005)
        for got, want in zip(value.tolist(), wanted, strict=True):
            assert want is None or got == pytest.approx(want, abs=1e-7)
        assert rule.open(value)[2:].tolist() == [0.0, 1.0, 0.0]
        assert rule.open(value)[1] == (0.0 if rule.released else 1.0)
        assert rule.rank([value]).tolist() == value.abs().tolist()
        assert rule.rank([value, torch.full((5,), 0.001)]).max() == pytest.approx(0.001)
        assert float(rule.cost(value).sum()) == 0.0


def test_proximal_gates_close_what_is_not_needed(monkeypatch) -> None:
    """The change of a closed gate is 0, and the threshold rises over the epochs after the warmup."""
    model, used = Scale(), []
    gates = install(model, config("tensor", "proximal"))
    change, gate = only(gates)
    with torch.no_grad():
        gate.fill_(0.1)
        change.fill_(0.3)
    gates.shrink(0.2)
    model()
    assert gate.item() == 0.0 and model.body.weight.item() == 0.5 and gates.density() == 0.0
    gates.remove()
    score = LearnedGates("proximal", penalty=0.4, epochs=4, warmup=2, lr=0.0)
    monkeypatch.setattr(Gates, "shrink", lambda self, kappa: used.append(kappa))
    fields = {"density": 0.5, "granularity": "tensor"}
    select(llama(), SelectConfig(score=score, **fields), data=batches()[:1])
    assert used == pytest.approx([-0.2, 0.0, 0.2, 0.4])


def test_a_product_of_gates() -> None:
    model = llama()
    gates = install(model, config(("element", "tensor"), per=1, penalty=1.0))
    assert len(gates.gates) == 28 and len(gates.changes) == 14
    elements = sum(c.numel() for c in gates.changes)
    opened = torch.tensor(5.0).sigmoid().item()
    assert gates.penalty().item() == pytest.approx((elements + 14) * opened, rel=1e-5)
    assert gates.density() == pytest.approx(opened**2, rel=1e-5)
    with torch.no_grad():
        for i, gate in enumerate(gates.gates):
            if gate.numel() == 1:
                gate.fill_(-9.0 if i != 1 else 9.0)
        for change in gates.changes:
            change.fill_(1.0)
    before = snapshot(model)
    model.eval()(**batches()[0])
    moved = [n for n, p in snapshot(model).items() if not torch.equal(before[n], p)]
    assert moved == ["model.layers.0.self_attn.q_proj.weight"]  # one tensor gate is open
    assert set(gates.mask(density=0.01)) == set(moved)


def test_units() -> None:
    model = tiny.gpt2()
    weight = "transformer.h.0.attn.c_attn.weight"  # stored [16, 48]: 48 rows
    for units, shape in (
        ("element", (16, 48)), ("row", (1, 48)), ("column", (16, 1)), ("tensor", (1, 1)),
        ("layer", ()),
    ):  # fmt: skip
        gates = install(model, config(units, "straight_through"))
        first = list(gates._gated).index(weight)
        assert tuple(gates._gated[weight].gates[0][1].shape) == shape, (units, first)
        assert len(gates.gates) == (2 if units == "layer" else 8)
        gates.remove()


def test_rows_are_ranked_exactly_and_ties_go_to_the_first() -> None:
    model = llama()
    gates = install(model, config("row", granularity="row", k=3, density=None))
    assert [gates.mask()[n].flat().tolist() for n in gates.mask()] == [list(range(96))]
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        gates._gated[name].gates[0][1][[4, 30]] += 0.25
    mask = gates.mask()
    assert mask[name].kind == "rows" and mask[name].index.tolist() == [4, 30]
    assert mask.count == 2 * 48 + 32
    assert mask.metadata["score"].startswith("LearnedGates(gate='hard_concrete'")
    json.dumps(mask.metadata)


# --- the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["straight_through", "hard_concrete"])
@pytest.mark.parametrize("tied", [False, True])
def test_step_0_is_the_identity_and_the_base_comes_back(dtype, gate: str, tied: bool) -> None:
    model = tiny.llama(tied=tied).to(dtype)
    with torch.no_grad():
        model.model.norm.weight[0] = -0.0
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    want = model(**tiny.text()).logits
    gates = install(model, config("tensor", gate, target_modules=None))
    assert torch.equal(model.train()(**tiny.text()).logits, want)
    assert_same(before, snapshot(model))
    optimizer = torch.optim.AdamW(gates.groups(lr=0.05, gate_lr=1e-3), weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = model(**tiny.text()).loss
        (loss.float() + gates.penalty()).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    gates.remove()
    assert_same(before, snapshot(model))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert torch.equal(model(**tiny.text()).logits, want)
    assert not model._forward_pre_hooks
    model(**tiny.text()).loss.backward()  # an ordinary model again
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_kept_is_kept_on_the_mask_alone() -> None:
    model = llama()
    before = snapshot(model)
    gates = install(model, config("element", penalty=0.0))
    optimizer = torch.optim.AdamW(gates.groups(lr=0.01), weight_decay=0.0)
    for batch in batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = gates.mask()
    assert mask.count == 1536  # floor(0.1 * 15360)
    model.eval()(**batches()[0])
    learned = snapshot(model)
    gates.remove(keep=mask)
    assert_frozen(before, model, mask)
    for name, selection in mask.items():
        assert torch.equal(selection.take(model.get_parameter(name)), selection.take(learned[name]))


def test_the_gradients_are_those_of_a_functional_call() -> None:
    """base + z * change written out with torch.func, through a tied table."""
    model = tiny.llama(tied=True).double()
    gates = install(model, config("row", "straight_through", target_modules=None, norms="frozen"))
    assert "lm_head.weight" not in gates._gated
    torch.manual_seed(0)
    with torch.no_grad():
        for change, gate in zip(gates.changes, gates.gates, strict=True):
            change.normal_(std=0.05)
            gate.uniform_(0.0, 0.2)
    base = {n: one.base.clone() for n, one in gates._gated.items()}
    model(**tiny.text()).loss.backward()
    got = [p.grad.clone() for p in gates.parameters()]
    gates.zero_grad()
    gates.remove()
    leaves = [p.detach().clone().requires_grad_() for p in gates.parameters()]
    changes, values = leaves[: len(base)], leaves[len(base) :]
    params = {}
    for name, change, value in zip(base, changes, values, strict=True):
        z = (value >= 0.1).to(value.dtype) + value - value.detach()
        params[name] = base[name] + z * change
    out = torch.func.functional_call(model, params, kwargs=tiny.text())
    out.loss.backward()
    for mine, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-9, atol=1e-12)
    assert any(bool((value < 0.1).any()) for value in values)


def test_checkpointed_models_learn_the_same() -> None:
    def run(checkpointed: bool) -> dict[str, Tensor]:
        model = llama().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        gates = install(model, config("tensor"))
        optimizer = torch.optim.SGD(gates.groups(lr=0.1))
        for batch in batches():
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(gates.state_dict())

    assert_same(run(False), run(True))


def test_mistakes_are_named() -> None:
    model = llama()
    with pytest.raises(errors.HyperparameterError, match=r"wanted a retouch\.gates\.LearnedGates"):
        install(model, "magnitude", density=0.1)
    with pytest.raises(errors.HyperparameterError, match=r"gate='soft'; wanted straight_through"):
        LearnedGates(gate="soft")
    with pytest.raises(errors.HyperparameterError, match="units"):
        LearnedGates(units=("row", "row"))
    with pytest.raises(errors.HyperparameterError, match="epochs=0; wanted >= 1"):
        LearnedGates(epochs=0)
    with pytest.raises(errors.ScoreError, match="needs data"):
        select(model, "taps")
    gates = install(model, "taps")
    with pytest.raises(errors.EngineError, match="has gates already"):
        install(model, "taps")
    model.load_state_dict(model.state_dict())
    with pytest.raises(errors.EngineError, match=r"\.weight was written to or moved"):
        model(**batches()[0])
    gates.remove()
    gates = install(model, "taps", norms="frozen", heads="frozen", output_embeddings="frozen")
    with torch.no_grad():
        for gate in gates.gates:
            gate.fill_(0.0)
    with pytest.raises(errors.BudgetError, match="selects nothing"):
        gates.mask()
    with torch.no_grad():
        gates.gates[2].fill_(float("nan"))
    with pytest.raises(errors.ScoreError, match=r"layers\.0\.self_attn\.v_proj\.weight is NaN"):
        gates.mask()
    gates.remove()
    retouch.wrap(torch.optim.SGD, Mask.full(model), model, lr=0.1)
    with pytest.raises(errors.EngineError, match="is wrapped: learn gates before"):
        install(model, "taps")


# --- as a score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score",
    [
        LearnedGates(epochs=4, penalty=0.1, lr=0.1),
        LearnedGates("hard_concrete", ("element", "tensor"), "change", 1e-3, 1, optimizer="adamw"),
    ],
)
def test_select_leaves_the_model_as_it_was_and_is_deterministic(score) -> None:
    model, data = llama().eval(), batches()
    model.lm_head.weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    granularity = "tensor" if score.units == "tensor" else "element"
    masks = [
        select(model, SelectConfig(score=score, density=0.25, granularity=granularity), data=data)
        for _ in range(2)
    ]
    assert masks[0] == masks[1]
    if granularity == "element":
        assert masks[0].count == 3840
    else:
        assert len(masks[0]) == 3  # floor(0.25 * 14)
    assert_same(before, snapshot(model))
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    assert not model._forward_pre_hooks


def test_the_penalty_closes_what_the_data_do_not_need() -> None:
    """Of two layers one is multiplied by 0: its gate falls, the other stays open."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.idle = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.used(x) + 0.0 * self.idle(x)
            return {"loss": (y - x @ (3 * torch.eye(4))).square().mean()}

    model, x = Two(), torch.randn(64, 4)
    score = LearnedGates(epochs=40, warmup=2, penalty=0.1, lr=0.02)
    mask = select(model, "taps", data=[{"x": x[:32]}, {"x": x[32:]}], score=score, heads="frozen")
    assert set(mask) == {"used.weight"} and mask["used.weight"].kind == "all"


def test_scores_in_files(tmp_path) -> None:
    for name in ("taps", "diff-pruning-structured"):
        score = retouch.recipes.info(name).config["score"]
        SelectConfig(score=score, density=0.1).save_pretrained(tmp_path)
        assert SelectConfig.from_pretrained(tmp_path).score == score
    assert select(llama(), "gates", density=0.5, granularity="tensor", data=batches()).count
    assert StraightThrough().open(torch.tensor([0.1, 0.0999])).tolist() == [1.0, 0.0]

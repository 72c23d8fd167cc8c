"""Gates that close after every micro-batch: GMT as its re-implementation does it."""

import copy

import pytest
import torch
from tiny_hf import llama, same, tokens, trainer, weights
from torch import nn
from training import assert_same, batch, bits, element_mask, loss_of, net, snapshot
from transformers import Trainer

import retouch
from retouch import Schedule, SelectConfig
from retouch.errors import HyperparameterError
from retouch.masks import Mask, Selection
from retouch.optim.gates import TopK

MICRO = TopK(0.34, per="backward", policy="P0", leaky=True)
STEP = TopK(0.34, policy="P0", leaky=True)
paths = pytest.mark.parametrize("gradient", ["dense", "sampled"])
kinds = pytest.mark.parametrize("kind", ["all", "elements"])


def keep_(param: nn.Parameter, ratio: float) -> None:
    """What the re-implementation does to `.grad` after a backward pass."""
    grad = param.grad
    bound = grad.abs().flatten().topk(max(1, int(grad.numel() * ratio))).values[-1]
    grad.mul_(grad.abs() >= bound)


class Three(nn.Module):
    """Its gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w(x)


@paths
@kinds
@pytest.mark.parametrize(("gate", "moves"), [(MICRO, 0), (STEP, 1)], ids=["micro", "step"])
def test_oracle_of_accumulation(gradient, kind, gate, moves) -> None:
    """(3, 2, 0) and (0, 2, 0), one of three: the sum (3, 2, 0) after (3, 0, 0), or the mean's 2."""
    model = Three()
    index = torch.arange(3, dtype=torch.int32) if kind == "elements" else None
    mask = Mask({"w.weight": Selection(kind, (1, 3), index)}, model)
    options = {"lr": 0.1, "weight_decay": 0.0, "gate": gate, "gradient": gradient}
    optimizer = retouch.wrap(retouch.AdamW, mask, model, **options)
    assert retouch.get_engine(model).paths["w.weight"].gradient == gradient or kind == "all"
    (before,) = snapshot(model).values()
    for part in ((3.0, 2.0, 0.0), (0.0, 2.0, 0.0)):
        (model(torch.tensor([part])) / 2).sum().backward()
    value = retouch.get_engine(model).slots["w.weight"].value
    wanted = (1.5, 0.0, 0.0) if gate is MICRO else (1.5, 2.0, 0.0)
    assert value.grad.flatten().tolist() == list(wanted)
    optimizer.step()
    (after,) = snapshot(model).values()
    assert (bits(before) != bits(after)).flatten().tolist() == [i == moves for i in range(3)]


@paths
def test_it_is_the_re_implementation(gradient) -> None:
    """Stock AdamW on gradients that are masked after each of three micro-batches, with momentum."""
    model, twin = llama(), llama()
    config = SelectConfig.named("gmt-micro", granularity="element", gate={"density": 0.3})
    optimizer = retouch.wrap(
        retouch.AdamW, config, model, lr=1e-3, weight_decay=0.1, gradient=gradient
    )
    slots = retouch.get_engine(model).slots
    chosen = [p for n, p in twin.named_parameters() if n in slots]
    assert len(chosen) == 14
    for p in twin.parameters():
        p.requires_grad_(any(p is other for other in chosen))
    reference = torch.optim.AdamW(chosen, lr=1e-3, weight_decay=0.1)
    ids = torch.stack([sample["input_ids"] for sample in tokens(36)]).view(4, 3, 3, -1)
    for step in ids:
        for rows in step:
            (model(input_ids=rows, labels=rows).loss / 3).backward()
            (twin(input_ids=rows, labels=rows).loss / 3).backward()
            for p in chosen:
                keep_(p, 0.3)
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
    for name, p in twin.named_parameters():
        # a coordinate on the edge of the k largest may fall to either side by rounding
        off = (model.get_parameter(name) - p).abs() > 1e-5
        assert off.float().mean() < 0.002, name


@paths
def test_a_single_micro_batch_is_one_mask_in_a_step(gradient) -> None:
    found = []
    for gate in (MICRO, STEP):
        model = net(torch.bfloat16)
        optimizer = retouch.wrap(
            retouch.AdamW, element_mask(model), model, lr=1e-2, gate=gate, gradient=gradient
        )
        for step in range(3):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(snapshot(model))
    assert_same(*found)


def train(model, optimizer, steps) -> None:
    for step in steps:
        for i in range(2):
            (loss_of(model, batch(16 * step + i)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_takes_the_gate_from_the_state() -> None:
    def start(**options):
        model = net()
        return model, retouch.wrap(retouch.AdamW, element_mask(model), model, lr=1e-2, **options)

    model, optimizer = start(gate=MICRO)
    train(model, optimizer, range(2))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, resumed = start()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    other, plain = start(gate=STEP)
    train(other, plain, range(4))
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(2, 4))
    assert_same(snapshot(model), snapshot(again))
    assert not same(snapshot(model), snapshot(other))


def test_on_a_mask_that_moves() -> None:
    """Newcomers are heard of as well, and what has left is not."""
    model = net()
    config = SelectConfig(
        direction="random", density=0.1, target_modules=["up", "down"], gate=MICRO,
        schedule=Schedule(every=1),
    )  # fmt: skip
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=1e-2)
    for step in range(3):
        (loss_of(model, batch(step)) / 2).backward()
        for slot in retouch.get_engine(model).slots.values():
            open_ = max(1, int(0.34 * slot.selection.count))
            assert 0 < torch.count_nonzero(slot.value.grad) <= open_
        optimizer.step()
        optimizer.zero_grad()
    retouch.verify_untouched(model)
    retouch.unwrap(model)
    for p in model.parameters():
        p.requires_grad_(True)
    loss_of(model, batch(9)).backward()
    assert torch.count_nonzero(model.up.weight.grad) == model.up.weight.numel()


def test_a_gradient_that_is_not_finite_is_left_to_the_scaler() -> None:
    model = Three()
    mask = Mask({"w.weight": Selection("all", (1, 3))}, model)
    optimizer = retouch.wrap(retouch.AdamW, mask, model, gate=MICRO)
    model(torch.tensor([[float("inf"), 1.0, 2.0]])).sum().backward()
    value = retouch.get_engine(model).slots["w.weight"].value
    assert value.grad.tolist() == [[float("inf"), 1.0, 2.0]]
    optimizer.zero_grad()


def test_what_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(HyperparameterError, match=r"parameter 0 of group 0.*needs retouch\.wrap"):
        retouch.AdamW([p], gate=MICRO).step()
    now = Schedule(every=1, collect=1, now=True)
    with pytest.raises(HyperparameterError, match="leave out now"):
        SelectConfig.named("gmt-micro", score="gradient", direction="top",
                           granularity="element", density=0.1, schedule=now)  # fmt: skip


# --- the Trainer ---------------------------------------------------------------------------------


def test_in_the_trainer_with_accumulation(tmp_path) -> None:
    """As a Trainer that masks `.grad` after each of its training steps; resumed bit for bit."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1e-3}

    class Masking(Trainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for param in model.parameters():
                if param.requires_grad:
                    keep_(param, 0.2)
            return loss

    def ours(out):
        run = trainer(tmp_path / out, save_strategy="steps", save_steps=2, **options)
        return retouch.attach(run, "gmt-micro")

    run = ours("a")
    run.train()
    again = ours("b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(weights(run.model), weights(again.model))

    chosen = set(retouch.get_engine(run.model).slots)
    model = llama()
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    plain = trainer(tmp_path / "c", model, **options)
    plain.__class__ = Masking
    plain.train()
    mine, other = weights(run.model), weights(model)
    for name in chosen:
        assert ((mine[name] - other[name]).abs() > 1e-5).float().mean() < 0.002, name
    start = weights(llama())
    assert all(same({n: mine[n]}, {n: start[n]}) == (n not in chosen) for n in start)

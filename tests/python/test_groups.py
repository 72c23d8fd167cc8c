"""Groups with rates of their own: muP, u-muP and LoRA+, and that schedulers leave them alone."""

import pytest
import torch
from torch import nn
from training import assert_same, llama, loss_of, net, own, snapshot, train

import retouch
from retouch import groups
from retouch.errors import HyperparameterError


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, 5)
        self.scale = nn.Parameter(torch.ones(1))


def by_name(model, made, *keys):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: tuple(g[k] for k in keys) for g in made for p in g["params"]}


def test_doubling_the_width_halves_hidden_rates() -> None:
    model, base = MLP(8), MLP(4)
    found = by_name(model, groups.mup(model, base), "lr_mult", "wd_mult")
    assert found.keys() == {n for n, _ in model.named_parameters()}
    assert found.pop("hidden.weight") == (0.5, 2.0)
    assert set(found.values()) == {(1.0, 1.0)}
    with torch.device("meta"):
        tiny = MLP(2)
    found = by_name(model, groups.mup(model, tiny), "lr_mult", "wd_mult")
    assert found["hidden.weight"] == (0.25, 4.0) and found["hidden.bias"] == (1.0, 1.0)


def test_rates_of_sgd() -> None:
    model = MLP(8)
    found = by_name(model, groups.mup(model, MLP(4), optimizer="sgd"), "lr_mult", "wd_mult")
    assert found["hidden.weight"] == (1.0, 1.0)  # both sides doubled
    for name in ("embed.weight", "hidden.bias", "norm.weight", "head.weight"):
        assert found[name] == (2.0, 1.0), name
    assert found["head.bias"] == found["scale"] == (1.0, 1.0)


def test_a_width_of_one_is_plain() -> None:
    a, b = net(), net()
    ours = retouch.AdamW(groups.mup(a, net()), lr=1e-2)
    plain = retouch.AdamW(b.parameters(), lr=1e-2)
    train(a, ours, range(3))
    train(b, plain, range(3))
    assert_same(snapshot(a), snapshot(b))


def test_transposed_storage_and_tied_tables() -> None:
    import tiny
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=32)
    base = GPT2LMHeadModel(config)  # the MLP's inner width is 4 times n_embd at 8 and at 16 too
    model = tiny.gpt2()
    found = by_name(model, groups.mup(model, base), "lr_mult", "wd_mult")
    assert found["transformer.h.0.attn.c_attn.weight"] == (0.5, 2.0)
    assert found["transformer.h.1.mlp.c_proj.weight"] == (0.5, 2.0)
    assert found["transformer.wte.weight"] == (1.0, 1.0)


def test_u_mup() -> None:
    model = llama(tied=False)
    found = by_name(model, groups.u_mup(model), "lr_mult", "wd_mult")
    root = 2**-0.5  # two layers
    wanted = {
        "model.embed_tokens.weight": 32**-0.5,
        "model.layers.0.self_attn.q_proj.weight": root * 32**-0.5,
        "model.layers.1.mlp.down_proj.weight": root * 48**-0.5,
        "model.layers.1.input_layernorm.weight": root,
        "model.norm.weight": 1.0,
        "lm_head.weight": 1.0,
    }
    for name, rate in wanted.items():
        assert found[name] == pytest.approx((rate, 1 / rate)), name
    deep = by_name(model, groups.u_mup(model, depth=8, residual=r".*mlp.*"), "lr_mult")
    assert deep["model.layers.1.mlp.down_proj.weight"] == pytest.approx(((8 * 48) ** -0.5,))
    assert deep["model.layers.1.input_layernorm.weight"] == (1.0,)
    # the decay of a step is weight_decay, whatever the rate
    given = groups.u_mup(model, lr=0.25, weight_decay=2.0**-9)
    for rate, decay in by_name(model, given, "lr", "weight_decay").values():
        assert rate * decay == pytest.approx(2.0**-9)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora_plus() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        llama(tied=False), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    )
    found = by_name(model, groups.lora_plus(model, 8.0), "lr_mult", "wd_mult")
    assert len(found) == 6 and all(
        p.requires_grad for n, p in model.named_parameters() if n in found
    )
    for name, rates in found.items():
        assert rates == ((8.0 if "lora_B" in name or "embedding_B" in name else 1.0), 1.0), name
    assert sorted(r for (r,) in by_name(model, groups.lora_plus(model, lr=0.5), "lr").values()) == [
        0.5, 0.5, 0.5, 8.0, 8.0, 8.0,
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora_plus_is_that_of_peft() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(llama(tied=False), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.25
    )
    ours = groups.lora_plus(model, 8.0, lr=0.5, weight_decay=0.25)
    both = [by_name(model, made, "lr", "weight_decay") for made in (ours, theirs.param_groups)]
    assert both[0] == both[1] and len(both[0]) == 8


@pytest.mark.parametrize("make", [retouch.AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize("cls", ["OneCycleLR", "CosineAnnealingWarmRestarts", "LambdaLR"])
def test_multipliers_survive_schedulers(make, cls) -> None:
    """The moves of the first steps of Adam are the rates: ours by multipliers, torch's by its groups."""
    model = MLP(8)
    ours = make is retouch.AdamW
    options = {} if ours else {"lr": 0.01, "weight_decay": 0.5}
    optimizer = make(groups.mup(model, MLP(2), **options), lr=0.01, weight_decay=0.5)
    arguments = {
        "OneCycleLR": {
            "max_lr": [0.04 * (1 if ours else g["lr"] / 0.01) for g in optimizer.param_groups],
            "total_steps": 10, "cycle_momentum": False,
        },
        "CosineAnnealingWarmRestarts": {"T_0": 4},
        "LambdaLR": {"lr_lambda": lambda step: 1 / (1 + step)},
    }[cls]  # fmt: skip
    scheduler = getattr(torch.optim.lr_scheduler, cls)(optimizer, **arguments)
    plain = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.01)
    single = dict(arguments, max_lr=0.04) if cls == "OneCycleLR" else arguments
    other = getattr(torch.optim.lr_scheduler, cls)(plain, **single)
    for _ in range(4):
        rate = plain.param_groups[0]["lr"]
        before = snapshot(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in own(model):
            mult = 0.25 if name == "hidden.weight" else 1.0
            wanted = before[name] * (1 - rate * 0.5) - rate * mult
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-6)
        scheduler.step()
        plain.step()
        other.step()


def test_a_mask_keeps_the_multipliers_of_whole_weights() -> None:
    model = MLP(8)
    mask = retouch.select(model, "random", density=0.25, target_modules=None)
    optimizer = retouch.AdamW(groups.mup(model, MLP(4)), lr=0.01, weight_decay=0.0)
    before = snapshot(model)
    retouch.wrap(optimizer, mask, model)
    for slot in retouch.get_engine(model).slots.values():
        slot.value.grad = torch.ones_like(slot.value)
    optimizer.step()
    for name, p in own(model):
        moved = (before[name] - p.detach())[p.detach() != before[name]]
        rate = 0.005 if name == "hidden.weight" else 0.01
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-6)


def test_a_model_trains_with_them() -> None:
    model = llama()
    first = loss_of(model, torch.arange(1, 25).view(2, 12))
    optimizer = retouch.AdamW(groups.u_mup(model), lr=0.05)
    for _ in range(5):
        loss_of(model, torch.arange(1, 25).view(2, 12)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model, torch.arange(1, 25).view(2, 12)) < first - 0.1


def test_muon_with_adamw_for_all_but_linear_weights() -> None:
    model, other = llama(tied=False), llama(tied=False)
    made = groups.muon(model, decay_vectors=False)
    found = by_name(model, made, "use_muon")
    assert {n for n, (muon,) in found.items() if muon} == {n for n in found if "_proj" in n}
    assert found.keys() == {n for n, _ in model.named_parameters()}
    chosen = retouch.Mask.full(model)
    optimizer = retouch.wrap(retouch.Muon(made, lr=0.01), chosen, model)
    plain = retouch.wrap(retouch.AdamW, retouch.Mask.full(other), other, lr=0.01, weight_decay=0.0)
    for m, o in ((model, optimizer), (other, plain)):
        for slot in retouch.get_engine(m).slots.values():
            slot.value.grad = torch.ones_like(slot.value)
        o.step()
    now, without = snapshot(model), snapshot(other)
    same = {n for n in now if torch.equal(now[n], without[n])}
    assert same == {n for n in now if "norm" in n}  # the tables decay


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: groups.mup(MLP(4), nn.Linear(2, 2)),
            "no shape of this rank for scale, embed.weight",
        ),
        (lambda: groups.mup(MLP(4), MLP(2), optimizer="lamb"), "wanted 'adam' or 'sgd'"),
        (lambda: groups.u_mup(MLP(4), depth=0), "depth must be at least 1"),
        (lambda: groups.lora_plus(MLP(4)), "no parameter named lora_B"),
        (lambda: groups.lora_plus(MLP(4), 0.0), "ratio must be above 0"),
    ],
)
def test_mistakes_are_named(call, message) -> None:
    with pytest.raises(HyperparameterError, match=message):
        call()

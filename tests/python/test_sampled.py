"""Sampled gradients: operators that compute the selected entries only, and which layers use them."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import assert_same, batch, element_mask, loss_of, net, positions, snapshot

import retouch
from retouch import ops, routes, sampled
from retouch.errors import EngineError, HyperparameterError, MaskError
from retouch.masks import Mask, Selection

KINDS = ["elements", "rows", "columns"]
kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Of one product: float32 sums in another order; 16 bits as torch rounds its own product.
RTOL = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def selection(kind, shape, seed=0):
    numel = torch.Size(shape).numel()
    length = {"elements": numel, "rows": shape[0], "columns": shape[1]}[kind]
    return Selection(kind, tuple(shape), positions(length, max(1, length // 3), seed))


def masked(model, kind):
    """A mask of one kind over every matrix of a model."""
    chosen = {
        name: selection(kind, tuple(p.shape), i)
        for i, (name, p) in enumerate(model.named_parameters())
        if p.dim() >= 2
    }
    return Mask(chosen, model)


def gradients(model, kind, backward, gradient="sampled"):
    """Gradients of the compact values, and the names that were taken the sampled way."""
    mask = masked(model, kind)
    retouch.wrap(torch.optim.SGD, mask, model, lr=0.1, gradient=gradient)
    backward(model)
    slots = retouch.get_engine(model).slots
    by_name = {n: s.value.grad for n, s in slots.items()}
    return by_name, {n for n, s in slots.items() if s.path.gradient == "sampled"}


def assert_near(got, want, rtol=1e-6):
    assert got.keys() == want.keys()
    for name, b in want.items():
        a = got[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert float((a - b).abs().max()) <= rtol * float(b.abs().max()) + 1e-30, name


def both_ways(make, kind, backward):
    """Sampled gradients equal the dense ones; returns what was sampled."""
    got, names = gradients(make(), kind, backward)
    want, none = gradients(make(), kind, backward, "dense")
    assert names and not none
    assert_near(got, want)
    return names


# --- the operators -------------------------------------------------------------------------------


@kinds
@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (2, 1, 3, 9), (0, 9)], ids=str)
def test_linear_is_linear(kind, dtype, bias, shape):
    torch.manual_seed(0)
    layer = nn.Linear(9, 7, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    back = torch.randn_like(y)
    y.backward(back)
    chosen = selection(kind, (7, 9))
    value = nn.Parameter(chosen.gather(layer.weight))
    mine, b = x.detach().clone().requires_grad_(), None
    if bias:
        b = layer.bias.detach().clone().requires_grad_()
    out = sampled.linear(mine, layer.weight.detach(), b, value, chosen.index, kind, False)
    out.backward(back)
    assert torch.equal(out, y)
    torch.testing.assert_close(mine.grad, x.grad)
    if bias:
        torch.testing.assert_close(b.grad, layer.bias.grad)
    assert_near({"w": value.grad}, {"w": chosen.gather(layer.weight.grad)}, RTOL[dtype])


@kinds
@dtypes
def test_the_torch_path_of_a_product(kind, dtype):
    x, weight = torch.randn(30, 9).to(dtype), torch.randn(7, 9).to(dtype)
    chosen, back = selection(kind, (7, 9)), torch.randn(30, 7).to(dtype)
    grads = []
    for force in (False, True):
        value = nn.Parameter(chosen.gather(weight))
        if force:
            with ops.force_torch():
                sampled.linear(x, weight, None, value, chosen.index, kind, False).backward(back)
        else:
            sampled.linear(x, weight, None, value, chosen.index, kind, False).backward(back)
        grads.append({"w": value.grad})
    assert_near(*grads, RTOL[dtype])


def test_a_product_in_blocks_of_rows(monkeypatch):
    left, right = torch.randn(20, 50), torch.randn(20, 30)
    index = positions(1500, 200, 0)
    want = (left.double().t() @ right.double()).reshape(-1)[index.long()].float()
    for block in (1, 30, 70, 10**6):
        monkeypatch.setattr(ops, "_BLOCK", block)
        with ops.force_torch():
            torch.testing.assert_close(ops.selected(left, right, index, "w"), want)
    assert ops.selected(left, right, index[:0], "w").shape == (0,)
    assert torch.equal(ops.selected(left[:0], right[:0], index, "w"), torch.zeros(200))


def test_a_product_refuses_what_does_not_fit():
    left, right = torch.randn(4, 5), torch.randn(4, 6)
    for index in (torch.tensor([30]), torch.tensor([3, 2]), torch.tensor([-1, 2])):
        with pytest.raises(MaskError, match="w is not valid"):
            ops.selected(left, right, index.int(), "w")
    with pytest.raises(retouch.errors.RetouchError):
        ops.selected(left, torch.randn(3, 6), torch.tensor([0], dtype=torch.int32), "w")


def test_non_contiguous_inputs_and_gradients():
    layer, chosen = nn.Linear(6, 5), selection("elements", (5, 6))
    x = torch.randn(6, 4, 3).transpose(0, 2)
    back = torch.randn(5, 4, 3).transpose(0, 2)
    layer(x).backward(back)
    value = nn.Parameter(chosen.gather(layer.weight))
    sampled.linear(x, layer.weight.detach(), None, value, chosen.index, "elements", False).backward(
        back
    )
    assert_near({"w": value.grad}, {"w": chosen.gather(layer.weight.grad)})
    # what `.sum().backward()` hands over has stride 0
    value.grad = None
    sampled.linear(
        x, layer.weight.detach(), None, value, chosen.index, "elements", False
    ).sum().backward()
    ones = x.reshape(-1, 6).sum(0).expand(5, 6)
    assert_near({"w": value.grad}, {"w": chosen.gather(ones.contiguous())})


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("linear", lambda v: (torch.randn(2, 4, 6, requires_grad=True), torch.randn(5, 6),
                              torch.randn(5, requires_grad=True), v, "elements", False)),
        ("linear", lambda v: (torch.randn(4, 5, requires_grad=True), torch.randn(5, 6), None, v,
                              "elements", True)),
        ("embedding", lambda v: (torch.randint(5, (3, 2)), torch.randn(5, 6), v, "elements", 2)),
        ("conv2d", lambda v: (torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(5, 3, 2, 1),
                              torch.randn(5, requires_grad=True), v, "elements",
                              [1, 1], [0, 1], [1, 1])),
    ],
    ids=["linear", "transposed", "embedding", "conv2d"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's own check
def test_operators_are_registered_as_torch_wants(op, args):
    value = torch.zeros(4, requires_grad=True)
    index = torch.tensor([0, 7, 13, 29], dtype=torch.int32)
    args = list(args(value))
    args.insert(next(i for i, a in enumerate(args) if a is value) + 1, index)
    torch.library.opcheck(getattr(sampled, op), args)


# --- layers --------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (tiny.bert, tiny.labelled), (tiny.gpt2, tiny.text), (tiny.llama, tiny.text),
        (lambda: tiny.llama(tied=True), tiny.text),
    ],
    ids=["bert", "gpt2", "llama", "llama-tied"],
)  # fmt: skip
def test_models(kind, make, text):
    def make_it():
        return make().eval()

    names = both_ways(make_it, kind, lambda model: model(**text()).loss.backward())
    assert names == {n for n, p in make_it().named_parameters() if p.dim() == 2}


@kinds
@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings(kind, padding):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 8, padding_idx=padding), nn.Linear(8, 2))

    ids = torch.tensor([[1, 3, 3, 7], [3, 1, 0, 10]])
    names = both_ways(make, kind, lambda model: model(ids).square().sum().backward())
    assert names == {"0.weight", "1.weight"}


def test_rows_of_an_embedding_that_no_batch_has():
    model = nn.Embedding(50, 4)
    mask = Mask({"weight": Selection("rows", (50, 4), torch.tensor([40, 41]))}, model)
    retouch.wrap(torch.optim.SGD, mask, model, lr=0.1, gradient="sampled")
    model(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(retouch.get_engine(model).slots["weight"].value.grad, torch.zeros(2, 4))


@kinds
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions(kind, batched, monkeypatch):
    monkeypatch.setattr(sampled, "_UNFOLDED", 300)  # several samples, not all, at once

    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            nn.Conv2d(6, 4, 2, stride=2, bias=False),
        )

    x = torch.randn(5, 3, 9, 8) if batched else torch.randn(3, 9, 8)
    both_ways(make, kind, lambda model: model(x).square().sum().backward())


def test_layers_that_cannot_be_sampled_say_why():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict({
        "own": Own(4, 4),
        "groups": nn.Conv2d(4, 4, 1, groups=2),
        "same": nn.Conv2d(4, 4, 3, padding="same"),
        "conv1d": nn.Conv1d(4, 4, 3),
        "norm": nn.LayerNorm(4),
        "attention": nn.MultiheadAttention(4, 1),
        "frequency": nn.Embedding(4, 4, scale_grad_by_freq=True),
        "bounded": nn.Embedding(4, 4, max_norm=1.0),
        "whole": nn.Linear(4, 4),
        "fine": nn.Linear(4, 4),
    })  # fmt: skip
    chosen = {
        n: Selection("elements", tuple(p.shape), torch.tensor([0, 1]))
        for n, p in model.named_parameters()
    }
    chosen["whole.weight"] = Selection("all", (4, 4))
    paths = routes.plan(model, chosen, "sampled")
    assert {n for n, p in paths.items() if p.gradient == "sampled"} == {"fine.weight"}
    for name, why in [
        ("own.weight", "Own: no sampled operator"),
        ("groups.weight", "2 groups"),
        ("same.weight", "padding zeros same"),
        ("conv1d.weight", "no sampled operator"),
        ("norm.weight", "a vector"),
        ("attention.in_proj_weight", "MultiheadAttention: unknown to it"),
        ("attention.out_proj.weight", "nn.MultiheadAttention reads its weight"),
        ("frequency.weight", "scale_grad_by_freq"),
        ("bounded.weight", "max_norm"),
        ("whole.weight", "all of it"),
    ]:
        assert why in paths[name].why, (name, paths[name].why)
    assert all(p.gradient == "dense" for p in routes.plan(model, chosen, "dense").values())
    with pytest.raises(HyperparameterError, match="gradient='sparse'"):
        routes.plan(model, chosen, "sparse")
    with pytest.raises(HyperparameterError, match="gradient='sparse'"):
        retouch.wrap(torch.optim.SGD, Mask(chosen, model), model, lr=0.1, gradient="sparse")
    assert "_retouch" not in model._modules


def test_auto_follows_the_measured_break_even():
    shape = (100, 100)
    model = nn.Linear(100, 100)
    for kind, length in (("elements", 10_000), ("rows", 100)):
        limit = routes.break_even(Selection(kind, shape, torch.tensor([0])), torch.float32)
        assert 0 < limit < 1
        count = int(limit * length)
        for k, want in ((count, "sampled"), (count + 1, "dense")):
            some = {"weight": Selection(kind, shape, torch.arange(k))}
            assert routes.plan(model, some, "auto")["weight"].gradient == want
            assert routes.plan(model, some, "sampled")["weight"].gradient == "sampled"


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_has_the_break_even_of_the_processor(fast, monkeypatch):
    """Where torch emulates its products, the dense way takes longer, so more is sampled."""
    monkeypatch.setattr(routes, "fast_bfloat16", lambda: fast)
    table = json.loads(Path(routes.__file__).with_name(routes.TABLE).read_text())
    for kind in ("elements", "rows", "columns"):
        rows = table[kind].get("bfloat16" if fast else "bfloat16 emulated", table[kind]["float32"])
        some = Selection(kind, (1024, 1024), torch.tensor([0]))
        assert routes.break_even(some, torch.bfloat16) == dict(rows)[1024]
    assert set(table["measured"]) == set(table["elements"]), "says on what it was measured"


# --- what a forward may be ------------------------------------------------------------------------


@kinds
def test_a_module_that_is_used_twice(kind):
    def make():
        torch.manual_seed(0)
        return nn.Linear(6, 6)

    x = torch.randn(4, 6)
    both_ways(make, kind, lambda model: model(torch.tanh(model(x))).square().sum().backward())


@kinds
def test_a_use_past_the_layer_is_added(kind):
    def make():
        torch.manual_seed(0)
        return nn.Linear(6, 5)

    x = torch.randn(4, 6)

    def backward(model):
        (model(x).square().sum() + F.linear(x, model.weight).sum()).backward()
        assert model.weight.grad is None

    both_ways(make, kind, backward)


@kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(kind, reentrant):
    def make():
        return tiny.llama().train()

    def backward(model):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**tiny.text()).loss.backward()

    both_ways(make, kind, backward)
    plain, _ = gradients(tiny.llama().train(), kind, lambda m: m(**tiny.text()).loss.backward())
    again, _ = gradients(make(), kind, backward)
    assert_near(again, plain)


def test_a_checkpointed_layer_alone():
    layer = nn.Linear(6, 5)
    mask = Mask({"weight": selection("elements", (5, 6))}, layer)
    retouch.wrap(torch.optim.SGD, mask, layer, lr=0.1, gradient="sampled")
    x = torch.randn(4, 6)
    value = retouch.get_engine(layer).slots["weight"].value
    layer(x).sum().backward()
    want, value.grad = value.grad, None
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(value.grad, want)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind, dtype):
    def backward(model):
        with torch.autocast("cpu", dtype):
            loss = model(**tiny.labelled()).loss
        (loss * 1024).backward()  # as GradScaler does: float16 has no small numbers

    got, names = gradients(tiny.bert().eval(), kind, backward)
    want, _ = gradients(tiny.bert().eval(), kind, backward, "dense")
    assert len(names) == 17
    assert_near(got, want, 4 * torch.finfo(dtype).eps)


def test_autocast_leaves_float64_alone():
    model = nn.Linear(4, 3).double()
    mask = Mask({"weight": selection("elements", (3, 4))}, model)
    retouch.wrap(torch.optim.SGD, mask, model, lr=0.1, gradient="sampled")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 4).double()).dtype == torch.float64


@kinds
def test_compile(kind):
    x = torch.randn(5, 12)

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 3, bias=False))

    def backward(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x).square().sum().backward()

    want, _ = gradients(make(), kind, lambda m: m(x).square().sum().backward())
    got, names = gradients(make(), kind, backward)
    assert names == {"0.weight", "2.weight"}
    assert_near(got, want)


def test_compile_sees_the_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    twin, x = copy.deepcopy(model), torch.randn(5, 6)
    forward = torch.compile(model, backend="aot_eager")
    runs = []
    for one, call in ((model, forward), (twin, twin)):
        mask = masked(one, "elements")
        optimizer = retouch.wrap(retouch.AdamW, mask, one, lr=1e-2, gradient="sampled")
        losses = []
        for _ in range(4):
            loss = call(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    torch.testing.assert_close(*runs)
    assert runs[0][-1] < runs[0][0]


def test_frozen_inputs_save_no_weight_and_frozen_values_no_input():
    layer, chosen = nn.Linear(40, 30), selection("columns", (30, 40))
    saved = []
    value = nn.Parameter(chosen.gather(layer.weight))
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    )
    with hooks:
        x = torch.randn(7, 40)
        sampled.linear(x, layer.weight.detach(), None, value, chosen.index, "columns", False)
    columns = chosen.index.numel()
    assert sorted(saved) == sorted([7 * columns, columns])  # nothing but the needed columns
    saved.clear()
    with hooks:
        x = torch.randn(7, 40, requires_grad=True)
        frozen = value.detach()
        sampled.linear(x, layer.weight.detach(), None, frozen, chosen.index, "columns", False)
    assert sorted(saved) == sorted([layer.weight.numel(), columns])


def test_no_dense_gradient_exists(monkeypatch):
    """The largest tensor that a sampled backward makes is far smaller than the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and not t._is_view():
                    Largest.size = max(Largest.size, t.numel())
            return out

    for make, x in [
        (lambda: nn.Linear(64, 64), torch.randn(3, 64)),
        (lambda: nn.Embedding(64, 64), torch.tensor([1, 5, 5])),
    ]:
        for kind in KINDS:
            for forced in (False, True):
                monkeypatch.setattr(ops, "_BLOCK", 64)
                model = make()
                length = {"elements": 4096, "rows": 64, "columns": 64}[kind]
                index = positions(length, length // 32, 0)
                mask = Mask({"weight": Selection(kind, (64, 64), index)}, model)
                retouch.wrap(torch.optim.SGD, mask, model, lr=0.1, gradient="sampled")
                loss = model(x).sum()
                Largest.size = 0
                monkeypatch.setattr(ops, "_forced", forced)
                with Largest():
                    loss.backward()
                assert 0 < Largest.size <= 256, (model, kind, forced, Largest.size)


# --- in the engine --------------------------------------------------------------------------------


def sampled_net(**options):
    model = net()
    mask = element_mask(model)
    optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=1e-2, gradient="sampled", **options)
    return model, optimizer


def test_copies_and_pickles_are_plain_models():
    model, _ = sampled_net()
    want = model(batch(0))
    again = io.BytesIO()
    torch.save(model, again)
    again.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(again, weights_only=False),
    ):
        assert other.up.forward.__func__ is nn.Linear.forward
        assert other.up.forward.__self__ is other.up
        before = [p.grad for p in retouch.get_engine(model).parameters()]
        assert torch.equal(other(batch(0)), want)
        other.requires_grad_(True)
        loss_of(other, batch(0)).backward()
        assert other.up.weight.grad is not None
        assert [p.grad for p in retouch.get_engine(model).parameters()] == before


def test_unwrap_gives_the_layers_back():
    model, optimizer = sampled_net()
    kept = model.up.forward  # somebody may have wrapped it meanwhile
    loss_of(model, batch(0)).backward()
    optimizer.step()
    after = snapshot(model)
    retouch.unwrap(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert_same(snapshot(model), after)
    loss_of(model, batch(1)).backward()
    assert model.up.weight.grad is not None
    x = torch.randn(2, 12)
    assert torch.equal(kept(x), model.up(x))


def test_a_backward_inside_of_base_weights_is_refused():
    model, _ = sampled_net()
    with retouch.get_engine(model).base_weights():
        loss = loss_of(model, batch(0))
        with pytest.raises(EngineError, match="base_weights"):
            loss.backward()


def test_a_weight_that_moved_between_forward_and_backward_is_refused():
    model, optimizer = sampled_net()
    first, second = loss_of(model, batch(0)), loss_of(model, batch(1))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_evaluation_is_plain():
    model, _ = sampled_net()
    with torch.profiler.profile() as profile, torch.no_grad():
        model(batch(0))
    assert not any(e.key.startswith("retouch::") for e in profile.key_averages())


def test_a_mask_change_changes_the_layers():
    model = net()
    optimizer = retouch.wrap(
        torch.optim.SGD, element_mask(model), model, lr=0.1, gradient="sampled"
    )
    engine = retouch.get_engine(model)
    assert isinstance(model.up.__dict__["forward"], routes.Route)
    mask = Mask({"embed.weight": selection("rows", (23, 12))}, model)
    engine.set_mask(mask)
    assert "forward" not in model.up.__dict__ and "forward" in model.embed.__dict__
    before = snapshot(model)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    after = snapshot(model)
    changed = [n for n in after if not torch.equal(after[n], before[n])]
    assert changed == ["embed.weight"]


def test_a_weight_on_another_device_follows():
    model, _ = sampled_net()
    model.to("cpu")
    route = model.up.__dict__["forward"]
    route.index = route.index.to("meta")  # as after a move
    loss_of(model, batch(0)).backward()
    assert route.index.device.type == "cpu"


def test_the_table_of_a_mask_says_which_way_each_layer_goes():
    model = tiny.llama()
    chosen = {}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            count = 1 if "up_proj" in name or "layers.0.mlp.gate" in name else p.numel() // 2
            chosen[name] = Selection("elements", tuple(p.shape), positions(p.numel(), count, 0))
        elif name == "model.norm.weight":
            chosen[name] = Selection("elements", (16,), torch.tensor([3]))
    mask = Mask(chosen, model)

    def line(part):
        return next(row for row in mask.summary().splitlines() if part in row)

    assert line("up_proj").endswith("sampled (elements)")
    assert "dense (density over the break-even of" in line("down_proj")
    assert "1 sampled (elements), 1 dense (density over" in line("gate_proj")
    assert line("model.norm").endswith("dense (a vector: its gradient is small)")
    retouch.wrap(torch.optim.SGD, mask, model, lr=0.1, gradient="dense")
    assert line("up_proj").endswith("dense (as asked)")
    assert retouch.get_engine(model).paths["model.norm.weight"].gradient == "dense"
    assert "sampled" not in Mask(chosen).summary()  # who knows of which model

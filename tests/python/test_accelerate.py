"""Through Accelerate: `prepare`, accumulation, its own checkpoints."""

import pytest
import torch
from training import assert_frozen, assert_same, batch, element_mask, loss_of, mixed_mask, net
from training import snapshot as weights_of

import retouch
from retouch.engine import get_engine, wrap
from retouch.errors import EngineError

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    made = []

    def make(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        made.append(accelerate.Accelerator(cpu=True, **options))
        return made[-1]

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(accelerator, model, optimizer, steps, *, micro=1, scheduler=None):
    for step in steps:
        for i in range(micro):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch(step * 16 + i)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()


CLASSES = [torch.optim.AdamW, retouch.AdamW]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_prepare_changes_nothing(accelerator, cls, dtype):
    model, plain = net(dtype), net(dtype)
    mask = mixed_mask(model)
    reference = wrap(cls, mixed_mask(plain), plain, lr=1e-2, weight_decay=0.1)
    optimizer = wrap(cls, mask, model, lr=1e-2, weight_decay=0.1)
    before = weights_of(model)
    acc = accelerator(gradient_accumulation_steps=4)
    prepared, outer = acc.prepare(model, optimizer)
    assert_same(weights_of(prepared), before)
    run(acc, prepared, outer, range(3), micro=4)
    for step in range(3):
        for i in range(4):
            (loss_of(plain, batch(step * 16 + i)) / 4).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    assert_same(weights_of(model), weights_of(plain))
    assert_frozen(before, model, mask)
    retouch.verify_untouched(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_prepare_in_mid_run_and_large_positions(accelerator, cls, dtype):
    """`prepare` sends the optimizer's state through `load_state_dict`."""

    def start():
        model = torch.nn.Linear(300, 300, bias=False).to(dtype)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 90_000).view(300, 300))
        index = torch.arange(65_530, 90_000, 7, dtype=torch.int32)
        mask = retouch.Mask({"weight": retouch.Selection("elements", (300, 300), index)}, model)
        return model, wrap(cls, mask, model, lr=1e-3)

    def step(model, optimizer, i):
        x = torch.linspace(-1, i + 1, 600).view(2, 300).to(dtype)
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (model, optimizer), (plain, reference) = start(), start()
    step(model, optimizer, 0)
    step(plain, reference, 0)
    prepared, outer = accelerator().prepare(model, optimizer)
    for i in range(1, 4):
        step(prepared, outer, i)
        step(plain, reference, i)
    assert_same(weights_of(model), weights_of(plain))
    index = get_engine(model).slots["weight"].selection.index
    assert index.dtype == torch.int32 and int(index[-1]) == 89_995
    for p, q in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert all(torch.equal(p[k], q[k]) and p[k].dtype == q[k].dtype for k in p)


def test_wrap_after_prepare(accelerator):
    model = net()
    before, mask = weights_of(model), element_mask(model)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    acc = accelerator()
    prepared, outer = acc.prepare(model, plain)
    scheduler = acc.prepare(torch.optim.lr_scheduler.LambdaLR(plain, lambda t: 1 / (t + 1)))
    assert wrap(outer, mask, model) is outer
    run(acc, prepared, outer, range(3), scheduler=scheduler)
    assert_frozen(before, model, mask)
    assert plain.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    with pytest.raises(EngineError, match="wrapped already"):
        wrap(outer, mask, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_state_and_load_state(accelerator, dtype, tmp_path):
    def start(mask_seed):
        model = net(dtype)
        optimizer = wrap(torch.optim.AdamW, element_mask(model, seed=mask_seed), model, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
        acc = accelerator()
        return acc, *acc.prepare(model, optimizer, scheduler)

    acc, model, optimizer, scheduler = start(0)
    run(acc, model, optimizer, range(3), scheduler=scheduler)
    acc.save_state(tmp_path / "state")
    run(acc, model, optimizer, range(3, 6), scheduler=scheduler)
    acc, again, resumed, schedule = start(70)  # of another mask: the saved one wins
    acc.load_state(tmp_path / "state")
    run(acc, again, resumed, range(3, 6), scheduler=schedule)
    assert_same(weights_of(again), weights_of(model))
    retouch.verify_untouched(again)


def test_mixed_precision(accelerator):
    model = net()
    before, mask = weights_of(model), element_mask(model)
    acc = accelerator(mixed_precision="bf16")
    prepared, optimizer = acc.prepare(model, wrap(torch.optim.AdamW, mask, model, lr=1e-2))
    run(acc, prepared, optimizer, range(3))
    assert_frozen(before, model, mask)

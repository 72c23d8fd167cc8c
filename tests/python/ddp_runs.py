"""What each process of a torchrun does in test_distributed.py: `torchrun ddp_runs.py FOLDER RUN...`."""

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import element_mask, llama, mixed_mask, net, positions

import retouch
from retouch.errors import EngineError
from retouch.masks import Mask, Selection

STEPS, ROWS = 4, 8


def rows(step, micro):
    """The tokens of the whole batch of a micro step."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randint(0, 23, (ROWS, 7), generator=generator)


def share(tokens):
    """The rows of this process."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    return tokens[rank::count]


def loss_of(outputs):
    return outputs.float().square().mean()


def train(gradient, micro=1, kind="net", **options):
    """A run of `STEPS` steps on one process, or on all with DDP."""
    model = net() if kind == "net" else llama()
    mask = mixed_mask(model)
    optimizer = retouch.wrap(
        torch.optim.AdamW, mask, model, lr=1e-2, weight_decay=0.1, gradient=gradient
    )
    engine = retouch.get_engine(model)
    forward = DistributedDataParallel(model, **options) if dist.is_initialized() else model
    assert retouch.get_engine(forward) is engine
    norms, sent = [], []
    for step in range(STEPS):
        for i in range(micro):
            last = i == micro - 1
            free = (
                forward.no_sync()
                if dist.is_initialized() and not last
                else warnings.catch_warnings()
            )
            with free:
                out = forward(share(rows(step, i)))
                loss = loss_of(out if kind == "net" else out.logits)
                (loss / micro).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        sent.append(engine.metrics().get("sent_bytes", 0.0))
    retouch.verify_untouched(model)
    weights = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("_retouch.")}
    values = sum(s.value.numel() for s in engine.slots.values())
    return {"weights": weights, "norms": norms, "sent": sent, "values": values,
            "slots": len(engine.slots), "numel": sum(w.numel() for w in weights.values())}  # fmt: skip


class Counter:
    """Counts the bytes that all-reduces of this process carry."""

    def __enter__(self):
        self.bytes, self._plain = 0, dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.bytes += tensor.numel() * tensor.element_size()
            return self._plain(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._plain


def moving(collect):
    """A mask that moves: by gradients of the training, and at random."""
    model = net()
    config = retouch.SelectConfig(
        **({"score": "gradient"} if collect else {"direction": "random"}), density=0.1,
        target_modules=["up", "down"],
        schedule=retouch.Schedule(every=2, collect=2 if collect else 0),
    )  # fmt: skip
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=1e-2, weight_decay=0.1)
    engine = retouch.get_engine(model)
    forward = DistributedDataParallel(model) if dist.is_initialized() else model
    masks = []
    for step in range(6):
        for i in range(2):
            free = (
                forward.no_sync() if dist.is_initialized() and i == 0 else warnings.catch_warnings()
            )
            with free:
                (loss_of(forward(share(rows(step, i)))) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append({n: slot.selection.flat() for n, slot in engine.slots.items()})
    retouch.verify_untouched(model)
    weights = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("_retouch.")}
    return {"weights": weights, "masks": masks}


class Exact(nn.Module):
    """Its gradients are small integers by a power of two, so that no sum of them is ever rounded."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(64, 80)
        self.rows = nn.Linear(64, 9, bias=False)
        self.columns = nn.Linear(64, 5)

    def forward(self, x):
        layers = (self.wide, self.rows, self.columns)
        outs = [layer(x) for layer in layers]
        signs = [torch.arange(out.shape[1]).remainder(3).sub(1).to(out.dtype) for out in outs]
        return sum(
            (out.float() * sign.float()).sum(1) for out, sign in zip(outs, signs, strict=True)
        )


def exact_mask(model, seed=0):
    """Elements (enough for moments of 8 bits), rows, columns and a whole vector."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "_retouch" not in n}
    return Mask({
        "wide.weight": Selection("elements", (80, 64), positions(5120, 4200, seed)),
        "wide.bias": Selection("all", shapes["wide.bias"]),
        "rows.weight": Selection("rows", (9, 64), positions(9, 4, seed + 1)),
        "columns.weight": Selection("columns", (5, 64), positions(64, 20, seed + 2)),
    }, model)  # fmt: skip


ROUNDED = {
    "AdamW": (retouch.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "AdamW8": (retouch.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "state_bits": 8}),
    "SGD": (retouch.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Lion": (retouch.Lion, {"lr": 1e-3, "weight_decay": 0.1}),
    "Adafactor": (retouch.Adafactor, {"lr": 0.05}),
}


def rounded(way, name, kind="exact"):
    """bfloat16 weights, two micro-batches in a step, a mask that moves; resumed in between."""
    cls, options = ROUNDED[name]
    masks = exact_mask if kind == "exact" else element_mask

    def start():
        torch.manual_seed(0)
        model = Exact().to(torch.bfloat16) if kind == "exact" else net(torch.bfloat16)
        optimizer = retouch.wrap(cls, masks(model), model, rounding=way, **options)
        return model, optimizer, DistributedDataParallel(model) if dist.is_initialized() else model

    def go(run, steps):
        model, optimizer, forward = run
        for step in steps:
            if step == 3:
                retouch.get_engine(model).move(masks(model, seed=5))
            for i in range(2):
                x = rows(step, i)
                if kind == "exact":
                    generator = torch.Generator().manual_seed(100 * step + i)
                    x = torch.randint(-3, 4, (ROWS, 64), generator=generator).to(torch.bfloat16)
                free = contextlib.nullcontext()
                if dist.is_initialized() and i == 0:
                    free = forward.no_sync()
                with free:
                    out = forward(share(x))
                    loss = out.mean() if kind == "exact" else loss_of(out)
                    (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    def weights(model):
        named = model.named_parameters()
        return {n: p.detach() for n, p in named if not n.startswith("_retouch.")}

    whole, again = start(), start()
    start_weights = {n: w.clone() for n, w in weights(whole[0]).items()}
    go(whole, range(2))
    file = io.BytesIO()
    torch.save((whole[0].state_dict(), whole[1].state_dict()), file)
    saved = [file.getvalue()]
    if dist.is_initialized():
        dist.broadcast_object_list(saved, 0)  # the state of the first process is that of all
    go(whole, range(2, 5))
    state, options = torch.load(io.BytesIO(saved[0]), weights_only=True)
    again[0].load_state_dict(state)
    again[1].load_state_dict(options)
    go(again, range(2, 5))
    retouch.verify_untouched(whole[0])
    slots = retouch.get_engine(whole[0]).slots.values()
    state = {f"{s.name} {k}": t for s in slots for k, t in whole[1].state[s.value].items()}
    values = {s.name: s.value.detach() for s in slots}
    return {"start": start_weights, "weights": weights(whole[0]), "resumed": weights(again[0]),
            "state": state, "values": values}  # fmt: skip


def micro_gate():
    """Gradients that are masked after every micro-batch: by each process alone, then together."""
    model = net()
    gate = retouch.optim.gates.TopK(0.3, per="backward", policy="P0", leaky=True)
    optimizer = retouch.wrap(retouch.AdamW, element_mask(model), model, lr=1e-2, gate=gate)
    forward = DistributedDataParallel(model)
    slots, counts = retouch.get_engine(model).slots.values(), []
    for step in range(3):
        for i in range(2):
            with forward.no_sync() if i == 0 else contextlib.nullcontext():
                (loss_of(forward(share(rows(step, i)))) / 2).backward()
            counts.append({s.name: int(torch.count_nonzero(s.value.grad)) for s in slots})
        optimizer.step()
        optimizer.zero_grad()
    named = model.named_parameters()
    return {"weights": {n: p.detach() for n, p in named if not n.startswith("_retouch.")},
            "counts": counts, "selected": {s.name: s.selection.count for s in slots}}  # fmt: skip


def collected_unused():
    """Gradients are collected of layers that one process alone uses."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

        def forward(self, x):
            return self.experts[dist.get_rank()](x)

    torch.manual_seed(0)
    model = Experts()
    config = retouch.SelectConfig(
        score="gradient", k=2, scope="tensor", target_modules=["experts"], heads="masked",
        schedule=retouch.Schedule(every=2, collect=1),
    )  # fmt: skip
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=1e-2)
    forward = DistributedDataParallel(model)
    for step in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(7 * step + dist.get_rank()))
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    slots = retouch.get_engine(model).slots
    return {"masks": {n: slot.selection.flat() for n, slot in slots.items()},
            "weights": {n: slots[n].param.detach() for n in slots}}  # fmt: skip


def unused_layers():
    """Each process uses another expert, and both the router."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x, which):
            return {"out": self.experts[which](self.experts[2](x))}

    torch.manual_seed(0)
    model = Experts()
    whole = {
        n: Selection("rows", (4, 4), torch.tensor([1, 2])) for n, _ in model.named_parameters()
    }
    optimizer = retouch.wrap(torch.optim.SGD, Mask(whole, model), model, lr=1.0)
    forward = DistributedDataParallel(model)
    slots = retouch.get_engine(model).slots
    for _ in range(2):  # DDP complains at the second pass of what was unused in the first
        loss = forward(torch.ones(2, 4), dist.get_rank())["out"].sum()
        loss.backward()
    mine = slots[f"experts.{dist.get_rank()}.weight"].value.grad.clone()
    grads = {n: s.value.grad for n, s in slots.items()}
    optimizer.step()
    return {"weights": {n: p.detach() for n, p in model.named_parameters()}, "grads": grads,
            "mine": mine}  # fmt: skip


def refusals():
    """What a user may get wrong, as (what, error)."""
    said = {}

    def note(what, run):
        try:
            run()
        except EngineError as error:
            said[what] = str(error)

    def without_ddp():
        model = net()
        optimizer = retouch.wrap(torch.optim.SGD, mixed_mask(model), model, lr=0.1)
        loss_of(model(rows(0, 0))).backward()
        optimizer.step()

    def ddp_first():
        model = net()
        forward = DistributedDataParallel(model)
        retouch.wrap(torch.optim.SGD, mixed_mask(model), model, lr=0.1)
        forward(rows(0, 0))

    def never_synced():
        model = net()
        optimizer = retouch.wrap(torch.optim.SGD, mixed_mask(model), model, lr=0.1)
        forward = DistributedDataParallel(model)
        with forward.no_sync():
            loss_of(forward(rows(0, 0))).backward()
        optimizer.step()

    def synced_too_early():
        model = net()
        optimizer = retouch.wrap(torch.optim.SGD, mixed_mask(model), model, lr=0.1)
        forward = DistributedDataParallel(model)
        loss_of(forward(rows(0, 0))).backward()
        with forward.no_sync():
            loss_of(forward(share(rows(0, 1)))).backward()
        optimizer.step()

    def other(weights, mask):
        model = net(seed=dist.get_rank() if weights else 0)
        chosen = mixed_mask(model)
        if mask and dist.get_rank():
            chosen = Mask({n: s for n, s in chosen.items() if n != "up.weight"}, model)
            chosen |= Mask({"up.weight": Selection("rows", (20, 12), torch.tensor([0]))}, model)
        retouch.wrap(torch.optim.SGD, chosen, model, lr=0.1)
        loss_of(DistributedDataParallel(model)(rows(0, 0))).backward()

    def changed_in_place():
        model = net()
        retouch.wrap(torch.optim.SGD, mixed_mask(model), model, lr=0.1)
        out = DistributedDataParallel(model)(rows(0, 0))
        out /= 2  # as trainers do with logits
        loss_of(out).backward()
        said["in place"] = "fine"

    note("without ddp", without_ddp)
    note("ddp first", ddp_first)
    note("never synced", never_synced)
    note("synced too early", synced_too_early)
    note("other weights", lambda: other(True, False))
    note("other mask", lambda: other(False, True))
    note("in place", changed_in_place)
    model = net()
    retouch.wrap(torch.optim.SGD, mixed_mask(model), model, lr=0.1)
    retouch.unwrap(model)
    said["unwrapped"] = str(len(DistributedDataParallel(model)._module_parameters))
    return {"said": said}


def shared_mask():
    """Masks that differ between processes, made one."""
    model = net()
    mask = retouch.select(model, "random", density=0.1, seed=dist.get_rank())
    shared = mask.broadcast()
    assert shared.model() is model
    retouch.wrap(torch.optim.SGD, shared, model, lr=0.1)
    loss_of(DistributedDataParallel(model)(rows(0, 0))).backward()
    return {"before": mask["up.weight"].index, "after": shared["up.weight"].index}


def trainer(folder, gradient, resume=None):
    """A Trainer with accumulation, clipping, a data-driven mask, logs and checkpoints."""
    import tiny_hf

    count = int(os.environ.get("WORLD_SIZE", "1"))
    run = tiny_hf.trainer(
        folder / f"{gradient}-{count}", per_device_train_batch_size=4 // count,
        gradient_accumulation_steps=2, max_grad_norm=0.5, save_strategy="steps", save_steps=2,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    retouch.attach(run, "gradient", density=0.05, samples=8, gradient=gradient)
    run.train(resume_from_checkpoint=resume)
    model = run.accelerator.unwrap_model(run.model)
    retouch.verify_untouched(model)
    log = [entry for entry in run.state.log_history if "loss" in entry]
    weights = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("_retouch.")}
    mask = {n: s.flat() for n, s in retouch.get_engine(model).mask.items()}
    return {"weights": weights, "mask": mask, "losses": [e["loss"] for e in log],
            "norms": [e["grad_norm"] for e in log],
            "sent": [e.get("retouch/sent_mib", 0.0) for e in log]}  # fmt: skip


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    if not any(name.startswith("trainer") for name in names):
        dist.init_process_group("gloo")
    runs = {
        "sampled": lambda: train("sampled"),
        "dense": lambda: train("dense"),
        "accumulated": lambda: train("sampled", micro=3),
        "accumulated-dense": lambda: train("dense", micro=3),
        "llama": lambda: train("sampled", kind="llama", find_unused_parameters=True),
        "static": lambda: train("sampled", static_graph=True),
        "unused": unused_layers,
        "moving": lambda: moving(collect=True),
        "moving-random": lambda: moving(collect=False),
        "moving-unused": collected_unused,
        "micro-gate": micro_gate,
        "refusals": refusals,
        "shared": shared_mask,
        "trainer-sampled": lambda: trainer(folder, "sampled"),
        "trainer-dense": lambda: trainer(folder, "dense"),
        "trainer-resumed": lambda: trainer(
            folder, "sampled", str(folder / "sampled-2" / "checkpoint-2")
        ),
    }
    for way in ("master", "stochastic", "kahan"):
        for name in ROUNDED:
            for kind in ("exact", "net"):
                runs[f"{way}-{name}-{kind}"] = lambda a=way, b=name, c=kind: rounded(a, b, c)
    rank = os.environ.get("RANK", "0")
    for name in names:
        if dist.is_initialized():
            with Counter() as counter:
                result = runs[name]()
            result["counted"] = counter.bytes
        else:
            result = runs[name]()
        torch.save(result, folder / f"{name}-{rank}.pt")
    print(json.dumps(names))


if __name__ == "__main__":
    main()

"""Small models, masks and literal references that the training tests share."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from retouch.engine import wrap
from retouch.masks import Mask, Selection

VOCABULARY = 97


class Net(nn.Module):
    """Every kind of parameter that matters: embedding, linear, conv, norm, bias, buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.up = nn.Linear(12, 20)
        self.conv = nn.Conv1d(20, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 5, bias=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.up(self.embed(tokens)))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.down(self.norm(x))


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def batch(step: int, rows: int = 3) -> Tensor:
    """Tokens of one step, the same for everybody."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 23, (rows, 7), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    if isinstance(model, Net):
        return model(tokens).float().square().mean()
    return model(input_ids=tokens, labels=tokens).loss


def positions(numel: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:count].sort().values.to(torch.int32)


def element_mask(model: nn.Module, density: float = 0.2, seed: int = 0) -> Mask:
    """Random elements of every parameter but the last, which is frozen whole."""
    parameters = list(own(model))
    return Mask(
        {
            name: Selection(
                "elements",
                tuple(p.shape),
                positions(p.numel(), max(1, int(density * p.numel())), seed + i),
            )
            for i, (name, p) in enumerate(parameters[:-1])
        },
        model,
    )


def mixed_mask(model: nn.Module) -> Mask:
    """All kinds of selections, in turn; every sixth parameter is frozen."""
    chosen = {}
    for i, (name, p) in enumerate(own(model)):
        shape, kind = tuple(p.shape), ("elements", "rows", "columns", "all", "rows", "none")[i % 6]
        if kind == "columns" and p.dim() < 2:
            kind = "elements"
        if kind == "none":
            continue
        index = None
        if kind == "elements":
            index = positions(p.numel(), max(1, p.numel() // 4), i)
        elif kind == "rows":
            index = positions(shape[0], max(1, shape[0] // 3), i)
        elif kind == "columns":
            index = positions(shape[1], max(1, shape[1] // 3), i)
        chosen[name] = Selection(kind, shape, index)
    return Mask(chosen, model)


def wrapped(
    model: Any = None, mask: Mask | None = None, cls: Any = torch.optim.AdamW, **options: Any
) -> tuple[Any, Mask, Any]:
    """A model, a mask on it, and an optimizer that is wrapped with it."""
    model = net() if model is None else model
    mask = element_mask(model) if mask is None else mask
    return model, mask, wrap(cls, mask, model, **{"lr": 1e-2, **options})


def bits(tensor: Tensor) -> Tensor:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(kind)


def own(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The model's own parameters, without the compact values of an engine."""
    return [(n, p) for n, p in model.named_parameters() if not n.startswith("_retouch.")]


def own_weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in own(model)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in own(model)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(bits(a[name]), bits(b[name])), name


def assert_frozen(before: dict[str, Tensor], model: nn.Module, mask: Mask) -> None:
    """Every coordinate outside of the mask has its old bits; some inside have not."""
    moved = 0
    for name, now in snapshot(model).items():
        changed = (bits(now) != bits(before[name])).reshape(-1)
        if name in mask:
            flat = mask[name].flat().long()
            moved += int(changed[flat].sum())
            changed[flat] = False
        assert not changed.any(), f"{name}: {int(changed.sum())} frozen coordinates moved"
    assert moved > 0


class Lion(Optimizer):
    """Chen et al., arXiv 2302.06675, written the old way: through `.data`."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99)})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p.data))
                b1, b2 = group["betas"]
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                p.data.add_(m.mul(b1).add(p.grad.data, alpha=1 - b1).sign(), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad.data, alpha=1 - b2)
        return loss


def train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: Iterable[int],
    *,
    clip: float | None = None,
    micro: int = 1,
    scheduler: Any = None,
) -> list[float]:
    """A plain loop; returns the gradient norms."""
    norms = []
    for step in steps:
        for i in range(micro):
            (loss_of(model, batch(step * 16 + i)) / micro).backward()
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        model.zero_grad()
    return norms


class Reference:
    """The same training, written out: torch's optimizer on θ[selected], rounded into the model.

    Shares nothing with the engine but `Selection.flat`, which says what is selected.
    """

    def __init__(self, model: nn.Module, mask: Mask, make: Callable[[Any], Optimizer]) -> None:
        self.model = copy.deepcopy(model)
        self.mask = mask
        self.known = dict(self.model.named_parameters())
        self.theta: dict[str, nn.Parameter] = {}
        for name, selection in mask.items():
            where = self._where(name)
            shape = _natural(selection)
            value = self.known[name].detach().reshape(-1)[where].float().reshape(shape)
            self.theta[name] = nn.Parameter(value.clone())
        self.optimizer = make(list(self.theta.values()))

    def _where(self, name: str) -> Tensor:
        return self.mask[name].flat().long()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, theta in self.theta.items():
            grad = self.known[name].grad
            if grad is not None:
                part = grad.reshape(-1)[self._where(name)].float().reshape(theta.shape)
                theta.grad = part.clone() if theta.grad is None else theta.grad + part
        self.model.zero_grad()

    def write(self) -> None:
        with torch.no_grad():
            for name, theta in self.theta.items():
                weight = self.known[name]
                flat = weight.detach().clone().reshape(-1)
                flat[self._where(name)] = theta.detach().reshape(-1).to(weight.dtype)
                weight.copy_(flat.view(weight.shape))

    def train(
        self, steps: Iterable[int], *, clip: float | None = None, micro: int = 1
    ) -> list[float]:
        norms = []
        for step in steps:
            for i in range(micro):
                self.backward(loss_of(self.model, batch(step * 16 + i)) / micro)
            if clip is not None:
                norms.append(float(nn.utils.clip_grad_norm_(self.theta.values(), clip)))
            self.optimizer.step()
            self.write()
            self.optimizer.zero_grad()
        return norms


def _natural(selection: Selection) -> tuple[int, ...]:
    shape = selection.shape
    if selection.kind == "elements":
        return (selection.count,)
    if selection.kind == "rows":
        return (selection.index.numel(), *shape[1:])
    if selection.kind == "columns":
        return (shape[0], selection.index.numel(), *shape[2:])
    return shape

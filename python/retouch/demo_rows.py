"""How `retouch demo` trains and measures one line of its table."""

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retouch.config import SelectConfig
from retouch.delta import Delta
from retouch.demo_data import Corpus, Text
from retouch.engine import get_engine, wrap
from retouch.routes import fast_bfloat16
from retouch.select import select

__all__ = [
    "METHODS",
    "Method",
    "Row",
    "Scale",
    "Scene",
    "folder_bytes",
    "measured",
    "said",
    "trained",
]

PROMPT = "The programmer opened the door and said to the people,"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 5


@dataclass(frozen=True)
class Scale:
    """How much the demo does."""

    batch: int = 4
    length: int = 128
    unseen: int = 16
    reply: int = 32
    scored: int = 2


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: For the table.
        lr: Learning rate; each kind of update has its own scale.
        config: What to select; None for what is not a selection.
        adapter: Train a LoRA adapter instead of weights.
    """

    name: str
    lr: float
    config: SelectConfig | None = None
    adapter: bool = False


METHODS = (
    Method("full fine-tuning", 1e-4),
    Method("LoRA r=8", 2e-3, adapter=True),
    Method("retouch, 1 % by gradient", 1e-3, SelectConfig(score="gradient", density=0.01)),
    Method("retouch, 1 % random", 1e-2, SelectConfig(direction="random", density=0.01)),
)


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: Of the method.
        lr: Its learning rate; None for the base.
        perplexity: On chapters that no method has trained on.
        kept: Share of the tokens of the base's own replies that the model would still choose.
        trained: Parameters that the optimizer moves.
        state_bytes: Of the tensors in the optimizer's state.
        file_bytes: What has to be shipped to somebody who has the base.
        step_seconds: Median wall time of a step: forward, backward, clip, update.
        step_cpu_seconds: The same in CPU time.
        setup_seconds: Choosing the mask and wrapping.
        extra_bytes: What retouch holds beside the optimizer's state: positions, float32 values,
            base values.
    """

    name: str
    perplexity: float
    kept: float
    lr: float | None = None
    trained: int = 0
    state_bytes: int = 0
    file_bytes: int = 0
    step_seconds: float | None = None
    step_cpu_seconds: float | None = None
    setup_seconds: float = 0.0
    extra_bytes: int = 0


@dataclass
class Scene:
    """What all methods share."""

    checkpoint: Path
    text: Text
    corpus: Corpus
    scale: Scale
    steps: int
    seed: int
    replies: list[tuple[list[int], int]] = field(default_factory=list)

    def load(self) -> nn.Module:
        """The base, fresh from the disk."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.checkpoint, dtype=torch.float32
        )
        return model

    @property
    def tokens(self) -> int:
        """Tokens of the replies that `Row.kept` is counted over."""
        return sum(len(ids) - start for ids, start in self.replies)


# --- training ------------------------------------------------------------------------------------


def trained(
    method: Method,
    scene: Scene,
    file: Path,
    doing: Callable[[str], None],
    stepped: Callable[[], None],
) -> tuple[Row, nn.Module]:
    """Trains a fresh base and measures it."""
    model = scene.load()
    torch.manual_seed(scene.seed)
    start = time.perf_counter()
    doing("choosing weights" if method.config else "setting up")
    model, optimizer = _set_up(method, model, scene)
    model.train()
    setup = time.perf_counter() - start
    doing("training")
    times = _steps(model, optimizer, method.lr, scene, stepped)
    doing("measuring")
    row = measured(method.name, model, scene)
    row.lr, row.setup_seconds = method.lr, setup
    row.step_seconds = statistics.median(t for t, _ in times)
    row.step_cpu_seconds = statistics.median(t for _, t in times)
    row.trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    row.state_bytes = _state_bytes(optimizer)
    shutil.rmtree(file, ignore_errors=True)
    if method.config is not None:
        Delta.from_model(model).save_pretrained(file)
        slots = get_engine(model).slots.values()
        kept = [t for s in slots for t in (s.value, s.base, s.selection.index) if t is not None]
        row.extra_bytes = sum(map(_nbytes, kept))
    elif method.adapter:
        model.save_pretrained(str(file))  # type: ignore[operator]
    row.file_bytes = folder_bytes(file) if file.exists() else _changed_bytes(model, scene)
    return row, model


def _set_up(
    method: Method, model: nn.Module, scene: Scene
) -> tuple[nn.Module, torch.optim.Optimizer]:
    options: dict[str, Any] = {"lr": method.lr, "weight_decay": 0.0, "fused": True}
    if method.config is not None:
        data = _labelled(scene) if method.config.score is not None else None
        mask = select(model, method.config, data=data, loss_fn=_batch_loss, seed=scene.seed)
        optimizer: torch.optim.Optimizer = wrap(torch.optim.AdamW, mask, **options)
        return model, optimizer
    if method.adapter:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEARS)
        model = get_peft_model(model, adapter)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)


def _steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    scene: Scene,
    done: Callable[[], None],
) -> list[tuple[float, float]]:
    """Trains; wall and CPU seconds of each step."""
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    times = []
    for step in range(scene.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARM_UP) * (1 - 0.9 * step / scene.steps)
        _loss(model, scene.corpus.train[step]).backward()
        nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
        done()
    return times


def _loss(model: nn.Module, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    with mixed_precision():
        out = model(input_ids=tokens, labels=tokens if labels is None else labels)
    loss: Tensor = out.loss
    return loss


def _batch_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return _loss(model, batch["input_ids"], batch["labels"])


def _labelled(scene: Scene) -> list[dict[str, Tensor]]:
    """The first batches to train on, as scores want them."""
    return [{"input_ids": x, "labels": x} for x in scene.corpus.train[: scene.scale.scored]]


def mixed_precision() -> torch.autocast:
    """bfloat16 where that is faster."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16())


# --- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def measured(name: str, model: nn.Module, scene: Scene) -> Row:
    """Perplexity on unseen text, and how much of the base's replies is kept."""
    model.eval()
    losses = [float(_loss(model, x)) for x in scene.corpus.unseen.split(scene.scale.batch * 2)]
    hits = 0
    for ids, start in scene.replies:
        with mixed_precision():
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        hits += int((logits.argmax(-1) == torch.tensor(ids[start:])).sum())
    return Row(name, math.exp(statistics.fmean(losses)), hits / scene.tokens)


@torch.no_grad()
def _greedy(
    model: nn.Module, prompts: list[list[int]], end: int, length: int, **options: Any
) -> list[list[int]]:
    """What the model says after each prompt, up to and with its end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with mixed_precision():
        said = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=seen, max_new_tokens=length, do_sample=False,
            eos_token_id=end, pad_token_id=end, **options,
        )  # fmt: skip
    replies = []
    for tokens in said[:, width:].tolist():
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        replies.append(tokens[:stop])
    return replies


def replies_to(
    model: nn.Module, scene: Scene, questions: tuple[str, ...]
) -> list[tuple[list[int], int]]:
    """The model's replies: all tokens, and where the reply begins."""
    model.eval()
    asked = [scene.text.chat(question) for question in questions]
    said = _greedy(model, asked, scene.text.end, scene.scale.reply)
    return [(a + s, len(a)) for a, s in zip(asked, said, strict=True)]


def said(model: nn.Module, scene: Scene) -> str:
    """How the model goes on from the demo's sentence, on one line."""
    model.eval()
    prompt = scene.text.encode(PROMPT)
    (said,) = _greedy(model, [prompt], scene.text.end, scene.scale.reply, repetition_penalty=1.2)
    return " ".join(scene.text.decode([*prompt, *said]).split())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = optimizer.state.values()
    return sum(_nbytes(t) for state in states for t in state.values() if isinstance(t, Tensor))


def folder_bytes(folder: Path) -> int:
    """Size of the tensors and descriptions in a folder."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".json"))


def _changed_bytes(model: nn.Module, scene: Scene) -> int:
    """Of the tensors that differ from the base's: what a full fine-tune has to ship."""
    base = dict(scene.load().named_parameters())
    return sum(_nbytes(p) for n, p in model.named_parameters() if not torch.equal(p, base[n]))

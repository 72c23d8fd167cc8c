"""What a checkpoint of a selective run holds beside, or instead of, the model."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from retouch._core import __version__
from retouch.config import FILE as CONFIG
from retouch.config import SelectConfig
from retouch.delta import Delta
from retouch.eligible import PLACE
from retouch.engine import Engine, get_engine
from retouch.maskfile import FILE as MASK_FILE
from retouch.masks import Mask

MASK, DELTA = MASK_FILE, "delta_config.json"


def has_optimizer(folder: Path) -> bool:
    """Whether the Trainer will load an optimizer state from a checkpoint (it wants both files)."""
    return (folder / OPTIMIZER_NAME).is_file() and (folder / SCHEDULER_NAME).is_file()


def has_delta(folder: Path) -> bool:
    """Whether a checkpoint holds a delta instead of a model."""
    return (folder / DELTA).is_file()


def save_record(folder: Path, engine: Engine) -> None:
    """Writes the mask, and the config that selected it, beside a saved model or delta."""
    if engine.mask is None:
        return
    engine.mask.save(folder / MASK)
    config = engine.mask.metadata.get("config")
    if config is not None:
        text = json.dumps(
            {**config, "retouch_version": __version__}, indent=2, sort_keys=True, default=str
        )
        unfinished = folder / f".{CONFIG}"
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, folder / CONFIG)


def differences(mask: Mask, wanted: SelectConfig | Mask) -> str:
    """In what the selection of a checkpoint differs from the one that is asked for; "" if not.

    Args:
        mask: The mask of the checkpoint; its metadata hold the config that selected it.
        wanted: What the run was told to select.
    """
    if isinstance(wanted, Mask):
        return "" if mask == wanted else "another mask"
    old = mask.metadata.get("config")
    if old is None:
        return "a given mask"
    new = json.loads(json.dumps(wanted.to_dict(), default=str))
    names = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name}={old.get(name)!r}, now {new[name]!r}" for name in names)


def swap(model: nn.Module, mask: Mask, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts `values` where the mask selects; returns what was there, all bit for bit."""
    named = dict(model.named_parameters())
    held = {name: selection.take(named[name].detach()) for name, selection in mask.items()}
    for name, selection in mask.items():
        selection.put_(named[name], values[name], name)
    return held


def save_delta(trainer: Trainer, folder: Path) -> None:
    """Writes what `Trainer._save` would, with the delta in the place of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    Delta.from_model(model).save_pretrained(folder)
    for part in ("config", "generation_config"):
        if hasattr(getattr(model, part, None), "save_pretrained"):
            getattr(model, part).save_pretrained(folder)
    words: Any = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if words is not None:
        words.save_pretrained(folder)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def load_delta(model: nn.Module, folder: Path) -> None:
    """Brings a model, wherever its training is, to the weights of a delta checkpoint.

    Raises:
        BaseMismatchError: The model is not the one that the delta was taken from.
    """
    delta = Delta.load(folder)
    if PLACE not in model._modules:
        delta.apply_(model)
        return
    engine = get_engine(model)
    Delta.from_model(model).revert_(model)
    delta.apply_(model)
    engine.sync_from_weights()

"""A delta as a LoRA adapter of PEFT: `Delta.to_peft`."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from retouch import _core
from retouch.compress import LowRank
from retouch.deltaentry import Entry
from retouch.errors import HyperparameterError, LayoutError
from retouch.roles import BEFORE, EMBEDDING, role

if TYPE_CHECKING:
    from retouch.delta import Delta

__all__ = ["Others", "to_peft"]

Others = Literal["error", "drop"]
_FILE = "adapter_model.safetensors"


def to_peft(
    delta: "Delta",
    folder: str | os.PathLike[str],
    rank: int,
    base: Any,
    others: Others,
    fan_in_fan_out: bool,
    task_type: str | None,
    overwrite: bool,
) -> dict[str, dict[str, float]]:
    """See `Delta.to_peft`."""
    if others not in ("error", "drop"):
        raise HyperparameterError(f"others must be error or drop, got {others!r}")
    tied = set(delta.aliases.values())
    linear = [name for name, entry in delta.items() if _linear(name, entry) and name not in tied]
    rest = [name for name in delta if name not in linear]
    if rest and others == "error":
        raise LayoutError(
            f"{len(rest)} changed tensors are not the weight of a linear layer of its own (first {rest[0]}), "
            "and a LoRA adapter has no place for them: others='drop' leaves them as in the base"
        )
    if not linear:
        raise LayoutError(
            "the delta changes no weight of a linear layer: there is nothing to adapt"
        )
    chosen = type(delta)({n: delta[n] for n in linear}, base_model=delta.base_model)
    report: dict[str, dict[str, float]] = {}
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, entry in chosen.compress(LowRank(rank), base=base).items():
        assert entry.change is not None and entry.error is not None
        up, down = entry.change.parts["B"], entry.change.parts["A"]
        if fan_in_fan_out:
            up, down = down.T, up.T
        module = name.removesuffix(".weight")
        if len(down) != rank:
            ranks[module] = len(down)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
        report[name] = {"rank": len(down), "residual": entry.error**2}
    report |= {name: {"rank": 0, "residual": 1.0} for name in rest}
    # PEFT takes the keys of patterns for regular expressions
    pattern = {re.escape(module): own for module, own in ranks.items()}
    config = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": delta.base_model,
        "r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": [name.removesuffix(".weight") for name in linear],
        "fan_in_fan_out": fan_in_fan_out, "bias": "none", "lora_dropout": 0.0, "inference_mode": True,
    }  # fmt: skip
    _write(Path(folder), tensors, config, overwrite)
    return report


def _linear(name: str, entry: Entry) -> bool:
    """Whether it is the weight of a linear layer, as far as name and shape tell."""
    matrix = len(entry.shape) == 2 and entry.dtype.is_floating_point
    kept = entry.kind not in ("added", "removed")
    return matrix and kept and name.endswith(".weight") and role(name) not in (EMBEDDING, BEFORE)


def _write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], overwrite: bool
) -> None:
    sink = _core.Sink(folder, overwrite, [])
    try:
        sink.begin(_FILE, [(name, "F32", list(t.shape)) for name, t in tensors.items()])
        for name, tensor in tensors.items():
            sink.put(_FILE, name, 0, tensor.reshape(-1).view(torch.uint8))
        sink.end(_FILE)
        sink.write("adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
        sink.publish()
    except BaseException:
        sink.discard()
        raise

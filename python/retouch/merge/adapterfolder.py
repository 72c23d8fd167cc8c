"""A merge of LoRA adapters without their base: the result is an adapter, too."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from retouch import _core, hub, ops
from retouch.errors import FormatError, HyperparameterError
from retouch.merge.document import MergeConfig, OutputSlice
from retouch.merge.factormethods import FactorMethod, matched
from retouch.merge.output import Result, TensorResult, Writer
from retouch.merge.plan import Input, kind_of, natural
from retouch.merge.report import REPORT, Report, TensorReport, warnings
from retouch.merge.settings import check_names, lookup
from retouch.merge.sources import NAMES, Adapter, Factors

__all__ = ["merge_adapters"]

FILE = "adapter_model.safetensors"


def merge_adapters(
    config: MergeConfig,
    method: FactorMethod,
    out: Path,
    *,
    overwrite: bool,
    max_ram: int | None,
    report: bool,
) -> tuple[Result, Report | None]:
    """Writes the merged adapter: ``adapter_config.json`` is that of the first one.

    Args:
        config: What is asked for; its models are folders (or Hub ids) of adapters.
        method: Of LoRA factors.
        out: The new folder, which appears when it is complete.
        overwrite: Replace it.
        max_ram: Bytes for the factors of one weight; None for no limit.
        report: Compare what each merged adapter adds to a weight with what the inputs add.

    Returns:
        What was made, and the report: `change` is the norm of what is added to a weight, `changes` those of
        the inputs; `bad` counts values of the merged factors.

    Raises:
        HyperparameterError: A model is no adapter; slices, tokenizers, filters by layer or gradients,
            which need a base; too small a budget.
        FormatError: Adapters that change different weights, at different ranks.
    """
    began = time.perf_counter()
    piece = _plain(config)
    models = [source.model for source in piece.sources]
    names = [str(model) for model in models]
    folders = [Path(hub.local(m.path, m.revision)) for m in models]
    for name, model, folder in zip(names, models, folders, strict=True):
        if model.lora is not None or kind_of(folder) != "adapter":
            raise HyperparameterError(
                f"{method.name} merges LoRA adapters, but {name} is none (for adapters over a model "
                "say base_model)"
            )
    few, _ = method.models
    if len(models) < few:
        raise HyperparameterError(f"{method.name} merges {few} or more models, got {len(models)}")
    result = Result(out, notes=tuple(check_names(config, method)))
    opened = [Adapter(folder) for folder in folders]
    dtype = None if config.out_dtype is None else getattr(torch, config.out_dtype, None)
    weights = sorted({weight for one in opened for weight in one.keys}, key=natural)
    if not weights:
        raise FormatError(f"{folders[0]}: the adapter has no factors")
    header, made = [], {}
    for weight in weights:
        found = matched([one.factors(weight) for one in opened], names, weight)
        assert found is not None
        size = sum(f.a.numel() + f.b.numel() for f in found)
        result.piece_bytes = max(result.piece_bytes, method.factor_memory(size))
        made[weight] = found
        for key, factor in zip(opened[0].keys[weight], found[0][:2], strict=True):
            header.append((key, dtype or factor.dtype, tuple(factor.shape)))
    if max_ram is not None and result.piece_bytes > max_ram:
        most = max(made, key=lambda w: sum(f.a.numel() + f.b.numel() for f in made[w]))
        raise HyperparameterError(
            f"max_ram is {max_ram:,} bytes, but the factors of {most} need {result.piece_bytes:,} with "
            f"{method.name}: that is the least for this merge"
        )
    sink = _core.Sink(out, overwrite, sorted(map(str, folders)))
    rows: list[TensorReport] = []
    try:
        with Writer(sink) as writer:
            sink.begin(FILE, [(key, NAMES[kind], list(shape)) for key, kind, shape in header])
            kinds = {key: kind for key, kind, _ in header}
            for weight, found in made.items():
                shared = _shared(config, piece, method, weight)
                joined = method.joined(found, shared)
                inputs = tuple(Input(name, weight) for name in names)
                keys = opened[0].keys[weight]
                written = [
                    f.to(kinds[k]).contiguous() for k, f in zip(keys, joined[:2], strict=True)
                ]
                if report:
                    one = joined._replace(a=written[0], b=written[1])
                    rows.append(_row(weight, method, one, found))
                for key, tensor in zip(keys, written, strict=True):
                    writer.put(FILE, key, 0, tensor)
                    size = tensor.numel() * tensor.element_size()
                    result.bytes_written += size
                    result.bytes_read += size * len(names)
                    result.tensors.append(
                        TensorResult(
                            key,
                            method.name,
                            None,
                            ops.dtype_name(tensor.dtype),
                            tuple(tensor.shape),
                            None,
                            inputs,
                            shared,
                        )
                    )
            writer.end(FILE)
        text = json.dumps(opened[0].config, indent=2, sort_keys=True) + "\n"
        sink.write("adapter_config.json", text.encode())
        sink.write("README.md", _card(config, method, names).encode())
        if report:
            made_of = Report(tuple(rows), tuple(warnings(rows)), notes=result.notes)
            sink.write(REPORT, made_of.to_json().encode())
        sink.publish()
    except BaseException:
        sink.discard()
        raise
    result.files = sorted(p.name for p in out.iterdir())
    result.seconds = time.perf_counter() - began
    return result, made_of if report else None


def _row(weight: str, method: FactorMethod, made: Factors, inputs: list[Factors]) -> TensorReport:
    bad = sum(int(f.isfinite().logical_not().sum()) for f in (made.a, made.b))
    norm, changes = _norm(made), tuple(_norm(one) for one in inputs)
    numel = made.a.shape[1] * made.b.shape[0]
    return TensorReport(weight, method.name, bad, norm, numel, None, norm, changes)


def _norm(factors: Factors) -> float:
    """|scale * B A|, by products as small as the rank."""
    a, b = factors.a.double(), factors.b.double()
    square = float(((b.T @ b) * (a @ a.T)).sum())
    return abs(factors.scale) * math.sqrt(max(square, 0.0)) if square == square else math.nan


def _plain(config: MergeConfig) -> OutputSlice:
    """The models of a configuration that merges all of each."""
    module = config.modules.get(None)
    if config.sliced or module is None or len(module.slices) != 1 or config.tokenizer is not None:
        raise HyperparameterError(
            "slices, modules and tokenizers are those of a model: say base_model to merge adapters into it"
        )
    if config.chat_template is not None or config.dtype is not None:
        raise HyperparameterError(
            "dtype and chat_template are for a model: say base_model (out_dtype is that of the factors)"
        )
    if config.out_dtype not in (None, "float32", "float16", "bfloat16"):
        raise HyperparameterError(
            f"dtype must be one of float32, float16, bfloat16; got {config.out_dtype!r}"
        )
    for place, block in config.settings():
        if any(len(rule.values) > 1 for setting in block.values() for rule in setting):
            raise HyperparameterError(
                f"{place}: gradients over layers need base_model; give one value"
            )
    return module.slices[0]


def _shared(
    config: MergeConfig, piece: OutputSlice, method: FactorMethod, weight: str
) -> dict[str, Any]:
    blocks = [piece.parameters, config.modules[None].parameters, config.parameters]
    given = {key: lookup(blocks, key, weight, 0.0, p) for key, p in method.shared.items()}
    known = {key: value for key, value in given.items() if value is not None}
    return method.resolve(None, [], known, weight)[2]


def _card(config: MergeConfig, method: FactorMethod, names: list[str]) -> str:
    return (
        "---\nlibrary_name: peft\ntags: [merge, retouch]\n---\n"
        f"A merge of {len(names)} LoRA adapters with `{method.name}` ({method.paper}), made by retouch.\n\n"
        f"```yaml\n{config.text.rstrip()}\n```\n"
    )

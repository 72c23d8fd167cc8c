"""`merge`: a mergekit configuration, or a list of models and a method, becomes a model folder."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from retouch import hub
from retouch._core import __version__
from retouch.errors import HyperparameterError
from retouch.merge.adapterfolder import merge_adapters
from retouch.merge.base import method_named, method_names
from retouch.merge.card import InputHashes, card
from retouch.merge.document import MergeConfig, ModelRef
from retouch.merge.engine import Progress, Result, run
from retouch.merge.factormethods import FactorMethod
from retouch.merge.mergekit import parse, read
from retouch.merge.modelconfig import chat_template, depth, load, tokenizer_files, updated
from retouch.merge.plan import Plan, Source, kind_of
from retouch.merge.report import REPORT, Report, survey
from retouch.merge.resolve import Resolved, resolve
from retouch.merge.sources import Checkpoint, Reader, open_sources
from retouch.merge.tokens import AlignedReader, Vocabulary, align
from retouch.names import close_to
from retouch.roles import EMBEDDING, role

__all__ = ["Merged", "Prepared", "merge", "prepare"]

Models: TypeAlias = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Merged:
    """A finished merge.

    Attributes:
        out: The folder.
        result: How each tensor was made.
        report: What that did to each tensor, and what looks wrong; None if it was not asked for.
    """

    out: Path
    result: Result
    report: Report | None


@dataclass(frozen=True)
class Prepared:
    """A merge that is ready to run.

    Attributes:
        config: What was asked for.
        plan: What will be done.
        resolved: How the tensors of the plan came about.
        readers: The sources by id, vocabularies aligned.
        folders: Where each source is.
        files: Config, tokenizer and chat template of the result; None: not copied from the base.
    """

    config: MergeConfig
    plan: Plan
    resolved: Resolved
    readers: Mapping[str, Reader]
    folders: Mapping[str, Path]
    files: Mapping[str, bytes | str | None]


def merge(
    config: str | os.PathLike[str] | Mapping[str, Any] | Models,
    out: str | os.PathLike[str],
    *,
    method: str | None = None,
    base: str | os.PathLike[str] | None = None,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    shared: Mapping[str, Any] | None = None,
    dialect: str | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    max_ram: int | None = None,
    max_shard_size: int = 5_000_000_000,
    missing: Literal["error", "copy"] = "error",
    overwrite: bool = False,
    report: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Merges models into a new folder.

    Methods on LoRA factors (`robust_merge`, `mos`) merge PEFT adapters: with a base into a model, without
    one into an adapter that PEFT loads.

    Args:
        config: A mergekit configuration (a YAML file, or what YAML gives), or the models: folders, files,
            Hub ids, ``model+adapter``, folders of deltas of `base`.
        out: The new folder.
        method: For a list of models: the merge method.
        base: For a list of models: what differences are taken from.
        parameters: For a list of models: of all, or one for each model. Values may be gradients and
            filters as in YAML.
        shared: For a list of models: parameters that all models share.
        dialect: Variant of the method, "mergekit" or "paper"; methods without it take their default.
            None: "mergekit" for a configuration, the method's default for a list of models.
        dtype: For a list of models: inputs are rounded to it first.
        out_dtype: For a list of models: of the result; None: that of the base, else of the first model.
        seed: Of random masks.
        max_ram: Bytes of memory for tensors; None for no limit.
        max_shard_size: Bytes in one file of the output.
        missing: A tensor that some models lack: "error", or "copy" it from the base (else from the first
            model that has it).
        overwrite: Replace `out`.
        report: Compare the output with its inputs afterwards (one more pass over all), and write
            ``merge_report.json``.
        progress: Called with tensors done, tensors in all, and a name.

    Returns:
        The folder, how it was made, and the report.

    Raises:
        HyperparameterError: A field, method or parameter is unknown or out of range.
        BaseMismatchError: Models that do not fit together.
        FileNotFoundError: There is no such model.
        RetouchError: See `retouch.merge.engine.run`.
    """
    chosen: str | None
    if isinstance(config, Mapping):
        document, chosen = parse(config), dialect or "mergekit"
    elif isinstance(config, str | os.PathLike):
        document, chosen = read(config), dialect or "mergekit"
    else:
        document = _listed(config, method, base, parameters, shared, dtype, out_dtype)
        method = base = parameters = shared = dtype = out_dtype = None
        chosen = dialect
    _check_dialect(chosen)
    if any(value is not None for value in (method, base, parameters, shared, dtype, out_dtype)):
        raise HyperparameterError(
            "method, base, parameters, shared, dtype and out_dtype go with a list of models; "
            "a configuration has its own"
        )
    merging = method_named(document.method)
    if isinstance(merging, FactorMethod) and document.base_model is None:
        made, compared = merge_adapters(
            document, merging, Path(out), overwrite=overwrite, max_ram=max_ram, report=report
        )
        return Merged(Path(out), made, compared)
    ready = prepare(
        document, dialect=chosen, seed=seed, missing=missing, max_shard_size=max_shard_size
    )
    target = Path(out)

    with InputHashes({s.id: ready.folders[s.id] for s in ready.plan.sources}) as hashes:

        def files(_: Result) -> dict[str, bytes | str | None]:
            text = card(document, merging, ready.plan, hashes, _versions(), target.name)
            own = {"README.md": text, "mergekit_config.yml": document.text}
            return dict(ready.files) | own | {"merge_plan.json": ready.plan.to_json() + "\n"}

        result = run(
            ready.plan, target, overwrite=overwrite, max_ram=max_ram, progress=progress,
            readers=ready.readers, extra_files=files,
        )  # fmt: skip
    if not report:
        return Merged(target, result, None)
    written = Checkpoint(target)
    found = survey(ready.plan, ready.readers, written.read, notes=ready.plan.notes)
    part = target / f".{REPORT}"
    part.write_text(found.to_json(), encoding="utf-8")
    part.replace(target / REPORT)
    return Merged(target, result, found)


def prepare(
    config: MergeConfig,
    *,
    dialect: str | None = "mergekit",
    seed: int = 0,
    missing: Literal["error", "copy"] = "error",
    max_shard_size: int = 5_000_000_000,
) -> Prepared:
    """Reads the headers of all models and says what will be done; merges nothing.

    Args:
        config: What is asked for.
        dialect: Of the method, where it has this one.
        seed: Of random masks.
        missing: See `merge`.
        max_shard_size: See `merge`.

    Returns:
        The plan with everything it needs.

    Raises:
        HyperparameterError: A method or parameter is unknown or out of range.
        BaseMismatchError: Models that do not fit together.
        FileNotFoundError: There is no such model.
    """
    _check_dialect(dialect)
    method = method_named(config.method)
    if isinstance(method, FactorMethod) and config.base_model is None:
        raise HyperparameterError(
            f"{method.name} without base_model makes an adapter of adapters, each weight alike: there is no "
            "plan to show, merge them"
        )
    sources = _sources(config)
    models = config.models()
    opened = open_sources(Plan(tuple(sources.values()), ()))
    readers: dict[ModelRef, Reader] = {model: opened[str(model)] for model in models}
    donor = models[0]
    before = load(readers[donor].folder)
    files, words, notes = _vocabulary(config, readers)
    if words is not None:
        readers = {model: AlignedReader(model, readers, words) for model in models}
    catalogs = {
        model: {
            name: (meta.shape, meta.dtype.is_floating_point)
            for name in reader.names()
            for meta in [reader.meta(name)]
        }
        for model, reader in readers.items()
    }
    resolved = resolve(
        config, catalogs, method, dialect=dialect, depth=depth(before), missing=missing
    )
    if before:
        after = updated(
            before,
            order=_order(config) if config.sliced else None,
            rows=None if words is None else words.rows,
            dtype=config.out_dtype or config.dtype,
            untied=resolved.untied,
        )
        if after != before:
            files["config.json"] = json.dumps(after, indent=2) + "\n"
    copies = [f"{name}: copied {why}" for name, why in resolved.copied.items()]
    plan = Plan(
        tuple(sources.values()), tuple(resolved.tensors), dialect=dialect, dtype=config.dtype,
        out_dtype=config.out_dtype, seed=seed, side_files=str(donor), max_shard_size=max_shard_size,
        notes=tuple(notes + resolved.notes + copies),
    )  # fmt: skip
    by_id = dict(opened) | {str(model): reader for model, reader in readers.items()}
    folders = {source.id: Path(source.path) for source in sources.values()}
    return Prepared(config, plan, resolved, by_id, folders, files)


def _sources(config: MergeConfig) -> dict[str, Source]:
    """Every model, and the models that adapters and deltas stand on, by id."""
    found: dict[str, Source] = {}
    for model in config.models():
        plain = replace(model, lora=None, lora_revision=None)
        path = hub.local(model.path, model.revision)
        kind = kind_of(path)
        below = None
        if kind != "checkpoint":
            if config.base_model is None or config.base_model == plain:
                raise HyperparameterError(
                    f"{plain} is no checkpoint ({kind}): base_model must say of which model"
                )
            below = str(config.base_model)
        found.setdefault(str(plain), Source(str(plain), path, kind, below))
        if model.lora is not None:
            adapter = hub.local(model.lora, model.lora_revision)
            found[str(model)] = Source(str(model), adapter, "adapter", str(plain))
    return found


def _vocabulary(
    config: MergeConfig, readers: Mapping[ModelRef, Reader]
) -> tuple[dict[str, bytes | str | None], Vocabulary | None, list[str]]:
    """Tokenizer and chat template of the result, and how the rows of the models change."""
    files: dict[str, bytes | str | None] = {}
    notes: list[str] = []
    words = None
    places = [reader.folder for reader in readers.values()]
    if config.tokenizer is not None:
        rows = {}
        folders = {m: r.folder for m, r in readers.items() if r.folder is not None}
        for model, reader in readers.items():
            name = next((n for n in reader.names() if role(n) == EMBEDDING), None)
            if name is None or model not in folders:
                raise HyperparameterError(
                    f"{model} has no embedding of tokens, or is no folder with a tokenizer"
                )
            rows[model] = reader.meta(name).shape[0]
        if isinstance(wanted := config.tokenizer.source, ModelRef):
            folders.setdefault(wanted, Path(hub.local(wanted.path, wanted.revision)))
        tokenizer, words = align(config.tokenizer, config.base_model, folders, rows)
        if words is not None or isinstance(config.tokenizer.source, ModelRef):
            files |= tokenizer_files(tokenizer)
        if words is not None:
            notes += [
                f"tokenizer: {model} lacked {len(row['added'])} tokens, "
                f"{len(row['dropped'])} of its own are not kept"
                for model, row in words.report().items()
                if row["added"] or row["dropped"]
            ]
    template = chat_template(config.chat_template, places)
    if template is not None:
        files["chat_template.jinja"] = template
    return files, words, notes


def _order(config: MergeConfig) -> list[int]:
    """For each layer of the output, which layer it is of the first source of its slice."""
    module = next(iter(config.modules.values()))
    spans = [piece.sources[0].layers for piece in module.slices]
    return [i for span in spans if span is not None for i in range(*span)]


def _versions() -> dict[str, str]:
    return {
        "retouch": __version__, "torch": str(torch.__version__), "python": platform.python_version(),
    }  # fmt: skip


def _check_dialect(dialect: str | None) -> None:
    """Refuses a word that is no method's dialect; a method that has not this one takes its default."""
    known = sorted({d for name in method_names() for d in method_named(name).dialects})
    if dialect is not None and dialect not in known:
        raise HyperparameterError(
            f"there is no dialect {dialect!r}; methods have {', '.join(known)}{close_to(dialect, known)}"
        )


def _listed(
    models: Models,
    method: str | None,
    base: str | os.PathLike[str] | None,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    shared: Mapping[str, Any] | None,
    dtype: str | None,
    out_dtype: str | None,
) -> MergeConfig:
    """A list of models, in the words of a configuration."""
    names = [os.fspath(model) for model in models]
    if method is None or not names:
        raise HyperparameterError("a list of models needs at least one model and a method")
    if isinstance(parameters, Sequence) and len(parameters) != len(names):
        raise HyperparameterError(
            f"parameters: got {len(parameters)} for {len(names)} models, wanted one for each or one for all"
        )
    own = list(parameters) if isinstance(parameters, Sequence) else [{}] * len(names)
    for_all = dict(parameters) if isinstance(parameters, Mapping) else {}
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": name} | ({"parameters": dict(given)} if given else {})
            for name, given in zip(names, own, strict=True)
        ],
        "parameters": for_all | dict(shared or {}),
    }
    given = {
        "base_model": None if base is None else os.fspath(base), "dtype": dtype, "out_dtype": out_dtype,
    }  # fmt: skip
    return parse(document | {key: value for key, value in given.items() if value is not None})

"""mergekit's YAML, read strictly: what it says, in the words of this package.

The grammar is that of mergekit 0.1.5. Nothing here reads a checkpoint: `parse` gives a `MergeConfig`,
`retouch.merge.resolve` gives every output tensor its inputs and its parameters.

Where mergekit ignores what it does not know, this is an error with the nearest word that is known.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from retouch.errors import HyperparameterError
from retouch.merge.document import (
    NO_SETTINGS,
    MergeConfig,
    ModelRef,
    Module,
    OutputSlice,
    Rule,
    Scalar,
    Setting,
    Settings,
    SliceSource,
    TokenizerConfig,
    TokenSource,
)
from retouch.names import close_to

__all__ = ["parse", "read"]

DTYPES = ("float32", "bfloat16", "float16")


def read(path: str | os.PathLike[str]) -> MergeConfig:
    """The configuration in a file.

    Raises:
        HyperparameterError: See `parse`; the file is named.
    """
    try:
        return parse(Path(path).read_text("utf-8"))
    except HyperparameterError as e:
        raise HyperparameterError(f"{os.fspath(path)}: {e}") from None


def parse(document: str | Mapping[str, Any]) -> MergeConfig:
    """Reads a mergekit configuration.

    Args:
        document: YAML, or what YAML gives.

    Returns:
        The configuration.

    Raises:
        HyperparameterError: It is not YAML, a field is unknown, missing, twice there or of another
            type; the message says where.
    """
    text = document if isinstance(document, str) else yaml.safe_dump(dict(document))
    top = _mapping(
        _load(text), "the configuration",
        ("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype",
         "out_dtype", "tokenizer_source", "tokenizer", "chat_template"),
    )  # fmt: skip
    if top.get("merge_method") is None:
        raise HyperparameterError("merge_method is missing")
    given = [key for key in ("models", "slices", "modules") if top.get(key)]
    if len(given) != 1:
        raise HyperparameterError(
            f"exactly one of models, slices and modules must be there, got {' and '.join(given) or 'none'}"
        )
    base = None if top.get("base_model") is None else _model(top["base_model"], "base_model")
    modules: dict[str | None, Module] = {}
    if given == ["modules"]:
        for name, value in _mapping(top["modules"], "modules").items():
            modules[name] = _module(value, f"modules.{name}", base)
    else:
        modules[None] = _module({given[0]: top[given[0]]}, "", base)
    return MergeConfig(
        method=_text(top["merge_method"], "merge_method"),
        modules=modules,
        sliced=given == ["slices"],
        base_model=base,
        dtype=_dtype(top.get("dtype"), "dtype"),
        out_dtype=_dtype(top.get("out_dtype"), "out_dtype"),
        tokenizer=_vocabulary(top),
        chat_template=_text_or_none(top.get("chat_template"), "chat_template"),
        parameters=_settings(top.get("parameters"), "parameters"),
        text=text.rstrip() + "\n",
    )


def _load(text: str) -> Any:
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            _no_key_twice(node)
        documents = [found for found in yaml.safe_load_all(text) if found is not None]
    except yaml.YAMLError as e:
        raise HyperparameterError(f"this is not YAML: {' '.join(str(e).split())}") from None
    if len(documents) != 1:
        raise HyperparameterError(
            f"got {len(documents)} YAML documents, wanted one: merge the stages of a "
            "multi-stage file one after the other"
        )
    return documents[0]


def _no_key_twice(node: Any) -> None:
    """YAML keeps the last of two equal keys without a word."""
    seen = set()
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen and key.value != "<<":
                line = key.start_mark.line + 1
                raise HyperparameterError(f"line {line}: {key.value!r} is there twice")
            seen.add(key.value)
        _no_key_twice(value)


def _mapping(value: Any, where: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise HyperparameterError(f"{where}: got {_kind(value)}, wanted keys and values")
    for key in value:
        if not isinstance(key, str):
            raise HyperparameterError(f"{where}: got the key {key!r}, wanted text")
        if known is not None and key not in known:
            hint = close_to(key, known) or f"; known are {', '.join(known)}"
            raise HyperparameterError(f"{where}: there is no key {key!r}{hint}")
    return dict(value)


def _items(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise HyperparameterError(f"{where}: got {_kind(value)}, wanted a list")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == [] else f"{type(value).__name__} {value!r}"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise HyperparameterError(f"{where}: got {_kind(value)}, wanted text")
    return value


def _text_or_none(value: Any, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise HyperparameterError(f"{where}: got {_kind(value)}, wanted a number from 0 on")
    return value


def _dtype(value: Any, where: str) -> str | None:
    if value is None:
        return None
    name = _text(value, where).removeprefix("torch.")
    if name not in DTYPES:
        raise HyperparameterError(
            f"{where}: got {value!r}, wanted one of {', '.join(DTYPES)}{close_to(name, DTYPES)}"
        )
    return name


def _model(value: Any, where: str) -> ModelRef:
    if isinstance(value, Mapping):
        known = _mapping(value, where, ("model", "lora", "path", "revision"))
        if "path" in known:
            return ModelRef(*_path(value, where))
        if "model" not in known:
            raise HyperparameterError(f"{where}: model or path is missing")
        lora = known.get("lora")
        adapter = (None, None) if lora is None else _path(lora, f"{where}.lora")
        return ModelRef(*_path(known["model"], f"{where}.model"), *adapter)
    parts = _text(value, where).split("+")
    if len(parts) > 2 or not all(parts):
        raise HyperparameterError(f"{where}: got {value!r}, wanted model or model+adapter")
    adapter = _path(parts[1], where) if len(parts) == 2 else (None, None)
    return ModelRef(*_path(parts[0], where), *adapter)


def _path(value: Any, where: str) -> tuple[str, str | None]:
    if isinstance(value, Mapping):
        known = _mapping(value, where, ("path", "revision"))
        revision = _text_or_none(known.get("revision"), f"{where}.revision")
        return _text(known.get("path"), f"{where}.path"), revision
    path, at, tail = _text(value, where).partition("@")
    if "@" in tail or not path or (at and not tail):
        raise HyperparameterError(f"{where}: got {value!r}, wanted path or path@revision")
    return path, tail or None


def _settings(value: Any, where: str) -> Settings:
    if value is None:
        return NO_SETTINGS
    return {
        name: _setting(entry, f"{where}.{name}") for name, entry in _mapping(value, where).items()
    }


def _setting(value: Any, where: str) -> Setting:
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return tuple(_rule(entry, f"{where}[{i}]") for i, entry in enumerate(value))
    values = _values(value, where)
    return (Rule(values),) if values else ()


def _rule(value: Any, where: str) -> Rule:
    known = _mapping(value, where, ("filter", "value"))
    if "value" not in known:
        raise HyperparameterError(f"{where}: value is missing")
    part = _text_or_none(known.get("filter"), f"{where}.filter")
    return Rule(_values(known["value"], f"{where}.value"), part)


def _values(value: Any, where: str) -> tuple[Scalar, ...]:
    values = value if isinstance(value, list) else [value]
    for entry in values:
        if not isinstance(entry, bool | int | float | str):
            raise HyperparameterError(
                f"{where}: got {_kind(entry)}, wanted a value, a list of values, or a list of "
                "{filter, value}"
            )
    return tuple(values)


def _module(value: Any, where: str, base: ModelRef | None) -> Module:
    known = _mapping(value, where or "the configuration", ("models", "slices", "parameters"))
    place = f"{where}." if where else ""
    models, slices = known.get("models"), known.get("slices")
    if bool(models) == bool(slices):
        raise HyperparameterError(f"{where}: exactly one of models and slices must be there")
    parameters = _settings(known.get("parameters"), f"{place}parameters")
    if models:
        sources = tuple(
            _source(entry, f"{place}models[{i}]", ("model", "parameters"))
            for i, entry in enumerate(_items(models, f"{place}models"))
        )
        if base is not None and all(source.model != base for source in sources):
            sources += (SliceSource(base),)
        return Module((OutputSlice(sources),), parameters)
    pieces = enumerate(_items(slices, f"{place}slices"))
    return Module(tuple(_slice(entry, f"{place}slices[{i}]") for i, entry in pieces), parameters)


def _slice(value: Any, where: str) -> OutputSlice:
    # `residual_weight` is in mergekit's grammar and has no effect there, so neither here
    known = _mapping(value, where, ("sources", "base_model", "residual_weight", "parameters"))
    sources = tuple(
        _source(entry, f"{where}.sources[{i}]", ("model", "layer_range", "parameters"))
        for i, entry in enumerate(_items(known.get("sources"), f"{where}.sources"))
    )
    lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
    if len(lengths) != 1:
        raise HyperparameterError(
            f"{where}: the sources have {' and '.join(map(str, sorted(lengths)))} layers, "
            "wanted the same number from each"
        )
    base = known.get("base_model")
    return OutputSlice(
        sources,
        None if base is None else _model(base, f"{where}.base_model"),
        _settings(known.get("parameters"), f"{where}.parameters"),
    )


def _source(value: Any, where: str, keys: tuple[str, ...]) -> SliceSource:
    known = _mapping(value, where, keys)
    if known.get("model") is None:
        raise HyperparameterError(f"{where}: model is missing")
    layers = None
    if "layer_range" in keys:
        ends = known.get("layer_range")
        if not isinstance(ends, list) or len(ends) != 2:
            raise HyperparameterError(
                f"{where}.layer_range: got {_kind(ends)}, wanted [first, one after the last]"
            )
        layers = (
            _integer(ends[0], f"{where}.layer_range"),
            _integer(ends[1], f"{where}.layer_range"),
        )
        if layers[1] <= layers[0]:
            raise HyperparameterError(f"{where}.layer_range: {ends} has no layers")
    return SliceSource(
        _model(known["model"], f"{where}.model"),
        layers,
        _settings(known.get("parameters"), f"{where}.parameters"),
    )


def _vocabulary(top: dict[str, Any]) -> TokenizerConfig | None:
    if top.get("tokenizer_source") and top.get("tokenizer"):
        raise HyperparameterError("tokenizer_source and tokenizer are both there, wanted one")
    if top.get("tokenizer_source"):
        return TokenizerConfig(_tokenizer_source(top["tokenizer_source"], "tokenizer_source"))
    if not top.get("tokenizer"):
        return None
    known = _mapping(top["tokenizer"], "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    multiple = known.get("pad_to_multiple_of")
    return TokenizerConfig(
        _tokenizer_source(known.get("source") or "union", "tokenizer.source"),
        {
            token: _token(value, f"tokenizer.tokens.{token}")
            for token, value in _mapping(known.get("tokens") or {}, "tokenizer.tokens").items()
        },
        None if multiple is None else _integer(multiple, "tokenizer.pad_to_multiple_of") or None,
    )


def _tokenizer_source(value: Any, where: str) -> ModelRef | str:
    return value if value in ("union", "base") else _model(value, where)


def _token(value: Any, where: str) -> TokenSource:
    known = _mapping(value, where, ("source", "force"))
    force, source = known.get("force", False), known.get("source")
    if not isinstance(force, bool):
        raise HyperparameterError(f"{where}.force: got {_kind(force)}, wanted true or false")
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if source is None:
        raise HyperparameterError(f"{where}: source is missing")
    if kind is None:
        return TokenSource(_model(source, f"{where}.source"), force=force)
    keys = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
    if kind not in keys:
        raise HyperparameterError(
            f"{where}.source.kind: got {kind!r}, wanted zero or model_token{close_to(str(kind), keys)}"
        )
    entry = _mapping(source, f"{where}.source", keys[kind])
    if kind == "zero":
        return TokenSource(force=force, zero=True)
    token, row = entry.get("token"), entry.get("token_id")
    if (token is None) == (row is None) or entry.get("model") is None:
        raise HyperparameterError(f"{where}.source: wanted model and one of token and token_id")
    return TokenSource(
        _model(entry["model"], f"{where}.source.model"),
        _text_or_none(token, f"{where}.source.token"),
        None if row is None else _integer(row, f"{where}.source.token_id"),
        force,
    )

"""What a merge changes in ``config.json``, the tokenizer and the chat template."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retouch.errors import FormatError, HyperparameterError
from retouch.names import close_to

__all__ = ["chat_template", "depth", "load", "tokenizer_files", "updated"]

_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TOKENIZER = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def load(folder: Path | None) -> dict[str, Any]:
    """The config of a model, empty if it has none.

    Raises:
        FormatError: It is not JSON.
    """
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FormatError(f"{path}: not valid JSON ({e})") from e
    return dict(found)


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Where the language model's sizes are: a part of the config of a multimodal model."""
    if any(key in config for key in _DEPTH):
        return config
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def depth(config: dict[str, Any]) -> int | None:
    """How many layers the config says there are."""
    part = _text_part(config)
    return next((part[key] for key in _DEPTH if isinstance(part.get(key), int)), None)


def updated(
    config: Mapping[str, Any],
    *,
    order: list[int] | None = None,
    rows: int | None = None,
    dtype: str | None = None,
    untied: bool = False,
) -> dict[str, Any]:
    """The config of the result.

    Args:
        config: Of the base (else the first model).
        order: For each layer of the result, which layer it was. Lists with an entry for each layer
            (``layer_types``) follow.
        rows: Of embeddings.
        dtype: Of the weights.
        untied: The result has a head of its own.

    Returns:
        A changed copy.
    """
    out: dict[str, Any] = json.loads(json.dumps(config))
    part = _text_part(out)
    before = depth(out)
    if order is not None and before is not None:
        for key in _DEPTH:
            if key in part:
                part[key] = len(order)
        for key, value in part.items():
            if isinstance(value, list) and len(value) == before and max(order) < before:
                part[key] = [value[i] for i in order]
    if rows is not None:
        part["vocab_size"] = rows
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in out:
            out[key] = dtype
    if untied:
        for place in (out, part):
            if place.get("tie_word_embeddings", True):
                place["tie_word_embeddings"] = False
    return out


def tokenizer_files(tokenizer: Any) -> dict[str, bytes | None]:
    """A tokenizer of transformers as files; None stands for files of the base that are out of date."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        written = {
            path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()
        }
    return dict.fromkeys(_TOKENIZER) | written


def chat_template(wanted: str | None, folders: Iterable[Path | None]) -> str | None:
    """The chat template of the result.

    Args:
        wanted: A Jinja template, a known name, or "auto": the one that most models have, of equally
            frequent ones the first.
        folders: Of the models.

    Returns:
        The template, or None if that of the base stays.

    Raises:
        HyperparameterError: It is neither.
    """
    if wanted is None:
        return None
    if wanted == "auto":
        found = [text for folder in folders if folder is not None and (text := _template(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if wanted in _TEMPLATES:
        return _TEMPLATES[wanted]
    if "{" not in wanted:
        raise HyperparameterError(
            f"chat_template: {wanted!r} is neither auto, {', '.join(_TEMPLATES)} nor a Jinja template"
            f"{close_to(wanted, ['auto', *_TEMPLATES])}; give the template itself"
        )
    return wanted


def _template(folder: Path) -> str | None:
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except ValueError as e:
        raise FormatError(f"{config}: not valid JSON ({e})") from e
    if isinstance(found, list):  # several, by name
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    return found.strip() if isinstance(found, str) else None

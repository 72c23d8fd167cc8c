"""Vocabularies: one tokenizer for the result, and every model's rows in its order.

Rows of embeddings and heads are aligned by the token they stand for, never by number, and nothing is
cut off silently. A token that a model lacks gets, as in mergekit: what the configuration says; else the
row of the only model that has it; else the row of the base; else the mean of those that have it.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retouch.errors import BaseMismatchError, HyperparameterError
from retouch.merge.document import ModelRef, TokenizerConfig, TokenSource
from retouch.roles import EMBEDDING, HEAD, role

if TYPE_CHECKING:
    from retouch.merge.sources import Memory, Meta, Reader

__all__ = ["AlignedReader", "Vocabulary", "align", "load_tokenizer", "union"]


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the result.

    Attributes:
        tokens: The row of each token.
        rows: How many rows embeddings and heads have, padding included.
        models: For each model the row of each token that it has.
        sources: For tokens that some model lacks, or whose row is forced.
        base: What a token is taken from in preference, if it has it.
    """

    tokens: Mapping[str, int]
    rows: int
    models: Mapping[ModelRef, Mapping[str, int]]
    sources: Mapping[str, TokenSource] = field(default_factory=dict)
    base: ModelRef | None = None

    def donors(self, token: str) -> list[tuple[ModelRef, int]]:
        """Where the row of a token comes from in models without it; several are averaged."""
        if (given := self.sources.get(token)) is not None:
            if given.zero or given.model is None:
                return []
            if given.token_id is not None:
                return [(given.model, given.token_id)]
            return [(given.model, self.models[given.model][given.token or token])]
        having = [model for model, rows in self.models.items() if token in rows]
        if self.base in having:
            having = [self.base]
        return [(model, self.models[model][token]) for model in having]

    def report(self) -> dict[str, Any]:
        """For each model: tokens it lacked, and tokens of it that the result has not."""
        return {
            str(model): {
                "added": sorted(t for t in self.tokens if t not in rows),
                "dropped": sorted(t for t in rows if t not in self.tokens),
            }
            for model, rows in self.models.items()
        }


class AlignedReader:
    """A model whose rows of tokens are those of a `Vocabulary`; all else as it is.

    Args:
        model: Which model of the vocabulary this is.
        readers: All models of the vocabulary.
        vocabulary: The rows to give.
    """

    def __init__(
        self, model: ModelRef, readers: Mapping[ModelRef, "Reader"], vocabulary: Vocabulary
    ) -> None:
        self.model, self.readers, self.vocabulary = model, readers, vocabulary
        self.inner = readers[model]
        self.folder, self.paths = self.inner.folder, self.inner.paths

    def names(self) -> list[str]:
        """The names of the tensors."""
        return self.inner.names()

    def meta(self, name: str) -> "Meta":
        """Shape and dtype of a tensor, as `read` gives it."""
        found = self.inner.meta(name)
        if not has_token_rows(name, found.shape):
            return found
        return found._replace(shape=(self.vocabulary.rows, *found.shape[1:]))

    def read(self, name: str) -> Tensor:
        """A tensor; rows of tokens in the order of the vocabulary.

        Raises:
            BaseMismatchError: A row that is needed is not in its model.
        """
        own = self.inner.read(name)
        if not has_token_rows(name, tuple(own.shape)):
            return own
        words, mine = self.vocabulary, self.vocabulary.models[self.model]
        out = own.new_zeros((words.rows, *own.shape[1:]))
        known = {
            row: mine[token]
            for token, row in words.tokens.items()
            if token in mine and not self._forced(token)
        }
        out[list(known)] = _rows(own, list(known.values()), self.model, name)
        others = [token for token, row in words.tokens.items() if row not in known]
        for models, tokens in self._grouped(others):
            if not models:
                continue  # zeros
            taken = [
                _rows(self._tensor(model, name), [rows[i] for rows in tokens.values()], model, name)
                for i, model in enumerate(models)
            ]
            mean = taken[0] if len(taken) == 1 else torch.stack([t.float() for t in taken]).mean(0)
            out[[words.tokens[token] for token in tokens]] = mean.to(out.dtype)
        count = max(words.tokens.values()) + 1
        if (
            words.rows > count
        ):  # rows that no token uses: the mean, so that softmax hardly sees them
            out[count:] = out[:count].float().mean(0).to(out.dtype)
        return out

    def memory(self, name: str) -> "Memory":
        """See `Reader`: rows in a new order are a copy, and so are the tensors of donors while they lend."""
        from retouch.merge.sources import Memory

        inner = self.inner.memory(name)
        meta = self.inner.meta(name)
        if not has_token_rows(name, meta.shape):
            return inner
        words, mine = self.vocabulary, self.vocabulary.models[self.model]
        width = math.prod(meta.shape[1:])
        own = words.rows * width * meta.dtype.itemsize
        known = [t for t in words.tokens if t in mine and not self._forced(t)]
        steps = [len(known) * width * meta.dtype.itemsize]
        others = [token for token in words.tokens if token not in set(known)]
        for models, tokens in self._grouped(others):
            lent = max((self._lent(model, name) for model in models), default=0)
            # the rows of each donor, those in float32 and stacked, their mean
            steps.append(lent + len(tokens) * width * (16 * len(models) + 8))
        count = max(words.tokens.values()) + 1
        if words.rows > count:
            steps.append(count * width * (4 + meta.dtype.itemsize))
        return Memory(own, max(inner.peak, inner.held + own + max(steps)))

    def _lent(self, model: ModelRef, name: str) -> int:
        reader = self.readers[model]
        return reader.memory(self._name(model, name)).peak

    def _forced(self, token: str) -> bool:
        given = self.vocabulary.sources.get(token)
        return given is not None and given.force

    def _grouped(
        self, tokens: Sequence[str]
    ) -> Iterator[tuple[tuple[ModelRef, ...], dict[str, list[int]]]]:
        """Tokens that come from the same models, together with their rows there."""
        groups: dict[tuple[ModelRef, ...], dict[str, list[int]]] = {}
        for token in tokens:
            donors = self.vocabulary.donors(token)
            rows = [row for _, row in donors]
            groups.setdefault(tuple(model for model, _ in donors), {})[token] = rows
        yield from groups.items()

    def _tensor(self, model: ModelRef, name: str) -> Tensor:
        """The same tensor of another model; the embedding where it has no head of its own."""
        return self.readers[model].read(self._name(model, name))

    def _name(self, model: ModelRef, name: str) -> str:
        names = self.readers[model].names()
        if name in names:
            return name
        tied = next((n for n in names if role(n) == EMBEDDING), None)
        if tied is None:
            raise BaseMismatchError(f"{model} has no {name}, from which rows of tokens are needed")
        return tied


def has_token_rows(name: str, shape: Sequence[int]) -> bool:
    """Whether row i of a tensor belongs to token i."""
    return bool(shape) and role(name) in (EMBEDDING, HEAD)


def _rows(tensor: Tensor, rows: list[int], model: ModelRef, name: str) -> Tensor:
    if rows and max(rows) >= tensor.shape[0]:
        raise BaseMismatchError(
            f"{name} of {model} has {tensor.shape[0]} rows, token {max(rows)} is asked for"
        )
    return tensor[torch.tensor(rows, dtype=torch.long)]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        HyperparameterError: There is none that transformers reads, or it is not a fast one.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise ImportError(
            "tokenizers are merged with transformers: pip install 'retouch[hf]'"
        ) from e
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise HyperparameterError(f"{folder}: no tokenizer to be read ({first})") from e
    if not found.is_fast:
        raise HyperparameterError(
            f"{folder}: its tokenizer has no tokenizer.json; convert it with transformers first"
        )
    return found


def union(tokenizers: Sequence[Any]) -> Any:
    """The first tokenizer with the tokens of the others added, in their order.

    Added tokens are matched as they are written. A token that another tokenizer builds with BPE merges
    keeps its row, but text reaches it only where it stands literally.

    Args:
        tokenizers: Of transformers, fast ones.

    Returns:
        A new tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:  # transformers cannot copy one
        tokenizers[0].save_pretrained(folder)
        out = load_tokenizer(Path(folder))
    known = set(out.get_vocab())
    plain: dict[str, None] = {}
    special: dict[str, Any] = {}
    for one in tokenizers[1:]:
        added = {info.content: info for _, info in sorted(one.added_tokens_decoder.items())}
        for token, _ in sorted(one.get_vocab().items(), key=lambda pair: pair[1]):
            if token not in known:
                if token in added:
                    special.setdefault(token, added[token])
                else:
                    plain.setdefault(token)
    out.add_tokens(list(plain))
    out.add_tokens(list(special.values()))
    return out


def align(
    wanted: TokenizerConfig,
    base: ModelRef | None,
    folders: Mapping[ModelRef, Path],
    rows: Mapping[ModelRef, int],
) -> tuple[Any, Vocabulary | None]:
    """Builds the tokenizer of the result, and what it does to the rows.

    Args:
        wanted: What the configuration asks for.
        base: The base model; None: the first.
        folders: Every model that is merged, and the one whose tokenizer is wanted.
        rows: Rows of each model's embedding.

    Returns:
        The tokenizer, and the rows; None if all models have this very vocabulary already.

    Raises:
        HyperparameterError: A tokenizer that cannot be read; a token that its source has not.
    """
    first = next(iter(rows)) if base is None else base
    loaded = {model: load_tokenizer(folders[model]) for model in (first, *rows)}
    if isinstance(wanted.source, ModelRef):
        found = load_tokenizer(folders[wanted.source])
    else:
        found = union(list(loaded.values()) if wanted.source == "union" else [loaded[first]])
    absent = [token for token in wanted.tokens if token not in found.get_vocab()]
    found.add_tokens(absent)
    vocabularies = {
        model: {t: i for t, i in loaded[model].get_vocab().items() if i < rows[model]}
        for model in rows
    }
    for token, source in wanted.tokens.items():
        _check_source(token, source, vocabularies)
    tokens = found.get_vocab()
    count = max(tokens.values()) + 1
    step = wanted.pad_to_multiple_of or 1
    same = all(v == tokens for v in vocabularies.values()) and len(set(rows.values())) == 1
    if same and not wanted.pad_to_multiple_of and not any(s.force for s in wanted.tokens.values()):
        return found, None
    return found, Vocabulary(
        tokens, -(-count // step) * step, vocabularies, dict(wanted.tokens), first
    )


def _check_source(
    token: str, source: TokenSource, vocabularies: Mapping[ModelRef, Mapping[str, int]]
) -> None:
    if source.model is None:
        return
    if source.model not in vocabularies:
        raise HyperparameterError(
            f"tokenizer.tokens.{token}: {source.model} is not one of the models that are merged"
        )
    if source.token_id is None and (source.token or token) not in vocabularies[source.model]:
        raise HyperparameterError(
            f"tokenizer.tokens.{token}: {source.model} has no token {source.token or token!r}"
        )

"""`Mask`: which coordinates of a model may move, as one selection per parameter."""

import copy
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retouch import maskfile, maskview
from retouch.config import ALL_LINEAR, SelectConfig
from retouch.eligible import candidates, own_parameters
from retouch.errors import MaskError
from retouch.maskfile import Layout
from retouch.names import close_to
from retouch.selection import Selection

__all__ = ["Mask", "Overlap", "Selection", "own_parameters"]


@dataclass(frozen=True)
class Overlap:
    """How two masks meet.

    Attributes:
        both: Coordinates in both masks.
        first: Coordinates in the first.
        second: Coordinates in the second.
        jaccard: both / either (1 for two empty masks).
        containment: both / the smaller count (1 if that is 0).
        expected: What `both` would be by chance if the two counts were spread over all parameters.
        expected_in_tensors: The same if each keeps its count in every parameter.
    """

    both: int
    first: int
    second: int
    jaccard: float
    containment: float
    expected: float
    expected_in_tensors: float

    @property
    def lift(self) -> float:
        """How many times more they share than by chance (infinite where chance gives nothing)."""
        if self.expected == 0:
            return float("inf") if self.both else 1.0
        return self.both / self.expected


class Mask(Mapping[str, Selection]):
    """Which coordinates may move: a `Selection` per parameter name; absent ones are frozen.

    ``&``, ``|``, ``-`` and ``~`` are the operations on sets of coordinates, ``==`` compares them,
    whatever the kinds of the selections. Equal kinds stay structured; mixed ones become elements.

    Args:
        selections: By names as in `model.named_parameters()`.
        model: The model, which is remembered weakly: `retouch.wrap` finds it, and `numel`,
            `density` and ``~`` refer to all of its parameters. Without it they refer to the
            parameters in `selections`.
        metadata: JSON-able facts: config, seed, score.

    Raises:
        MaskError: Names or shapes that the model does not have.
    """

    def __init__(
        self,
        selections: Mapping[str, Selection],
        model: nn.Module | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        for name, selection in selections.items():
            if not isinstance(selection, Selection):
                raise MaskError(
                    f"{name}: got a {type(selection).__name__}, wanted a Selection; for positions "
                    "use Mask.from_indices"
                )
        self._selections = dict(selections)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.layout: dict[str, Layout] = {n: Layout(s.shape, None) for n, s in selections.items()}
        self._model: weakref.ref[nn.Module] | None = None
        if model is not None:
            self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self.check(model)
        self._model = weakref.ref(model)
        self.layout = {
            name: Layout(tuple(p.shape), str(p.dtype).removeprefix("torch."))
            for name, p in own_parameters(model)
        }
        mine = self._selections
        self._selections = {name: mine[name] for name in self.layout if name in mine}

    @classmethod
    def _of(
        cls,
        selections: Mapping[str, Selection],
        layout: Mapping[str, Layout],
        metadata: Mapping[str, Any],
        model: weakref.ref[nn.Module] | None = None,
    ) -> "Mask":
        mask = cls(selections, None, metadata)
        mask.layout, mask._model = dict(layout), model
        return mask

    @classmethod
    def full(cls, model: nn.Module) -> "Mask":
        """Every coordinate of every floating-point parameter may move."""
        return cls(
            {
                name: Selection("all", tuple(p.shape))
                for name, p in own_parameters(model)
                if p.is_floating_point()
            },
            model,
        )

    @classmethod
    def from_indices(
        cls,
        indices: Mapping[str, Tensor | Sequence[int]],
        model: nn.Module,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Mask":
        """A mask of the coordinates that you name.

        Args:
            indices: Per parameter either flat positions (any integers, in any order; a position
                that occurs twice counts once) or a bool tensor of the parameter's shape.
            model: The model.
            metadata: See `Mask`.

        Raises:
            MaskError: An unknown parameter, or positions that it does not have.
        """
        known = dict(own_parameters(model))
        chosen: dict[str, Selection] = {}
        for name, index in indices.items():
            if name not in known:
                raise MaskError(f"the model has no parameter {name!r}{_hint(name, model)}")
            try:
                chosen[name] = _from_index(torch.as_tensor(index), tuple(known[name].shape))
            except (MaskError, TypeError, ValueError, RuntimeError) as error:
                raise MaskError(f"{name}: {error}") from error
        return cls(chosen, model, metadata)

    @classmethod
    def from_tokens(
        cls, model: nn.Module, tokens: Sequence[int | str], tokenizer: Any = None
    ) -> "Mask":
        """The rows of some tokens in the input embedding and, where it is not tied, in the output.

        For new or special tokens: ``select(...) | Mask.from_tokens(...)`` trains them too,
        ``select(...) - Mask.from_tokens(...)`` leaves them as they are.

        Args:
            model: A model with `get_input_embeddings`; resize it first for new tokens.
            tokens: Numbers of tokens, or their strings.
            tokenizer: With ``get_vocab()``; needed for strings.

        Raises:
            MaskError: The model names no embedding, a token is unknown or beyond the embedding.
        """
        ids = _token_ids(tokens, tokenizer)
        chosen: dict[str, Selection] = {}
        for get in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(model, get)() if hasattr(model, get) else None
            table = getattr(module, "weight", None)
            name = next((n for n, p in own_parameters(model) if p is table), None)
            if name is None or table is None:
                if get == "get_input_embeddings":
                    raise MaskError(
                        f"{type(model).__name__} names no input embedding; use Mask.from_indices"
                    )
                continue
            if ids and not 0 <= ids[0] <= ids[-1] < table.shape[0]:
                raise MaskError(
                    f"{name} has {table.shape[0]} rows, the tokens go from {ids[0]} to {ids[-1]}: "
                    "resize the embeddings (resize_token_embeddings) before"
                )
            chosen[name] = Selection("rows", tuple(table.shape), torch.tensor(ids))
        return cls(_without_empty(chosen), model, {"tokens": ids})

    @classmethod
    def nonzero(cls, model: nn.Module, target_modules: Sequence[str] | str = ALL_LINEAR) -> "Mask":
        """Every weight that is not 0 may move, so that the pattern of a pruned model survives.

        The zeros of a model that was pruned, 2:4 or otherwise, keep their bits under training;
        ``select(...) & Mask.nonzero(model)`` chooses among the others. A weight that was 0 by chance
        counts as pruned.

        Args:
            model: The pruned model.
            target_modules: Which parameters, as in `SelectConfig`; all others are frozen.

        Raises:
            HyperparameterError: The names match nothing.
        """
        config = SelectConfig(direction="random", density=1.0, target_modules=target_modules)  # type: ignore[arg-type]
        chosen = {
            name: _from_index(one.param.detach() != 0, one.shape)
            for name, one in candidates(model, config).items()
            if one.state == "masked"
        }
        return cls(_without_empty(chosen), model, {"nonzero": config.target_modules})

    # --- mapping ---------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Selection:
        return self._selections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._selections)

    def __len__(self) -> int:
        return len(self._selections)

    def __repr__(self) -> str:
        return f"Mask({self.count:,} of {self.numel:,} weights in {len(self)} parameters may move)"

    # --- numbers ---------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Coordinates that may move."""
        return sum(s.count for s in self._selections.values())

    @property
    def numel(self) -> int:
        """Coordinates of the model (of the known parameters)."""
        return sum(one.numel for one in self.layout.values())

    @property
    def density(self) -> float:
        """Count / numel."""
        return self.count / max(self.numel, 1)

    def model(self) -> nn.Module | None:
        """The model that the mask was made for, if it is known and still alive."""
        return self._model() if self._model is not None else None

    def check(self, model: nn.Module) -> None:
        """Raises MaskError, naming parameters, if the mask does not fit a model."""
        known = {name: tuple(p.shape) for name, p in own_parameters(model)}
        for name, selection in self._selections.items():
            if name not in known:
                raise MaskError(
                    f"the mask selects {name!r}, which {type(model).__name__} does not have"
                    f"{_hint(name, model)}"
                )
            if known[name] != selection.shape:
                raise MaskError(
                    f"the mask is for {name} of shape {selection.shape}; the model's has shape "
                    f"{known[name]}"
                )

    # --- sets ------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        mine, theirs = ({name: s for name, s in mask.items() if s.count} for mask in (self, other))
        return mine.keys() == theirs.keys() and all(mine[n] == theirs[n] for n in mine)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: "Mask") -> "Mask":
        """Coordinates in both masks."""
        return self._combined(other, "&", lambda a, b: a & b)

    def __or__(self, other: "Mask") -> "Mask":
        """Coordinates in either mask."""
        return self._combined(other, "|", lambda a, b: a | b)

    def __sub__(self, other: "Mask") -> "Mask":
        """Coordinates in the first mask only."""
        return self._combined(other, "-", lambda a, b: a - b)

    def __invert__(self) -> "Mask":
        """Coordinates that are not in the mask."""
        chosen = {
            name: ~self._selections[name] if name in self else Selection("all", one.shape)
            for name, one in self.layout.items()
            if one.torch_dtype.is_floating_point
        }
        metadata = {"operation": "~", "of": [self.metadata]}
        return self._of(_without_empty(chosen), self.layout, metadata, self._model)

    def _combined(
        self, other: "Mask", sign: str, combine: Callable[[Selection, Selection], Selection]
    ) -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        layout = self._joint_layout(other)
        none = {name: Selection("none", one.shape) for name, one in layout.items()}
        chosen = {
            name: combine(self.get(name, none[name]), other.get(name, none[name]))
            for name in layout
        }
        metadata = {"operation": sign, "of": [self.metadata, other.metadata]}
        model = self._model if self._model is not None else other._model
        return self._of(_without_empty(chosen), layout, metadata, model)

    def _joint_layout(self, other: "Mask") -> dict[str, Layout]:
        for name, one in self.layout.items():
            theirs = other.layout.get(name)
            if theirs is not None and theirs.shape != one.shape:
                raise MaskError(
                    f"the masks are of different models: {name} has shape {one.shape} in one and "
                    f"{theirs.shape} in the other"
                )
        # the mask that knows its model has all parameters, in their order
        first, second = self.layout, other.layout
        if self._model is None and other._model is not None:
            first, second = second, first
        return first | {n: x for n, x in second.items() if n not in first}

    def overlap(self, other: "Mask") -> Overlap:
        """How much two masks share, and how much they would by chance."""
        layout = self._joint_layout(other)
        both, by_tensor = 0, 0.0
        for name in self:
            if name in other:
                both += (self[name] & other[name]).count
                by_tensor += self[name].count * other[name].count / max(layout[name].numel, 1)
        a, b = self.count, other.count
        total = sum(one.numel for one in layout.values())
        return Overlap(
            both=both, first=a, second=b,
            jaccard=both / (a + b - both) if a + b else 1.0,
            containment=both / min(a, b) if min(a, b) else 1.0,
            expected=a * b / max(total, 1), expected_in_tensors=by_tensor,
        )  # fmt: skip

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, which appears under its name only when it is complete.

        Args:
            path: The file, or a folder for ``mask.safetensors``. An existing file is replaced.

        Raises:
            MaskError: The metadata are not JSON-able.
        """
        maskfile.write(path, self._selections, self.layout, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> "Mask":
        """Reads what `save` has written; no code is executed.

        Args:
            path: The file, or a folder with ``mask.safetensors``.
            model: The model that the mask is for; needed for `retouch.wrap(optimizer, mask)`
                without a model.

        Raises:
            FormatError: The file is damaged, no mask, or of an unknown version.
            MaskError: The mask does not fit the model.
        """
        mask = cls._of(*maskfile.read(path))
        if model is not None:
            mask._attach(model)
        return mask

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}  # a copy in another process has no model

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mask":
        return self._of(self._selections, self.layout, copy.deepcopy(self.metadata), self._model)

    # --- processes -------------------------------------------------------------------------------

    def broadcast(self, source: int = 0) -> "Mask":
        """The mask of one process, in every process of the default group of `torch.distributed`.

        Scores of different data, or of different devices, may differ in their last bits, and masks
        must not: select in each process and train with ``mask.broadcast()``.

        Args:
            source: Rank of the process whose mask is taken.

        Returns:
            A mask for the model of this one.

        Raises:
            MaskError: The mask does not fit the model of this process.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        held = [self if dist.get_rank() == source else None]
        dist.broadcast_object_list(held, src=source)
        mask = held[0]
        assert mask is not None
        model = self.model()
        if model is not None:
            mask._attach(model)
        return mask

    # --- looks -----------------------------------------------------------------------------------

    def summary(self, modules: bool = True) -> str:
        """The figures of the mask in one line, and a table by kind of module.

        Args:
            modules: With the table. Layers are summed up: ``*`` stands for their number.

        Returns:
            Trainable and all parameters, the percentage, the optimizer state of AdamW (two float32
            numbers per selected weight) and the size of an uncompressed delta; in the table also
            how the gradients are taken, and why (see `retouch.wrap`), if the model is known: of a
            wrapped model as it is, else as ``gradient="auto"`` will have it.
        """
        return maskview.summary(self, modules)

    def print_trainable_parameters(self) -> None:
        """Prints `summary()`."""
        print(self.summary())

    def plot(self, ax: Any = None) -> Any:
        """Draws the density per layer (across) and kind of parameter (down).

        Args:
            ax: Matplotlib axes; default new ones.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        return maskview.plot(self, ax)

    def _repr_html_(self) -> str:
        return maskview.as_html(self)


def _from_index(index: Tensor, shape: tuple[int, ...]) -> Selection:
    if index.dtype == torch.bool:
        if tuple(index.shape) != shape:
            raise MaskError(f"a bool tensor of shape {tuple(index.shape)}; wanted {shape}")
        index = index.reshape(-1).nonzero().squeeze(1)
    elif index.is_floating_point() and index.numel() == 0:
        index = index.to(torch.int64)  # an empty list
    elif index.is_floating_point() or index.is_complex() or index.dim() > 1:
        raise MaskError(
            f"positions are {index.dtype} of shape {tuple(index.shape)}; wanted integers in one "
            "dimension"
        )
    index = index.reshape(-1).to(torch.int64).unique()
    return Selection("elements", shape, index)


def _token_ids(tokens: Sequence[int | str], tokenizer: Any) -> list[int]:
    words = [t for t in tokens if isinstance(t, str)]
    known = tokenizer.get_vocab() if words and tokenizer is not None else {}
    missing = [w for w in words if w not in known]
    if missing:
        where = "the tokenizer" if tokenizer is not None else "no tokenizer, which strings need"
        raise MaskError(
            f"tokens that are unknown: {', '.join(map(repr, missing[:5]))}; got {where}"
        )
    ids = {known[t] if isinstance(t, str) else int(t) for t in tokens}
    return sorted(ids)


def _hint(name: str, model: nn.Module) -> str:
    """Why a model has no such parameter: it is tied, or misspelt."""
    known = dict(own_parameters(model))
    for other, param in model.named_parameters(remove_duplicate=False):
        if other == name:
            first = next(n for n, p in known.items() if p is param)
            return f": it is tied to {first}, which is the name to use"
    return close_to(name, known)


def _without_empty(selections: Mapping[str, Selection]) -> dict[str, Selection]:
    return {name: s for name, s in selections.items() if s.count}

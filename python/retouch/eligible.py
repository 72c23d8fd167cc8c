"""Which parameters may take part in a selection, and how they are oriented.

Parameters are told apart by the type of the module that holds them, never by a part of their name:
a `Candidate` is one parameter with its kind, its layer and its state (masked, full or frozen). Tied
parameters are one candidate. This is also the one place that knows where a module stores its output
features: `Candidate.row_dims`.
"""

import difflib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from retouch.config import ALL_LINEAR, Kind, SelectConfig, State
from retouch.errors import HyperparameterError, MaskError

__all__ = [
    "Candidate",
    "as_matrices",
    "as_units",
    "candidates",
    "from_matrices",
    "from_units",
    "own_parameters",
]

PLACE = "_retouch"  # the module in which an engine keeps its compact values

_BIASES = ("bias", "norm_bias")
_WEIGHTS = ("linear", "expert", "conv")
_FLAG_OF_KIND: dict[str, str] = {
    "head": "heads", "output": "output_embeddings", "embedding": "embeddings", "norm": "norms",
    "norm_bias": "norm_biases", "bias": "biases", "conv": "convs",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Candidate:
    """One parameter of a model, as a selection sees it.

    Attributes:
        name: Its name in `model.named_parameters()`.
        param: The parameter.
        module: The module that holds it.
        kind: linear (also HF Conv1D), expert (3-D, one matrix per expert), conv, embedding, output
            (output embedding that is not tied), head, norm, norm_bias, bias or other.
        state: masked (competes for the budget), full (trained whole) or frozen.
        layer: Name of the layer it is in, None outside of any.
        position: Position of that layer in its list, None outside of any.
        aliases: All its names; more than one if it is tied.
        row_dims: Dimensions that count its output features: row = one position in them.
        column_dims: The same for input features; None if it has none.
    """

    name: str
    param: nn.Parameter
    module: nn.Module
    kind: Kind
    state: State
    layer: str | None
    position: int | None
    aliases: tuple[str, ...]
    row_dims: tuple[int, ...]
    column_dims: tuple[int, ...] | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.param.numel()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return tuple(self.param.shape)

    @property
    def experts(self) -> int | None:
        """How many fused experts it holds a part of, along dimension 0; None if it does not."""
        count = _number_of_experts(self.module)
        fused = self.kind in ("expert", "bias") and self.param.dim() > 1
        return count if fused and self.shape[0] == count else None

    @property
    def matrix(self) -> tuple[int, int, int]:
        """How many matrices it holds (one per expert, else one), their rows and their columns.

        Raises:
            HyperparameterError: It holds none, as biases and norms do.
        """
        if self.column_dims is None:
            raise HyperparameterError(
                f"{self.name} of shape {self.shape} is no matrix: train biases and norms whole or "
                "not at all (biases='full' or 'frozen')"
            )
        rows = math.prod(self.shape[d] for d in self.row_dims)
        count = math.prod(self.shape[d] for d in self.row_dims if d in self.column_dims)
        return count, rows // max(count, 1), self.numel // max(rows, 1)


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model without the compact values of an engine; tied ones once."""
    for name, param in model.named_parameters():
        if not name.startswith(f"{PLACE}."):
            yield name, param


def candidates(model: nn.Module, config: SelectConfig) -> dict[str, Candidate]:
    """All parameters of a model with the states that a config gives them, in the model's order.

    Whether a parameter requires a gradient at the moment plays no part.

    Args:
        model: The model.
        config: See `SelectConfig`: target_modules, exclude_modules, modules_to_save, layers and the
            flags from heads to convs.

    Raises:
        HyperparameterError: Nothing is left that could be selected.
        MaskError: A parameter that takes part has no values yet (meta device).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    heads, output = _heads(model)
    aliases: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{PLACE}."):
            aliases.setdefault(id(param), []).append(name)
    rules = _Rules(config)
    found: dict[str, Candidate] = {}
    for name, param in own_parameters(model):
        names = aliases[id(param)]
        kinds = [_kind(modules[_parent(n)], _leaf(n), param, heads, output) for n in names]
        # a table that is also the output is an embedding, whichever comes first
        kind: Kind = "embedding" if "embedding" in kinds else kinds[0]
        module = modules[_parent(name)]
        layer, position = _layer(name, modules)
        rows, columns = _orientation(module, param, kind)
        found[name] = Candidate(
            name, param, module, kind, rules.state(names, kind, position, param),
            layer, position, tuple(names), rows, columns,
        )  # fmt: skip
    rules.check(model, found, modules)
    for one in found.values():
        if one.state != "frozen" and one.param.is_meta:
            raise MaskError(f"{one.name} is on the meta device: load its weights, then select")
    return found


# --- units: rows and columns in any storage order ----------------------------------------------------


def as_units(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A tensor as [units, elements of a unit], contiguous: units are positions in `dims`."""
    rest = [d for d in range(tensor.dim()) if d not in dims]
    moved = tensor.permute(*dims, *rest) if tensor.dim() else tensor
    count = 1
    for d in dims:
        count *= tensor.shape[d]
    return moved.reshape(count, -1).contiguous()


def from_units(positions: Tensor, shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    """Flat positions in a tensor from flat positions in its `as_units`; ascending."""
    order = [*dims, *(d for d in range(len(shape)) if d not in dims)]
    if order == list(range(len(shape))):
        return positions
    rest, flat = positions.to(torch.int64), torch.zeros_like(positions, dtype=torch.int64)
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    for d in reversed(order):
        flat += rest % shape[d] * strides[d]
        rest = rest // shape[d]
    return flat.sort().values.to(positions.dtype)


def as_matrices(tensor: Tensor, candidate: Candidate) -> Tensor:
    """A tensor of a parameter's shape as [matrices, rows, columns], contiguous; see `matrix`."""
    return as_units(tensor, candidate.row_dims).reshape(candidate.matrix)


def from_matrices(matrices: Tensor, candidate: Candidate) -> Tensor:
    """The tensor of a parameter's shape that `as_matrices` makes these of."""
    shape, first = candidate.shape, candidate.row_dims
    order = [*first, *(d for d in range(len(shape)) if d not in first)]
    moved = matrices.reshape([shape[d] for d in order])
    return moved.permute([order.index(d) for d in range(len(shape))]).contiguous()


# --- kinds -------------------------------------------------------------------------------------------


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _heads(model: nn.Module) -> tuple[set[int], nn.Module | None]:
    """The modules of the task heads (by id), and the output embedding."""
    get = getattr(model, "get_output_embeddings", None)
    if callable(get):  # a HF model says where its head is
        try:
            output = get()
        except NotImplementedError:
            output = None
        base = getattr(model, "base_model", model)
        if output is not None or base is model:
            return set(), output
        inside = {id(m) for m in base.modules()}
        return {id(m) for m in model.modules() if id(m) not in inside and m is not model}, None
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return ({id(linears[-1])} if linears else set()), None


def _kind(
    module: nn.Module, leaf: str, param: Tensor, heads: set[int], output: nn.Module | None
) -> Kind:
    is_bias = leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias")
    if module is output:
        return "output"
    if id(module) in heads:
        return "head"
    if is_norm(module):
        return "norm_bias" if is_bias else "norm"
    if is_bias:
        return "bias"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.Linear) or is_hf_conv1d(module):
        return "linear"
    if isinstance(module, nn.MultiheadAttention) and param.dim() == 2:
        return "linear"
    if isinstance(module, _ConvNd):
        return "conv"
    if param.dim() == 3 and _number_of_experts(module) == param.shape[0]:
        return "expert"
    return "other"


def is_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _NormBase):
        return True
    # Each HF architecture has an RMSNorm class of its own; the class is named, not the parameter.
    return "norm" in type(module).__name__.lower() and all(
        p.dim() <= 1 for p in module.parameters(recurse=False)
    )


def is_hf_conv1d(module: nn.Module) -> bool:
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


def _number_of_experts(module: nn.Module) -> int | None:
    count = getattr(module, "num_experts", None)
    return count if isinstance(count, int) else None


def _orientation(
    module: nn.Module, param: Tensor, kind: Kind
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The dimensions of output and of input features."""
    if param.dim() < 2 or kind in _BIASES:
        return tuple(range(param.dim())), None  # an output feature each
    if kind == "expert":
        if getattr(module, "is_transposed", False):
            return (0, 2), (0, 1)
        return (0, 1), (0, 2)
    if is_hf_conv1d(module) or isinstance(module, _ConvTransposeNd):
        return (1,), (0,)
    return (0,), (1,)


def _layer(name: str, modules: dict[str, nn.Module]) -> tuple[str | None, int | None]:
    """The outermost list entry that a parameter is in: of a ModuleList, else of a Sequential."""
    parts = name.split(".")[:-1]
    for container in (nn.ModuleList, nn.Sequential):
        for depth in range(len(parts)):
            parent = modules[".".join(parts[:depth])]
            if isinstance(parent, container):
                position = list(parent._modules).index(parts[depth])
                return ".".join(parts[: depth + 1]), position
    return None, None


# --- states ------------------------------------------------------------------------------------------


class _Names:
    """A list of names or endings of names, or a regular expression for whole names."""

    def __init__(self, field: str, spec: list[str] | str | None) -> None:
        self.field = field
        self.spec = spec
        self.unused = set(spec) if isinstance(spec, list) else set()
        self._seen: dict[str, bool] = {}
        self._regex: re.Pattern[str] | None = None
        if isinstance(spec, str) and spec != ALL_LINEAR:
            try:
                self._regex = re.compile(spec)
            except re.error as error:
                raise HyperparameterError(
                    f"{field}={spec!r} is no regular expression ({error}); for endings of names "
                    "give a list"
                ) from error

    def names(self, path: str) -> bool:
        """Whether this names the module or parameter at `path`."""
        if path not in self._seen:
            self._seen[path] = self._match(path)
        return self._seen[path]

    def _match(self, path: str) -> bool:
        if self._regex is not None:
            return self._regex.fullmatch(path) is not None
        if not isinstance(self.spec, list):
            return False
        hits = {e for e in self.spec if path == e or path.endswith(f".{e}")}
        self.unused -= hits
        return bool(hits)

    def match(self, names: Iterable[str]) -> str | None:
        """What of a parameter is named: itself ("parameter"), its "module", a "block" around it."""
        found = []
        for name in names:
            if self.names(name):
                return "parameter"
            path = _parent(name)
            if path and self.names(path):
                found.append("module")
            while path := _parent(path):
                if self.names(path):
                    found.append("block")
        return "module" if "module" in found else "block" if found else None


class _Rules:
    """The states that a config gives to parameters."""

    def __init__(self, config: SelectConfig) -> None:
        self.config = config
        self.target = _Names("target_modules", config.target_modules)
        self.exclude = _Names("exclude_modules", config.exclude_modules)
        self.save = _Names("modules_to_save", config.modules_to_save)

    def state(self, names: list[str], kind: Kind, position: int | None, param: Tensor) -> State:
        target = self.target.match(names)
        saved = self.save.match(names)
        if self.exclude.match(names) or not param.is_floating_point():
            return "frozen"
        if saved:
            return "full"
        layers = self.config.layers
        if layers is not None and position is not None and position not in layers:
            return "frozen"
        if target == "parameter":
            return "masked"
        flag = self._flag(kind)
        if flag is not None:
            return flag
        if self.config.target_modules is None:
            return "masked"
        if self.config.target_modules == ALL_LINEAR:
            return "masked" if kind in ("linear", "expert") else "frozen"
        if target == "module" and kind not in _BIASES:
            return "masked"
        return "masked" if target == "block" and kind in _WEIGHTS else "frozen"

    def _flag(self, kind: Kind) -> State | None:
        name = _FLAG_OF_KIND.get(kind)
        flag: State | None = getattr(self.config, name) if name else None
        if flag is None and kind == "output":
            return self.config.heads
        if flag is None and kind == "norm_bias":
            return self.config.norms
        return flag

    def check(
        self, model: nn.Module, found: dict[str, Candidate], modules: dict[str, nn.Module]
    ) -> None:
        """Reports names that match nothing: an error if nothing at all is left to select."""
        nothing = all(c.state == "frozen" for c in found.values())
        known = [p for p in [*modules, *found] if p and not p.startswith(PLACE)]
        for names in (self.target, self.exclude, self.save):
            if names.unused and not (nothing and names is self.target):
                warnings.warn(
                    f"{names.field}: {_missing(sorted(names.unused), known)} of "
                    f"{type(model).__name__}",
                    stacklevel=5,
                )
        if not nothing:
            return
        spec, unused = self.target.spec, sorted(self.target.unused)
        if unused:
            what = f"target_modules: {_missing(unused, known)}"
        elif isinstance(spec, str) and spec != ALL_LINEAR and not any(self.target._seen.values()):
            what = (
                f"target_modules: {_missing([spec], known)}; a string is a regular expression for "
                f"the whole name, for endings of names give a list: [{spec!r}]"
            )
        else:
            counts = Counter(c.kind for c in found.values())
            what = "its parameters are " + (
                ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "none"
            )
            what += "; see heads, biases, norms, embeddings, convs and target_modules"
        raise HyperparameterError(
            f"nothing of {type(model).__name__} may be selected with this config: {what}"
        )


def _missing(names: list[str], known: list[str]) -> str:
    """Says that names match nothing, and which are near."""
    parts = []
    endings = sorted({e for path in known for e in _endings(path)})
    for name in names:
        near = difflib.get_close_matches(name, endings, n=3, cutoff=0.5)
        hint = f" (near: {', '.join(near)})" if near else ""
        parts.append(f"{name!r}{hint}")
    if not any("(near" in part for part in parts):
        parts[-1] += f" (among: {', '.join(sorted({_leaf(p) for p in known})[:12])})"
    return f"{', '.join(parts)} {'match' if len(names) > 1 else 'matches'} nothing"


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(max(len(parts) - 2, 0), len(parts))]

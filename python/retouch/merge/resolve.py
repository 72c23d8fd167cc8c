"""From a `MergeConfig` to one line for each output tensor: its inputs and its parameters.

Precedence as in mergekit: source over slice over module over document. In each block the first rule
whose filter is part of the tensor's name decides; a block without such a rule is passed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from retouch.errors import BaseMismatchError, HyperparameterError
from retouch.merge.base import Method
from retouch.merge.document import MergeConfig, ModelRef, Module, OutputSlice, SliceSource
from retouch.merge.layers import layout
from retouch.merge.plan import Input, TensorPlan, natural
from retouch.merge.settings import check_names, lookup
from retouch.roles import AFTER, EMBEDDING, HEAD, role

__all__ = ["Catalog", "Resolved", "resolve"]

Catalog: TypeAlias = Mapping[str, tuple[tuple[int, ...], bool]]
"""The tensors of a model: shape, and whether the dtype is a floating one."""

# Recomputed when a model is built; some checkpoints carry it and some do not
_RECOMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias")


@dataclass
class Resolved:
    """What `resolve` gives.

    Attributes:
        tensors: The output, stacks first, layers in order.
        layers: Layers of each stack of the output, by the name of the stack.
        copied: Output tensors that no method touches, with the reason.
        notes: What the reader of the report should know.
        untied: Whether the output has a head of its own although some input has none.
    """

    tensors: list[TensorPlan] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    untied: bool = False


def resolve(
    config: MergeConfig,
    catalogs: Mapping[ModelRef, Catalog],
    method: Method,
    *,
    dialect: str | None = None,
    depth: int | None = None,
    missing: Literal["error", "copy"] = "error",
) -> Resolved:
    """Gives every output tensor its inputs and its parameters.

    Args:
        config: What is asked for.
        catalogs: The tensors of every model of `config.models()`.
        method: The method of the configuration.
        dialect: Of the method, where it has this one.
        depth: Layers of the main stack, as the model's config says; only needed where a model has
            several stacks and `slices:` are used.
        missing: A tensor that some models lack: "error", or "copy" it from the base (else from the
            first model that has it).

    Returns:
        The tensors of the plan. Ids of sources are `str(ModelRef)`.

    Raises:
        HyperparameterError: A parameter, layer or module that is not there.
        BaseMismatchError: Models that do not fit together.
    """
    walk = _Walk(config, catalogs, method, dialect if dialect in method.dialects else None, missing)
    walk.out.notes += check_names(config, method)
    walk.run(depth)
    return walk.out


class _Walk:
    """One pass over the output, layers numbered as they come."""

    def __init__(
        self,
        config: MergeConfig,
        catalogs: Mapping[ModelRef, Catalog],
        method: Method,
        dialect: str | None,
        missing: str,
    ) -> None:
        self.config, self.catalogs, self.method = config, catalogs, method
        self.dialect, self.missing = dialect, missing
        self.layouts = {model: layout(catalog) for model, catalog in catalogs.items()}
        self.donor = config.models()[0]
        self.out = Resolved()

    def run(self, depth: int | None) -> None:
        shape = self.layouts[self.donor]
        if None not in self.config.modules:
            return self.modules()
        module = self.config.modules[None]
        stacks = [shape.main(depth)] if self.config.sliced else list(shape.stacks)
        for stack in stacks:
            self.stack(module, stack)
        # other slices take or leave the layers; what is in no layer is the ends' alone
        models = {source.model for piece in module.slices for source in piece.sources}
        inside = {name for m in models for s in stacks for name in self.inside(m, s)}
        ends = {s.model for piece in (module.slices[0], module.slices[-1]) for s in piece.sources}
        self.loose(module, {name for m in ends for name in self.catalogs[m]} - inside)
        return None

    def inside(self, model: ModelRef, stack: str) -> set[str]:
        shape = self.layouts[model]
        return shape.names(stack) if stack in shape.stacks else set()

    def modules(self) -> None:
        """Each module by its own slices; what is in none of them is copied."""
        shape = self.layouts[self.donor]
        done: set[str] = set()
        for name, module in self.config.modules.items():
            stack = shape.named(name or "default")
            self.stack(module, stack)
            owned = set(shape.owned(stack))
            self.loose(module, owned)
            done |= shape.names(stack) | owned
        for name in sorted(set(self.catalogs[self.donor]) - done, key=natural):
            self.copy(name, self.donor, "it is in no module of the configuration")

    def stack(self, module: Module, stack: str) -> None:
        """The layers of one stack."""
        number = 0
        for piece in module.slices:
            spans = [self.span(source, stack) for source in piece.sources]
            counts = {last - first for first, last in spans}
            if len(counts) > 1:
                found = ", ".join(
                    f"{s.model}: {last - first}"
                    for s, (first, last) in zip(piece.sources, spans, strict=True)
                )
                raise BaseMismatchError(
                    f"the models have different numbers of layers in {stack} ({found}); "
                    "say with slices and layer_range which are meant"
                )
            (count,) = counts
            for i in range(count):
                t = i / (count - 1) if count > 1 else 1.0
                self.layer(module, piece, stack, [first + i for first, _ in spans], number, t)
                number += 1
        self.out.layers[stack] = number

    def span(self, source: SliceSource, stack: str) -> tuple[int, int]:
        """The layers of a stack that a source gives."""
        stacks = self.layouts[source.model].stacks
        if stack not in stacks:
            raise BaseMismatchError(
                f"{source.model} has no layers {stack}.N, which {self.donor} has; "
                f"it has {', '.join(stacks) or 'none'}"
            )
        first, last = source.layers or (0, len(stacks[stack]))
        if last > len(stacks[stack]):
            raise HyperparameterError(
                f"layer_range [{first}, {last}] of {source.model}: it has {len(stacks[stack])} "
                f"layers in {stack}"
            )
        return first, last

    def layer(
        self,
        module: Module,
        piece: OutputSlice,
        stack: str,
        layers: list[int],
        number: int,
        t: float,
    ) -> None:
        """One layer of the output."""
        held = [
            self.layouts[source.model].stacks[stack][i]
            for source, i in zip(piece.sources, layers, strict=True)
        ]
        for rest in sorted(frozenset().union(*held), key=natural):
            names = [
                f"{stack}.{i}.{rest}" if rest in found else None
                for i, found in zip(layers, held, strict=True)
            ]
            self.tensor(f"{stack}.{number}.{rest}", names, module, piece, t)

    def loose(self, module: Module, names: set[str]) -> None:
        """Tensors before and after the layers. They take the start of gradients, as in mergekit."""
        for name in sorted(names, key=natural):
            # what comes after the last layer belongs to the last slice
            piece = module.slices[-1 if role(name) in (HEAD, AFTER) else 0]
            held = [name if name in self.catalogs[s.model] else None for s in piece.sources]
            if any(held):
                self.tensor(name, held, module, piece, 0.0)

    def tensor(
        self, name: str, names: list[str | None], module: Module, piece: OutputSlice, t: float
    ) -> None:
        """One tensor of the output, from one tensor of each source."""
        models = [source.model for source in piece.sources]
        if None in names and role(name) == HEAD and name.endswith("weight"):
            names = self.tied(name, models, names)
        if None in names:
            return self.incomplete(name, models, names)
        held = [n for n in names if n is not None]
        self.check_shapes(name, models, held)
        if not all(self.catalogs[m][n][1] for m, n in zip(models, held, strict=True)):
            return self.copy(name, models[0], "integers are not merged", held[0])
        base_model = piece.base_model or self.config.base_model
        base, inputs, given = None, [], []
        for source, tensor in zip(piece.sources, held, strict=True):
            if source.model == base_model and self.method.base != "none":
                base = Input(str(source.model), tensor)
                continue
            blocks = [
                source.parameters,
                piece.parameters,
                module.parameters,
                self.config.parameters,
            ]
            values = {
                key: lookup(blocks, key, tensor, t, param)
                for key, param in self.method.per_model.items()
            }
            given.append({key: value for key, value in values.items() if value is not None})
            inputs.append(Input(str(source.model), tensor))
        self.check_inputs(name, base_model, base, inputs)
        blocks = [piece.parameters, module.parameters, self.config.parameters]
        common = {
            key: lookup(blocks, key, name, t, param) for key, param in self.method.shared.items()
        }
        common = {key: value for key, value in common.items() if value is not None}
        _, complete, shared = self.method.resolve(self.dialect, given, common, name)
        filled = (
            Input(i.source, i.tensor, values) for i, values in zip(inputs, complete, strict=True)
        )
        self.out.tensors.append(
            TensorPlan(name, self.method.name, tuple(filled), base, shared, self.dialect)
        )
        return None

    def tied(self, name: str, models: list[ModelRef], names: list[str | None]) -> list[str | None]:
        """The embedding stands in for the head of a model that has tied the two."""
        found = list(names)
        for i, model in enumerate(models):
            if names[i] is None:
                loose = self.layouts[model].loose
                found[i] = next((n for n in loose if role(n) == EMBEDDING), None)
                if found[i] is not None:
                    self.out.untied = True
                    self.out.notes.append(f"{name}: {model} has none, its {found[i]} stands in")
        return found

    def incomplete(self, name: str, models: list[ModelRef], names: list[str | None]) -> None:
        """A tensor that only some models have."""
        if name.endswith(_RECOMPUTED):
            self.out.notes.append(f"{name}: left out, models compute it themselves")
            return
        without = [str(m) for m, n in zip(models, names, strict=True) if n is None]
        if self.missing == "error":
            raise BaseMismatchError(
                f"{name}: {', '.join(without)} has no such tensor; merge models of one "
                "architecture, or take what only some have as it is with missing='copy'"
            )
        order = sorted(range(len(models)), key=lambda i: models[i] != self.config.base_model)
        i = next(i for i in order if names[i] is not None)
        self.copy(name, models[i], f"{', '.join(without)} has none", names[i])

    def copy(self, name: str, model: ModelRef, why: str, tensor: str | None = None) -> None:
        self.out.copied[name] = f"from {model}: {why}"
        self.out.tensors.append(TensorPlan(name, None, (Input(str(model), tensor or name),)))

    def check_shapes(self, name: str, models: list[ModelRef], names: list[str]) -> None:
        shapes = [self.catalogs[m][n][0] for m, n in zip(models, names, strict=True)]
        if len(set(shapes)) > 1:
            found = ", ".join(f"{m}: {list(s)}" for m, s in zip(models, shapes, strict=True))
            hint = (
                "the vocabularies differ: say which to use with tokenizer_source (union, base or a model)"
                if role(name) in (EMBEDDING, HEAD)
                else "these models are not fine-tunes of one base"
            )
            raise BaseMismatchError(f"{name} has different shapes ({found}); {hint}")

    def check_inputs(
        self, name: str, wanted: ModelRef | None, base: Input | None, inputs: list[Input]
    ) -> None:
        """Whether the method takes so many models, with or without a base."""
        method = self.method
        if base is None and (method.base == "required" or (wanted and method.base == "optional")):
            raise HyperparameterError(
                f"{method.name} needs base_model"
                if wanted is None
                else f"{name}: the base {wanted} is not among the sources of this slice"
            )
        few, many = method.models
        if len(inputs) < few or (many is not None and len(inputs) > many):
            range_ = (
                f"{few}"
                if few == many
                else f"{few} or more"
                if many is None
                else f"{few} to {many}"
            )
            raise HyperparameterError(
                f"{name}: {method.name} merges {range_} models"
                f"{' beside the base' if base else ''}, got {len(inputs)}"
            )

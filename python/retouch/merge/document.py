"""A merge as it is asked for: models, slices, and parameters with filters and gradients.

These are the words of mergekit's grammar, whatever the file or call they come from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

__all__ = [
    "MergeConfig",
    "ModelRef",
    "Module",
    "OutputSlice",
    "Rule",
    "Scalar",
    "Setting",
    "Settings",
    "SliceSource",
    "TokenSource",
    "TokenizerConfig",
]

Scalar: TypeAlias = bool | int | float | str
NO_SETTINGS: Mapping[str, "Setting"] = MappingProxyType({})


@dataclass(frozen=True)
class ModelRef:
    """A model: ``path[@revision][+adapter[@revision]]``.

    Attributes:
        path: A folder, or an id of the Hub.
        revision: Of the Hub, None for the newest.
        lora: A PEFT LoRA adapter that is added to the model, or None.
        lora_revision: Of the adapter.
    """

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        if self.lora:
            text += f"+{self.lora}" + (f"@{self.lora_revision}" if self.lora_revision else "")
        return text


@dataclass(frozen=True)
class Rule:
    """One value, or a gradient over the layers, for the tensors whose name contains `filter`.

    Attributes:
        values: One value, or several that are spread evenly over the layers of a slice.
        filter: A part of a tensor's name; None: every tensor.
    """

    values: tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        """Whether the rule is for that tensor."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting: TypeAlias = tuple[Rule, ...]
"""The first rule whose filter is part of the tensor's name decides."""
Settings: TypeAlias = Mapping[str, Setting]


@dataclass(frozen=True)
class SliceSource:
    """Layers of one model. `layers` is [first, last), None for all of them."""

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=lambda: NO_SETTINGS)


@dataclass(frozen=True)
class OutputSlice:
    """Layers of the result, merged from as many layers of each source."""

    sources: tuple[SliceSource, ...]
    base_model: ModelRef | None = None
    parameters: Settings = field(default_factory=lambda: NO_SETTINGS)


@dataclass(frozen=True)
class Module:
    """A stack of layers with what stands before and after it."""

    slices: tuple[OutputSlice, ...]
    parameters: Settings = field(default_factory=lambda: NO_SETTINGS)


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of a token comes from.

    Attributes:
        model: The model, or None for zeros.
        token: Its token whose row is taken; None: the token of the same name.
        token_id: Its row, in place of `token`.
        force: Replace the row in the models that have the token, too.
        zero: A row of zeros.
    """

    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    zero: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The vocabulary of the result.

    Attributes:
        source: ``"union"``, ``"base"``, or the model whose tokenizer it is.
        tokens: Sources of single tokens; those that the tokenizer lacks are added.
        pad_to_multiple_of: Rows of the embeddings are a multiple of this.
    """

    source: ModelRef | str = "union"
    tokens: Mapping[str, TokenSource] = field(default_factory=lambda: MappingProxyType({}))
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class MergeConfig:
    """A mergekit configuration.

    Attributes:
        method: The merge method.
        modules: By name; the key None stands for all modules (`models:`) or for the only one (`slices:`).
        sliced: Whether `slices:` was used: layers are picked and numbered anew.
        base_model: What task vectors are measured from.
        dtype: Inputs are cast to it before the arithmetic.
        out_dtype: Results are stored in it.
        tokenizer: The vocabulary of the result; None: that of the base stays.
        chat_template: ``"auto"``, a name, or a Jinja template.
        parameters: Of the whole document.
        text: The YAML it was read from.
    """

    method: str
    modules: Mapping[str | None, Module]
    sliced: bool = False
    base_model: ModelRef | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    parameters: Settings = field(default_factory=lambda: NO_SETTINGS)
    text: str = ""

    def models(self) -> tuple[ModelRef, ...]:
        """All models, the base first, then in the order of the document."""
        found = {} if self.base_model is None else {self.base_model: None}
        for module in self.modules.values():
            for piece in module.slices:
                found |= {} if piece.base_model is None else {piece.base_model: None}
                found |= {source.model: None for source in piece.sources}
        return tuple(found)

    def settings(self) -> Iterator[tuple[str, Settings]]:
        """Every block of parameters with the place it stands at."""
        yield "parameters", self.parameters
        for name, module in self.modules.items():
            place = "" if name is None else f"modules.{name}."
            yield f"{place}parameters", module.parameters
            for i, piece in enumerate(module.slices):
                yield f"{place}slices[{i}].parameters", piece.parameters
                for source in piece.sources:
                    yield f"{place}parameters of {source.model}", source.parameters

"""Stacks of layers, found in the names of tensors: no list of architectures is needed."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from retouch.errors import HyperparameterError
from retouch.names import close_to
from retouch.roles import EMBEDDING, role

__all__ = ["Layout", "layout"]

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """Which tensors of a model are in which layer.

    Attributes:
        stacks: For each stack, by the name before the number (``model.layers``): its layers, each a set
            of the rest of the names (``mlp.up_proj.weight``).
        loose: The tensors that are in no layer, sorted.
    """

    stacks: Mapping[str, tuple[frozenset[str], ...]]
    loose: tuple[str, ...]

    def main(self, depth: int | None = None) -> str:
        """The stack that `slices:` cut.

        Args:
            depth: How many layers the model's config has, if it says so.

        Raises:
            HyperparameterError: There is none, or more than one that it could be.
        """
        found = list(self.stacks)
        if len(found) > 1 and depth is not None:
            found = [name for name in found if len(self.stacks[name]) == depth] or found
        if len(found) != 1:
            raise HyperparameterError(
                f"slices need one stack of layers, this model has {self._listed()}; "
                "say under modules which is meant"
            )
        return found[0]

    def named(self, module: str) -> str:
        """The stack that is called so under `modules:`: by its name, a part of it, or "default".

        Raises:
            HyperparameterError: None or several are.
        """
        if module in self.stacks:
            return module
        parts = [s for s in self.stacks if module in s.split(".")]
        if module == "default" and len(self.stacks) == 1:
            parts = list(self.stacks)
        if len(parts) != 1:
            raise HyperparameterError(
                f"modules.{module}: this model has the stacks {self._listed()}; take one of these "
                f"names{close_to(module, self.stacks)}"
            )
        return parts[0]

    def names(self, stack: str) -> set[str]:
        """All tensors of a stack."""
        return {
            f"{stack}.{i}.{rest}" for i, layer in enumerate(self.stacks[stack]) for rest in layer
        }

    def owned(self, stack: str) -> list[str]:
        """The loose tensors that belong to a stack: whose names agree with its name the longest.

        Those that agree with none (a head) belong where the embedding is.
        """
        tokens = next((name for name in self.loose if role(name) == EMBEDDING), "")
        home = max(self.stacks, key=lambda s: _agreement(s, tokens))

        def owner(name: str) -> str:
            best = max(self.stacks, key=lambda s: _agreement(s, name))
            return best if _agreement(best, name) else home

        return [name for name in self.loose if owner(name) == stack]

    def _listed(self) -> str:
        return ", ".join(f"{s} ({len(layers)})" for s, layers in self.stacks.items()) or "none"


def layout(names: Iterable[str]) -> Layout:
    """The stacks of layers of a checkpoint.

    The first number in a name counts the layer; a stack is numbered from 0 without a gap. Numbers
    that are not (the 0 and 2 of an `nn.Sequential` with an activation between) count no layers.

    Args:
        names: The names of the tensors.

    Returns:
        Each stack with its layers, and the rest.
    """
    numbered: dict[str, dict[int, set[str]]] = {}
    every = sorted(names)
    for name in every:
        if match := _NUMBER.search(name):
            layers = numbered.setdefault(name[: match.start()], {})
            layers.setdefault(int(match[1]), set()).add(name[match.end() :])
    stacks = {
        prefix: tuple(frozenset(layers[i]) for i in range(len(layers)))
        for prefix, layers in numbered.items()
        if set(layers) == set(range(len(layers)))
    }
    found = Layout(stacks, ())
    inside = {name for stack in stacks for name in found.names(stack)}
    return Layout(stacks, tuple(name for name in every if name not in inside))


def _agreement(stack: str, name: str) -> int:
    """How many leading parts two names share."""
    pairs = zip(stack.split("."), name.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

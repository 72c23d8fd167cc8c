"""What a `SelectConfig` says of the update itself, put into the groups of an optimizer."""

from typing import Any

from torch.optim import Optimizer

from retouch.config import SelectConfig
from retouch.errors import HyperparameterError
from retouch.optim import gates
from retouch.optim.base import Fused

__all__ = ["asks", "configure"]

# Options of groups that a config may set, and what they are where nobody has set them.
_UNSET: dict[str, Any] = {"gate": None, "decay": "weight", "pull": 0.0}


def asks(config: SelectConfig) -> dict[str, Any]:
    """The group options that a config wants, as plain data; {} if it leaves the update alone."""
    wanted = {"gate": gates.plain(config.gate), "decay": config.decay, "pull": config.pull}
    return {k: v for k, v in wanted.items() if v is not None and v != _UNSET[k]}


def configure(optimizer: Optimizer, config: SelectConfig) -> None:
    """Gives every group the options that the config asks for and that were left at their defaults.

    Args:
        optimizer: The innermost one.
        config: With `gate`, `decay` or `pull`, or without.

    Raises:
        HyperparameterError: The optimizer does not have them.
    """
    for key, value in asks(config).items():
        if not (isinstance(optimizer, Fused) and key in optimizer.defaults):
            origin = f"the recipe {config.recipe!r}" if config.recipe else "the config"
            ours = "retouch.AdamW" if key == "gate" else "retouch.AdamW, SGD, Lion and Muon"
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            raise HyperparameterError(
                f"{origin} asks for {key}={value!r}, which {kind} does not know; use {ours}: "
                "retouch.wrap(retouch.AdamW, config, model), or attach(..., optimizer=retouch.AdamW)"
            )
        for group in optimizer.param_groups:
            if group[key] == _UNSET[key]:
                group[key] = value

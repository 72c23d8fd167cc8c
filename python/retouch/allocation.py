"""What a mask would rather have whole: a LoRA for some matrices, all of some vectors (SPT)."""

from dataclasses import dataclass

from torch import nn

from retouch.errors import HyperparameterError
from retouch.masks import Mask
from retouch.selection import Selection

__all__ = ["Allocation", "escalate"]


@dataclass(frozen=True)
class Allocation:
    """A mask, and beside it the modules that should have a LoRA.

    Attributes:
        mask: What is trained as it is: elements of the other matrices, whole vectors.
        lora: The modules, by name, as for `target_modules` of PEFT; nothing of their weights is in
            the mask.
        whole: The vectors that became whole.
        lora_parameters: How many parameters the LoRAs have together.
    """

    mask: Mask
    lora: tuple[str, ...]
    whole: tuple[str, ...]
    lora_parameters: int

    @property
    def count(self) -> int:
        """Trainable parameters in all, to compare with a budget."""
        return self.mask.count + self.lora_parameters


def escalate(
    mask: Mask, model: nn.Module, *, rank: int = 8, alpha: float = 10.0, beta: float = 5.0
) -> Allocation:
    """Gives a LoRA to each matrix with many selected elements, and trains such vectors whole.

    The structured half of SPT (arXiv 2303.08566, released code): a matrix of a linear layer of which
    at least ``rank * (rows + columns) / alpha`` elements are selected gets a LoRA instead of them; a
    vector (bias or norm) of which at least ``length / beta`` are, is trained whole. What a mask
    selects whole already stays. To meet a budget, try several densities and compare `count`.

    Args:
        mask: Of elements, such as that of ``select(model, "spt", data=...)``.
        model: The model of the mask.
        rank: Of the LoRAs.
        alpha: How much denser than the selection a LoRA may be.
        beta: The same for vectors.

    Raises:
        HyperparameterError: A rank, alpha or beta that is not above 0.
        MaskError: The mask does not fit the model.
    """
    for name, value in (("rank", rank), ("alpha", alpha), ("beta", beta)):
        if not value > 0:
            raise HyperparameterError(f"escalate: {name}={value!r}; wanted a number above 0")
    mask.check(model)
    chosen: dict[str, Selection] = {}
    lora, whole, size = [], [], 0
    for name, selection in mask.items():
        shape, module = selection.shape, name.rpartition(".")[0]
        if selection.kind == "elements" and _takes_lora(model.get_submodule(module), shape):
            parameters = rank * sum(shape)
            if selection.count >= parameters / alpha:
                lora.append(module)
                size += parameters
                continue
        elif selection.kind != "all" and len(shape) == 1 and selection.count >= shape[0] / beta:
            whole.append(name)
            selection = Selection("all", shape)
        chosen[name] = selection
    metadata = {"escalated": {"rank": rank, "alpha": alpha, "beta": beta}, "of": [mask.metadata]}
    return Allocation(Mask(chosen, model, metadata), tuple(lora), tuple(whole), size)


def _takes_lora(module: nn.Module, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")

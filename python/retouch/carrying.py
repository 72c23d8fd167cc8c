"""Values of selected positions that follow them when a selection moves.

As in `retouch.ops`: one result, by a Rust kernel for contiguous tensors on the CPU, else in torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retouch import _core, ops
from retouch.ops import _native, _written

__all__ = ["carry_", "exchange_"]

# What a kernel that copies bits takes a dtype for.
_SAME_WIDTH = {
    torch.float32: torch.float32, torch.int32: torch.float32,
    torch.bfloat16: torch.bfloat16, torch.float16: torch.float16,
}  # fmt: skip


def carry_(
    to: Sequence[Tensor], values: Sequence[Tensor], old: Tensor, new: Tensor, name: str
) -> None:
    """Writes values of the positions that two ascending indices share to their places in the second.

    Args:
        to: Written; flattened, each has one value for each position of `new`.
        values: For each of `to`; flattened, one value for each position of `old`.
        old: Positions.
        new: Positions.
        name: Of the weight, for errors.
    """
    rest: list[tuple[Tensor, Tensor]] = []
    same: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for pair in zip(to, values, strict=True):
        a, b = (t.detach() for t in pair)
        like = _SAME_WIDTH.get(a.dtype)
        if like is not None and a.dtype == b.dtype and _native(a.view(like), b.view(like)):
            same.setdefault(like, []).append((a.view(like), b.view(like)))
        else:
            rest.append((a, b))
    for pairs in same.values():
        _core.carry_([a for a, _ in pairs], [b for _, b in pairs], old.cpu(), new.cpu(), name)
        for target, _ in pairs:
            _written(target)
    if rest:
        source, target = ops.places(old, new).long(), ops.places(new, old).long()
        for a, b in rest:
            a.view(-1)[target.to(a.device)] = b.reshape(-1)[source.to(b.device)].to(a)


def exchange_(
    new_values: Tensor, new: Tensor, old: Tensor, old_values: Tensor,
    aside: Tensor, aside_values: Tensor, tensor: Tensor, name: str,
) -> tuple[Tensor, Tensor, int] | None:  # fmt: skip
    """What is put aside of a tensor when its selection moves; see `src/kernel/exchange.rs`.

    Args:
        new_values: One for each position of `new`; what was put aside of them is written into it.
        new: Ascending positions that are selected from now on.
        old: Those that were selected.
        old_values: What each held at first.
        aside: Those that were put aside.
        aside_values: What each held at first.
        tensor: What all positions hold now; the values have its dtype.
        name: Of the tensor, for errors.

    Returns:
        Positions and values that are put aside now, and how many of `old` are in `new`; None where no
        kernel takes these tensors.
    """
    tensors = (new_values, old_values, aside_values, tensor)
    indexes = (new, old, aside)
    if not _native(*tensors) or len({t.dtype for t in tensors}) > 1:
        return None
    if any(i.dtype != torch.int32 or i.device.type != "cpu" for i in indexes):
        return None
    index, values, shared = _core.exchange_(
        new_values, new, old, old_values.detach(), aside, aside_values.detach(), tensor, name
    )
    _written(new_values)
    return torch.from_numpy(index), torch.from_numpy(values).view(tensor.dtype), shared

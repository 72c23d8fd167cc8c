"""Layers whose backward pass computes the selected entries of a weight's gradient and no others.

Each is an operator of torch (`torch.ops.retouch.*`) that takes the compact value beside the weight:
forward is the ordinary operation on the weight and does not read the value; backward gives the
gradient of the value. So autograd, activation checkpointing, `torch.compile` and hooks see an
ordinary operation with a small parameter. The weight itself gets no gradient.

What a selection is called here: ``kind`` is "elements" (``index`` holds flat positions), "rows" or
"columns" (``index`` holds rows or columns) of the weight as it is stored. The gradient of a value
has its shape and dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import infer_schema, register_fake
from torch.nn import functional as F

from retouch import ops

__all__ = ["conv2d", "embedding", "linear"]

_UNFOLDED = 2**22  # elements of an unfolded input that are in memory at once
_library = torch.library.Library("retouch", "DEF")
Run = Callable[..., Any]


def _operator(run: Run) -> Run:
    """Registers a function as an operator, without a gradient, under its name.

    `torch.library.custom_op` does the same, at four times the cost of a call.
    """
    name = run.__name__
    _library.define(name + infer_schema(run, mutates_args=()))
    _library.impl(name, run, "CompositeExplicitAutograd")
    operator: Run = getattr(torch.ops.retouch, name).default
    return operator


def _shape_of(operator: Any) -> Callable[[Run], Run]:
    """Registers what an operator returns for tensors without data."""
    register: Callable[[Run], Run] = register_fake(operator, lib=_library)
    return register


def _differentiable(operator: Any, setup: Run, back: Run) -> None:
    """Gives an operator a gradient, as `torch.library.register_autograd` does, but cheaper to call."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            setup(ctx, inputs, output)
            return output

        backward = staticmethod(back)

    def apply(*inputs: Any) -> Any:
        return Node.apply(*inputs)  # type: ignore[no-untyped-call]

    _library.impl(operator._schema.name.split("::")[1], apply, "Autograd")


@_operator
def selected(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """See `retouch.ops.selected`."""
    return ops.selected(left, right, index, "the weight")


@_shape_of(selected)
def _(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    return left.new_empty(index.shape, dtype=ops.value_dtype(left.dtype))


def _product(left: Tensor, right: Tensor, index: Tensor, kind: str, narrowed: bool) -> Tensor:
    """The selected entries of ``left.T @ right``; `narrowed` if only what is needed was saved."""
    if kind == "elements":
        entries: Tensor = selected(left, right, index)
        return entries
    if not narrowed:
        if kind == "rows":
            left = left.index_select(1, index)
        else:
            right = right.index_select(1, index)
    return (left.t() @ right).to(ops.value_dtype(left.dtype))


# --- linear --------------------------------------------------------------------------------------


@_operator
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    kind: str,
    transposed: bool,
) -> Tensor:
    """A linear layer of which only some weights train.

    Args:
        input: [..., n_in], of any strides.
        weight: [n_out, n_in]; [n_in, n_out] if `transposed` (Conv1D of GPT-2).
        bias: [n_out] or None; gets its ordinary gradient.
        value: Receives the gradient of the selected weights: [k], [r, ...] or [..., c].
        index: Of the selection.
        kind: "elements", "rows" or "columns" of the weight as it is stored.
        transposed: See `weight`.

    Returns:
        [..., n_out], bit for bit what the layer itself gives.
    """
    if not transposed:
        return F.linear(input, weight, bias)
    flat = input.reshape(-1, input.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*input.shape[:-1], weight.shape[1])


@_shape_of(linear)
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    kind: str,
    transposed: bool,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[int(transposed)])


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, _, _, index, kind, transposed = inputs
    # The input is the right factor of the gradient, the left one where the weight is transposed.
    ctx.kind, ctx.transposed, ctx.shape = kind, transposed, input.shape
    ctx.narrowed = kind == ("rows" if transposed else "columns")
    kept = None
    if ctx.needs_input_grad[3]:
        kept = input.index_select(-1, index) if ctx.narrowed else input
    ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None, index)


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    input, weight, index = ctx.saved_tensors
    flat = grad.reshape(-1, grad.shape[-1])
    back = to_bias = to_value = None
    if ctx.needs_input_grad[0]:
        back = (flat @ (weight.t() if ctx.transposed else weight)).view(ctx.shape)
    if ctx.needs_input_grad[2]:
        to_bias = flat.sum(0)
    if ctx.needs_input_grad[3]:
        input = input.reshape(-1, input.shape[-1])
        left, right = (input, flat) if ctx.transposed else (flat, input)
        to_value = _product(left, right, index, ctx.kind, ctx.narrowed)
    return back, None, to_bias, to_value, None, None, None


_differentiable(linear, _linear_setup, _linear_backward)


# --- embedding -----------------------------------------------------------------------------------


@_operator
def embedding(
    input: Tensor, weight: Tensor, value: Tensor, index: Tensor, kind: str, padding_idx: int
) -> Tensor:
    """An embedding of which only some weights train.

    Args:
        input: Token ids of any shape.
        weight: [tokens, width].
        value: Receives the gradient of the selected weights: [k], [r, width] or [tokens, c].
        index: Of the selection.
        kind: "elements", "rows" or "columns".
        padding_idx: A row whose lookups give no gradient; -1 for none.

    Returns:
        [..., width].
    """
    return F.embedding(input, weight)


@_shape_of(embedding)
def _(
    input: Tensor, weight: Tensor, value: Tensor, index: Tensor, kind: str, padding_idx: int
) -> Tensor:
    return weight.new_empty(*input.shape, weight.shape[1])


@_operator
def embedding_entries(
    grad: Tensor, input: Tensor, value: Tensor, index: Tensor, kind: str, padding_idx: int
) -> Tensor:
    """The gradient of `value`, from the [tokens, width] gradient of the looked-up rows."""
    out = torch.zeros_like(value)
    ids = input.reshape(-1)
    if padding_idx >= 0:
        kept = ids != padding_idx
        ids, grad = ids[kept], grad[kept]
    if kind == "columns":
        return out.index_add_(0, ids, grad.index_select(1, index).to(out.dtype))
    rows, of_row = ids.unique(return_inverse=True)
    if kind == "rows":
        place = _found(index, rows)[of_row]
        kept = place >= 0
        return out.index_add_(0, place[kept], grad[kept].to(out.dtype))
    # Only the rows of tokens that the batch holds are summed, then their entries are taken.
    width = grad.shape[1]
    sums = out.new_zeros(len(rows), width).index_add_(0, of_row, grad.to(out.dtype))
    place = _found(rows, index.long() // width)
    kept = place >= 0
    out[kept] = sums.view(-1)[place[kept] * width + index[kept].long() % width]
    return out


def _found(ascending: Tensor, wanted: Tensor) -> Tensor:
    """The place of each number in an ascending list, -1 for what is not there."""
    if not ascending.numel():
        return torch.full_like(wanted, -1, dtype=torch.int64)
    place = torch.searchsorted(ascending, wanted.to(ascending.dtype)).clamp_(max=len(ascending) - 1)
    return torch.where(ascending[place] == wanted, place, -1)


@_shape_of(embedding_entries)
def _(
    grad: Tensor, input: Tensor, value: Tensor, index: Tensor, kind: str, padding_idx: int
) -> Tensor:
    return torch.empty_like(value)


def _embedding_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, _, value, index, ctx.kind, ctx.padding_idx = inputs
    ctx.save_for_backward(input, value, index)


def _embedding_backward(ctx, grad):  # type: ignore[no-untyped-def]
    input, value, index = ctx.saved_tensors
    flat = grad.reshape(-1, grad.shape[-1])
    to_value = embedding_entries(flat, input, value, index, ctx.kind, ctx.padding_idx)
    return None, None, to_value, None, None, None


_differentiable(embedding, _embedding_setup, _embedding_backward)


# --- convolution ---------------------------------------------------------------------------------


@_operator
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    kind: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """A convolution (one group, zero padding) of which only some weights train.

    Args:
        input: [batch, n_in, height, width], or without the batch.
        weight: [n_out, n_in, kernel, kernel].
        bias: [n_out] or None; gets its ordinary gradient.
        value: Receives the gradient of the selected weights.
        index: Of the selection.
        kind: "elements", "rows" (output channels) or "columns" (input channels).
        stride: As of `torch.nn.functional.conv2d`, two numbers, like the next two.
        padding: See `stride`.
        dilation: See `stride`.

    Returns:
        [batch, n_out, height', width'].
    """
    return F.conv2d(input, weight, bias, stride, padding, dilation)


@_shape_of(conv2d)
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    kind: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation)


@_operator
def conv2d_entries(
    grad: Tensor,
    input: Tensor,
    index: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Selected entries of the gradient of a convolution's weight: a linear layer over patches."""
    out = torch.zeros(index.shape, dtype=ops.value_dtype(grad.dtype), device=grad.device)
    outputs = grad.flatten(2).transpose(1, 2)  # [batch, patches, n_out]
    patch = outputs.shape[1] * input.shape[1] * kernel[0] * kernel[1]
    at_once = max(1, _UNFOLDED // max(patch, 1))
    size, apart, around, step = (tuple(n) for n in (kernel, dilation, padding, stride))
    for first in range(0, len(input), at_once):
        part = slice(first, first + at_once)
        patches = F.unfold(input[part], size, apart, around, step).transpose(1, 2)
        left, right = outputs[part].flatten(0, 1), patches.flatten(0, 1)
        out += ops.selected(left, right, index, "the weight")
    return out


@_shape_of(conv2d_entries)
def _(
    grad: Tensor,
    input: Tensor,
    index: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return grad.new_empty(index.shape, dtype=ops.value_dtype(grad.dtype))


def _conv2d_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, _, value, index, kind, *ctx.options = inputs
    ctx.kind, ctx.narrowed = kind, kind == "columns"
    ctx.shape = value.shape  # of the gradient, where a selection is made of whole channels
    kept = None
    if ctx.needs_input_grad[3]:
        kept = input.index_select(-3, index) if ctx.narrowed else input
    ctx.save_for_backward(kept, weight, index)
    ctx.batched, ctx.input_shape = input.dim() == 4, input.shape


def _conv2d_backward(ctx, grad):  # type: ignore[no-untyped-def]
    input, weight, index = ctx.saved_tensors
    stride, padding, dilation = ctx.options
    if not ctx.batched:
        grad, input = grad[None], None if input is None else input[None]
    back = to_bias = to_value = None

    def backward(g: Tensor, x: Tensor, w: Tensor, which: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            g, x, w, None, stride, padding, dilation, False, [0, 0], 1, which
        )

    if ctx.needs_input_grad[0]:
        shape = ctx.input_shape if ctx.batched else (1, *ctx.input_shape)
        back = backward(grad, grad.new_empty(shape), weight, [True, False, False])[0]
        back = back.view(ctx.input_shape)
    if ctx.needs_input_grad[2]:
        to_bias = grad.sum((0, 2, 3))
    if ctx.needs_input_grad[3]:
        if ctx.kind == "elements":
            kernel = list(weight.shape[2:])
            to_value = conv2d_entries(grad, input, index, kernel, stride, padding, dilation)
        else:
            some = grad.index_select(1, index) if ctx.kind == "rows" else grad
            like = weight.new_empty(ctx.shape)
            to_value = backward(some, input, like, [False, True, False])[1]
            to_value = to_value.to(ops.value_dtype(weight.dtype))
    return back, None, to_bias, to_value, None, None, None, None, None


_differentiable(conv2d, _conv2d_setup, _conv2d_backward)

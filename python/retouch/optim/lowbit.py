"""Moments of 8 bits: block-wise dynamic quantisation (Dettmers et al., arXiv 2110.02861).

A moment is cut into blocks of 256 coordinates. Each has one float32 scale, the largest magnitude in
it, and for each coordinate the number of the nearest of 256 levels: seven decades below the scale,
of which each has half as many levels as the next larger one. That is 2.03 bytes for the two moments
of a coordinate in place of 8. Steps are computed in float32, from moments that are widened before and
rounded once afterwards.

One thing is ours: a second moment that is not 0 never becomes 0. It would be divided by.

As in `retouch.ops`, contiguous float32 tensors on the CPU go to the Rust kernels, which give the same
codes and scales; `retouch.optim.steps.adamw_coded_` widens, steps and rounds block by block.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retouch import _core
from retouch.ops import _native

__all__ = [
    "BLOCK", "SMALLEST", "begin", "coded", "dequantise", "expand", "levels", "nearest", "quantise",
    "shrink",
]  # fmt: skip

BLOCK = 256
SMALLEST = 4096  # values with fewer coordinates keep moments of 32 bits, as in bitsandbytes
_MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
_ONE = 0x3F800000  # the bits of 1.0
_SHIFT = 12
_CELLS = _ONE >> _SHIFT


@functools.cache
def levels(signed: bool) -> Tensor:
    """The 256 numbers in [-1, 1], or in [0, 1], that a code stands for; float32, ascending.

    The decade up to `10**-d` has `64 / 2**d` levels for each sign (128 / 2**d without signs), in the
    middle of equal parts of its upper nine tenths. 0 and 1 are levels of their own; -1 is none.
    """
    return torch.from_numpy(_core.code_levels(signed))


@functools.cache
def _bounds(signed: bool) -> Tensor:
    """What lies half-way between neighbouring levels."""
    wide = levels(signed).double()
    return ((wide[1:] + wide[:-1]) / 2).to(torch.float32)


@functools.cache
def _cells(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell of [-1, 1] the code of its lowest number, and for each code its upper bound.

    A cell is the float32 numbers that share sign, exponent and the first 11 bits of the mantissa; levels
    are further apart than a cell is wide, so each number in it has that code or the next one. This
    takes a tenth of the time of a binary search for each number.
    """
    keys = torch.arange(-_CELLS - 1, _CELLS + 1, dtype=torch.int32) << _SHIFT
    bounds = torch.cat([_bounds(signed), torch.tensor([torch.inf])])
    codes = torch.bucketize(_ordered(keys).view(torch.float32), bounds, out_int32=True)
    return codes.to(device), bounds.to(device)


def _ordered(bits: Tensor) -> Tensor:
    """The bits of float32 as integers in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def nearest(shares: Tensor, signed: bool) -> Tensor:
    """int32 codes of the levels nearest to numbers in [-1, 1]; half-way it is the lower one."""
    codes, bounds = _cells(signed, shares.device)
    keys = _ordered(shares.view(torch.int32)).clamp_(-_ONE - 1, _ONE)
    found = codes.index_select(0, (keys >> _SHIFT).add_(_CELLS + 1).view(-1))
    return found.add_(shares.view(-1) > bounds.index_select(0, found)).view(shares.shape)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes of a moment and the scales of its blocks.

    Args:
        x: Floating-point, of any shape.
        signed: Whether it may be negative. If not, what is above 0 stays above 0.

    Returns:
        uint8 of that shape, and float32 [ceil(n / 256)].
    """
    if x.dtype == torch.float32 and _native(x):
        codes = torch.empty(x.shape, dtype=torch.uint8)
        scale = torch.empty(-(-x.numel() // BLOCK), dtype=torch.float32)
        _core.quantise_(codes, scale, x.detach(), signed)
        return codes, scale
    flat = x.detach().reshape(-1).to(torch.float32)
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    shares = blocks / torch.where(scale == 0, 1.0, scale)[:, None]
    codes = nearest(shares, signed)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.view(-1)[: flat.numel()].to(torch.uint8).view(x.shape), scale


def dequantise(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """float32 of the shape of the codes."""
    if _native(scale) and codes.device.type == "cpu" and codes.is_contiguous():
        out = torch.empty(codes.shape, dtype=torch.float32)
        _core.dequantise_(out, codes, scale, signed)
        return out
    flat = levels(signed).to(codes.device).index_select(0, codes.reshape(-1).to(torch.int32))
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    return blocks.mul_(scale[:, None]).view(-1)[: flat.numel()].view(codes.shape)


def coded(state: dict[str, Any]) -> bool:
    """Whether both moments of AdamW's state are codes and scales."""
    return all(f"{key}_codes" in state for key, _ in _MOMENTS)


def begin(state: dict[str, Any], value: Tensor) -> bool:
    """Gives a value that has no moments yet codes of zeros, if it is large enough; see `coded`."""
    if value.numel() >= SMALLEST and not any(key.startswith("exp_avg") for key in state):
        for key, signed in _MOMENTS:
            zero = int((levels(signed) == 0).nonzero())
            codes = torch.full(value.shape, zero, dtype=torch.uint8, device=value.device)
            blocks = -(-value.numel() // BLOCK)
            scale = torch.zeros(blocks, dtype=torch.float32, device=value.device)
            state[f"{key}_codes"], state[f"{key}_scale"] = codes, scale
    return coded(state)


def expand(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """AdamW's state with moments of `dtype` in place of codes and scales."""
    wide = dict(state)
    for key, signed in _MOMENTS:
        if f"{key}_codes" in wide:
            codes, scale = wide.pop(f"{key}_codes"), wide.pop(f"{key}_scale")
            wide[key] = dequantise(codes, scale, signed).to(dtype)
    return wide


def shrink(state: dict[str, Any]) -> dict[str, Any]:
    """AdamW's state with codes and scales in place of moments, where these are large enough."""
    small = dict(state)
    for key, signed in _MOMENTS:
        if key in small and small[key].numel() >= SMALLEST:
            codes, scale = quantise(small.pop(key), signed)
            small[f"{key}_codes"], small[f"{key}_scale"] = codes, scale
    return small

"""How a step of a 16-bit value is rounded where there is no float32 master of it.

A bfloat16 number of size 1 is 1/128 away from the next: rounded to the nearest, a hundred steps of
1/1000 leave it where it was. There are three remedies, and the first is the default:

==============  ====================================================================================
``master``      The engine keeps a float32 value for each selected weight, 4 bytes; 16-bit parameters
                without an engine are refused.
``stochastic``  Rounds up or down by chance, so that the expectation is the exact result; the value is
                of the weight's own 2 bytes, and nothing else is kept. For bfloat16.
``kahan``       Keeps what rounding took away in a second 16-bit number, and adds it to the next step;
                2 + 2 bytes.
==============  ====================================================================================

Each step is computed in float32 and rounded once, whatever the way. Moments stay in float32: they are
never rounded by chance.
"""

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor

from retouch.errors import LayoutError

__all__ = ["COMPENSATION", "NARROW", "Rounding", "check", "draws", "narrow_", "stochastic", "widen"]

Rounding = Literal["master", "stochastic", "kahan"]
NARROW = (torch.bfloat16, torch.float16)
COMPENSATION = "kahan_comp"  # the key in the state, of the value's dtype and shape
_BLOCK = 2**20  # coordinates whose 64-bit counters are in memory at once
_MASK = 2**64 - 1


def check(rounding: str, name: str, dtype: torch.dtype) -> None:
    """Refuses a parameter that cannot be rounded in a way.

    Raises:
        LayoutError: It is of 16 bits and has no master, or of another dtype than the way is for.
    """
    if dtype in (torch.float32, torch.float64):
        return
    if dtype not in NARROW or rounding == "master":
        raise LayoutError(
            f"{name} is {dtype}; this optimizer steps float32 and float64. Pass its class to "
            "retouch.wrap: 16-bit weights then train through float32 values; or give it "
            "rounding='kahan' or 'stochastic'"
        )
    if rounding == "stochastic" and dtype != torch.bfloat16:
        raise LayoutError(f"{name} is {dtype}; stochastic rounding is for bfloat16, kahan for both")


def widen(value: Tensor, state: dict[str, Any]) -> Tensor:
    """A 16-bit value in float32, with what its last rounding took away.

    What is more than half of the last place of the value belongs to another value, which somebody has
    overwritten since, and is dropped.
    """
    wide = value.detach().to(torch.float32, memory_format=torch.contiguous_format)
    lost = state.get(COMPENSATION)
    if lost is None:
        return wide
    _, exponent = torch.frexp(wide)
    half = torch.ldexp(torch.full_like(wide, torch.finfo(value.dtype).eps), exponent - 2)
    lost = lost.to(torch.float32)
    mine = (lost.abs() <= half) & (wide != 0)
    return wide + torch.where(mine, lost, 0.0)


def narrow_(
    value: Tensor, wide: Tensor, rounding: str, state: dict[str, Any], flat: Tensor, key: str
) -> None:
    """Rounds `wide` into `value`.

    Args:
        value: 16-bit, written in place.
        wide: float32, of its shape.
        rounding: "stochastic" or "kahan".
        state: Of the value; gets the compensation.
        flat: int [n], the flat positions of the coordinates in their weight.
        key: What tells this weight and this step from others.
    """
    if rounding == "kahan":
        rounded = wide.to(value.dtype)
        state[COMPENSATION] = (wide - rounded.to(torch.float32)).to(value.dtype)
    else:
        rounded = stochastic(wide, flat, key)
    value.detach().copy_(rounded)


def stochastic(wide: Tensor, flat: Tensor, key: str) -> Tensor:
    """Rounds float32 to one of the two neighbours in bfloat16, up with the probability of the rest.

    A uniform 16-bit number is added to the bits, and the low 16 are cleared: the expectation is
    `wide`, a number of bfloat16 is itself, infinities and NaN stay what they are.

    Args:
        wide: float32, of any shape.
        flat: int [n], a counter for each element.
        key: See `draws`.

    Returns:
        bfloat16 of that shape.
    """
    out = torch.empty(wide.shape, dtype=torch.bfloat16, device=wide.device)
    source, target = wide.detach().reshape(-1), out.view(-1)
    for start in range(0, source.numel(), _BLOCK):
        part = source[start : start + _BLOCK]
        chance = draws(flat[start : start + _BLOCK].to(wide.device), key)
        moved = ((part.view(torch.int32) + chance) & -65536).view(torch.float32)
        target[start : start + _BLOCK] = torch.where(part.isfinite(), moved, part)
    return out


def draws(counters: Tensor, key: str) -> Tensor:
    """Uniform numbers of 16 bits, each of which depends on key and counter alone.

    They are the high bits of a 64-bit mix (the finaliser of SplitMix64: Steele, Lea and Flood, 2014) of
    a hash of the key and the counter, in integer operations that are exact on every device.

    Args:
        counters: Integers of any shape.
        key: Any text.

    Returns:
        int32 of that shape, from 0 to 65535.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    x = (counters.to(torch.int64) * _signed(0x9E3779B97F4A7C15)).add_(_signed(start))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= (x >> shift) & (2 ** (64 - shift) - 1)
        x *= _signed(factor)
    x ^= (x >> 31) & (2**33 - 1)
    return ((x >> 48) & 0xFFFF).to(torch.int32)


def _signed(number: int) -> int:
    """A 64-bit number as torch has it, which knows signed ones only."""
    number &= _MASK
    return number - 2**64 if number >= 2**63 else number

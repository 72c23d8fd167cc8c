"""`Change`: a difference in a compact form, to be added to the base.

Decoding is exact arithmetic in a fixed order, so a change means the same numbers on every machine.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Change", "Coding"]

Coding = Literal["plain", "sign", "int8", "int4", "low-rank"]

PARTS: dict[str, tuple[str, ...]] = {
    "plain": ("add",),
    "sign": ("bits", "scale"),
    "int8": ("codes", "scale"),
    "int4": ("codes", "scale"),
    "low-rank": ("A", "B"),
}
"""The tensors of each coding, which are also the endings of their names in a file."""


@dataclass(eq=False)
class Change:
    """Numbers that are added to a tensor, or to some elements of it.

    Attributes:
        coding: "plain" (float32), "sign" (one bit per element and one magnitude), "int8" or "int4"
            (integers times a scale per block), "low-rank" (the product of two matrices).
        count: How many numbers.
        parts: plain: `add` [count] float32. sign: `bits` [ceil(count / 8)] uint8, the first element in
            the lowest bit, 1 for a negative one, and `scale` [1] float32. int8 and int4: `codes`, int8
            [count] or uint8 [ceil(count / 2)] (two codes plus 8, the first in the low half), and `scale`
            [ceil(count / block)] float32. low-rank: `A` [rank, in] and `B` [out, rank] float32.
        block: Elements that share a scale (int8, int4), else 0.
    """

    coding: Coding
    count: int
    parts: dict[str, Tensor]
    block: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(t.numel() * t.element_size() for t in self.parts.values())

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if the parts are not those of this coding and count."""
        n, block = self.count, self.block
        want: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if self.coding == "plain":
            want = {"add": ((n,), torch.float32)}
        elif self.coding == "sign":
            want = {"bits": ((-(-n // 8),), torch.uint8), "scale": ((1,), torch.float32)}
        elif self.coding in ("int8", "int4"):
            if type(block) is not int or block < 1:
                raise ValueError(f"a block of {block!r} elements")
            codes = (n,) if self.coding == "int8" else (-(-n // 2),)
            dtype = torch.int8 if self.coding == "int8" else torch.uint8
            want = {"codes": (codes, dtype), "scale": ((-(-n // block),), torch.float32)}
        else:
            if len(shape) != 2:
                raise ValueError(f"a low-rank change of a tensor of shape {shape}")
            rank = self.parts["A"].shape[0]
            want = {
                "A": ((rank, shape[1]), torch.float32),
                "B": ((shape[0], rank), torch.float32),
            }
        for part, (size, dtype) in want.items():
            found = self.parts[part]
            if tuple(found.shape) != size or found.dtype != dtype:
                raise ValueError(
                    f"{part} is {found.dtype} {tuple(found.shape)}, expected {dtype} {size}"
                )

    def decode(self) -> Tensor:
        """The numbers: float32 [count]."""
        if self.coding == "plain":
            return self.parts["add"]
        if self.coding == "low-rank":
            return _product(self.parts["B"], self.parts["A"]).reshape(-1)
        scale = self.parts["scale"]
        if self.coding == "sign":
            bits = self.parts["bits"][:, None] >> torch.arange(8, dtype=torch.uint8)
            negative = (bits & 1).reshape(-1)[: self.count].bool()
            return torch.where(negative, -scale, scale)
        codes = self.parts["codes"]
        if self.coding == "int4":
            codes = (
                torch.stack([codes & 15, codes >> 4], 1).reshape(-1)[: self.count].to(torch.int8)
                - 8
            )
        each = scale.repeat_interleave(self.block)[: self.count]
        return codes.float() * each


def plain(values: Tensor) -> Change:
    """Values as they are."""
    return Change("plain", values.numel(), {"add": values.float().contiguous()})


def signs(values: Tensor) -> Change:
    """Signs (0 counts as positive) and the mean magnitude."""
    padded = torch.zeros(-(-values.numel() // 8) * 8, dtype=torch.uint8)
    padded[: values.numel()] = values < 0
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    bits = (padded.reshape(-1, 8) * weights).sum(1).to(torch.uint8)
    size = values.double().abs().mean() if values.numel() else torch.zeros(())
    return Change("sign", values.numel(), {"bits": bits, "scale": size.float().reshape(1)})


def integers(values: Tensor, bits: int, block: int) -> Change:
    """Nearest multiples (ties to even) of a scale that lets the largest of each block fit exactly."""
    most = 2 ** (bits - 1) - 1
    blocks = -(-values.numel() // block)
    padded = torch.zeros(blocks * block)
    padded[: values.numel()] = values.float()
    rows = padded.reshape(blocks, block)
    scale = rows.abs().amax(1) / most
    safe = torch.where(scale > 0, scale, 1.0)
    codes = (rows / safe[:, None]).round().clamp(-most, most).reshape(-1)[: values.numel()]
    codes = codes.to(torch.int8)
    if bits == 4:
        wide = torch.full((-(-len(codes) // 2) * 2,), 8, dtype=torch.uint8)
        wide[: len(codes)] = (codes + 8).to(torch.uint8)
        codes = wide[0::2] | (wide[1::2] << 4)
    coding: Coding = "int8" if bits == 8 else "int4"
    return Change(coding, values.numel(), {"codes": codes, "scale": scale}, block)


def low_rank(up: Tensor, down: Tensor) -> Change:
    """The product of `up` [out, rank] and `down` [rank, in]."""
    parts = {"A": down.float().contiguous(), "B": up.float().contiguous()}
    return Change("low-rank", up.shape[0] * down.shape[1], parts)


def _product(up: Tensor, down: Tensor) -> Tensor:
    """Up times down, rank by rank in float64: a product of two float32 numbers is exact there."""
    total = torch.zeros(up.shape[0], down.shape[1], dtype=torch.float64)
    left, right = up.double(), down.double()
    for k in range(up.shape[1]):
        total += left[:, k, None] * right[k]
    return total.float()

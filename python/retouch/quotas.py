"""How a budget is shared among groups, in whole numbers."""

import math
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["shares"]


def shares(weights: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Shares of a total in proportion to weights, each at most all that its group has.

    What groups that are full leave over goes to the others in the same proportion: share i is
    ``min(most[i], c * weights[i])`` with the one c that spends the total. Groups of weight 0 get
    something only when all others are full, and then in proportion to what they have. Parts of a unit
    go to the largest remainders, equal ones to the first. The allocator of SNELLA (arXiv 2510.24037).

    Args:
        weights: Of each group, finite and >= 0.
        most: How many units each group has.
        total: How many units to share.

    Returns:
        A number for each group; their sum is the total, or that of `most` if it is less.
    """
    given = [Fraction(0)] * len(most)
    left = Fraction(min(total, sum(most)))
    for wanted in (list(map(Fraction, weights)), list(map(Fraction, most))):
        hungry = [i for i in range(len(most)) if wanted[i] > 0 and given[i] < most[i]]
        while left and hungry:
            scale = left / sum(wanted[i] for i in hungry)
            full = [i for i in hungry if scale * wanted[i] >= most[i] - given[i]]
            for i in full or hungry:
                part = most[i] - given[i] if full else scale * wanted[i]
                given[i] += part
                left -= part
            hungry = [i for i in hungry if full and i not in full]
    whole = [math.floor(g) for g in given]
    short = sorted(range(len(most)), key=lambda i: whole[i] - given[i])  # stable: ties to the first
    for i in short[: int(sum(given)) - sum(whole)]:
        whole[i] += 1
    return whole

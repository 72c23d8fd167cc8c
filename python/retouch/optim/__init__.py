"""Optimizers over compact values, and what acts inside of their steps.

`AdamW`, `SGD` and `Lion` step in one pass of a Rust kernel; where the selection is by elements the same
pass writes the rounded result into the weight. `Adafactor` and `Muon` consist of torch's operations.
Arithmetic, defaults and state keys are those of `torch.optim` where it has such an optimizer, so state
dicts are interchangeable with torch's.
"""

from retouch.optim.adafactor import Adafactor
from retouch.optim.adamw import AdamW
from retouch.optim.lion import Lion
from retouch.optim.muon import Muon
from retouch.optim.sgd import SGD

__all__ = ["SGD", "Adafactor", "AdamW", "Lion", "Muon"]

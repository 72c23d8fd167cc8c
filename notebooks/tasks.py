"""Two more tasks for the encoder of `verses.py`: the package of a docstring, the category of a character.

Both are read from what is installed: sources of Python packages, which are parsed and never imported,
and the names of characters in `unicodedata`.
"""

import ast
import sys
import unicodedata
import warnings
import zlib
from collections import Counter
from pathlib import Path
from sysconfig import get_path

import torch

from retouch.demo_data import package_folder

SOURCES = {  # of each package enough files for some hundred docstrings
    "python": (Path(get_path("stdlib")), ["[c-f]*.py", "email/*.py", "logging/*.py"]),
    "numpy": (package_folder("numpy"), ["_core/*.py", "lib/*.py", "polynomial/*.py"]),
    "torch": (package_folder("torch"), ["nn/modules/*.py", "distributions/*.py"]),
    "transformers": (package_folder("transformers"), ["generation/*.py", "utils/*.py"]),
    "matplotlib": (package_folder("matplotlib"), ["[a-c]*.py", "axes/*.py"]),
}
CATEGORIES = {
    "Mn": "nonspacing mark",
    "Mc": "spacing mark",
    "No": "number",
    "Po": "punctuation",
    "Sm": "mathematics",
    "So": "other symbol",
}


def docstrings():
    """Samples (first sentence, package, name of the object); names of the test occur nowhere else."""
    found = []
    for label, (folder, patterns) in enumerate(SOURCES.values()):
        for path in sorted(p for pattern in patterns for p in folder.glob(pattern)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes in the strings of others
                tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    found.append((text.split(". ")[0], label, node.name))
    often = Counter(text for text, _, _ in found)
    clear = [s for s in found if s[0][:1].isalpha() and len(s[0].split()) > 3 and often[s[0]] == 1]
    return _split(clear, lambda name: zlib.crc32(name.encode()))


def characters():
    """Samples (name of a character, category, run of 64 code points); no run is in both parts."""
    codes = list(CATEGORIES)
    found = [
        (unicodedata.name(char).lower(), codes.index(category), code // 64)
        for code, char in enumerate(map(chr, range(sys.maxunicode + 1)))
        if (category := unicodedata.category(char)) in CATEGORIES
    ]
    return _split(found, lambda run: run)


def _split(samples, key):
    """In random order: as many of each class to train on, and as many of each class to test."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [], []
    for i in order:
        parts[key(samples[i][2]) % 5 == 0].append(samples[i])
    return tuple(_even(part) for part in parts)


def _even(samples):
    """Of each class as many as there are of the rarest."""
    counts = Counter(label for _, label, _ in samples)
    least = min(counts.values())
    seen = Counter()
    kept = []
    for sample in samples:
        seen[sample[1]] += 1
        if seen[sample[1]] <= least:
            kept.append(sample)
    return kept

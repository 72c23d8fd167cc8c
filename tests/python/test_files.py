"""The files of deltas: damage, hostile descriptions, full disks; the file engine on every dtype."""

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deltas import DTYPES, llama, llama_with, nudged, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from retouch import Delta, _core, errors, ops

# --- what Python reads and writes --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    model = llama()
    Delta.between(model, nudged(model)).save_pretrained(tmp_path / "d", reversible=True)
    return tmp_path / "d"


@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.9, 0.9999])
def test_truncated_files_are_refused(folder, share):
    path = folder / "delta.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(errors.FormatError, match=r"delta\.safetensors.*damaged or truncated"):
        Delta.load(folder)


def test_damaged_values_are_refused_before_anything_is_written(folder):
    path = folder / "delta.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "model.layers.0.mlp.up_proj.weight"
    for part, use in ((".val", Delta.apply_), (".old", Delta.revert_)):
        at = 8 + length + header[name + part]["data_offsets"][0]
        data[at] ^= 1
        path.write_bytes(data)
        model = llama() if part == ".val" else llama_with(nudged(llama()))
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(errors.FormatError, match=r"damaged.*layers\.0\.mlp\.up_proj"):
            use(Delta.load(folder), model)
        assert same(model.state_dict(), before)
        data[at] ^= 1
    path.write_bytes(data)
    Delta.load(folder).apply_(llama())


def edit(folder, change):
    path = folder / "delta_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update(format="other"), "not a retouch delta"),
        (lambda c: c.update(format_version=99), "version 99.*update retouch"),
        (lambda c: c.pop("tensors"), "lists no tensors"),
        (lambda c: first(c).update(kind="magic"), "unknown kind"),
        (lambda c: first(c).update(index_encoding="zip"), "unknown index coding"),
        (lambda c: first(c).update(dtype="F99"), "F99"),
        (lambda c: first(c).update(shape=[1]), "inside of the tensor"),
        (lambda c: first(c).update(count=1), "positions and"),
        (lambda c: first(c).update(shape=[-1]), "has the shape"),
        (lambda c: first(c).update(shape=7), "not iterable"),
        (lambda c: first(c).update(base_hash=7), "fingerprint"),
        (lambda c: first(c).update(kind=[]), "unknown kind"),
        (lambda c: first(c).update(dtype=[]), "unhashable"),
        (lambda c: first(c).update(count=math.inf), "infinity"),
        (lambda c: c["tensors"].popitem(), "does not tell of"),
        (lambda c: c.update(aliases=7), "aliases"),
        (lambda c: c.update(aliases={"x": "ghost"}), "alias x"),
        (lambda c: c.update(metadata=[1]), "metadata"),
        (lambda c: c.update(base_model=[1]), "base_model"),
        (lambda c: c["tensors"].update(ghost=first(c)), "ghost"),
    ],
)
def test_hostile_configs_are_refused(folder, change, why):
    edit(folder, change)
    with pytest.raises(errors.FormatError, match=why):
        Delta.load(folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The files of a small delta with two kinds of entry, and its base."""
    folder = tmp_path_factory.mktemp("pristine")
    base = {"a": torch.zeros(40), "b": torch.zeros(3)}
    tuned = {"a": torch.zeros(40)}
    tuned["a"][::9] = 1
    Delta.between(base, tuned).save_pretrained(folder, reversible=True)
    return {p.name: p.read_bytes() for p in folder.iterdir()}, base


@given(
    which=st.sampled_from(["delta_config.json", "delta.safetensors"]),
    at=st.integers(0, 10**9),
    new=st.binary(min_size=1, max_size=3),
)
def test_any_damage_is_an_error_of_the_format_or_harmless(
    tmp_path_factory, pristine, which, at, new
):
    files, base = pristine
    folder = tmp_path_factory.mktemp("damaged")
    for name, data in files.items():
        data = bytearray(data)
        if name == which:
            at %= len(data)
            data[at : at + len(new)] = new
        (folder / name).write_bytes(data)
    with contextlib.suppress(errors.RetouchError):
        delta = Delta.load(folder)
        state = {n: t.clone() for n, t in base.items()}
        delta.apply_(state)
        delta.revert_(state)
    with contextlib.suppress(errors.RetouchError):
        _core.show_files(folder)


def test_a_nested_config_is_refused(folder):
    (folder / "delta_config.json").write_text("[" * 100_000)
    with pytest.raises(errors.FormatError, match="not a JSON file"):
        Delta.load(folder)


def test_files_of_two_deltas_never_stand_together(folder, monkeypatch):
    """The config goes before the tensors are replaced: in between there is no delta."""
    model = llama()
    other = Delta.between(model, nudged(model, seed=5))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    replace = os.replace

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("safetensors.torch.serialize_file", lambda *_, **__: full("", "x"))
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr(
        os, "replace", lambda s, t: full(s, t) if str(t).endswith("json") else replace(s, t)
    )
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(folder)
    assert [p.name for p in folder.iterdir()] == ["delta.safetensors"]
    with pytest.raises(FileNotFoundError, match="no delta at"):
        Delta.load(folder)


def test_names_that_would_meet_in_the_file_are_refused(tmp_path):
    base = {"a": torch.zeros(9), "a.val": torch.zeros(1)}
    tuned = {"a": torch.zeros(9), "a.val": torch.ones(1)}
    tuned["a"][4] = 1
    with pytest.raises(errors.FormatError, match=r"two tensors would be named a\.val"):
        Delta.between(base, tuned).save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def first(config):
    return next(iter(config["tensors"].values()))


def test_json_that_is_none_and_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*nowhere"):
        Delta.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no delta at"):
        Delta.load(tmp_path / "empty")
    (folder / "delta_config.json").write_text("{")
    with pytest.raises(errors.FormatError, match="not a JSON file"):
        Delta.load(folder)


@given(positions=st.sets(st.integers(0, 300_000), max_size=40), wide=st.booleans())
def test_positions_survive_their_coding(positions, wide):
    from retouch.deltafile import decode, encode

    index = torch.tensor(sorted(positions), dtype=torch.int64 if wide else torch.int32)
    coding, stored = encode(index)
    gaps = [b - a - 1 for a, b in zip([-1, *sorted(positions)], sorted(positions), strict=False)]
    assert (coding == "gap16") == (max(gaps, default=0) < 2**16)
    assert decode(coding, stored, 300_001).tolist() == sorted(positions)
    if positions:
        with pytest.raises(ValueError, match="inside of the tensor"):
            decode(coding, stored, max(positions))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on file size stands for the full disk: the write fails in the middle."""
    code = (
        "import resource, signal, sys, torch, retouch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "base = {'w': torch.zeros(100_000)}\n"
        "tuned = {'w': torch.randn(100_000)}\n"
        "delta = retouch.Delta.between(base, tuned)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    delta.save_pretrained(sys.argv[1])\n"
        "except OSError as e:\n"
        "    print('refused', type(e).__name__)\n"
    )
    out = tmp_path / "d"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = llama()
    delta = Delta.between(model, nudged(model))
    with pytest.raises(OSError, match="file"):
        delta.save_pretrained(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


# --- checkpoints on disk, in Rust --------------------------------------------------------------------


def write(folder: Path, state: dict[str, torch.Tensor], shards: int) -> Path:
    """A checkpoint folder of one file or of shards with an index."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        part = {n: t for i, (n, t) in enumerate(state.items()) if i % shards == s}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from([d for d in DTYPES if d != torch.bool]),
            st.binary(min_size=8, max_size=160),
            st.lists(st.tuples(st.integers(0, 159), st.integers(1, 255)), max_size=12),
        ),
        min_size=2,
        max_size=5,
    ),
    shards=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    reversible=st.booleans(),
)
def test_files_there_and_back(tmp_path_factory, tensors, shards, reversible):
    base, tuned = {}, {}
    for i, (dtype, data, changes) in enumerate(tensors):
        data = data[: len(data) // 8 * 8]
        other = bytearray(data)
        for at, flip in changes:
            other[at % len(other)] ^= flip
        base[f"w{i}"] = torch.frombuffer(bytearray(data), dtype=dtype)
        tuned[f"w{i}"] = torch.frombuffer(other, dtype=dtype)
    place = tmp_path_factory.mktemp("files")
    b, t = write(place / "b", base, shards[0]), write(place / "t", tuned, shards[1])
    d, out, back = place / "d", place / "out", place / "back"
    report = json.loads(_core.diff_files(b, t, d, reversible=reversible))
    assert report["changed"] == sum(len(ops.diff(base[n], tuned[n], n)) for n in base)
    _core.apply_files(b, d, out)
    assert same(read(out), tuned)
    assert json.loads(_core.verify_files(out, d, result=True)) == []
    assert json.loads(_core.verify_files(b, d)) == []
    _core.revert_files(out, d, back, base=None if reversible else b)
    assert same(read(back), base)
    assert sorted(os.listdir(back)) == sorted(os.listdir(b))
    _core.apply_files(out, d, place / "again")
    assert same(read(place / "again"), tuned)
    # and the delta is the one that Python makes of the same tensors
    delta = Delta.load(d)
    state = {n: x.clone() for n, x in base.items()}
    delta.apply_(state)
    assert same(state, tuned)


def test_threads_change_no_byte(tmp_path):
    gen = torch.Generator().manual_seed(1)
    base = {f"w{i}": torch.randn(400_000, generator=gen).bfloat16() for i in range(3)}
    tuned = {
        n: torch.where(torch.rand(400_000, generator=gen) < 0.02, t + 1, t) for n, t in base.items()
    }
    b, t = write(tmp_path / "b", base, 1), write(tmp_path / "t", tuned, 2)
    files = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        d, out = tmp_path / f"d{threads}", tmp_path / f"out{threads}"
        _core.diff_files(b, t, d, reversible=True)
        _core.apply_files(b, d, out)
        files.append([p.read_bytes() for f in (d, out) for p in sorted(f.iterdir())])
    assert files[0] == files[1]


@contextlib.contextmanager
def mounted(place: Path, *options: str):
    """A file system of its own at a folder."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def pair(tmp_path):
    base = {"w": torch.zeros(200_000), "v": torch.zeros(200_000)}
    tuned = {n: t.clone() for n, t in base.items()}
    tuned["w"][::3] = 1
    tuned["v"] += 1
    return write(tmp_path / "b", base, 1), write(tmp_path / "t", tuned, 2)


def test_a_disk_that_is_really_full(tmp_path, pair):
    b, t = pair
    d = tmp_path / "d"
    _core.diff_files(b, t, d)
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=700k", "tmpfs") as small:
        for write_into in (
            lambda out: _core.apply_files(b, d, out),
            lambda out: _core.diff_files(b, t, out, reversible=True),
            lambda out: Delta.load(d).save_pretrained(out),
        ):
            with pytest.raises(OSError, match="No space left") as caught:
                write_into(small / "deep" / "out")
            assert "small" in str(caught.value)
            assert os.listdir(small) == []


def test_no_right_to_write(tmp_path, pair):
    b, t = pair
    d = tmp_path / "d"
    _core.diff_files(b, t, d)
    with mounted(tmp_path / "fixed", "-t", "tmpfs", "-o", "ro", "tmpfs") as fixed:
        for write_into in (
            lambda out: _core.apply_files(b, d, out),
            lambda out: _core.diff_files(b, t, out),
            lambda out: Delta.load(d).save_pretrained(out),
        ):
            with pytest.raises(OSError, match="Read-only file system") as caught:
                write_into(fixed / "out")
            assert "fixed" in str(caught.value)


def test_an_output_cannot_be_where_a_file_is(tmp_path, pair):
    b, t = pair
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((OSError, errors.RetouchError), match="file"):
            _core.diff_files(b, t, out)
    assert (tmp_path / "file").read_text() == "in the way"

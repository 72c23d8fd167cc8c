"""Masks: sets of coordinates, values that move in and out, files, looks."""

import copy
import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import safetensors
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from retouch import errors, maskfile, ops
from retouch.masks import Mask, Selection
from retouch.select import select

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def index_of(positions, dtype=torch.int32) -> Tensor:
    return torch.tensor(sorted(positions), dtype=dtype)


@st.composite
def selections(draw, shape: tuple[int, ...]) -> Selection:
    kinds = ["all", "none", "elements"]
    kinds += ["rows"] * (len(shape) > 0) + ["columns"] * (len(shape) > 1)
    kind = draw(st.sampled_from(kinds))
    if kind in ("all", "none"):
        return Selection(kind, shape)
    length = {"rows": 0, "columns": 1}.get(kind)
    length = int(np.prod(shape)) if length is None else shape[length]
    positions = draw(st.sets(st.integers(0, max(length - 1, 0)), max_size=length))
    return Selection(
        kind, shape, index_of(positions, draw(st.sampled_from([torch.int32, torch.int64])))
    )


shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)


def literal(s: Selection) -> set[int]:
    """The selected positions, counted without any of the code under test."""
    grid = np.arange(int(np.prod(s.shape))).reshape(s.shape)
    if s.kind == "all":
        return set(grid.ravel().tolist())
    if s.kind == "none":
        return set()
    where = s.index.tolist()
    if s.kind == "elements":
        return set(where)
    return set((grid[where] if s.kind == "rows" else grid[:, where]).ravel().tolist())


# --- one parameter ---------------------------------------------------------------------------------


@given(shape=shapes, data=st.data())
def test_selections_are_sets(shape: tuple[int, ...], data) -> None:
    a, b = data.draw(selections(shape)), data.draw(selections(shape))
    one, two = literal(a), literal(b)
    everything = set(range(a.numel))
    assert a.flat().tolist() == sorted(one) and a.count == len(one)
    assert a.flat().dtype == torch.int32
    for found, want in [
        (a & b, one & two), (a | b, one | two), (a - b, one - two), (~a, everything - one),
        (~~a, one), (a - a, set()), (a & ~a, set()), (a | ~a, everything),
    ]:  # fmt: skip
        assert found.flat().tolist() == sorted(want)
        assert found.count == len(want) and found.shape == shape
        if a.kind == b.kind:
            assert found.kind in (a.kind, "all", "none")  # structured stays structured
    assert (a == b) == (one == two)
    assert (a | b) == (b | a) and (a & b) == (b & a)
    assert a - b == a & ~b and ~(a | b) == ~a & ~b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forced", [False, True])
@given(shape=shapes, data=st.data())
def test_values_move_in_and_out(dtype, forced: bool, shape: tuple[int, ...], data) -> None:
    s = data.draw(selections(shape))
    weight = torch.arange(1, s.numel + 1).reshape(shape).div(3).to(dtype)
    index, where = s.flat().long(), torch.zeros(s.numel, dtype=torch.bool)
    where[index] = True
    picked = weight.flatten()[index]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with ops.force_torch() if forced else torch.no_grad():
        got = s.gather(weight)
        assert got.dtype == wide and got.shape == s.value_shape
        assert torch.equal(got.flatten(), picked.to(wide))
        taken = s.take(weight)
        assert taken.dtype == dtype and torch.equal(taken.flatten(), picked)
        assert taken.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        out = torch.ones_like(got)
        s.gather_add_(out, weight, "w")
        assert torch.equal(out, 1 + got)

        param, version = nn.Parameter(weight.clone()), 0
        values = got + 1 / 7  # needs rounding
        version = param._version
        s.scatter_(param, values, "w")
        assert torch.equal(param.detach().flatten()[index], values.flatten().to(dtype))
        assert torch.equal(param.detach().flatten()[~where], weight.flatten()[~where])
        if s.count:
            assert param._version > version  # autograd notices
        s.put_(param, taken, "w")
        assert torch.equal(param.detach(), weight)


def test_values_of_another_size_or_dtype_are_refused() -> None:
    weight = torch.zeros(3, 4)
    for s, shape in [
        (Selection("rows", (3, 4), index_of([1])), (1, 4)),
        (Selection("columns", (3, 4), index_of([0, 3])), (3, 2)),
        (Selection("elements", (3, 4), index_of([5])), (1,)),
        (Selection("all", (3, 4)), (3, 4)),
        (Selection("none", (3, 4)), (0,)),
    ]:
        assert s.value_shape == shape
        for call in (s.scatter_, s.put_):
            with pytest.raises(errors.ShapeError, match=r"values of w have shape \(7,\)"):
                call(weight, torch.zeros(7), "w")
            with pytest.raises(errors.ShapeError, match=r"w has shape \(4, 3\)"):
                call(torch.zeros(4, 3), torch.zeros(shape), "w")
        with pytest.raises(errors.ShapeError, match="values of w have shape"):
            s.gather_add_(torch.zeros(7), weight, "w")
        with pytest.raises(errors.LayoutError, match=r"values of w are torch\.float64"):
            s.put_(weight, torch.zeros(shape, dtype=torch.float64), "w")
        with pytest.raises(errors.ShapeError, match="its selection is for"):
            s.gather(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("kind", "shape", "index", "message"),
    [
        ("some", (3,), torch.tensor([0]), "wanted all, none, elements, rows or columns"),
        ("all", (3,), torch.tensor([0]), "has no index"),
        ("all", (3, -1), None, "no parameter has shape"),
        ("rows", (3,), None, "needs an index tensor"),
        ("rows", (), torch.tensor([0]), "has no rows"),
        ("columns", (3,), torch.tensor([0]), "has no columns"),
        ("elements", (3,), torch.tensor([3]), "wanted 0 to 2"),
        ("rows", (2, 3), torch.tensor([2]), "wanted 0 to 1"),
        ("elements", (3,), torch.tensor([-1]), "wanted 0 to 2"),
        ("elements", (3,), torch.tensor([1, 0]), "not ascending"),
        ("elements", (3,), torch.tensor([1, 1]), "not ascending"),
        ("elements", (3,), torch.tensor([1.0]), "wanted int32 or int64"),
        ("elements", (3,), torch.tensor([[1]]), "wanted int32 or int64"),
        ("elements", (0,), torch.tensor([0]), "wanted 0 to -1"),
    ],
)
def test_selections_that_make_no_sense(kind, shape, index, message) -> None:
    with pytest.raises(errors.MaskError, match=message):
        Selection(kind, shape, index)


def test_selections_of_different_shapes_do_not_meet() -> None:
    a, b = Selection("all", (3,)), Selection("all", (4,))
    assert a != b and a != "all"
    for operation in ("__and__", "__or__", "__sub__"):
        with pytest.raises(errors.MaskError, match=r"different shapes: \(3,\) and \(4,\)"):
            getattr(a, operation)(b)


# --- a model ---------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2).to(torch.bfloat16))


@st.composite
def masks(draw, model: nn.Module) -> Mask:
    chosen = {}
    for name, p in model.named_parameters():
        if draw(st.booleans()):
            chosen[name] = draw(selections(tuple(p.shape)))
    return Mask(chosen, model)


def coordinates(mask: Mask) -> set[tuple[str, int]]:
    return {(name, i) for name, s in mask.items() for i in literal(s)}


@given(data=st.data())
def test_masks_are_sets(data) -> None:
    model = net()
    a, b = data.draw(masks(model)), data.draw(masks(model))
    one, two = coordinates(a), coordinates(b)
    everything = coordinates(Mask.full(model))
    assert len(everything) == sum(p.numel() for p in model.parameters())
    for found, want in [
        (a & b, one & two), (a | b, one | two), (a - b, one - two), (~a, everything - one),
    ]:  # fmt: skip
        assert coordinates(found) == want and found.model() is model
        assert found.count == len(want) and found.numel == len(everything)
        assert found.density == len(want) / len(everything)
        assert all(s.count for s in found.values())
        assert list(found) == [n for n, _ in model.named_parameters() if n in found]
    assert (a == b) == (one == two)
    assert a - b == a & ~b and ~(a | b) == ~a & ~b

    meeting = a.overlap(b)
    assert (meeting.both, meeting.first, meeting.second) == (len(one & two), len(one), len(two))
    either = len(one | two)
    assert meeting.jaccard == (len(one & two) / either if either else 1.0)
    assert meeting.expected == pytest.approx(len(one) * len(two) / len(everything))
    by_tensor = sum(
        sum(n == name for n, _ in one) * sum(n == name for n, _ in two) / p.numel()
        for name, p in model.named_parameters()
    )
    assert meeting.expected_in_tensors == pytest.approx(by_tensor)


def test_overlap_of_random_masks_is_what_chance_gives() -> None:
    model = nn.Linear(100, 100, bias=False)
    a, b = (select(model, "random", density=0.1, seed=seed, target_modules=None) for seed in (0, 1))
    meeting = a.overlap(b)
    assert meeting.expected == 100 and 70 < meeting.both < 130
    assert meeting.lift == meeting.both / 100 and meeting.containment == meeting.both / 1000
    same = a.overlap(a)
    assert same.jaccard == same.containment == 1.0 and same.lift == 10
    nothing = Mask({}, model)
    assert nothing.overlap(nothing).jaccard == nothing.overlap(nothing).lift == 1.0


def test_a_mask_without_its_model_knows_what_it_selects() -> None:
    mask = Mask({"w": Selection("rows", (2, 3), index_of([1]))})
    assert mask.model() is None and (mask.count, mask.numel) == (3, 6)
    assert coordinates(~mask) == {("w", 0), ("w", 1), ("w", 2)}
    with pytest.raises(errors.MaskError, match=r"w has shape \(2, 3\) in one and \(4,\)"):
        mask & Mask({"w": Selection("all", (4,))})
    model = net()
    known = Mask.full(model)
    joined = Mask({"0.bias": Selection("all", (4,))}) & known
    assert joined.model() is model and joined.numel == known.numel


def test_integers_are_no_part_of_a_full_mask() -> None:
    model = net()
    model.register_parameter("table", nn.Parameter(torch.ones(3, dtype=torch.int8), False))
    assert "table" not in Mask.full(model) and "table" not in ~Mask({}, model)
    assert Mask.full(model).numel - Mask.full(model).count == 3


def test_the_model_is_remembered_weakly() -> None:
    model = net()
    mask = Mask.full(model)
    assert mask.model() is model and copy.deepcopy(mask).model() is model
    again = pickle.loads(pickle.dumps(mask))
    assert again == mask and again.model() is None and again.numel == mask.numel
    del model
    assert mask.model() is None and mask.count == 34


@pytest.mark.parametrize(
    ("index", "want"),
    [
        ([3, 0, 3], [0, 3]), (torch.tensor([2], dtype=torch.uint8), [2]), ([], []),
        (np.array([1, 0]), [0, 1]), (range(4), [0, 1, 2, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]), (torch.tensor(2), [2]),
    ],
)  # fmt: skip
def test_from_indices(index, want) -> None:
    model = net()
    mask = Mask.from_indices({"0.bias": index}, model, {"why": "test"})
    assert mask["0.bias"].flat().tolist() == want
    assert mask.model() is model and mask.metadata == {"why": "test"}


def test_from_indices_errors() -> None:
    model = net()
    for index, message in [
        ([4], "0.bias: an index of elements goes from 4 to 4; wanted 0 to 3"),
        ([-1], "from -1"), ([0.5], r"0.bias: positions are torch\.float32"),
        (torch.ones(2, 2, dtype=torch.bool), r"a bool tensor of shape \(2, 2\); wanted \(4,\)"),
        (torch.ones(2, 2, dtype=torch.int32), "in one dimension"), (["a"], "0.bias: "),
    ]:  # fmt: skip
        with pytest.raises(errors.MaskError, match=message):
            Mask.from_indices({"0.bias": index}, model)
    with pytest.raises(errors.MaskError, match=r"no parameter '0\.bia'; did you mean '0\.bias'"):
        Mask.from_indices({"0.bia": [0]}, model)


def test_a_mask_of_another_model() -> None:
    model, other = net(), nn.Sequential(nn.Linear(3, 5))
    mask = Mask.full(model)
    with pytest.raises(errors.MaskError, match=r"for 0\.weight of shape \(4, 3\).*shape \(5, 3\)"):
        mask.check(other)
    with pytest.raises(errors.MaskError, match="which Sequential does not have"):
        Mask({"9.weight": Selection("all", (4, 3))}, other)
    tied = tiny.llama(tied=True)
    with pytest.raises(errors.MaskError, match=r"it is tied to model\.embed_tokens\.weight"):
        Mask({"lm_head.weight": Selection("all", (31, 16))}, tied)
    with pytest.raises(errors.MaskError, match=r"0\.bias: got a Tensor, wanted a Selection"):
        Mask({"0.bias": torch.tensor([0])}, model)  # type: ignore[dict-item]


# --- files -----------------------------------------------------------------------------------------


@given(data=st.data())
def test_files_give_back_what_they_got(tmp_path_factory, data) -> None:
    model = net()
    mask = data.draw(masks(model))
    mask.metadata.update(seed=3, config={"density": 0.1, "score": None})
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask.save(path)
    again = Mask.load(path)
    assert again == mask and list(again) == list(mask)
    assert {n: s.kind for n, s in again.items()} == {n: s.kind for n, s in mask.items()}
    assert again.metadata == mask.metadata and again.layout == mask.layout
    assert (again.numel, again.model()) == (mask.numel, None)
    assert Mask.load(path, model).model() is model
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"]


def test_a_folder_stands_for_the_usual_name(tmp_path: Path) -> None:
    Mask.full(net()).save(tmp_path)
    assert (tmp_path / "mask.safetensors").is_file()
    assert Mask.load(tmp_path) == Mask.full(net())


def test_bitmaps_where_they_are_smaller(tmp_path: Path) -> None:
    model = nn.Linear(100, 80, bias=False)
    sizes = {}
    for density in (0.001, 0.02, 0.05, 0.5):
        mask = select(model, "random", density=density, target_modules=None)
        mask.save(tmp_path / "m")
        with safetensors.safe_open(tmp_path / "m", framework="pt") as file:
            tensor = file.get_tensor("weight")
        sizes[density] = tensor.numel() * tensor.itemsize
        assert (tensor.dtype == torch.uint8) == (density > 1 / 32)
        assert Mask.load(tmp_path / "m") == mask
    assert sizes == {0.001: 8 * 4, 0.02: 160 * 4, 0.05: 1000, 0.5: 1000}


def test_files_are_readable_by_safetensors_alone(tmp_path: Path) -> None:
    model = net()
    Mask.from_indices({"0.weight": [7, 2]}, model, {"seed": 5}).save(tmp_path / "m")
    with safetensors.safe_open(tmp_path / "m", framework="np") as file:
        strings = file.metadata()
        # 12 elements: a bitmap of 2 bytes, lowest bit first
        assert file.get_tensor("0.weight").tolist() == [0b10000100, 0]
    assert strings["format"] == "retouch-mask" and strings["format_version"] == "1"
    header = json.loads(strings["header"])
    assert header["metadata"] == {"seed": 5}
    assert header["layout"]["2.bias"] == [[2], "bfloat16"]


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_files_are_refused(tmp_path_factory, data) -> None:
    model = net()
    mask = select(model, "random", k=9, target_modules=None)
    path = tmp_path_factory.mktemp("mask") / "m"
    mask.save(path)
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(errors.FormatError):
            Mask.load(path)
        return
    where = data.draw(st.integers(0, len(whole) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole[:where] + bytes([whole[where] ^ bit]) + whole[where + 1 :])
    try:
        again = Mask.load(path)
    except errors.FormatError as error:
        assert str(path) in str(error)
    else:  # padding, or the version that wrote it
        assert again == mask and again.metadata == mask.metadata


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(errors.FormatError, match="damaged or no safetensors file"):
        Mask.load(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(errors.FormatError, match="is no mask: its format is None"):
        Mask.load(path)
    save_file({}, path, {"format": "retouch-mask", "format_version": "2", "retouch_version": "9"})
    with pytest.raises(errors.FormatError, match=r"version '2' .written by retouch 9.*reads '1'"):
        Mask.load(path)
    with pytest.raises(FileNotFoundError, match="no mask at"):
        Mask.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("row", "tensor", "message"),
    [
        ({"kind": "elements", "coding": "index"}, None, "the tensor of w is missing"),
        ({"kind": "elements", "coding": "index", "hash": "x"}, torch.tensor([1]), "its hash"),
        ({"kind": "elements", "coding": "gap"}, torch.tensor([1]), "coded as 'gap'"),
        ({"kind": "rows", "coding": "bitmap"}, torch.zeros(1, dtype=torch.uint8), "coded as"),
        (
            {"kind": "elements", "coding": "bitmap"},
            torch.zeros(9, dtype=torch.uint8),
            "bitmap of w",
        ),
        ({"kind": "elements", "coding": "index"}, torch.tensor([99]), "wanted 0 to 5"),
        ({"kind": "rows", "coding": "none"}, None, "needs an index"),
        ({"kind": "all", "coding": "none"}, torch.tensor([1]), "w has a tensor"),
        ({"coding": "none"}, None, "kind"),
        ({"kind": "elements"}, None, "coding"),
    ],
)
def test_hostile_headers(tmp_path: Path, row, tensor, message) -> None:
    """Files that are whole and say something that cannot be."""
    row = dict(row)
    if tensor is not None and "hash" not in row:
        row["hash"] = ops.fingerprint(tensor)
    header = {"selections": {"w": row}, "layout": {"w": [[2, 3], "float32"]}, "metadata": {}}
    text = json.dumps(header)
    strings = {
        "format": "retouch-mask", "format_version": "1", "header": text,
        "header_hash": maskfile._hash(text),
    }  # fmt: skip
    save_file({} if tensor is None else {"w": tensor}, tmp_path / "m", strings)
    with pytest.raises(errors.FormatError, match=message):
        Mask.load(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"selections": {"w": 3}, "layout": {}}'])
def test_headers_of_another_form(tmp_path: Path, text: str) -> None:
    strings = {
        "format": "retouch-mask", "format_version": "1", "header": text,
        "header_hash": maskfile._hash(text),
    }  # fmt: skip
    save_file({}, tmp_path / "m", strings)
    with pytest.raises(errors.FormatError, match="is damaged"):
        Mask.load(tmp_path / "m")
    with safetensors.safe_open(tmp_path / "m", framework="pt") as file:
        assert file.metadata()["header"] == text


def test_unknown_tensors(tmp_path: Path) -> None:
    text = json.dumps({"selections": {}, "layout": {}, "metadata": {}})
    strings = {
        "format": "retouch-mask", "format_version": "1", "header": text,
        "header_hash": maskfile._hash(text),
    }  # fmt: skip
    save_file({"x": torch.zeros(1)}, tmp_path / "m", strings)
    with pytest.raises(errors.FormatError, match=r"unknown tensors \['x'\]"):
        Mask.load(tmp_path / "m")


def test_nothing_half_written(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "mask.safetensors"
    Mask.full(model).save(path)
    before = path.read_bytes()
    with pytest.raises(errors.MaskError, match="must be JSON-able"):
        Mask(Mask.full(model), model, {"score": object()}).save(path)
    big = select(nn.Linear(300, 300, bias=False), "random", density=0.5, target_modules=None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            big.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        big.save(tmp_path / "no" / "folder.safetensors")


# --- looks -----------------------------------------------------------------------------------------


def test_figures() -> None:
    model = tiny.bert()
    mask = select(model, "magnitude", density=0.1, heads="full")
    total = sum(p.numel() for p in model.parameters())
    line, *rows = mask.summary().splitlines()
    assert line == (
        f"trainable params: {mask.count:,} || all params: {total:,} || "
        f"trainable%: {100 * mask.count / total:.4f} || optimizer state: "
        f"{8 * mask.count / 2**20:.2f} MiB || delta: "
        f"{(4 * mask.count + 4 * (mask.count - 51)) / 2**20:.2f} MiB"
    )
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert table["classifier.weight"][:5] == ["48", "of", "48", "100.000%", "dense"]
    query = "bert.encoder.layer.*.attention.self.query.weight"
    both = sum(mask[query.replace("*", str(i))].count for i in (0, 1))
    assert table[query][:3] == [str(both), "of", "512"]
    assert "bert.embeddings.word_embeddings.weight" not in table
    assert mask.summary(modules=False) == line
    assert (
        repr(mask)
        == f"Mask({mask.count:,} of {total:,} weights in {len(mask)} parameters may move)"
    )


def test_printing(capsys) -> None:
    mask = select(tiny.bert(), "magnitude", density=0.1)
    mask.print_trainable_parameters()
    assert capsys.readouterr().out == mask.summary() + "\n"


def test_the_delta_of_bfloat16_is_smaller() -> None:
    from retouch.maskview import delta_bytes

    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = nn.Linear(8, 6, bias=False).to(dtype)
        for s, index in [
            (Selection("elements", (6, 8), index_of([1, 2])), 2),
            (Selection("rows", (6, 8), index_of([1])), 1),
            (Selection("all", (6, 8)), 0),
        ]:
            mask = Mask({"weight": s}, model)
            assert delta_bytes(mask, mask.layout) == s.count * size + 4 * index


def test_html_is_escaped_and_complete() -> None:
    model = nn.Sequential()
    model.add_module("a<b", nn.Linear(3, 2))
    html = Mask.full(model)._repr_html_()
    assert "<code>a&lt;b.weight</code>" in html and "a<b" not in html
    assert "8 of 8 weights may move (100.000%)" in html


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model = tiny.bert()
    mask = select(model, "magnitude", density=0.1, heads="full")
    ax = mask.plot()
    labels = [t.get_text() for t in ax.get_yticklabels()]
    grid = ax.images[0].get_array()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["-", "0", "1"]
    row = grid[labels.index("bert.encoder.layer.*.attention.self.query.weight")]
    want = [mask[f"bert.encoder.layer.{i}.attention.self.query.weight"].density for i in (0, 1)]
    assert row[1:].tolist() == pytest.approx(want) and np.ma.is_masked(row[0])
    assert grid[labels.index("classifier.weight")][0] == 1.0
    _, given_ax = plt.subplots()
    assert mask.plot(given_ax) is given_ax
    plt.close("all")

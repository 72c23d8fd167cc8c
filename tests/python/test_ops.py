"""Every operation twice: the Rust kernel and the libtorch ops must give the same result."""

import contextlib
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retouch import _core, errors, ops
from retouch.carrying import carry_
from retouch.made import Made
from retouch.migrate import Past, Piece
from retouch.optim import steps
from retouch.selection import Selection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(run):
    """The result of `run` on the Rust path and on the libtorch path."""
    native = run()
    with ops.force_torch():
        plain = run()
    return native, plain


def scores(seed: int, sizes: list[int], dtype: torch.dtype, levels: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    # few levels make many ties; signed, with both zeros
    parts = [torch.randint(-levels, levels + 1, (n,), generator=gen) / 4 for n in sizes]
    return [
        torch.where(p == 0, torch.copysign(p, torch.randn(p.shape)), p).to(dtype) for p in parts
    ]


@given(
    seed=st.integers(0, 999),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([1, 3, 1000]),
    largest=st.booleans(),
    absolute=st.booleans(),
)
def test_topk_is_exact_and_ties_go_to_the_lowest_position(
    seed, sizes, share, dtype, levels, largest, absolute
):
    parts = scores(seed, sizes, dtype, levels)
    names = [f"p{i}" for i in range(len(parts))]
    k = int(share * sum(sizes))
    native, plain = both(lambda: ops.topk(parts, names, k, largest=largest, absolute=absolute))
    flat = torch.cat(parts).float()
    flat = flat.abs() if absolute else flat
    want = sorted(
        range(flat.numel()), key=lambda i: (-flat[i].item() if largest else flat[i].item(), i)
    )[:k]
    offset, got = 0, []
    for part, size in zip(native, sizes, strict=True):
        assert part.tolist() == sorted(set(part.tolist()))
        got += [offset + i for i in part.tolist()]
        offset += size
    assert got == sorted(want)
    assert [p.tolist() for p in plain] == [p.tolist() for p in native]


def test_topk_over_many_chunks_does_not_depend_on_threads():
    parts = [torch.randn(300_000), torch.zeros(200_000), torch.randn(70_001)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for k in (0, 1, 5_700, 300_000, 570_001):
            results.append((k, [p.tolist() for p in ops.topk(parts, ["a", "b", "c"], k)]))
    assert results[:5] == results[5:10] == results[10:]
    assert all(sum(map(len, r)) == k for k, r in results)


@given(
    seed=st.integers(0, 99), rows=st.integers(1, 9), cols=st.integers(1, 33), largest=st.booleans()
)
def test_topk_rows(seed, rows, cols, largest):
    x = scores(seed, [rows * cols], torch.float32, 3)[0].view(rows, cols)
    k = min(3, cols)
    native, plain = both(lambda: ops.topk_rows(x, "x", k, largest=largest))
    assert native.tolist() == plain.tolist()
    for r in range(rows):
        one = ops.topk([x[r].contiguous()], ["row"], k, largest=largest)[0]
        mine = [i - r * cols for i in native.tolist() if r * cols <= i < (r + 1) * cols]
        assert mine == one.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 40, 120])
def test_topk_as_a_mask_and_of_groups(dtype, k):
    parts = scores(k, [120, 200, 70_000], dtype, 3)
    want = [ops.topk([p], ["p"], k, absolute=True)[0] for p in parts]
    run = lambda p: ops.topk_mask(p.view(-1, 10), "p", k, absolute=True)  # noqa: E731
    for masks in both(lambda: [run(p) for p in parts]):
        for mask, part, positions in zip(masks, parts, want, strict=True):
            assert mask.dtype == torch.bool and mask.shape == (part.numel() // 10, 10)
            assert torch.equal(mask.flatten().nonzero().squeeze(1), positions.long())
    groups = [[parts[0]], parts[1:]]
    names = [["a"], ["b", "c"]]
    together = ops.topk(parts[1:], names[1], k + 7, absolute=True)
    for found in both(lambda: ops.topk_each(groups, names, [k, k + 7], absolute=True)):
        assert torch.equal(found[0][0], want[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], together, strict=True))


@pytest.mark.parametrize("pin", [math.inf, -math.inf])
@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("largest", [True, False])
def test_made_scores_rank_as_filled_ones(over, pin, largest):
    values = {n: t for n, t in zip("ab", scores(1, [300, 70_000], torch.float32, 50), strict=True)}
    weights = {n: torch.randn(t.shape) for n, t in values.items()}
    pinned = {"b": torch.arange(0, 70_000, 111, dtype=torch.int32)}
    made = Made(values, weights if over else None, 0.125, pinned, pin)
    filled = {
        n: (t.abs() / (weights[n].abs() + 0.125) if over else t.abs()) for n, t in values.items()
    }
    filled["b"][pinned["b"].long()] = pin
    ks = (0, 5, 2000, 70_300)
    want = [ops.topk(list(filled.values()), list("ab"), k, largest=largest) for k in ks]
    for found in both(lambda: made.topk([["a", "b"]] * len(ks), ks, largest=largest)):
        for one, other in zip(found, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_finite(dtype):
    parts = [
        torch.zeros(3, dtype=dtype),
        torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype),
    ]
    assert both(lambda: ops.finite(parts, ["a", "b"])) == (True, True)
    for bad in (math.inf, -math.inf, math.nan):
        parts[1][69_999] = bad
        assert both(lambda: ops.finite(parts, ["a", "b"])) == (False, False)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.float64, torch.int64])
@pytest.mark.parametrize("n", [50, 200_000])
def test_carry_copies_what_two_indices_share(dtype, n):
    old, new = (torch.arange(0, n, step, dtype=torch.int32) for step in (2, 3))
    values = [torch.arange(old.numel()).to(dtype), torch.arange(old.numel(), 0, -1).to(dtype)]
    dense = [torch.full((n,), 7).to(dtype).index_put_((old.long(),), v) for v in values]
    shape = (new.numel(), 1)

    def run():
        to = [torch.full(shape, 7).to(dtype) for _ in values]
        carry_(to, values, old, new, "w")
        return to

    for found in both(run):
        for to, whole in zip(found, dense, strict=True):
            assert to.shape == shape and torch.equal(to.flatten(), whole[new.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("strides", [(2, 3, 5), (1, 70, 30_001), (7, 7, 2)])
def test_what_is_put_aside_when_a_selection_moves(dtype, first, strides):
    n = 100_000
    base = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    param = torch.nn.Parameter(base.clone())
    param.data[::3] += 1  # a third has moved
    old, new, gone = (torch.arange(i, n, step, dtype=torch.int32) for i, step in enumerate(strides))
    gone = torch.tensor(sorted({*gone.tolist()} - {*old.tolist()}), dtype=torch.int32)
    place = lambda index: Selection("elements", (n,), index)  # noqa: E731
    slot = SimpleNamespace(name="w", param=param, selection=place(old), base=base[old.long()])

    def run():
        past, values = Past(), torch.full((new.numel(),), 3.0, dtype=dtype)
        if not first:
            past.add("w", Piece(place(gone), -base[gone.long()]))
        return past.exchange("w", slot, place(new), values), past, values

    for shared, past, values in both(run):
        before = {} if first else {p: -base[p] for p in gone.tolist()}
        left = {p: base[p] for p in {*old.tolist()} - {*new.tolist()} if p % 3 == 0}
        assert shared == len({*old.tolist()} & {*new.tolist()})
        held = torch.tensor([before.get(p, 3.0) for p in new.tolist()]).to(dtype)
        assert torch.equal(values, held)
        now = {*new.tolist()}
        rest = {p: v for p, v in (before | left).items() if p not in now}
        want = torch.tensor(sorted(rest), dtype=torch.int32)
        assert ("w" in past) == bool(rest)
        if rest:
            assert torch.equal(past["w"].selection.flat(), want)
            assert torch.equal(past["w"].values, torch.stack([rest[p] for p in want.tolist()]))


@pytest.mark.parametrize("largest", [True, False])
def test_threshold(largest):
    x = torch.tensor([[0.5, -1.0], [2.0, 0.5]])
    native, plain = both(lambda: ops.threshold([x], ["x"], 0.5, largest=largest))
    assert native[0].tolist() == plain[0].tolist() == ([0, 2, 3] if largest else [0, 1, 3])


@pytest.mark.parametrize("forced", [False, True])
def test_nan_and_budget_are_refused_by_name(forced):
    x = torch.zeros(100_000)
    x[70_001] = math.nan

    def run(scores, k):
        if forced:
            with ops.force_torch():
                return ops.topk(scores, ["ok", "layer.weight"], k)
        return ops.topk(scores, ["ok", "layer.weight"], k)

    with pytest.raises(errors.ScoreError, match=r"layer\.weight is NaN at flat position 70001"):
        run([torch.ones(3), x], 2)
    with pytest.raises(errors.BudgetError, match="cannot select 7 of 6"):
        run([torch.ones(3), torch.ones(3)], 7)


@given(seed=st.integers(0, 99), n=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
def test_gather_and_scatter(seed, n, dtype):
    gen = torch.Generator().manual_seed(seed)
    source = torch.randn(n, generator=gen).to(dtype)
    index = (torch.rand(n, generator=gen) < 0.4).nonzero().squeeze(1).to(torch.int32)
    values = torch.randn(index.numel(), generator=gen)
    got, plain = both(lambda: ops.gather(source, index, "w"))
    assert got.dtype == torch.float32
    assert torch.equal(got, source[index].float()) and torch.equal(got, plain)
    taken, plain = both(lambda: ops.take(source, index, "w"))
    assert taken.dtype == dtype and torch.equal(taken, source[index]) and torch.equal(taken, plain)

    def written():
        target = source.clone()
        ops.scatter_(target, index, values, "w")
        return target

    native, plain = both(written)
    want = source.clone()
    want[index.long()] = values.to(dtype)
    assert torch.equal(native, want) and torch.equal(plain, want)

    def added():
        out = values.clone()
        ops.gather_add_(out, source, index, "w")
        return out

    native, plain = both(added)
    assert torch.equal(native, values + source[index].float()) and torch.equal(native, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map_", ["id", "abs", "square"])
def test_accumulate(dtype, map_):
    value = torch.randn(3, 100).to(dtype)
    start = torch.randn(3, 100)

    def run():
        score = start.clone()
        ops.accumulate_(score, value, "w", map=map_, weight=0.5)
        return score

    native, plain = both(run)
    torch.testing.assert_close(native, plain, rtol=1e-6, atol=1e-7)
    wide = {"id": value.float(), "abs": value.float().abs(), "square": value.float() ** 2}[map_]
    torch.testing.assert_close(native, start + 0.5 * wide, rtol=1e-6, atol=1e-7)


FACTORS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("map_", ["id", "abs", "square"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_accumulate_outer(dtype, map_, tokens):
    left, right = torch.randn(5, tokens, 13).to(dtype), torch.randn(5, tokens, 37).to(dtype)
    start = torch.randn(13, 37)

    def run():
        score = start.clone()
        ops.accumulate_outer_(score, left, right, "w", map=map_)
        return score

    native, plain = both(run)
    products = left.double().transpose(1, 2) @ right.double()
    products = products.to(dtype).double()  # each alone is what a gradient of this dtype would be
    mapped = {"id": products, "abs": products.abs(), "square": products**2}[map_]
    want = (start.double() + mapped.sum(0)).float()
    # one unit of 16 bits where the rounding falls on the other side
    rtol = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
    atol = rtol * max(1.0, float(mapped.abs().amax()))
    torch.testing.assert_close(native, want, rtol=rtol, atol=atol)
    torch.testing.assert_close(plain, want, rtol=rtol, atol=atol)


def test_accumulate_outer_in_rust_has_one_order_of_sums():
    left, right = torch.randn(12, 20, 150), torch.randn(12, 20, 70)
    threads = torch.get_num_threads()

    def run(*cuts):
        score = torch.zeros(150, 70)
        for a, b in zip(left.tensor_split(cuts), right.tensor_split(cuts), strict=True):
            ops.accumulate_outer_(score, a, b, "w", map="square")
        return score

    with mock.patch.object(
        ops._core, "accumulate_outer_", wraps=ops._core.accumulate_outer_
    ) as kernel:
        want = run()
        turned = left.transpose(1, 2).contiguous().transpose(1, 2), right[:, :, None].squeeze(2)
        strided = torch.zeros(150, 70)
        ops.accumulate_outer_(strided, *turned, "w", map="square")
        assert torch.equal(strided, want)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(run(), want) and torch.equal(run(5, 6), want)
        finally:
            torch.set_num_threads(threads)
        assert kernel.call_count == 14
        with ops.force_torch():
            torch.testing.assert_close(run(), want)
        assert kernel.call_count == 14


@pytest.mark.parametrize("forced", [False, True])
def test_accumulate_outer_refuses_what_does_not_fit(forced):
    score, left, right = torch.zeros(3, 4), torch.ones(2, 5, 3), torch.ones(2, 5, 4)
    with ops.force_torch() if forced else contextlib.nullcontext():
        for wrong in (
            (score.t(), left, right),
            (score, left[0], right[0]),
            (score, left[:1], right),
            (score, left, right[:, 1:]),
            (score, left, right[..., 1:]),
        ):
            with pytest.raises(errors.ShapeError, match=r"score of w has shape \(\d, \d\)"):
                ops.accumulate_outer_(*wrong, "w", map="square")
        with pytest.raises(errors.HyperparameterError, match="one of id, abs, square, got cube"):
            ops.accumulate_outer_(score, left, right, "w", map="cube")
    assert not score.any()
    before = score._version
    ops.accumulate_outer_(score, left, right, "w", map="abs")
    assert score._version > before and torch.equal(score, torch.full((3, 4), 10.0))


def test_the_kernel_of_accumulate_outer_checks_what_it_is_given():
    score, left, right = torch.zeros(3, 4), torch.ones(2, 5, 3), torch.ones(2, 5, 4)
    kernel = ops._core.accumulate_outer_
    for samples in (0, 3, 7, 2**64 - 1):
        with pytest.raises(errors.ShapeError, match="left has 30 elements, expected"):
            kernel(score, left, right, samples)
    with pytest.raises(errors.ShapeError, match="score has 11 elements, expected 12"):
        kernel(torch.zeros(11), left, right, 2)
    with pytest.raises(errors.ShapeError, match="right has 20 elements, expected 40"):
        kernel(score, left, right[:1], 2)
    with pytest.raises(errors.LayoutError, match="right must be a contiguous float32 tensor"):
        kernel(score, left, right.double(), 2)
    with pytest.raises(errors.LayoutError, match="score and left share memory"):
        kernel(left[0, :3], left, torch.ones(2, 5, 3), 2)
    assert not score.any()


def test_writing_is_seen_by_autograd():
    weight = torch.nn.Parameter(torch.ones(4))
    loss = (weight * weight).sum()
    ops.scatter_(weight, torch.tensor([1], dtype=torch.int32), torch.tensor([5.0]), "weight")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strides_dtypes_and_devices_without_a_kernel_take_the_other_path():
    plain = torch.arange(12.0).view(3, 4)
    index = torch.tensor([1, 5, 11], dtype=torch.int32)
    assert ops.gather(plain.t().contiguous().t(), index, "w").tolist() == [1, 5, 11]
    turned = plain.clone().t()
    ops.scatter_(turned, index, torch.tensor([-1.0, -2.0, -3.0]), "w")
    want = plain.clone().t().contiguous()
    want.view(-1)[index.long()] = torch.tensor([-1.0, -2.0, -3.0])
    assert torch.equal(turned, want)
    double = torch.full((3,), 1e-300, dtype=torch.float64)
    assert ops.gather(double, torch.tensor([2], dtype=torch.int32), "w").item() == 1e-300


@pytest.mark.parametrize(
    ("index", "why"),
    [([3, 1], "ascending"), ([1, 1], "ascending"), ([-1, 2], "outside"), ([0, 9], "outside")],
)
def test_bad_positions_are_refused(index, why):
    index = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(errors.MaskError, match=f"index of w is not valid: .*{why}"):
        ops.gather(torch.zeros(9), index, "w")
    target = torch.zeros(9)
    with pytest.raises(errors.MaskError, match=why):
        ops.scatter_(target, index, torch.ones(2), "w")
    assert not target.any()


def test_the_extension_refuses_what_it_cannot_take():
    from retouch import _core

    out, index = torch.zeros(1), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got <class 'list'>"):
        _core.gather_(out, [1.0], index, "w")
    with pytest.raises(errors.LayoutError, match=r"w must be a contiguous float32.*got.*float64"):
        _core.gather_(out, torch.zeros(3, dtype=torch.float64), index, "w")
    with pytest.raises(errors.LayoutError, match="non-contiguous float32"):
        _core.gather_(out, torch.zeros(3, 3).t(), index, "w")
    for strange in (torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()):
        with pytest.raises(errors.LayoutError, match="w must be a contiguous"):
            _core.gather_(out, strange, index, "w")
    with pytest.raises(errors.LayoutError, match="share memory"):
        _core.gather_(out, out, index, "w")
    with pytest.raises(errors.LayoutError, match="index must be a contiguous int32"):
        _core.gather_(out, torch.zeros(3), torch.zeros(1), "w")
    with pytest.raises(errors.ShapeError, match="out has 1 elements, expected 2"):
        _core.gather_(out, torch.zeros(3), torch.tensor([0, 1], dtype=torch.int32), "w")


def test_uniform_depends_on_seed_name_and_position_alone():
    a = ops.uniform((70_000,), 7, "layer.0", "cpu")
    torch.set_num_threads(1)
    assert torch.equal(a, ops.uniform((70_000,), 7, "layer.0", "cpu"))
    assert torch.equal(a[:50], ops.uniform((50,), 7, "layer.0", "cpu"))
    assert not torch.equal(a, ops.uniform((70_000,), 8, "layer.0", "cpu"))
    assert not torch.equal(a, ops.uniform((70_000,), 7, "layer.1", "cpu"))
    assert 0 <= a.min() and a.max() < 1 and abs(a.mean() - 0.5) < 0.01


@given(a=st.sets(st.integers(0, 60)), b=st.sets(st.integers(0, 60)), wide=st.booleans())
def test_algebra_is_that_of_sets(a, b, wide):
    dtype = torch.int64 if wide else torch.int32
    x, y = (torch.tensor(sorted(s), dtype=dtype) for s in (a, b))
    assert set(ops.union(x, y).tolist()) == a | b
    assert set(ops.intersection(x, y).tolist()) == a & b
    assert set(ops.difference(x, y).tolist()) == a - b
    assert ops.complement(x, 61).tolist() == sorted(set(range(61)) - a)


ANY = [torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES + ANY)
def test_diff_finds_every_changed_bit(dtype):
    base = torch.zeros(70_000).to(dtype).view(7, 10_000)
    tuned = base.clone()
    tuned.view(-1)[[3, 65_536, 69_999]] = torch.ones(3).to(dtype)
    native, plain = both(lambda: ops.diff(base, tuned, "w"))
    assert native.tolist() == plain.tolist() == [3, 65_536, 69_999]


def test_diff_sees_zeros_of_either_sign_and_payloads_of_nan():
    base = torch.tensor([0.0, math.nan, math.nan, 1.0])
    tuned = torch.tensor([-0.0, math.nan, math.nan, 1.0])
    tuned.view(torch.int32)[2] += 1
    assert ops.diff(base, tuned, "w").tolist() == [0, 2]


def test_a_file_has_the_hash_that_b3sum_prints(tmp_path):
    """Published values: of nothing, and of "abc"."""
    known = {
        b"": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        b"abc": "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
    }
    for data, want in known.items():
        (tmp_path / "x").write_bytes(data)
        assert _core.file_hash(tmp_path / "x") == want
    large = bytearray(range(256)) * 1000  # a map of the file, not a buffer
    (tmp_path / "x").write_bytes(large)
    first = _core.file_hash(tmp_path / "x")
    large[-1] ^= 1
    (tmp_path / "x").write_bytes(large)
    assert _core.file_hash(tmp_path / "x") != first
    with pytest.raises(FileNotFoundError, match="missing"):
        _core.file_hash(tmp_path / "missing")


def test_fingerprint():
    w = torch.randn(100, 700).to(torch.bfloat16)
    base = ops.fingerprint(w)
    assert base == ops.fingerprint(w.clone()) == ops.fingerprint(w.t().contiguous().t())
    assert base != ops.fingerprint(w.view(700, 100)) and base != ops.fingerprint(
        w.to(torch.float16)
    )
    index = torch.tensor([0, 33_000, 69_999], dtype=torch.int32)
    old = ops.take(w, index, "w")
    ops.put_(w, index, torch.ones(3, dtype=torch.bfloat16), "w")
    assert ops.fingerprint(w) != base == ops.fingerprint(w, index, old)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert ops.fingerprint(w, index, old) == base


GRADS = [[0.3, -4.0, 0.2], [-0.1, 1.0, 0.4], [0.2, 0.2, 0.2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_torch_adamw_on_the_selected_values(dtype, maximize):
    weight = torch.randn(50_000).to(dtype)
    index = (torch.rand(50_000) < 0.3).nonzero().squeeze(1).to(torch.int32)
    start = ops.gather(weight, index, "w")
    want = torch.nn.Parameter(start.clone())
    options = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, maximize=maximize)
    reference = torch.optim.AdamW([want], **options, foreach=False)
    runs = [
        [start.clone(), torch.zeros_like(start), torch.zeros_like(start), weight.clone()]
        for _ in "ab"
    ]
    for step in range(1, 6):
        grad = torch.randn(index.numel())
        want.grad = grad.clone()
        reference.step()
        for run, context in zip(runs, ("native", "torch"), strict=True):
            value, m, v, target = run

            def update(value=value, m=m, v=v, target=target, grad=grad, step=step):
                steps.adamw_(
                    value, grad, m, v, target, index, "w",
                    step=step, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1,
                    maximize=maximize,
                )  # fmt: skip

            if context == "native":
                update()
            else:
                with ops.force_torch():
                    update()
    (native, *_, moved), (plain, *_, other) = runs
    assert torch.equal(plain, want.detach())
    torch.testing.assert_close(native, want.detach(), rtol=6e-7, atol=1e-7)
    frozen = torch.ones(50_000, dtype=torch.bool)
    frozen[index.long()] = False
    for target, value in ((moved, native), (other, plain)):
        assert torch.equal(target[frozen], weight[frozen])
        assert torch.equal(target[index.long()], value.to(dtype))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_sgd_on_the_selected_values(momentum, nesterov):
    if nesterov and not momentum:
        pytest.skip("torch refuses Nesterov without momentum")
    weight, index = torch.randn(9), torch.tensor([0, 4, 8], dtype=torch.int32)
    want = torch.nn.Parameter(ops.gather(weight, index, "w"))
    dampening = 0.0 if nesterov else 0.3
    options = dict(lr=0.1, momentum=momentum, dampening=dampening, weight_decay=0.1)
    reference = torch.optim.SGD([want], **options, nesterov=nesterov, foreach=False)
    for forced in (False, True):
        value, target = ops.gather(weight, index, "w"), weight.clone()
        buffer = torch.zeros(3) if momentum else None
        results = []
        for step, grad in enumerate(map(torch.tensor, GRADS)):
            if not forced:
                want.grad = grad.clone()
                reference.step()

            def update(grad=grad, step=step, value=value, buffer=buffer, target=target):
                steps.sgd_(
                    value, grad, buffer, target, index, "w",
                    first=step == 0, **options, nesterov=nesterov,
                )  # fmt: skip

            if forced:
                with ops.force_torch():
                    update()
            else:
                update()
            results.append(value.clone())
        torch.testing.assert_close(value, want.detach(), rtol=2e-7, atol=1e-7)
        assert torch.equal(target[[0, 4, 8]], value)
        assert torch.equal(target[[1, 2, 3, 5, 6, 7]], weight[[1, 2, 3, 5, 6, 7]])

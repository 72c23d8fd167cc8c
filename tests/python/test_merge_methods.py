"""Merge methods against hand-worked numbers: six elements, base 1, ties on purpose."""

import math

import pytest
import torch

from retouch.errors import HyperparameterError, ScoreError
from retouch.merge import Job, method_named, method_names

DELTA_A = [0.5, -0.25, 0, 1, -0.125, 0.25]
DELTA_B = [0.25, 0.5, -0.5, -0.25, -0.125, 0]
BASE = torch.ones(6)
A, B = BASE + torch.tensor(DELTA_A), BASE + torch.tensor(DELTA_B)
MASK_A, MASK_B = [1, 0, 1, 1, 1, 0], [1, 0, 1, 0, 1, 1]


def job_of(name, tensors, base, parameters, shared, dialect, dtype=torch.float32, masks=None):
    method = method_named(name)
    chosen, per_model, common = method.resolve(dialect, parameters, shared)
    ids = [f"m{i}" for i in range(len(tensors))]
    masks = None if masks is None else [torch.tensor(m) for m in masks]
    return method, Job("w", base, tensors, ids, per_model, common, chosen, 7, dtype, masks=masks)


def merged(
    name,
    tensors=(A, B),
    base=BASE,
    parameters=None,
    dialect=None,
    masks=None,
    dtype=torch.float32,
    **shared,
):
    """What the engine does with one tensor."""
    tensors = list(tensors)
    parameters = parameters or [{}] * len(tensors)
    method, job = job_of(name, tensors, base, parameters, shared, dialect, dtype, masks)
    if method.global_scope(job.dialect):
        job.state = method.begin(job)
        while True:
            method.observe(job)
            if not method.settle(job.state):
                break
    job.local = method.prepare(job)
    return method.merge(job)


def check(result, *want):
    torch.testing.assert_close(result.double(), torch.tensor(want).double(), atol=2e-6, rtol=2e-6)


def each(key, *values):
    return [{key: v} for v in values]


def both(**values):
    return [values, values]


def test_linear():
    w = each("weight", 0.75, 0.25)
    check(merged("linear", base=None, parameters=w), 1.4375, 0.9375, 0.875, 1.6875, 0.875, 1.1875)
    one = each("weight", 1, 1)
    check(merged("linear", base=None, parameters=one), 1.375, 1.125, 0.75, 1.375, 0.875, 1.125)
    out = merged("linear", base=None, parameters=one, normalize=False)
    check(out, 2.75, 2.25, 1.5, 2.75, 1.75, 2.25)
    with pytest.raises(HyperparameterError, match="sum to 0"):
        merged("linear", base=None, parameters=each("weight", 1, -1))


def test_ema_in_float32_does_not_freeze():
    e = torch.ones(1)
    for want in (1.1, 1.19):
        e = merged("ema", [torch.tensor([2.0])], e, decay=0.9)
        check(e, want)
    e, half = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    x = torch.tensor([1.5])
    for _ in range(1000):
        e = merged("ema", [x], e, decay=0.999)
        half = merged("ema", [x.bfloat16()], half, decay=0.999, dtype=torch.bfloat16)
    check(e, 1.316152)
    assert float(half) == 1.0  # what a bf16 average would do


def test_task_arithmetic_and_negation():
    out = merged("task_arithmetic", parameters=each("weight", 1, 0.5))
    check(out, 1.625, 1, 0.75, 1.875, 0.8125, 1.25)
    check(merged("task_arithmetic", **{"lambda": 0.4}), 1.3, 1.1, 0.8, 1.3, 0.9, 1.1)
    out = merged("task_arithmetic", [A], parameters=each("weight", -1))
    check(out, 0.5, 1.25, 1, 0, 1.125, 0.75)
    out = merged("sens_merging", parameters=each("weight", 1, 0.5))
    check(out, 1.625, 1, 0.75, 1.875, 0.8125, 1.25)


def test_ties_mergekit():
    def ties(density, weights, **shared):
        parameters = [{"density": density, "weight": w} for w in weights]
        return merged("ties", parameters=parameters, dialect="mergekit", **shared)

    check(ties(0.5, (1, 1)), 1.375, 1.5, 0.5, 2, 1, 1)
    check(ties(0.5, (1, 0.5)), 1 + 0.625 / 1.5, 1.5, 0.5, 2, 1, 1)
    check(ties(0.5, (1, 1), normalize=False), 1.75, 1.5, 0.5, 2, 1, 1)
    check(ties(1.0, (1, 1)), 1.375, 1.5, 0.5, 2, 0.875, 1.25)


def test_ties_paper():
    def ties(take):
        return merged("ties", parameters=both(density=0.5), dialect="paper", take=take)

    check(ties("mean"), 1.375, 1.5, 0.5, 2, 1, 1.25)
    check(ties("sum"), 1.75, 1.5, 0.5, 2, 1, 1.25)
    check(ties("largest"), 1.5, 1.5, 0.5, 2, 1, 1.25)


def test_ties_paper_finds_the_global_threshold_and_the_majority():
    method, job = job_of("ties", [A, B], BASE, both(density=0.2), {}, "paper")
    job.state = method.begin(job)
    while True:
        method.observe(job)
        if not method.settle(job.state):
            break
    assert job.state["bounds"] == [0.5, 0.5]  # K = .2 keeps two a model, not int(6 * .2) = 1
    method, job = job_of("ties", [A, B], BASE, both(density=0.5), {}, "paper")
    job.state = method.begin(job)
    while True:
        method.observe(job)
        if not method.settle(job.state):
            break
    assert job.state["bounds"] == [0.25, 0.25] and job.state["majority"] == 1.0


def test_ties_peft_with_its_own_choice_of_ties():
    # torch.topk keeps other ones of equal magnitudes than the lowest positions: given as masks
    masks = [[1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0]]
    out = merged("ties", parameters=each("weight", 1, 0.5), dialect="peft", masks=masks)
    check(out, 1.5, 1.25, 0.75, 2, 1, 1.25)
    out = merged("ties", dialect="peft", masks=masks)
    check(out, 1.5, 1.5, 0.5, 2, 1, 1.25)


def test_breadcrumbs():
    mergekit = both(density=0.5, gamma=0.17)
    check(
        merged("breadcrumbs", parameters=mergekit, dialect="mergekit"), 1.75, 1.25, 1, 0.75, 1, 1.25
    )
    check(merged("breadcrumbs_ties", parameters=mergekit), 1.75, 1.5, 1, 0.75, 1, 1.25)
    out = merged("breadcrumbs", parameters=mergekit, dialect="paper", **{"lambda": 1.0})
    check(out, 1.75, 0.75, 0.5, 0.75, 1, 1.25)


def test_breadcrumbs_keeps_exactly_so_many_where_all_are_equal():
    x = torch.full((1000,), 2.0)
    out = merged(
        "breadcrumbs", [x], torch.ones(1000), both(density=0.25, gamma=0.1)[:1], dialect="mergekit"
    )
    assert int((out != 1).sum()) == 250 and bool((out[:250] == 2).all())


def test_dare_with_given_masks():
    masks = [MASK_A, MASK_B]
    out = merged("dare_linear", parameters=both(density=0.5), masks=masks)
    check(out, 2.5, 1, 0, 3, 0.5, 1)
    want = (2.118132, 1, 0.071429, 2.307692, 0.604396, 1)
    for name in ("dare_linear", "dare_ties"):
        check(merged(name, parameters=both(density=0.5), masks=masks, dialect="mergekit"), *want)
    out = merged("dare_linear", parameters=both(density=0.5, q=1.0), masks=masks)
    check(out, 1.75, 1, 0.5, 2, 0.75, 1)  # DAREx with q = 1: nothing is enlarged


def test_dare_keeps_its_share_at_random():
    n = 200_000
    base, x = torch.zeros(n), torch.ones(n)
    out = merged("dare_linear", [x], base, each("density", 0.3))
    kept = out != 0
    assert abs(float(kept.float().mean()) - 0.3) < 5 * math.sqrt(0.21 / n)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.3))
    again = merged("dare_linear", [x], base, each("density", 0.3))
    assert torch.equal(out, again)
    # two models draw independently
    two = merged("dare_linear", [x, x], base, both(density=0.3), rescale=False)
    both_kept = float((two == 2).float().mean())
    assert abs(both_kept - 0.09) < 5 * math.sqrt(0.09 / n)


def test_della_probabilities_rise_with_the_rank_in_the_row():
    rows, width = 20_000, 6
    base = torch.zeros(rows, width)
    x = base + torch.tensor(DELTA_A)
    parameters = [{"density": 0.5, "epsilon": 0.2}]
    out = merged("della_linear", [x], base, parameters)
    want = torch.tensor([0.62, 0.46, 0.30, 0.70, 0.38, 0.54])
    kept = out != 0
    nonzero = torch.tensor(DELTA_A) != 0
    share = kept.float().mean(0)
    limit = 5 * math.sqrt(0.25 / rows)
    assert bool((share - want).abs()[nonzero].max() < limit)
    for i in (0, 1, 3, 4, 5):  # each is divided by its own probability
        torch.testing.assert_close(
            float(out[kept[:, i], i].max().abs()), abs(DELTA_A[i]) / float(want[i])
        )
    out = merged("della_linear", [x], base, parameters, dialect="mergekit")
    torch.testing.assert_close(out.abs().sum(), x.abs().sum())
    assert len({round(float(v), 4) for v in (out / x)[:, nonzero][kept[:, nonzero]]}) == 1
    with pytest.raises(HyperparameterError, match="between 0 and 1"):
        merged("della", [x], base, [{"density": 0.9, "epsilon": 0.2}])


def test_della_mergekit_with_given_masks():
    # the sheet's row is torch's seed 0 in mergekit; its masks are drawn from these probabilities
    torch.manual_seed(0)
    masks = []
    for d in (DELTA_A, DELTA_B):
        order = torch.tensor(d).abs().argsort().argsort().double()
        p = (0.5 - 0.2) + 0.4 * order / 5
        masks.append(torch.bernoulli(p.float()).tolist())
    out = merged(
        "della", parameters=both(density=0.5, epsilon=0.2), dialect="mergekit", masks=masks
    )
    check(out, 1.653846, 1, -0.3, 2.307692, 0.755769, 1)


def test_sce():
    check(merged("sce"), 1.421154, 1.5, 0.5, 2, 0.875, 1.25)
    check(merged("sce", select_topk=0.5), 1, 1.5, 1, 2, 1, 1)


def test_pairs():
    check(merged("arcee_fusion", [A]), 1.5, 1, 1, 2, 1, 1)
    check(merged("nearswap", [A], t=0.2), 1.2, 0.8, 1, 1.2, 0.875, 1.2)
    check(merged("expo", [A], alpha=0.5), 1.75, 0.625, 1, 2.5, 0.8125, 1.375)
    check(merged("passthrough", [A], None, each("scale", 2)), *(2 * A).tolist())


def test_ram_magmax_consensus():
    check(merged("ram"), 1.375, 1.125, 0.5, 1.375, 0.875, 1.25)
    check(merged("ramplus_tl"), 1.375, 1.125, 0.49, 1.375, 0.875, 1.255)
    check(merged("magmax", **{"lambda": 1.0}), 1.5, 1.5, 0.5, 2, 0.875, 1.25)
    out = merged("consensus", parameters=both(tall_lambda=0.5))
    check(out, 1, 1, 1, 1, 0.75, 1)
    for factor, task, mask in (
        (0.5, 0, [1, 0, 0, 1, 1, 1]), (0.5, 1, [0, 1, 1, 0, 1, 0]),
        (1.0, 0, [1, 0, 0, 1, 0, 1]), (1.0, 1, [0, 1, 1, 0, 0, 0]),
    ):  # fmt: skip
        out = merged("consensus", parameters=both(tall_lambda=factor), task=task)
        check(out - 1, *(torch.tensor(mask) * (A + B - 2)).tolist())


def test_emr_localize_pcb():
    check(merged("emr", task=0), 1.566667, 1, 1, 2.133333, 0.858333, 1.283333)
    out = merged("emr", task=1)
    check(out, 1.5, 1.5, 0.5, 1, 0.875, 1)  # its scale is 1
    check(merged("localize_stitch", parameters=both(density=0.5)), 1.5, 1.5, 0.5, 2, 1, 1)
    check(merged("pcb", ratio=0.5), 1.5, 1.5, 0.5, 1.5, 1, 1)


def test_localize_and_stitch_averages_given_masks_by_count():
    out = merged("localize_stitch", masks=[[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]])
    check(out, 1.375, 0.75, 0.5, 1, 1, 1)


def test_geometry():
    out = merged("slerp", [B], A, t=0.25)
    want = (1.472788, 0.964399, 0.894999, 1.724854, 0.897127, 1.216466)
    check(out, *want)
    w = each("weight", 0.75, 0.25)
    check(merged("nuslerp", base=None, parameters=w), *want)
    out = merged("nuslerp", parameters=w)
    check(out, 1.618931, 0.974331, 0.772963, 1.897305, 0.816888, 1.252706)
    out = merged("multislerp", parameters=w)
    check(out, 1.589013, 0.995798, 0.767757, 1.829662, 0.823716, 1.236446)
    out = merged("multislerp", base=None, parameters=w)
    check(out, 1.476398, 1.006087, 0.882212, 1.687885, 0.90588, 1.217575)
    check(merged("karcher", base=None), 1.4254, 1.223695, 0.755602, 1.365205, 0.916649, 1.1635)
    check(merged("model_stock"), 0.752241, 0.917414, 1.165173, 0.752241, 1.082586, 0.917414)


def test_rows_have_their_own_angles():
    x, y = torch.stack([A, B, A]), torch.stack([B, A, A])
    w = each("weight", 0.75, 0.25)
    out = merged("nuslerp", [x, y], None, w, nuslerp_flatten=False)
    first = merged("nuslerp", [A, B], None, w)
    torch.testing.assert_close(out[0], first)
    torch.testing.assert_close(out[2], A)
    turned = merged(
        "nuslerp", [x.t().contiguous(), y.t().contiguous()], None, w,
        nuslerp_flatten=False, nuslerp_row_wise=True,
    )  # fmt: skip
    torch.testing.assert_close(turned.t(), out)
    stock = merged("model_stock", [x, y], torch.ones(3, 6), filter_wise=True)
    torch.testing.assert_close(stock[1], merged("model_stock", [B, A]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_wide_and_rounded_once(dtype):
    gen = torch.Generator().manual_seed(0)
    base = torch.randn(70_001, generator=gen).to(dtype)
    models = [
        (base.float() + 0.01 * torch.randn(70_001, generator=gen)).to(dtype) for _ in range(3)
    ]
    out = merged("task_arithmetic", models, base, each("weight", 0.3, 0.3, 0.3), dtype=dtype)
    exact = base.double() + sum(0.3 * (m.double() - base.double()) for m in models)
    off = (out.double() - exact.to(dtype).double()).abs()
    assert float((off > 0).double().mean()) < 1e-3  # only what f32 puts on the other side of a half
    assert bool((off <= exact.abs() * 2.0**-7).all())


@pytest.mark.parametrize("n", [5, 5000, 300_001])
@pytest.mark.parametrize("kind", ["normal", "bf16", "mostly zero", "equal"])
def test_cuts_are_exact(n, kind):
    from retouch.merge.streams import Streams

    gen = torch.Generator().manual_seed(n)
    base = torch.randn(n, generator=gen)
    x = base + torch.randn(n, generator=gen) ** 3
    if kind == "bf16":
        base, x = base.bfloat16(), x.bfloat16()
    if kind == "mostly zero":
        x = torch.where(torch.rand(n, generator=gen) < 0.9, base, x)
    if kind == "equal":
        base, x = torch.zeros(n), torch.ones(n)
    size = (x.float() - base.float()).abs()
    order = size.argsort(descending=True, stable=True)
    _, job = job_of("task_arithmetic", [x], base, [{}], {}, None)
    streams = Streams.of(job)
    for k in sorted({0, 1, n // 100, n // 3, n - 1, n}):
        streams.low = [None]
        streams.low = streams.cuts([k])
        kept = torch.zeros(n, dtype=torch.bool)
        kept[order[:k]] = True
        got = streams.blend("sum", torch.float32, onto_base=False)
        torch.testing.assert_close(got, torch.where(kept, x.float() - base.float(), 0.0))


def test_a_stretch_gives_the_bits_of_the_whole():
    gen = torch.Generator().manual_seed(3)
    base = torch.randn(40, 37, generator=gen).bfloat16()
    models = [(base + torch.randn(40, 37, generator=gen) / 8).bfloat16() for _ in range(3)]
    for name in method_names():
        method = method_named(name)
        if not method.pieces:
            continue
        given = {
            "weight": 0.5,
            "density": 0.4,
            "gamma": 0.05,
            "epsilon": 0.1,
            "scale": 0.5,
            "tall_lambda": 0.4,
        }
        common = {"t": 0.3, "task": 1, "lambda": 0.7}
        tensors = models[: method.models[1] or 3]
        parameters = [{k: v for k, v in given.items() if k in method.per_model}] * len(tensors)
        shared = {k: v for k, v in common.items() if k in method.shared}
        for dialect in method.dialects:
            _, job = job_of(
                name, tensors, None if method.base == "none" else base, parameters, shared, dialect,
                torch.bfloat16,
            )  # fmt: skip
            if method.global_scope(dialect):
                job.state = method.begin(job)
                while True:
                    method.observe(job)
                    if not method.settle(job.state):
                        break
            job.local = method.prepare(job)
            whole = method.merge(job)
            parts = [method.merge(job.piece(a, b)) for a, b in ((0, 3), (3, 20), (20, 40))]
            assert torch.equal(torch.cat(parts), whole), (name, dialect)


def test_not_a_number_is_named():
    bad = A.clone()
    bad[2] = math.nan
    for name, dialect in (("task_arithmetic", None), ("ties", "mergekit"), ("ties", "paper")):
        with pytest.raises(ScoreError, match="w of m1 is NaN at flat position 2"):
            parameters = both(density=0.5) if name == "ties" else None
            merged(name, [A, bad], parameters=parameters, dialect=dialect)
    with pytest.raises(ScoreError, match="the base"):
        merged("task_arithmetic", base=bad)


def test_parameters_are_checked():
    method = method_named("ties")
    with pytest.raises(HyperparameterError, match="did you mean 'density'"):
        method.resolve(None, [{"densty": 0.5}], {})
    with pytest.raises(HyperparameterError, match=r"from 0.0 to 1.0, got 1.5"):
        method.resolve(None, [{"density": 1.5}], {})
    with pytest.raises(HyperparameterError, match="no dialect 'mergkit'; did you mean 'mergekit'"):
        method.resolve("mergkit", [{}], {})
    with pytest.raises(HyperparameterError, match="needs a value for 'weight'"):
        method_named("linear").resolve(None, [{}], {})
    with pytest.raises(HyperparameterError, match="did you mean"):
        method_named("task_arithmatic")

"""Merging by matrices and statistics: worked numbers, and what must hold for any input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retouch import errors, linalg
from retouch.merge import adapters, editing, matrix, statistics, trajectory

D = torch.float64
DELTA_A = torch.tensor([0.5, -0.25, 0, 1, -0.125, 0.25])
DELTA_B = torch.tensor([0.25, 0.5, -0.5, -0.25, -0.125, 0])
T_A = torch.tensor([[2.0, 0], [0, 1]])
T_B = torch.tensor([[1.0, 1], [1, 0]])


def near(got, *wanted, tol=1e-6):
    want = torch.tensor(wanted, dtype=D)
    assert torch.allclose(got.reshape(-1).double(), want, rtol=0, atol=tol), got


def some(seed=0, count=3, shape=(7, 5)):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen) for _ in range(count)]


# --- worked numbers ---------------------------------------------------------------------------------


def test_tsv():
    near(matrix.tsv([T_A, T_B]), 1.909423, -0.16246, -0.16246, 1.708611)


def test_iso_c_makes_all_singular_values_their_mean():
    near(matrix.iso_c([T_A, T_B]), 2, 0, 0, 2)
    u, s, vh = torch.linalg.svd(sum(some()).double(), full_matrices=False)
    assert torch.allclose(matrix.iso_c(some()), s.mean() * u @ vh)


def test_iso_cts_with_nothing_but_the_common_space_is_iso_c():
    assert torch.allclose(matrix.iso_cts(some(), 1.0), matrix.iso_c(some()))


def test_iso_cts_takes_equally_many_directions_of_every_task():
    # min(out, in) = 2: int(2 * .5) = 1 common, round(1 / 1) * 1 = 1 of the one task
    one = torch.tensor([[3.0, 0], [0, 1], [0, 0]])
    near(matrix.iso_cts([one], 0.5), 2, 0, 0, 2, 0, 0)
    # two tasks and one direction left: round(1 / 2) = 0, all is common
    assert torch.allclose(matrix.iso_cts([T_A, T_B], 0.5), matrix.iso_c([T_A, T_B]))
    # three tasks that share nothing, in four dimensions with one common direction
    apart = [torch.zeros(4, 4) for _ in range(3)]
    for i, t in enumerate(apart):
        t[0, 0], t[i + 1, i + 1] = 10.0, 1.0 + i
    near(matrix.iso_cts(apart, 0.3), *((30 + 1 + 2 + 3) / 4 * torch.eye(4)).flatten().tolist())


def test_knots_aligns_the_tasks():
    u, parts = matrix.aligned([T_A, T_B])
    near(torch.cat(parts, 1).norm(dim=1), 2.497212, 1.328131)
    assert torch.allclose(u @ parts[0], T_A.double()) and torch.allclose(u @ parts[1], T_B.double())
    assert torch.allclose(matrix.knots([T_A, T_B], sum), (T_A + T_B).double())
    assert not matrix.knots([torch.zeros(2, 3)] * 2, sum).any()


def test_wudi():
    both = [T_A, T_B]
    assert math.isclose(matrix.wudi_loss(T_A + T_B, both), 4.8)
    assert math.isclose(matrix.wudi_loss(T_A + T_B, both, squared=False), 9.221075, abs_tol=1e-6)
    near(matrix.wudi(both), 1.735099, 0.165563, 0.264901, 0.834437)


def test_opcm():
    near(matrix.opcm_project(T_A, T_B, 0.5), 0, 1, 1, 0)
    merged = matrix.opcm([T_A, T_B])
    near(merged, 2, 1, 1, 1)
    norms = [float(t.norm()) for t in (T_A, T_B)]
    scale = matrix.opcm_scale(float(merged.norm()), norms)
    near(merged * scale, 1.499808, 0.749904, 0.749904, 0.749904)


def test_regmean():
    w = [torch.eye(2), torch.tensor([[0.0, 1], [1, 0]])]
    g = [torch.tensor([[2.0, 1], [1, 2]]), torch.diag(torch.tensor([1.0, 3]))]
    near(statistics.regmean(w, g, 1.0), 0.428571, 0.714286, 0.571429, 0.285714)
    near(statistics.regmean(w, g, 0.9), 0.457364, 0.697674, 0.542636, 0.302326)


def test_fisher():
    fishers = [torch.tensor([4.0, 1, 0, 1, 1, 1]), torch.tensor([1.0, 1, 2, 0, 1, 3])]
    got = statistics.fisher_mean([1 + DELTA_A, 1 + DELTA_B], fishers)
    near(got, 1.45, 1.125, 0.5, 1.999999, 0.875, 1.0625)


def test_rank_one():
    near(editing.truncated(T_B, 1), 1.17082, 0.723607, 0.723607, 0.447214)
    near(trajectory.rank_k(T_B), 1.253324, 0.774597, 0.774597, 0.478727)
    near(trajectory.rank_k(T_B, keep_norm=False), 1.17082, 0.723607, 0.723607, 0.447214)


def test_robust_merge():
    a = [[1, 0.5, -0.25, 0, 0.125], [2, 0.5, 0.25, -0.5, 1]]
    b = [[0.5, 0.5, 1, 0.25, 0], [0.125, -1, 0.25, 0.5, 0.25]]
    first = torch.tensor(a), torch.tensor([[1, 0], [0.5, 0.25]])
    second = torch.tensor(b), torch.tensor([[0.5, 1], [0.25, 0.5]])
    got_a, got_b = adapters.robust_merge([first, second], density=0.5, tail=0.5)
    near(got_a, 3, 2, 2, 0.5, 0, 4, -1, 0.5, 0, 2.5)
    near(got_b, 1.540541, 0.918919, 0.540541, 0.72973)


def test_mos():
    near(adapters.mos(torch.zeros(1), torch.tensor([2.0 + 4.0]), 2), 0.3)
    assert torch.equal(adapters.mos(torch.ones(2), torch.zeros(2), 0), torch.ones(2))


def test_dare_in_its_general_form():
    kept = torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    near(editing.dare(DELTA_A, kept, 0.5, 0.5), 0.75, -0.125, 0, 1.5, -0.1875, 0.125)
    near(editing.dare(DELTA_A, kept, 0.5), 1, 0, 0, 2, -0.25, 0)


def test_sign_magnitudes():
    size = 0.3541666
    near(editing.sign_magnitudes(DELTA_A), size, -size, size, size, -size, size)
    small, large = 0.125, 1.75 / 3  # of magnitudes 0 .125 .25 and .25 .5 1: the first .25 is small
    near(editing.sign_magnitudes(DELTA_A, 2), large, -small, small, large, -small, large)


def test_twin_merging_of_the_worked_example():
    shared = (DELTA_A + DELTA_B) / 2
    rest = editing.twin_residual((DELTA_A - shared)[None], 2 / 6, "magnitude")
    near(1 + shared + rest, 1.375, 0.75, 0.75, 2, 0.875, 1.125)
    vector = torch.ones(3)
    assert torch.equal(editing.twin_residual(vector, 0.1, "svd"), vector.double())


def test_relex_follows_a_line():
    (d,) = some(count=1)
    assert torch.allclose(trajectory.relex([d, 2 * d, 3 * d], [1, 2, 3], 6), 6 * d.double())
    with pytest.raises(errors.HyperparameterError, match="two of them different"):
        trajectory.relex([d, d], [3, 3], 6)


def test_relex_equals_projection_fit_and_reconstruction():
    deltas, steps = some(4, 5, (6, 4)), [10, 20, 30, 40, 50]
    m = torch.stack([d.flatten() for d in deltas]).double()
    _, _, vh = torch.linalg.svd(m, full_matrices=False)
    course = m @ vh[:2].T
    t = torch.tensor(steps, dtype=D)
    line = torch.linalg.lstsq(torch.stack([t, torch.ones_like(t)], 1), course).solution
    want = (line[0] * 200 + line[1]) @ vh[:2]
    assert torch.allclose(trajectory.relex(deltas, steps, 200, rank=2), want.reshape(6, 4))


def test_alpharl_follows_a_line_of_rank_one_updates():
    u, v = some(1, 2, (5,))
    course = [torch.outer(u * t, v[:4]) for t in (1.0, 2.0, 3.0)]
    got = trajectory.alpharl(course, [0.1, 0.2, 0.3], 0.6)
    assert torch.allclose(got, 6 * torch.outer(u, v[:4]).double())


def test_alpharl_equals_partial_least_squares():
    deltas, y = some(5, 6, (8, 3)), np.array([0.1, 0.15, 0.3, 0.28, 0.4, 0.45])
    leading = [np.linalg.svd(d.double().numpy()) for d in deltas]
    rows = [u[:, 0] * s[0] for u, s, _ in leading]
    for i in reversed(range(5)):
        rows[i] = rows[i] * (1 if rows[i] @ rows[i + 1] >= 0 else -1)
    x = np.stack(rows)
    standard = (x - x.mean(0)) / x.std(0, ddof=1)
    u, _, _ = np.linalg.svd(standard.T @ ((y - y.mean()) / y.std(ddof=1))[:, None])
    scores = standard @ u[:, 0]
    slope, height = np.polyfit(scores, y, 1)
    loadings = np.linalg.lstsq(scores[:, None], standard, rcond=None)[0][0]
    predicted = (0.6 - height) / slope * loadings * x.std(0, ddof=1) + x.mean(0)
    want = torch.tensor(np.outer(predicted, leading[-1][2][0]))
    assert torch.allclose(trajectory.alpharl(deltas, y.tolist(), 0.6), want)


# --- what must hold -----------------------------------------------------------------------------------

FORMULAS = {
    "tsv": matrix.tsv,
    "iso_c": matrix.iso_c,
    "iso_cts": lambda ds: matrix.iso_cts(ds, 0.4),
    "knots": lambda ds: matrix.knots(ds, lambda parts: torch.stack(parts).max(0).values),
    "wudi": matrix.wudi,
    "wudi-adam": lambda ds: matrix.wudi(ds, steps=5),
    "opcm": matrix.opcm,
    "rank": lambda ds: trajectory.rank_k(ds[0], 2),
    "alpharl": lambda ds: trajectory.alpharl(ds, [0.1, 0.3, 0.2], 0.5),
    "relex": lambda ds: trajectory.relex(ds, [1, 2, 3], 9, rank=2),
    "regmean": lambda ds: statistics.regmean(ds, [d.T @ d for d in ds]),
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_signs_of_singular_vectors_do_not_matter(formula, monkeypatch):
    deltas = some(2)
    want = formula(deltas)
    real_svd, real_eigh = torch.linalg.svd, torch.linalg.eigh
    gen = torch.Generator().manual_seed(0)

    def signs(n):
        return 1.0 - 2 * torch.randint(0, 2, (n,), generator=gen).double()

    def svd(x, full_matrices=True):
        u, s, vh = real_svd(x, full_matrices=full_matrices)
        flip = signs(len(s))
        u, vh = u.clone(), vh.clone()
        u[:, : len(s)] *= flip
        vh[: len(s)] *= flip[:, None]
        u[:, len(s) :] *= signs(u.shape[1] - len(s))
        vh[len(s) :] *= signs(vh.shape[0] - len(s))[:, None]
        return torch.return_types.linalg_svd((u, s, vh))

    def eigh(x):
        values, vectors = real_eigh(x)
        return torch.return_types.linalg_eigh((values, vectors * signs(len(values))))

    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for _ in range(5):
        assert torch.allclose(formula(deltas), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_threads_change_no_bit(formula):
    deltas = some(3, 3, (150, 200))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(formula(deltas))
            assert torch.get_num_threads() == threads
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_nan_is_an_error(formula):
    deltas = some(2)
    deltas[0][1, 1] = math.nan
    with pytest.raises(errors.ScoreError, match="NaN"):
        formula(deltas)


def test_wudi_is_a_minimum_and_stays_at_the_sum_where_no_task_looks():
    deltas = some(6, 2, (4, 9))
    deltas = [d * torch.tensor([1.0] * 6 + [0] * 3) for d in deltas]  # the last inputs are unseen
    best = matrix.wudi(deltas)
    loss = matrix.wudi_loss(best, deltas)
    for noise in some(7, 5, (4, 9)):
        assert matrix.wudi_loss(best + 1e-3 * noise, deltas) >= loss
    assert not best[:, 6:].abs().gt(1e-12).any()
    assert matrix.wudi_loss(matrix.wudi(deltas, steps=300, lr=1e-2), deltas) < matrix.wudi_loss(
        sum(deltas), deltas
    )


def test_wudi_by_adam_equals_torch():
    deltas = some(8, 2, (4, 3))
    value = sum(deltas).double().requires_grad_()
    optimizer = torch.optim.Adam([value], lr=1e-3)
    for _ in range(7):
        optimizer.zero_grad()
        terms = [((value - d) @ d.double().T).square().sum() / d.double().norm() for d in deltas]
        sum(terms).backward()
        optimizer.step()
    assert torch.allclose(matrix.wudi(deltas, squared=False, steps=7, lr=1e-3), value.detach())


def test_opcm_equals_the_sequence_that_rescales_after_every_step():
    """The literal algorithm, on a model of one matrix and one vector."""
    models = [{"w": w, "b": b} for w, b in zip(some(9, 4), some(10, 4, (7,)), strict=True)]

    def norm(state):
        return math.sqrt(sum(float(t.double().square().sum()) for t in state.values()))

    merged, factor = {n: t.double() for n, t in models[0].items()}, 1.0
    norms = [norm(models[0])]
    for model in models[1:]:
        norms.append(norm(model))
        u, s, vh = torch.linalg.svd(merged["w"], full_matrices=True)
        split = int((s.cumsum(0) / s.sum() > 0.5).nonzero()[0])
        inside = u.T @ model["w"].double() @ vh.T
        inside.fill_diagonal_(0)
        inside[:split, :split] = 0
        new = {"w": u @ inside @ vh, "b": model["b"].double()}
        raw = {n: factor * merged[n] + new[n] for n in merged}
        mean = sum(norms) / len(norms)
        factor = norm(raw) / mean
        merged = {n: t * mean / norm(raw) for n, t in raw.items()}
    got = {n: matrix.opcm([m[n] for m in models]) for n in merged}
    scale = matrix.opcm_scale(norm(got), norms)
    for n in merged:
        assert torch.allclose(got[n] * scale, merged[n])


def test_regmean_minimises_the_distance_of_outputs():
    gen = torch.Generator().manual_seed(0)
    inputs = [torch.randn(20, 5, generator=gen, dtype=D) for _ in range(2)]
    weights = [w.double() for w in some(11, 2, (3, 5))]
    got = statistics.regmean(weights, [x.T @ x for x in inputs], 1.0)
    x, y = torch.cat(inputs), torch.cat([a @ w.T for a, w in zip(inputs, weights, strict=True)])
    assert torch.allclose(got, torch.linalg.lstsq(x, y).solution.T)


def test_regmean_is_the_mean_where_no_model_had_inputs():
    weights = some(12, 2, (3, 4))
    gram = torch.diag(torch.tensor([1.0, 2, 0, 0]))
    got = statistics.regmean(weights, [gram, 3 * gram])
    assert torch.allclose(got[:, 2:], (weights[0] + weights[1])[:, 2:].double() / 2)
    assert torch.allclose(got[:, :2], (0.25 * weights[0] + 0.75 * weights[1])[:, :2].double())


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 1000))
def test_any_shape(rows, columns, count, seed):
    deltas = some(seed, count, (rows, columns))
    for name in ("tsv", "iso_c", "iso_cts", "knots", "wudi", "opcm"):
        got = FORMULAS[name](deltas)
        assert got.shape == (rows, columns) and got.dtype == D and bool(got.isfinite().all())
    if count == 1:
        assert torch.allclose(matrix.tsv(deltas), deltas[0].double(), atol=1e-9)
        assert torch.allclose(matrix.opcm(deltas), deltas[0].double())
    assert not matrix.opcm([torch.zeros(rows, columns)] * 2).any()
    assert not matrix.iso_c([torch.zeros(rows, columns)] * 2).any()


def test_threads_are_given_back_when_several_use_them():
    before = torch.get_num_threads()
    with linalg.one_thread(), linalg.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), linalg.one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: statistics.fisher_mean([DELTA_A], [T_A]), errors.ShapeError, "Fisher"),
        (lambda: statistics.fisher_mean([DELTA_A], [DELTA_A]), errors.ScoreError, "negative"),
        (lambda: statistics.regmean([T_A], [torch.eye(3)]), errors.ShapeError, "input feature"),
        (lambda: statistics.regmean([T_A], [-T_A]), errors.ScoreError, "semi-definite"),
        (lambda: matrix.iso_cts([T_A], 1.5), errors.HyperparameterError, "fraction"),
        (lambda: trajectory.alpharl([T_A], [1], 2), errors.HyperparameterError, "at least 3"),
        (lambda: trajectory.alpharl([T_A] * 3, [1] * 3, 2), errors.HyperparameterError, "same"),
        (lambda: editing.dare(T_A, T_A > 0, 1.0), errors.HyperparameterError, "below 1"),
        (lambda: editing.sign_magnitudes(T_A, 0), errors.HyperparameterError, "levels"),
        (lambda: adapters.robust_merge([(T_A, T_A)], 0), errors.HyperparameterError, "density"),
        (
            lambda: adapters.robust_merge([(T_A, T_A), (T_A[:1], T_A)]),
            errors.ShapeError,
            "different shapes",
        ),
    ],
)
def test_what_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()

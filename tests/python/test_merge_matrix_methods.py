"""The merge methods on matrices, statistics and trajectories, as an engine calls them."""

import math

import pytest
import torch
from deltas import llama
from safetensors.torch import load_file, save_file

from retouch import Delta, errors
from retouch.compress import Quantise
from retouch.merge import matrix, trajectory
from retouch.merge.base import Job, method_named, method_names
from retouch.merge.build import build
from retouch.merge.engine import run as run_plan

DELTA_A = torch.tensor([0.5, -0.25, 0, 1, -0.125, 0.25])
DELTA_B = torch.tensor([0.25, 0.5, -0.5, -0.25, -0.125, 0])
T_A = torch.tensor([[2.0, 0], [0, 1]])
T_B = torch.tensor([[1.0, 1], [1, 0]])


def job(name, tensors, base=None, models=None, dialect=None, dtype=torch.float32, **given):
    """A job; parameters that are lists belong to the models one by one."""
    method = method_named(name)
    own = {k: v for k, v in given.items() if k in method.per_model}
    parameters = [{k: v[i] for k, v in own.items()} for i in range(len(tensors))]
    shared = {k.rstrip("_"): v for k, v in given.items() if k not in own}
    chosen, parameters, shared = method.resolve(dialect, parameters, shared)
    ids = models or [f"m{i}" for i in range(len(tensors))]
    return method, Job("w", base, list(tensors), ids, parameters, shared, chosen, out_dtype=dtype)


def run(*args, **kwargs):
    method, one = job(*args, **kwargs)
    if method.global_scope(one.dialect):
        one.state = method.begin(one)
        method.observe(one)
        assert not method.settle(one.state)
    out = method.merge(one)
    assert out.dtype == one.out_dtype and out.shape == one.tensors[0].shape
    assert method.memory(out.numel(), len(one.tensors), one.dialect) > 0
    return out


def near(got, *wanted):
    assert torch.allclose(
        got.reshape(-1), torch.tensor(wanted, dtype=got.dtype), rtol=0, atol=2e-6
    ), got


ZERO = torch.zeros(2, 2)


def test_worked_numbers_of_matrices():
    near(run("tsv", [T_A, T_B], ZERO), 1.909423, -0.16246, -0.16246, 1.708611)
    near(run("iso_c", [T_A, T_B], ZERO), 2, 0, 0, 2)
    near(run("wudi", [T_A, T_B], ZERO), 1.735099, 0.165563, 0.264901, 0.834437)
    near(run("opcm", [T_A, T_B], ZERO), 1.499808, 0.749904, 0.749904, 0.749904)
    near(run("rank", [T_B], ZERO), 1.253324, 0.774597, 0.774597, 0.478727)
    near(run("rank", [1 + T_B], 1 + ZERO, keep_norm=False, lambda_=2.0),
         3.34164, 2.447214, 2.447214, 1.894427)  # fmt: skip


def test_weights_and_lambda_scale_the_differences():
    base = torch.tensor([[0.5, 1], [1, 0.25]])
    tensors = [base + 2 * T_A, base + 4 * T_B]
    got = run("tsv", tensors, base, weight=[0.5, 0.25], lambda_=3.0)
    want = base + 3 * torch.tensor([[1.909423, -0.16246], [-0.16246, 1.708611]])
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "wudi"])
def test_what_is_no_matrix_is_averaged(name):
    near(run(name, [1 + DELTA_A, 1 + DELTA_B], torch.ones(6)),
         1.375, 1.125, 0.75, 1.375, 0.875, 1.125)  # fmt: skip


def test_wudi_as_released():
    both = [T_A.double(), T_B.double()]
    want = matrix.wudi(both, squared=False, steps=300)
    got = run("wudi", [T_A, T_B], ZERO, dialect="released")
    assert torch.equal(got, want.float())
    assert not torch.allclose(got, run("wudi", [T_A, T_B], ZERO))


def test_knots_of_vectors_is_the_released_ties():
    # keeps four of each (thresholds keep equals); the worked row "TIES official K=.5 dis-mean"
    got = run("knots", [1 + DELTA_A, 1 + DELTA_B], torch.ones(6), density=[0.5, 0.5], lambda_=1.0)
    near(got, 1.375, 1.5, 0.5, 2, 1, 1.25)
    whole = run("knots", [T_A], ZERO, density=[1.0], lambda_=1.0)
    assert torch.allclose(whole, T_A, atol=1e-6)


def test_knots_with_dare_has_masks_of_seed_model_and_name():
    def once(**kwargs):
        return run("knots", [T_A, T_B], ZERO, inner="dare_ties", density=[0.5, 0.5], **kwargs)

    assert torch.equal(once(), once())
    assert any(not torch.equal(once(), once(models=[f"x{i}", "y"])) for i in range(4))


def test_opcm_scales_all_tensors_by_one_factor():
    method, one = job("opcm", [T_A, T_B], ZERO)
    _, other = job("opcm", [DELTA_A, DELTA_B], torch.zeros(6))
    other.name = "b"
    state = method.begin(one)
    for each in (other, one):
        each.state = state
        method.observe(each)
    method.settle(state)
    norms = [math.sqrt(float(a.square().sum() + b.square().sum()))
             for a, b in ((T_A, DELTA_A), (T_B, DELTA_B))]  # fmt: skip
    raw = [matrix.opcm([T_A, T_B]), matrix.opcm([DELTA_A, DELTA_B])]
    size = math.sqrt(sum(float(t.square().sum()) for t in raw))
    for each, want in zip((one, other), raw, strict=True):
        got = method.merge(each)
        assert torch.allclose(got, (want * sum(norms) / 2 / size).float())
    total = math.sqrt(sum(float(method.merge(j).square().sum()) for j in (one, other)))
    assert math.isclose(total, sum(norms) / 2, rel_tol=1e-6)


def test_twin_merging():
    tensors = [(1 + d)[None] for d in (DELTA_A, DELTA_B)]
    given = {"lambda_": 0.5, "density": 2 / 6, "strategy": "magnitude"}
    got = run("twin", tensors, torch.ones(1, 6), router=[1.0, 0.0], **given)
    near(got, 1.375, 0.75, 0.75, 2, 0.875, 1.125)
    whole = run("twin", tensors, torch.ones(1, 6), router=[1.0, 0.0], lambda_=0.5, density=1.0)
    assert torch.allclose(whole, tensors[0], atol=1e-6)
    with pytest.raises(errors.HyperparameterError, match="router"):
        run("twin", tensors, torch.ones(1, 6))


def test_fisher_reads_its_files(tmp_path):
    files = [str(tmp_path / f"{i}.safetensors") for i in "ab"]
    save_file({"w": torch.tensor([4.0, 1, 0, 1, 1, 1])}, files[0])
    save_file({"w": torch.tensor([1.0, 1, 2, 0, 1, 3])}, files[1])
    tensors = [1 + DELTA_A, 1 + DELTA_B]
    near(run("fisher", tensors, fisher=files), 1.45, 1.125, 0.5, 1.999999, 0.875, 1.0625)
    # coefficients by 1 / norm: sqrt(20), sqrt(16)
    a, b = (1 / math.sqrt(n) for n in (20.0, 16.0))
    got = run("fisher", tensors, fisher=files, dialect="normalized")
    assert math.isclose(float(got[0]), (4 * a * 1.5 + b * 1.25) / (4 * a + b), rel_tol=1e-5)
    save_file({"other": torch.ones(6)}, tmp_path / "c.safetensors")
    with pytest.raises(errors.FormatError, match="no Fisher information for w"):
        run("fisher", tensors, fisher=[files[0], str(tmp_path / "c.safetensors")])


def test_regmean_reads_its_files(tmp_path):
    files = [str(tmp_path / f"{i}.safetensors") for i in "ab"]
    save_file({"w": torch.tensor([[2.0, 1], [1, 2]])}, files[0])
    save_file({"w": torch.diag(torch.tensor([1.0, 3]))}, files[1])
    tensors = [torch.eye(2), torch.eye(2).flip(0)]
    near(run("regmean", tensors, gram=files), 0.457364, 0.697674, 0.542636, 0.302326)
    near(run("regmean", tensors, gram=files, shrink=1.0), 0.428571, 0.714286, 0.571429, 0.285714)
    save_file({"other": torch.eye(2)}, tmp_path / "c.safetensors")
    method, one = job("regmean", tensors, gram=[files[0], str(tmp_path / "c.safetensors")])
    near(method.merge(one), 0.5, 0.5, 0.5, 0.5)
    assert "plain mean" in one.notes["gram"]


def test_trajectories():
    base = torch.tensor([1.0, -1, 2])
    d = torch.tensor([0.5, 0.25, -1])
    got = run("relex", [base + d, base + 2 * d], base, step=[1.0, 2.0], target=6.0)
    assert torch.allclose(got, base + 6 * d)
    u = torch.outer(torch.tensor([1.0, 2]), torch.tensor([1.0, -1]))
    course = [u, 2 * u, 3 * u]
    got = run("alpharl", course, ZERO, accuracy=[0.1, 0.2, 0.3], target=0.6)
    assert torch.allclose(got, 6 * u, atol=1e-5)
    got = run("alpharl", [base + d] * 3, base, accuracy=[0.1, 0.2, 0.3], target=0.6)
    assert torch.equal(got, base + d)  # no matrix: the last checkpoint
    want = trajectory.alpharl(course, [0.3, 0.2, 0.3], 0.6)
    got = run("alpharl", course, ZERO, accuracy=[0.3, 0.2, 0.3], target=0.6)
    assert torch.allclose(got, want.float())


def test_edits():
    one = torch.ones(6)
    matrices = [(1 + d)[None] for d in (DELTA_A, DELTA_B)]
    a, b = 0.354167, 0.270833
    want = [1 + a + b, 1 - a + b, 1 + a - b, 1 + a - b, 1 - a - b, 1 + a + b]
    near(run("bitdelta", matrices, one[None]), *want)
    near(run("bitdelta", [1 + DELTA_A, 1 + DELTA_B], one), *(1 + DELTA_A + DELTA_B).tolist())


def test_dare_with_a_share_keeps_the_expectation():
    delta = torch.full((40_000,), 0.5)
    got = run("dare_share", [1 + delta], torch.ones(40_000), density=[0.25], share=[0.5])
    small, large = 0.5 * 0.5, 0.5 * (1 - 0.5 * 0.75) / 0.25
    kept = (got - 1 - large).abs() < 1e-6
    assert bool((kept | ((got - 1 - small).abs() < 1e-6)).all())
    assert abs(float(kept.float().mean()) - 0.25) < 0.01
    assert abs(float(got.mean()) - 1.5) < 0.02
    same = run("dare_share", [1 + delta[:100]], torch.ones(100), density=[0.25], share=[0.5])
    assert torch.equal(got[:100], same)  # position by position, whatever the size


def test_half_precision_is_rounded_once():
    base, model = (torch.randn(4, 5).bfloat16() for _ in range(2))
    got = run("rank", [model], base, rank=4, lambda_=1.5, dtype=torch.bfloat16)
    want = base.double() + 1.5 * (model.double() - base.double())
    # all ranks: the difference itself, up to 1e-15
    assert torch.equal(got, want.float().bfloat16())


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "knots", "wudi", "opcm", "rank"])
def test_nan_names_the_tensor(name):
    bad = T_A.clone()
    bad[0, 0] = math.nan
    with pytest.raises(errors.ScoreError, match="w holds NaN"):
        run(name, [bad] if name == "rank" else [bad, T_B], ZERO)


def test_all_are_registered():
    names = set(method_names())
    assert names >= {
        "tsv", "iso_c", "iso_cts", "knots", "wudi", "opcm", "twin", "fisher", "regmean", "relex",
        "alpharl", "rank", "dare_share", "bitdelta",
    }  # fmt: skip


# --- through the engine ----------------------------------------------------------------------------------


def llamas(folder, count=3):
    """Checkpoints of a base and of models near it."""
    out = []
    for i in range(count + 1):
        model = llama()
        gen = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * i * torch.randn(p.shape, generator=gen))
        model.save_pretrained(folder / f"m{i}")
        out.append(str(folder / f"m{i}"))
    return out


GIVEN = {
    "tsv": {}, "iso_c": {}, "iso_cts": {}, "knots": {}, "wudi": {}, "opcm": {},
    "twin": {"parameters": [{"router": x} for x in (1.0, 0.0, 0.5)]},
    "relex": {"parameters": [{"step": x} for x in (1.0, 2.0, 3.0)], "shared": {"target": 9.0}},
    "alpharl": {
        "parameters": [{"accuracy": x} for x in (0.1, 0.2, 0.25)], "shared": {"target": 0.5},
    },
    "dare_share": {"parameters": {"density": 0.5}},
    "bitdelta": {},
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_merged_checkpoints_are_models(name, tmp_path):
    base, *models = llamas(tmp_path)
    plan = build(name, models, base=base, **GIVEN[name])
    run_plan(plan, tmp_path / "out")
    merged = type(llama()).from_pretrained(tmp_path / "out").state_dict()
    start, one = (type(llama()).from_pretrained(p).state_dict() for p in (base, models[0]))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert bool(merged[key].isfinite().all())
    assert not torch.equal(merged[key], start[key]) and not torch.equal(merged[key], one[key])
    run_plan(plan, tmp_path / "again")
    a, b = (tmp_path / d / "model.safetensors" for d in ("out", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_compressed_deltas_are_merged_as_what_they_stand_for(tmp_path):
    base, model, _, _ = llamas(tmp_path)
    delta = Delta.between(base, model).compress(Quantise(4))
    delta.save_pretrained(tmp_path / "d")
    run_plan(build("iso_c", [str(tmp_path / "d")], base=base), tmp_path / "out")
    whole = type(llama()).from_pretrained(base)
    delta.apply_(whole)
    whole.save_pretrained(tmp_path / "whole")
    run_plan(build("iso_c", [str(tmp_path / "whole")], base=base), tmp_path / "want")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "want"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

"""Two real processes under torchrun (gloo) train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import assert_same

HERE = Path(__file__).parent
RUNS = [
    "sampled", "dense", "accumulated", "accumulated-dense", "llama", "static", "unused",
    "refusals", "shared", "moving", "moving-random", "moving-unused", "micro-gate",
]  # fmt: skip
WAYS = ["master", "stochastic", "kahan"]
ROUNDED = ["AdamW", "AdamW8", "SGD", "Lion", "Adafactor"]
TRAINER = ["trainer-sampled", "trainer-dense"]
ALONE = ["sampled", "dense", "accumulated", "accumulated-dense", "llama"]


def launch(folder: Path, names: list[str], count: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(count)]  # fmt: skip
    script = [str(HERE / "ddp_runs.py"), str(folder), *names]
    alone = [sys.executable, *script]
    done = subprocess.run(
        torchrun + script if count > 1 else alone,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(folder):
    """Results of both processes, by name of the run."""
    launch(folder, RUNS, 2)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in RUNS}


@pytest.fixture(scope="module")
def one():
    """The same runs in this process alone."""
    import ddp_runs

    return {
        "sampled": ddp_runs.train("sampled"),
        "dense": ddp_runs.train("dense"),
        "accumulated": ddp_runs.train("sampled", micro=3),
        "accumulated-dense": ddp_runs.train("dense", micro=3),
        "llama": ddp_runs.train("sampled", kind="llama"),
    }


@pytest.mark.parametrize("name", ALONE)
def test_two_processes_train_what_one_does(name, one, two):
    first, second = two[name]
    assert_same(first["weights"], second["weights"])
    assert first["norms"] == second["norms"]
    torch.testing.assert_close(first["norms"], one[name]["norms"], rtol=1e-4, atol=0)
    for n, want in one[name]["weights"].items():
        # Adam divides by the size of a gradient, however small: where it is noise, so is the step
        assert ((first["weights"][n] - want).abs() > 1e-4).float().mean() < 0.01, n


@pytest.mark.parametrize("name", ["moving", "moving-random"])
def test_a_mask_moves_alike_in_all_processes(name, two):
    import ddp_runs

    first, second = two[name]
    alone = ddp_runs.moving(collect=name == "moving")
    assert_same(first["weights"], second["weights"])
    for mine, other, want in zip(first["masks"], second["masks"], alone["masks"], strict=True):
        assert mine.keys() == other.keys() == want.keys()
        assert all(torch.equal(mine[n], other[n]) and torch.equal(mine[n], want[n]) for n in want)
    assert len({str(masks) for masks in alone["masks"]}) > 2
    for n, want in alone["weights"].items():
        assert ((first["weights"][n] - want).abs() > 1e-4).float().mean() < 0.01, n


def test_gradients_of_layers_that_one_process_uses_are_collected(two):
    first, second = two["moving-unused"]
    assert_same(first["weights"], second["weights"])
    assert first["masks"].keys() == {"experts.0.weight", "experts.1.weight"}
    for n, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][n]) and mask.numel() == 2


@pytest.fixture(scope="module")
def rounded(folder):
    """Runs of 16-bit weights by way, optimizer and model, of both processes."""
    names = [
        f"{way}-{name}-{kind}" for way in WAYS for name in ROUNDED for kind in ("exact", "net")
    ]
    launch(folder, names, 2)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in names}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("kind", ["exact", "net"])
def test_rounding_is_alike_in_all_processes_and_resumes(way, name, kind, rounded):
    first, second = rounded[f"{way}-{name}-{kind}"]
    for what in ("weights", "resumed", "state", "values"):
        assert_same(first[what], second[what])
    assert_same(first["weights"], first["resumed"])
    moved = [not torch.equal(w, first["start"][n]) for n, w in first["weights"].items()]
    assert sum(moved) >= 4
    narrow = {v.dtype for v in first["values"].values()}
    assert narrow == {torch.float32 if way == "master" else torch.bfloat16}
    assert any("kahan_comp" in key for key in first["state"]) == (way == "kahan")
    assert any("_codes" in key for key in first["state"]) == (name == "AdamW8" and kind == "exact")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_in_two_processes_is_that_of_one(way, name, rounded):
    """Bit for bit, where no sum of gradients is rounded: draws know neither rank nor world size."""
    import ddp_runs

    alone = ddp_runs.rounded(way, name)
    first, _ = rounded[f"{way}-{name}-exact"]
    for what in ("weights", "state", "values"):
        assert_same(first[what], alone[what])


def test_gates_after_micro_batches_are_alike_in_all_processes(two):
    first, second = two["micro-gate"]
    assert_same(first["weights"], second["weights"])
    selected = first["selected"]
    for i, counts in enumerate(first["counts"]):
        assert i % 2 == 0 or counts == second["counts"][i]
        for n, count in counts.items():
            assert 0 < count <= max(1, int(0.3 * selected[n]))


def test_a_static_graph_is_no_other_run(two):
    assert_same(two["static"][0]["weights"], two["sampled"][0]["weights"])


@pytest.mark.parametrize("name", ALONE)
def test_only_the_selected_entries_are_sent(name, one, two):
    for result in two[name]:
        message = 4 * (result["values"] + result["slots"])
        steps = len(result["sent"])
        assert result["sent"] == [message] * steps
        assert result["counted"] == message * steps  # once a step, however many micro batches
        assert message < 4 * result["numel"] * 0.6
    assert one[name]["sent"] == [0.0] * len(one[name]["sent"])


def test_a_layer_that_one_process_alone_uses(two):
    for rank, result in enumerate(two["unused"]):
        other = two["unused"][1 - rank]
        assert_same(result["weights"], other["weights"])
        mine = result["grads"][f"experts.{rank}.weight"]
        assert torch.equal(mine, other["grads"][f"experts.{rank}.weight"])
        assert mine.abs().sum() > 0


def test_what_is_refused_and_what_to_do(two):
    for result in two["refusals"]:
        said = result["said"]
        assert "wrap the model in DistributedDataParallel" in said["without ddp"]
        assert "call retouch.wrap first" in said["ddp first"]
        assert "no_sync" in said["never synced"]
        assert "no_sync" in said["synced too early"]
        assert "same mask on the same weights" in said["other weights"]
        assert "same mask on the same weights" in said["other mask"]
        assert said["in place"] == "fine"
        assert int(said["unwrapped"]) > 1


def test_a_mask_is_shared(two):
    first, second = two["shared"]
    assert not torch.equal(first["before"], second["before"])
    assert torch.equal(first["after"], first["before"])
    assert torch.equal(second["after"], first["before"])


def test_trainer(folder):
    """The HF Trainer on two processes: mask, losses and norms of one; resume is exact."""
    launch(folder, TRAINER, 2)
    two = {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in (0, 1)] for n in TRAINER}
    launch(folder, ["trainer-resumed"], 2)
    resumed = torch.load(folder / "trainer-resumed-0.pt")
    launch(folder, TRAINER, 1)
    for name in TRAINER:
        first, second = two[name]
        alone = torch.load(folder / f"{name}-0.pt")
        assert_same(first["weights"], second["weights"])
        assert first["mask"].keys() == alone["mask"].keys()
        assert all(torch.equal(first["mask"][n], alone["mask"][n]) for n in alone["mask"])
        torch.testing.assert_close(first["losses"], alone["losses"], rtol=2e-4, atol=0)
        torch.testing.assert_close(first["norms"], alone["norms"], rtol=2e-3, atol=0)
        assert all(sent > 0 for sent in first["sent"])
    assert_same(resumed["weights"], two["trainer-sampled"][0]["weights"])

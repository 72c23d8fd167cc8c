"""What is measured of a model is what Fisher merging and RegMean read: from data to a merged model."""

import pytest
import torch
from deltas import llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import retouch
from retouch.errors import FormatError, HyperparameterError, ScoreError
from retouch.merge import collect_fisher, collect_gram, statistics
from retouch.scores import Fisher, Gradient, TrueFisher


def tuned(seed):
    model = llama(tie_word_embeddings=False)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=gen)
    return model.eval()


def data(seed, batches=2):
    gen = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(batches):
        ids = torch.randint(0, 97, (3, 7), generator=gen)
        out.append({"input_ids": ids, "labels": ids})
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("collect")
    out = []
    for i in (1, 2):
        model = tuned(i)
        model.save_pretrained(root / f"m{i}")
        out.append((model, data(i), root / f"m{i}"))
    return out


def squares(model, batches):
    """Mean of squared gradients, one sample at a time."""
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    count = 0
    for batch in batches:
        for ids in batch["input_ids"]:
            model.zero_grad()
            model(input_ids=ids[None], labels=ids[None]).loss.backward()
            count += 1
            for name, p in model.named_parameters():
                sums[name] += p.grad.square()
    model.zero_grad()
    return {n: t / count for n, t in sums.items()}


def test_fisher_from_data_to_model(models, tmp_path):
    files, want = [], []
    for i, (model, batches, _) in enumerate(models):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        files.append(str(collect_fisher(model, batches, tmp_path / f"new/{i}.safetensors")))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        want.append(squares(model, batches))
        got = load_file(files[-1])
        assert got.keys() == want[-1].keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, want[-1][name], rtol=1e-3, atol=1e-8)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "0.safetensors",
        "1.safetensors",
    ]
    config = {
        "merge_method": "fisher",
        "models": [
            {"model": str(folder), "parameters": {"fisher": file}}
            for (*_, folder), file in zip(models, files, strict=True)
        ],
        "parameters": {"floor": 1e-9},
    }
    made = retouch.merge(config, tmp_path / "out")
    states = [model.state_dict() for model, *_ in models]
    for name, tensor in load_file(made.out / "model.safetensors").items():
        w, f = [s[name] for s in states], [x[name] for x in want]
        expected = statistics.fisher_mean(w, f, floor=1e-9)
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(tensor, (w[0] + w[1]) / 2, atol=1e-3)


def test_gram_from_data_to_model(models, tmp_path):
    files, grams = [], []
    for i, (model, batches, _) in enumerate(models):
        files.append(str(collect_gram(model, batches, tmp_path / f"{i}.safetensors")))
        seen: dict[str, list[torch.Tensor]] = {}
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                rows = seen.setdefault(name, [])
                hooks.append(
                    module.register_forward_hook(
                        lambda _, args, __, rows=rows: rows.append(args[0].flatten(0, 1))
                    )
                )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for hook in hooks:
            hook.remove()
        got = load_file(files[-1])
        assert got.keys() == {f"{name}.weight" for name in seen}
        grams.append({})
        for name, rows in seen.items():
            x = torch.cat(rows).double()
            grams[-1][f"{name}.weight"] = x.T @ x / len(x)
            torch.testing.assert_close(got[f"{name}.weight"], (x.T @ x / len(x)).float())
    made = retouch.merge(
        [folder for *_, folder in models], tmp_path / "out", method="regmean",
        parameters=[{"gram": file} for file in files], shared={"shrink": 1.0},
    )  # fmt: skip
    states = [model.state_dict() for model, *_ in models]
    merged = load_file(made.out / "model.safetensors")

    def missed(weight, name):
        """How far the outputs of a layer are from both models' on their own inputs."""
        parts = [
            (weight.double() - s[name].double(), g[name])
            for s, g in zip(states, grams, strict=True)
        ]
        return sum(float((d @ g @ d.T).trace()) for d, g in parts)

    for name in grams[0]:
        mean = (states[0][name] + states[1][name]) / 2
        assert missed(merged[name], name) < 0.999 * missed(mean, name)
    name = "model.embed_tokens.weight"  # no linear layer
    torch.testing.assert_close(merged[name], (states[0][name] + states[1][name]) / 2)


def test_files_measured_anew_are_read_anew(models, tmp_path):
    (model, batches, folder), (second, other, place) = models
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    collect_fisher(second, other, files[1])
    merged = []
    for i, given in enumerate((batches, data(9))):
        collect_fisher(model, given, files[0])
        made = retouch.merge(
            [folder, place], tmp_path / f"out{i}", method="fisher",
            parameters=[{"fisher": str(file)} for file in files],
        )  # fmt: skip
        merged.append(load_file(made.out / "model.safetensors"))
    assert any(not torch.equal(merged[0][n], merged[1][n]) for n in merged[0])


def test_gram_of_weights_stored_the_other_way(tmp_path):
    """GPT-2's Conv1D: the merge of a model whose matrices lie as [in, out], square ones too."""
    models, files = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97, n_positions=16)
        ).eval()
        model.save_pretrained(tmp_path / f"g{seed}")
        models.append(model)
        files.append(str(collect_gram(model, data(seed), tmp_path / f"{seed}.safetensors")))
    inputs = [{}, {}]
    for model, seen, seed in zip(models, inputs, (1, 2), strict=True):
        for name, module in model.named_modules():
            if type(module).__name__ == "Conv1D":
                rows = seen.setdefault(f"{name}.weight", [])
                module.register_forward_hook(
                    lambda _, args, __, rows=rows: rows.append(args[0].flatten(0, 1))
                )
        with torch.no_grad():
            for batch in data(seed):
                model(**batch)
    made = retouch.merge(
        [tmp_path / "g1", tmp_path / "g2"], tmp_path / "out", method="regmean",
        parameters=[{"gram": file} for file in files], shared={"shrink": 1.0},
    )  # fmt: skip
    merged = load_file(made.out / "model.safetensors")
    states = [model.state_dict() for model in models]
    assert len(inputs[0]) == 4
    for name in inputs[0]:
        x = [torch.cat(seen[name]).double() for seen in inputs]
        grams = [a.T @ a / len(a) for a in x]
        moments = [g @ s[name].double() for g, s in zip(grams, states, strict=True)]
        # the inputs of so few tokens do not span the space: compared where they do
        want = torch.linalg.pinv(sum(grams), rcond=1e-7) @ sum(moments)
        for a in x:
            got = a @ merged[f"{name}"].double()
            torch.testing.assert_close(got, a @ want, rtol=2e-3, atol=2e-3)
            assert not torch.allclose(
                got, a @ (states[0][name] + states[1][name]).double() / 2, atol=2e-3
            )
    with pytest.raises(FormatError, match="for some of the Gram files"):
        other = load_file(files[1])
        save_file({n.removesuffix(":in_out"): t for n, t in other.items()}, files[1])
        retouch.merge(
            [tmp_path / "g1", tmp_path / "g2"], tmp_path / "x", method="regmean",
            parameters=[{"gram": file} for file in files],
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_other_scores_ties_and_buffers(models, tmp_path):
    model, batches, _ = models[0]
    drawn = collect_fisher(
        model, batches, tmp_path / "t.safetensors", score=TrueFisher(outer="mean")
    )
    assert load_file(drawn).keys() == dict(model.named_parameters()).keys()
    with pytest.raises(HyperparameterError, match="squares of gradients"):
        collect_fisher(model, batches, tmp_path / "x", score=Gradient())
    with pytest.raises(ScoreError, match="needs data"):
        collect_fisher(model, None, tmp_path / "x", score=Fisher())
    with pytest.raises(ScoreError, match="no batch"):
        collect_gram(model, [], tmp_path / "x")
    assert not (tmp_path / "x").exists()
    tied = llama()
    held = load_file(collect_gram(tied, batches, tmp_path / "g.safetensors"))
    assert "model.embed_tokens.weight" not in held and "lm_head.weight" not in held
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    loss = nn.functional.cross_entropy
    found = load_file(
        collect_fisher(
            net, [(torch.randn(6, 4), torch.randint(0, 3, (6,)))], tmp_path / "n.safetensors",
            loss_fn=lambda m, batch: loss(m(batch[0]), batch[1]),
        )
    )  # fmt: skip
    floats = {n for n, t in net.state_dict().items() if t.dtype.is_floating_point}
    assert found.keys() == floats and not found["1.running_mean"].any()

"""mergekit's YAML: what it means is what mergekit 0.1.5 takes it to mean.

The expected numbers come from mergekit's own resolution of the same documents; where it is installed,
`test_live` asks it again.
"""

from typing import Any, ClassVar

import pytest
import torch

from retouch.errors import BaseMismatchError, HyperparameterError
from retouch.merge.base import Job, Method, Param
from retouch.merge.document import MergeConfig, ModelRef
from retouch.merge.layers import layout
from retouch.merge.mergekit import parse, read
from retouch.merge.resolve import Resolved, resolve
from retouch.roles import AFTER, BEFORE, EMBEDDING, HEAD, role


class Trimmed(Method):
    """The parameters of mergekit's ties; the arithmetic is not asked for here."""

    name = "ties"
    per_model: ClassVar = {"weight": Param(float), "density": Param(float, 1.0)}
    shared: ClassVar = {"normalize": Param(bool, True), "lambda": Param(float, 1.0)}
    dialects = ("paper", "mergekit")

    def merge(self, job: Job) -> torch.Tensor:
        raise AssertionError("no arithmetic in these tests")


class Between(Trimmed):
    name = "slerp"
    per_model: ClassVar = {}
    shared: ClassVar = {"t": Param(float)}
    models = (1, 1)


class Mean(Trimmed):
    name = "linear"
    per_model: ClassVar = {"weight": Param(float)}
    shared: ClassVar = {"normalize": Param(bool, True)}
    base = "none"


LAYER = ("input_layernorm.weight", "mlp.down_proj.weight", "self_attn.q_proj.weight")


def llama(layers: int, rows: int = 8, head: bool = True) -> dict[str, tuple[tuple[int, ...], bool]]:
    names = ["model.embed_tokens.weight", "model.norm.weight"] + ["lm_head.weight"] * head
    catalog = {name: ((rows, 4) if "norm" not in name else (4,), True) for name in names}
    for i in range(layers):
        catalog |= {f"model.layers.{i}.{rest}": ((4, 4), True) for rest in LAYER}
    return catalog


def resolved(text: str, method: Method, layers: int = 5, **options: Any) -> Resolved:
    config = parse(text)
    return resolve(config, {m: llama(layers) for m in config.models()}, method, **options)


def table(found: Resolved, key: str) -> dict[str, list[Any]]:
    return {
        t.name: [i.parameters[key] for i in t.inputs]
        if key in t.inputs[0].parameters
        else t.shared[key]
        for t in found.tensors
    }


TIES = """
merge_method: ties
base_model: base
models:
  - model: one
    parameters:
      density: [1, 0.5, 0.25]
      weight:
        - filter: mlp
          value: [0, 0.5]
        - filter: self_attn
          value: 0.75
        - value: 2
  - model: two
    parameters:
      weight:
        - {filter: lm_head, value: "3e-1"}
parameters:
  weight: 5
  lambda: {filter: mlp, value: 0.5}
  normalize: [false, true]
dtype: bfloat16
"""


def test_precedence_filters_and_gradients() -> None:
    found = resolved(TIES, Trimmed())
    weights, density = table(found, "weight"), table(found, "density")
    assert weights["model.layers.0.mlp.down_proj.weight"] == [0.0, 5.0]
    assert weights["model.layers.1.mlp.down_proj.weight"] == [0.125, 5.0]
    assert weights["model.layers.4.mlp.down_proj.weight"] == [0.5, 5.0]
    assert weights["model.layers.3.self_attn.q_proj.weight"] == [0.75, 5.0]
    assert weights["model.layers.2.input_layernorm.weight"] == [2.0, 5.0]
    assert weights["lm_head.weight"] == [2.0, 0.3]
    # three values over five layers; a model without one has the default
    ladder = [density[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(5)]
    assert ladder == [[1, 1], [0.75, 1], [0.5, 1], [0.375, 1], [0.25, 1]]
    # outside the layers gradients stand at their start, for the head, too
    assert density["lm_head.weight"] == density["model.embed_tokens.weight"] == [1.0, 1.0]
    scale = table(found, "lambda")
    assert scale["model.layers.0.mlp.down_proj.weight"] == 0.5 and scale["lm_head.weight"] == 1.0
    # of words and booleans one is picked
    normalize = [table(found, "normalize")[f"model.layers.{i}.{LAYER[0]}"] for i in range(5)]
    assert normalize == [False, False, False, False, True]
    assert all(t.base is not None and t.base.source == "base" for t in found.tensors)
    assert [i.source for i in found.tensors[0].inputs] == ["one", "two"]


SLICES = """
merge_method: linear
slices:
  - sources:
      - model: one
        layer_range: [0, 3]
        parameters: {weight: 1}
      - model: two
        layer_range: [1, 4]
    parameters: {weight: [0, 1]}
  - sources:
      - {model: two, layer_range: [4, 5]}
    parameters: {weight: [0.25, 0.75]}
parameters: {weight: 9}
"""


def test_slices_number_the_layers_anew() -> None:
    found = resolved(SLICES, Mean())
    assert found.layers == {"model.layers": 4}
    by_name = {t.name: t for t in found.tensors}
    second = by_name["model.layers.1.mlp.down_proj.weight"]
    assert [(i.source, i.tensor) for i in second.inputs] == [
        ("one", "model.layers.1.mlp.down_proj.weight"),
        ("two", "model.layers.2.mlp.down_proj.weight"),
    ]
    assert [i.parameters["weight"] for i in second.inputs] == [1.0, 0.5]
    last = by_name["model.layers.3.mlp.down_proj.weight"].inputs
    # a slice of one layer stands at the end of its gradient
    assert [(i.source, i.tensor) for i in last] == [("two", "model.layers.4.mlp.down_proj.weight")]
    assert last[0].parameters["weight"] == 0.75
    # the first slice owns what comes before the layers, the last what comes after
    assert [i.source for i in by_name["model.embed_tokens.weight"].inputs] == ["one", "two"]
    assert [i.source for i in by_name["model.norm.weight"].inputs] == ["two"]
    assert by_name["lm_head.weight"].inputs[0].parameters["weight"] == 0.25
    assert len(by_name) == len(found.tensors) == 4 * len(LAYER) + 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{model: a}]", "merge_method is missing"),
        ("merge_method: ties\nmodels: [{modle: a}]", "no key 'modle'; did you mean 'model'"),
        ("merge_method: ties\nparmeters: {}\nmodels: [{model: a}]", "did you mean 'parameters'"),
        ("merge_method: ties", "exactly one of models, slices and modules"),
        ("merge_method: ties\nmodels: [{model: a}]\nslices: [{}]", "models and slices"),
        ("merge_method: ties\nmodels: [{model: a}]\nmerge_method: dare", "line 3: 'merge_method'"),
        ("merge_method: ties\nmodels: [{model: a+b+c}]", "wanted model or model+adapter"),
        ("merge_method: ties\ndtype: bfloat\nmodels: [{model: a}]", "did you mean 'bfloat16'"),
        ("a: 1\n---\nb: 2", "2 YAML documents"),
        ("merge_method: [", "this is not YAML"),
        ("- 1", "wanted keys and values"),
        ("merge_method: x\nslices: [{sources: [{model: a, layer_range: [3, 3]}]}]", "has no layers"),
        (
            "merge_method: x\nslices: [{sources: [{model: a, layer_range: [0, 3]}, "
            "{model: b, layer_range: [0, 2]}]}]",
            "the sources have 2 and 3 layers",
        ),
        ("merge_method: x\nmodels: [{model: a}]\ntokenizer_source: base\ntokenizer: {source: base}", "both"),
        (
            "merge_method: x\nmodels: [{model: a}]\ntokenizer: {tokens: {t: {source: {kind: zeros}}}}",
            "did you mean 'zero'",
        ),
        ("merge_method: x\nmodels: [{model: a, parameters: {weight: {value: null}}}]", "wanted a value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text: str, message: str, tmp_path: Any) -> None:
    with pytest.raises(HyperparameterError, match=message.replace("+", r"\+")):
        parse(text)
    path = tmp_path / "config.yml"
    path.write_text(text)
    with pytest.raises(HyperparameterError, match=r"config\.yml: "):
        read(path)


def test_misspelt_parameters_are_errors_and_useless_ones_notes() -> None:
    with pytest.raises(HyperparameterError, match="no parameter 'densty'; did you mean 'density'"):
        resolved(TIES.replace("density", "densty"), Trimmed())
    assert resolved(TIES, Trimmed()).notes == []
    found = resolved(
        TIES.replace("  weight: 5", "  weight: 5\n  int8_mask: true\n  t: 1"), Trimmed()
    )
    assert found.notes == ["t in parameters has no effect: ties has none"]
    shared = TIES.replace("      density: [1", "      lambda: 2\n      density: [1")
    assert "all models share it" in resolved(shared, Trimmed()).notes[0]
    with pytest.raises(HyperparameterError, match="needs a value for 'weight'"):
        resolved(TIES.replace("  weight: 5", ""), Trimmed())
    with pytest.raises(HyperparameterError, match="got 'much', wanted a float"):
        resolved(TIES.replace("weight: 5", "weight: much"), Trimmed())


def test_models_that_do_not_fit() -> None:
    config = parse(TIES)
    base, one, two = config.models()
    assert config.models() == (ModelRef("base"), ModelRef("one"), ModelRef("two"))

    def run(changed: dict[Any, Any], method: Method | None = None, **options: Any) -> Resolved:
        catalogs = {base: llama(2), one: llama(2), two: llama(2)} | changed
        return resolve(config, catalogs, method or Trimmed(), **options)

    with pytest.raises(BaseMismatchError, match=r"different numbers of layers .*one: 3"):
        run({one: llama(3)})
    with pytest.raises(BaseMismatchError, match=r"lm_head.weight.*two: \[9, 4\].*tokenizer_source"):
        run({two: llama(2) | {"lm_head.weight": ((9, 4), True)}})
    fewer = {n: m for n, m in llama(2).items() if n != "model.norm.weight"}
    with pytest.raises(BaseMismatchError, match=r"model.norm.weight: one has no such tensor"):
        run({one: fewer})
    copied = run({one: fewer}, missing="copy")
    assert copied.copied == {"model.norm.weight": "from base: one has none"}
    found = run({one: llama(2, head=False)})
    (head,) = [t for t in found.tensors if t.name == "lm_head.weight"]
    assert [i.tensor for i in head.inputs] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert found.untied and "stands in" in found.notes[0]
    with pytest.raises(HyperparameterError, match="slerp merges 1 models beside the base, got 2"):
        resolved(TIES.replace("  weight: 5", "  t: 0.5"), Between())
    with pytest.raises(HyperparameterError, match="ties needs base_model"):
        resolved(TIES.replace("base_model: base", ""), Trimmed())


def test_integers_are_copied_and_what_models_compute_is_left_out() -> None:
    config = parse(TIES)
    extra = {"model.layers.0.steps": ((1,), False)}
    catalogs = {m: llama(1) | extra for m in config.models()}
    catalogs[config.models()[2]] |= {"model.layers.0.self_attn.rotary_emb.inv_freq": ((2,), True)}
    found = resolve(config, catalogs, Trimmed())
    (steps,) = [t for t in found.tensors if t.name.endswith("steps")]
    assert steps.method is None and len(steps.inputs) == 1
    assert not any("inv_freq" in t.name for t in found.tensors)
    assert "left out" in found.notes[0]


def test_stacks_are_found_in_names() -> None:
    seen = {"model.language_model.layers": 3, "model.visual.blocks": 2}
    names = [f"{s}.{i}.w.weight" for s, n in seen.items() for i in range(n)]
    names += [f"{s}.{i}.experts.{e}.w" for s, n in seen.items() for i in range(n) for e in range(4)]
    loose = ["model.visual.merger.mlp.0.weight", "model.visual.merger.mlp.2.weight"]
    loose += ["lm_head.weight", "model.language_model.embed_tokens.weight"]
    found = layout(names + loose)
    assert {s: len(layers) for s, layers in found.stacks.items()} == seen
    assert found.loose == tuple(sorted(loose))
    assert found.main(depth=3) == "model.language_model.layers"
    with pytest.raises(HyperparameterError, match=r"model.visual.blocks \(2\)"):
        found.main()
    assert found.named("visual") == "model.visual.blocks"
    assert found.owned("model.visual.blocks") == sorted(loose[:2])
    assert found.owned("model.language_model.layers") == sorted(loose[2:])
    with pytest.raises(HyperparameterError, match=r"modules\.vision"):
        found.named("vision")
    assert role("transformer.wte.weight") == role("model.embed_tokens.weight") == EMBEDDING
    assert role("lm_head.weight") == role("embed_out.weight") == HEAD
    assert role("transformer.wpe.weight") == role("word_embeddings_layernorm.weight") == BEFORE
    assert role("model.norm.weight") == role("transformer.ln_f.bias") == AFTER


def test_modules_are_merged_each_in_its_way() -> None:
    text = """
merge_method: linear
base_model: one
modules:
  layers:
    slices:
      - sources:
          - {model: one, layer_range: [0, 2]}
          - {model: two, layer_range: [0, 2]}
    parameters: {weight: 0.5}
"""
    config = parse(text)
    visual = {f"visual.blocks.{i}.w": ((2,), True) for i in range(2)}
    found = resolve(config, {m: llama(2) | visual for m in config.models()}, Mean())
    by_name = {t.name: t for t in found.tensors}
    assert by_name["visual.blocks.1.w"].method is None
    assert "no module" in found.copied["visual.blocks.1.w"]
    assert [i.parameters["weight"] for i in by_name["lm_head.weight"].inputs] == [0.5, 0.5]


def test_references() -> None:
    text = (
        "merge_method: x\nmodels: [{model: 'org/a@rev+org/b'}, {model: {path: 'x@y', revision: z}}]"
    )
    with pytest.raises(HyperparameterError, match="path@revision"):
        parse(text.replace("a@rev", "a@rev@more"))
    first, second = parse(text).models()
    assert first == ModelRef("org/a", "rev", "org/b", None) and str(first) == "org/a@rev+org/b"
    assert second == ModelRef("x@y", "z")


def settings_of_mergekit(config: MergeConfig, layers: int) -> dict[str, dict[str, Any]]:
    """mergekit's own resolution, for every tensor of a plan: parameters by model."""
    import mergekit.config as mk
    import mergekit.merge_methods.registry as registry
    import yaml
    from mergekit.parameter_resolver import resolve_parameters

    raw = mk.MergeConfiguration.model_validate(yaml.safe_load(config.text))
    spec = registry.get(raw.merge_method).spec
    slices = raw.slices
    if slices is None:
        models = list(raw.models)
        if all(m.model != raw.base_model for m in models):
            models.append(mk.InputModelDefinition(model=raw.base_model))
        slices = [
            mk.OutputSliceDefinition(
                sources=[
                    mk.InputSliceDefinition(
                        model=m.model, layer_range=(0, layers), parameters=m.parameters
                    )
                    for m in models
                ]
            )
        ]
    out: dict[str, dict[str, Any]] = {}

    def ask(piece: Any, name: str, names: list[str], t: float) -> None:
        reader = mk.ConfigReader(config=raw, t=t, slice_out=piece)
        shared, own = resolve_parameters(
            spec,
            tensor_name=name,
            inputs=dict(zip([s.model for s in piece.sources], names, strict=True)),
            sources=reader.parameter_sources,
            base_model=reader.base_model,
            t=t,
        )
        out[name] = {"shared": shared} | {str(m): values for m, values in own.items()}

    ask(
        slices[0],
        "model.embed_tokens.weight",
        ["model.embed_tokens.weight"] * len(slices[0].sources),
        0,
    )
    for name in ("model.norm.weight", "lm_head.weight"):
        ask(slices[-1], name, [name] * len(slices[-1].sources), 0)
    number = 0
    for piece in slices:
        spans = [s.layer_range for s in piece.sources]
        count = spans[0][1] - spans[0][0]
        for i in range(count):
            for rest in LAYER:
                names = [f"model.layers.{first + i}.{rest}" for first, _ in spans]
                t = i / (count - 1) if count > 1 else 1
                ask(piece, f"model.layers.{number}.{rest}", names, t)
            number += 1
    return out


@pytest.mark.filterwarnings("ignore")  # of its dependencies
@pytest.mark.parametrize(("text", "method"), [(TIES, Trimmed()), (SLICES, Mean())])
def test_live(text: str, method: Method) -> None:
    pytest.importorskip("mergekit")
    theirs = settings_of_mergekit(parse(text), 5)
    ours = resolved(text, method)
    assert theirs.keys() == {t.name for t in ours.tensors}
    for tensor in ours.tensors:
        want = theirs[tensor.name]
        for key, value in tensor.shared.items():
            assert value == want["shared"][key], (tensor.name, key)
        for given in tensor.inputs:
            for key, value in given.parameters.items():
                assert value == want[given.source][key], (tensor.name, given.source, key)

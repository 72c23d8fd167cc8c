"""`SelectConfig`: what it refuses, and what comes back from a file."""

import json

import pytest

from retouch import SelectConfig, errors
from retouch.config import preset_names, resolve
from retouch.scores import Fisher, Magnitude

RIGHT = {"score": "magnitude", "density": 0.1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": None}, "give exactly one of density, k, .*; got none"),
        ({"k": 3}, "got density and k"),
        ({"density": 0}, r"density=0\.0; wanted a fraction in \(0, 1\]"),
        ({"density": 1.5}, r"density=1\.5; wanted a fraction"),
        ({"density": True}, "density=True; wanted a number"),
        ({"density": None, "k": 0}, "k=0; wanted an integer >= 1"),
        ({"density": None, "k": 2.5}, r"k=2\.5; wanted an integer"),
        ({"density": None, "threshold": float("nan")}, "threshold is NaN"),
        ({"granularity": "rows"}, "granularity='rows'; wanted one of .*; did you mean 'row'"),
        ({"heads": "on"}, "heads='on'; wanted one of masked, full, frozen"),
        ({"granularity": "block"}, "block_size=None with granularity='block'"),
        ({"block_size": 4}, "block_size=4 with granularity='element'"),
        ({"scope": "group"}, "group_size=None"),
        ({"granularity": "layer", "scope": "tensor"}, "wanted a scope of global"),
        ({"density": None, "threshold": 1.0, "scope": "tensor"}, "the same everywhere"),
        ({"density": None, "k_per_row": 1, "scope": "layer"}, "a budget in each row"),
        ({"allocation": 0.1}, "allocation needs k_per_row"),
        ({"direction": "random"}, "direction='random' asks for no score"),
        ({"score": None}, "give a score"),
        ({"score": "fischer"}, "no score is named 'fischer'; did you mean 'fisher'"),
        ({"score": 3}, "score=3; wanted a name, a score or a function"),
        ({"counted_in_budget": "heads"}, "counted_in_budget='heads'.*did you mean 'head'"),
        ({"counted_in_budget": True, "scope": "tensor"}, "counted_in_budget needs density or k"),
        ({"seed": -1}, "seed=-1; wanted an integer >= 0"),
        ({"target_modules": [1]}, r"target_modules=\[1\]; wanted a list of names"),
    ],
)
def test_mistakes_are_named(fields, message: str) -> None:
    SelectConfig(**RIGHT)
    with pytest.raises(errors.HyperparameterError, match=message):
        SelectConfig(**RIGHT | fields)


def test_resolve_says_what_it_knows() -> None:
    with pytest.raises(
        errors.HyperparameterError, match="no field 'desity'; did you mean 'density'"
    ):
        resolve("fish", {"desity": 0.1})
    with pytest.raises(errors.HyperparameterError, match="no recipe or score is named 'fis'"):
        resolve("fis", {})
    with pytest.raises(errors.HyperparameterError, match="config: got int"):
        resolve(3, {})
    assert resolve("fish", {"k": 5}).density is None and resolve("fish", {"k": 5}).recipe == "fish"
    assert resolve("magnitude", {"k": 5}).k == 5 and "fish" in preset_names()


def test_files(tmp_path) -> None:
    config = SelectConfig(score=Fisher(), k=7, target_modules={"b", "a"}, counted_in_budget="head")
    assert config.target_modules == ["a", "b"] and config.counted_in_budget == ["head"]
    config.save_pretrained(tmp_path / "deep")
    assert SelectConfig.from_pretrained(tmp_path / "deep") == config
    file = tmp_path / "deep" / "retouch_config.json"
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # nothing half-written is left
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"new_field": 1}))
    with pytest.warns(UserWarning, match="unknown keys are ignored: new_field"):
        assert SelectConfig.from_pretrained(file) == config
    for text, message in (("{", "is not JSON"), ("[]", "holds a list")):
        file.write_text(text)
        with pytest.raises(errors.FormatError, match=message):
            SelectConfig.from_pretrained(file)
    with pytest.raises(FileNotFoundError):
        SelectConfig.from_pretrained(tmp_path)
    function = SelectConfig(score=lambda *_: {}, k=1)
    assert SelectConfig.from_dict(function.to_dict()).score == "custom"
    combined = SelectConfig(score=Magnitude() * Fisher(), k=1)
    assert SelectConfig.from_dict(json.loads(json.dumps(combined.to_dict()))) == combined

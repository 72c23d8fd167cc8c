"""The model card of a merge: everything that is needed to make it again."""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import yaml  # type: ignore[import-untyped]

from retouch import _core
from retouch.merge.base import Method
from retouch.merge.document import MergeConfig
from retouch.merge.plan import Plan, TensorPlan

__all__ = ["InputHashes", "card", "parameter_rows"]


class InputHashes:
    """BLAKE3 of the files of weights (what `b3sum` prints), taken by threads beside the merge.

    Args:
        sources: A folder or one file, by source id.
    """

    def __init__(self, sources: Mapping[str, Path]) -> None:
        # as many as the merge has: between its tensors it waits for memory and disk
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        files = {id: _weights(folder) for id, folder in sources.items()}
        each = {f for found in files.values() for f in found}
        hashes = {file: self._pool.submit(_core.file_hash, file) for file in sorted(each)}
        self._of = {id: {f.name: hashes[f] for f in found} for id, found in files.items()}

    def of(self, source: str) -> dict[str, str]:
        """The hashes of a source by name of file, as soon as they are known."""
        return {name: hash.result() for name, hash in self._of[source].items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _weights(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))


def parameter_rows(tensors: Iterable[TensorPlan]) -> list[dict[str, Any]]:
    """The resolved parameters, tensors with the same ones together.

    Returns:
        For each group: ``tensors`` (names), ``method``, ``shared`` and ``models`` (parameters by source).
    """
    groups: dict[str, dict[str, Any]] = {}
    for entry in tensors:
        row = {
            "method": entry.method or "copied",
            "shared": dict(entry.shared),
            "models": {i.source: dict(i.parameters) for i in entry.inputs},
        }
        group = groups.setdefault(json.dumps(row, sort_keys=True), {"tensors": [], **row})
        group["tensors"].append(entry.name)
    return list(groups.values())


def card(
    config: MergeConfig,
    method: Method,
    plan: Plan,
    inputs: InputHashes,
    versions: Mapping[str, str],
    name: str,
) -> str:
    """A README in Markdown, with metadata as the Hub reads them.

    Args:
        config: What was asked for.
        method: Its method.
        plan: What it became.
        inputs: The hashes of its sources.
        versions: Of the packages that had a part in it.
        name: Of the model.

    Returns:
        The text.
    """
    # a path of this machine says nothing on the Hub
    ids = [m.path for m in config.models() if not os.path.exists(m.path)]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "retouch"]}
    if ids:
        head["base_model"] = ids
    recipe = {
        "dialect": plan.dialect, "seed": plan.seed, "dtype": plan.dtype, "out_dtype": plan.out_dtype,
        "versions": dict(versions),
        "inputs": {id: {"kind": s.kind, "blake3": inputs.of(id)} for id, s in _sources(plan)},
    }  # fmt: skip
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", f"# {name}", ""]
    lines += [
        f"A merge of {len(config.models())} models with `{method.name}`"
        + (f" ({method.paper})" if method.paper else "")
        + ", made by retouch.",
        "",
        "## Configuration",
        "",
        "```yaml",
        config.text.rstrip(),
        "```",
        "",
        "## What it was made with",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False).rstrip(),
        "```",
        "",
        "## Parameters of every tensor",
        "",
        "`merge_plan.json` has them one by one.",
        "",
        "| tensors | method | parameters |",
        "|---|---|---|",
    ]
    for row in parameter_rows(plan.tensors):
        names = row["tensors"]
        shown = f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        values = [_values("", row["shared"])]
        values += [_values(f"{source}: ", given) for source, given in row["models"].items()]
        lines.append(f"| {shown} | {row['method']} | {'; '.join(filter(None, values)) or '-'} |")
    if plan.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines) + "\n"


def _sources(plan: Plan) -> list[tuple[str, Any]]:
    return [(source.id, source) for source in plan.sources]


def _values(prefix: str, given: Mapping[str, Any]) -> str:
    return prefix + ", ".join(f"{key} {value}" for key, value in given.items()) if given else ""

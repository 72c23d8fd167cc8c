"""The command line: `retouch diff | show | apply | revert | verify | merge | recipes | demo`.

File commands stream checkpoints through the Rust engine: memory holds about one tensor at a time, and
an output appears under its name only when it is complete.
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec

import typer

__all__ = ["app", "main"]

P = ParamSpec("P")
app = typer.Typer(
    name="retouch",
    help="Selective parameter updates: diff, apply, revert and verify what changed in a model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[
    str, typer.Argument(help="A .safetensors file, a checkpoint folder, or a Hugging Face Hub id")
]
DeltaFolder = Annotated[str, typer.Argument(help="A delta folder or a Hugging Face Hub id")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists")]
Force = Annotated[
    bool, typer.Option("--force", help="Go on although the checkpoint is not the delta's own")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]


def _reported(command: Callable[P, None]) -> Callable[P, None]:
    """One line on stderr and exit code 2 instead of a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from retouch.errors import RetouchError

        try:
            command(*args, **kwargs)
        except (RetouchError, OSError, ImportError) as e:
            # OSError's own text begins with its number; file and reason are what helps
            text = (
                f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
            )
            print(f"error: {text}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


def _local(source: str) -> str:
    """A path as it is; an id of the Hub, fetched."""
    from retouch import hub

    return hub.local(source)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def _tensors(config: dict[str, Any], limit: int = 12) -> list[list[str]]:
    """The tensors with the most changes, as rows."""
    rows = []
    for name, row in config["tensors"].items():
        numel = 1
        for n in row["shape"]:
            numel *= n
        rows.append((row["count"], name, row["kind"], row["dtype"], numel))
    rows.sort(reverse=True)
    out = [
        [name, kind, dtype, f"{count:,}", f"{count / max(numel, 1):.3%}"]
        for count, name, kind, dtype, numel in rows[:limit]
    ]
    if len(rows) > limit:
        out.append(
            [f"({len(rows) - limit} more)", "", "", f"{sum(r[0] for r in rows[limit:]):,}", ""]
        )
    return out


@app.command()
@_reported
def diff(
    base: Checkpoint,
    tuned: Checkpoint,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Write the delta into this folder")
    ] = None,
    reversible: Annotated[
        bool, typer.Option("--reversible", help="Keep the old values: revert needs no base then")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints bit for bit; write what leads from BASE to TUNED.

    Exit code 0: no difference, 1: they differ (without -o, like diff), 2: an error.
    """
    from retouch import _core

    report = json.loads(
        _core.diff_files(
            _local(base), _local(tuned), out, reversible=reversible, overwrite=overwrite,
            base_model=base,
        )
    )  # fmt: skip
    differ = report["changed_tensors"]
    compared = differ + report["unchanged_tensors"]
    if as_json:
        print(json.dumps(report, indent=1, sort_keys=True))
    elif not differ:
        print(f"no difference in {compared} tensors")
    else:
        title = f"{report['changed']:,} values in {differ} of {compared} tensors differ"
        columns = ["tensor", "kind", "dtype", "changed", "share"]
        _table(title, columns, _tensors(report["config"]))
        if out is not None:
            print(f"wrote {out} ({report['bytes'] / 1e6:,.2f} MB)")
    if differ and out is None:
        raise typer.Exit(1)


@app.command()
@_reported
def show(delta: DeltaFolder, as_json: Json = False) -> None:
    """Show what a delta holds."""
    from retouch import _core

    found = json.loads(_core.show_files(_local(delta)))
    if as_json:
        print(json.dumps(found, indent=1, sort_keys=True))
        return
    config, size = found["config"], found["bytes"]["total"] / 1e6
    base = config["base_model"] or "an unnamed base"
    print(f"delta of {base}, format {config['format_version']}")
    print(f"reversible without the base: {'yes' if found['reversible'] else 'no'}")
    title = f"{found['changed']:,} values in {len(config['tensors'])} tensors, {size:,.2f} MB"
    _table(title, ["tensor", "kind", "dtype", "changed", "share"], _tensors(config))


@app.command()
@_reported
def apply(
    base: Checkpoint,
    delta: DeltaFolder,
    out: Annotated[str, typer.Option("-o", "--out", help="Where the tuned checkpoint goes")],
    force: Force = False,
    overwrite: Overwrite = False,
) -> None:
    """Write BASE with DELTA applied, in the shards of BASE, side files included."""
    from retouch import _core

    report = json.loads(
        _core.apply_files(_local(base), _local(delta), out, force=force, overwrite=overwrite)
    )
    print(
        f"wrote {out}: {report['changed']:,} values in {report['changed_tensors']} tensors changed"
    )


@app.command()
@_reported
def revert(
    tuned: Checkpoint,
    delta: DeltaFolder,
    out: Annotated[str, typer.Option("-o", "--out", help="Where the base checkpoint goes")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base, if the delta has no old values")
    ] = None,
    force: Force = False,
    overwrite: Overwrite = False,
) -> None:
    """Write TUNED with DELTA taken back, bit for bit the base again."""
    from retouch import _core

    report = json.loads(
        _core.revert_files(
            _local(tuned), _local(delta), out, base=None if base is None else _local(base),
            force=force, overwrite=overwrite,
        )
    )  # fmt: skip
    print(
        f"wrote {out}: {report['changed']:,} values in {report['changed_tensors']} tensors changed"
    )


@app.command()
@_reported
def verify(
    checkpoint: Checkpoint,
    delta: DeltaFolder,
    result: Annotated[
        bool, typer.Option("--result", help="CHECKPOINT is the result of the delta, not its base")
    ] = False,
) -> None:
    """Check by fingerprints that CHECKPOINT is the base of DELTA (or its result).

    Exit code 0: it is, 1: it is not (the tensors are named), 2: an error.
    """
    from retouch import _core

    differ = json.loads(_core.verify_files(_local(checkpoint), _local(delta), result=result))
    what = "result" if result else "base"
    if not differ:
        print(f"{checkpoint} is the {what} of {delta}")
        return
    print(f"{checkpoint} is not the {what} of {delta}: {len(differ)} tensors differ")
    for name in differ[:20]:
        print(f"  {name}")
    raise typer.Exit(1)


@app.command()
@_reported
def merge(
    config: Annotated[str, typer.Argument(help="A mergekit configuration (YAML)")],
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="The new model folder; without it: only the plan"),
    ] = None,
    dialect: Annotated[
        str, typer.Option(help="Variant of the method: mergekit, or paper (as published)")
    ] = "mergekit",
    max_ram: Annotated[
        str | None, typer.Option(help="Memory for tensors, such as 8GB; default: no limit")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random masks")] = 0,
    copy_missing: Annotated[
        bool,
        typer.Option(
            "--copy-missing", help="Copy tensors that some models lack; default: an error"
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Compare the output with its inputs (one more pass over all)")
    ] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge models as a mergekit CONFIG says.

    Without -o nothing is written: the parameters of every tensor are shown.
    Exit code 0: merged, 1: merged, but the output has NaN or infinite values, 2: an error.
    """
    from retouch.merge import api, mergeview
    from retouch.merge.mergekit import read

    missing: Literal["copy", "error"] = "copy" if copy_missing else "error"
    if out is None:
        ready = api.prepare(read(config), dialect=dialect, seed=seed, missing=missing)
        if as_json:
            print(ready.plan.to_json())
        else:
            _table(*mergeview.parameters(ready))
            print("\n".join(f"note: {note}" for note in ready.plan.notes))
        return
    if max_ram is not None:
        mergeview.return_memory()
    with mergeview.bar() as progress:
        made = api.merge(
            config, out, dialect=dialect, seed=seed, max_ram=mergeview.size(max_ram), missing=missing,
            overwrite=overwrite, report=report, progress=progress,
        )  # fmt: skip
    if as_json:
        found = None if made.report is None else made.report.to_dict()
        print(json.dumps(made.result.to_dict() | {"report": found}, indent=1, sort_keys=True))
    else:
        if (moved := mergeview.changes(made)) is not None:
            _table(*moved)
        print("\n".join(mergeview.summary(made)))
    if made.report is not None and any(row.bad for row in made.report.tensors):
        raise typer.Exit(1)


@app.command()
@_reported
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe in full")] = None,
    as_json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As the table of the README")
    ] = False,
) -> None:
    """List the published methods that `retouch.select` knows."""
    from dataclasses import asdict

    from retouch import recipes as registry

    if markdown:
        print(registry.markdown())
        return
    if name is None and not as_json:
        rows = [[r.id, r.title, r.arxiv or "-", r.scores, r.budget] for r in registry.list()]
        _table("recipes", ["id", "method", "arXiv", "scores", "budget"], rows)
        return
    found = registry.list() if name is None else (registry.info(name),)
    if as_json:
        print(json.dumps([asdict(r) for r in found], indent=1, sort_keys=True, default=str))
        return
    row = found[0]
    print(row.title + (f": {row.paper} (arXiv:{row.arxiv})" if row.paper else ""))
    for field in ("scores", "where", "budget", "when", "cost", "variant", "source", "warning"):
        if text := getattr(row, field):
            print(f"{field}: {text}")
    print(f"\n{row.notes}\n\nSelectConfig(")
    for field, value in row.config.items():
        print(f"    {field}={value!r},")
    print(f")\n\n{registry.bibtex(row.id)}".rstrip())


@app.command()
@_reported
def demo(
    small: Annotated[bool, typer.Option("--small", help="A tiny model, in seconds")] = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps for each method")] = 12,
    seed: Annotated[int, typer.Option(help="Of masks and adapters")] = 0,
    out: Annotated[
        str | None, typer.Option(help="Keep the delta and results.json in this folder")
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where the converted model is kept")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for torch and retouch")] = None,
) -> None:
    """Teach a 135M chat model King James English by moving 1 % of its weights."""
    from retouch import demo as scene

    scene.run(small=small, steps=steps, seed=seed, out=out, cache_dir=cache_dir, threads=threads)


def main() -> None:
    """Entry point of the `retouch` command."""
    app()

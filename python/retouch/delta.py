"""Deltas: what moved, exactly.

A `Delta` holds, for each tensor that changed, the positions, the new values (replacements, so nothing
is lost to rounding), where known the old ones, and fingerprints of the tensor before and after. It
refuses a base that is not its own.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from retouch import deltafile, ops
from retouch.errors import BaseMismatchError, EngineError, FormatError, ShapeError
from retouch.slots import PLACE, same_bits

__all__ = ["Delta", "Entry"]

Target = nn.Module | dict[str, Tensor]


@dataclass(eq=False)
class Entry:
    """What happened to one tensor.

    Attributes:
        kind: "sparse-replace" (values at positions), "dense" (the whole tensor), "added" (it is not
            in the base) or "removed".
        shape: Of the tensor.
        dtype: Of the tensor and its values.
        index: Ascending flat positions (int32 or int64) of a sparse entry.
        value: New values: [k] for a sparse entry, else the whole tensor; None if removed.
        old: What the base has there; None if not known.
        base_hash: Fingerprint of the tensor in the base; None if not known.
        result_hash: Fingerprint of the tensor after the change; None if not known.
    """

    kind: Literal["sparse-replace", "dense", "added", "removed"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: Tensor | None = None
    value: Tensor | None = None
    old: Tensor | None = None
    base_hash: str | None = None
    result_hash: str | None = None

    @property
    def count(self) -> int:
        """Changed elements (all of them for a whole tensor)."""
        return 0 if self.value is None else self.value.numel()

    def read(self, tensor: Tensor) -> Tensor:
        """What a tensor holds where this entry writes, bit for bit."""
        if self.index is not None:
            return ops.take(tensor, self.index, "tensor")
        return tensor.detach().clone()

    def write(self, tensor: Tensor, values: Tensor, name: str) -> None:
        """Writes values there, bit for bit."""
        if self.index is not None:
            ops.put_(tensor, self.index, values, name)
        else:
            with torch.no_grad():
                tensor.copy_(values.view(self.shape))


class Delta(Mapping[str, Entry]):
    """What moved between a base and a tuned model, by tensor name.

    Args:
        entries: By name, as in the state dict of the model.
        aliases: Other names of the same tensor (tied weights), to the name that has the entry.
        base_model: Id or path of the base, for the reader.
        metadata: How it was made; JSON-able.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        aliases: Mapping[str, str] | None = None,
        base_model: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._entries = dict(entries)
        self.aliases = dict(aliases or {})
        self.base_model = base_model
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # --- making --------------------------------------------------------------------------------

    @classmethod
    def between(
        cls,
        base: "str | Path | nn.Module | Mapping[str, Tensor]",
        tuned: "str | Path | nn.Module | Mapping[str, Tensor]",
    ) -> Self:
        """What leads from one model to another.

        Args:
            base: A checkpoint (file or folder of safetensors), a model, or a state dict.
            tuned: Likewise; floats, integers and buffers are compared bit for bit.

        Raises:
            ShapeError: A tensor has another shape or dtype in the other.
        """
        old, new = _tensors(base), _tensors(tuned)
        entries, aliases = {}, _aliases(tuned)
        for name in new:
            if name in aliases:
                continue
            after = new[name]()
            if name not in old:
                entries[name] = Entry(
                    "added", tuple(after.shape), after.dtype, value=after.detach().clone(),
                    result_hash=ops.fingerprint(after),
                )  # fmt: skip
                continue
            entry = _compared(name, old[name](), after)
            if entry is not None:
                entries[name] = entry
        ties = _aliases(base)
        for name in old:
            if name not in new and name not in ties:
                before = old[name]()
                entries[name] = Entry(
                    "removed", tuple(before.shape), before.dtype, old=before.detach().clone(),
                    base_hash=ops.fingerprint(before),
                )  # fmt: skip
        return cls(entries, {a: n for a, n in aliases.items() if n in entries}, _id(base))

    @classmethod
    def from_model(cls, model: nn.Module) -> Self:
        """What has moved in a wrapped model since its mask was set; O(selected), and exact.

        Raises:
            EngineError: The model is not wrapped.
        """
        from retouch.engine import get_engine

        engine = get_engine(model)
        entries = {}
        for name, slot in engine.slots.items():
            now = slot.selection.take(slot.param)
            moved = ~same_bits(now, slot.base).reshape(-1)
            if not bool(moved.any()):
                continue
            where = moved.nonzero().squeeze(1).cpu()
            index = slot.selection.flat()[where]
            value, old = (x.reshape(-1).cpu()[where] for x in (now, slot.base))
            entries[name] = Entry(
                "sparse-replace", tuple(slot.param.shape), slot.param.dtype, index, value, old,
                slot.base_hash or None, ops.fingerprint(slot.param),
            )  # fmt: skip
        state = _tensors(engine.owner())
        for name, before in engine.base_buffers.items():
            if name in state:
                entry = _compared(name, before, state[name]().cpu())
                if entry is not None:
                    entries[name] = entry
        aliases = {a: n for a, n in _aliases(engine.owner()).items() if n in entries}
        metadata = {"mask": engine.mask.metadata} if engine.mask is not None else {}
        return cls(entries, aliases, _id(engine.owner()), metadata)

    # --- using ---------------------------------------------------------------------------------

    def apply_(self, target: Target, force: bool = False) -> None:
        """Brings a base to the tuned state, in place; nothing is written before all is checked.

        Applying it again changes nothing. What was there is remembered, so `revert_` is exact.

        Args:
            target: A model, or a state dict.
            force: Also onto a tensor that is neither the base nor the result.

        Raises:
            BaseMismatchError: The target is not the base; the tensors that differ are named.
            ShapeError: A tensor is missing or has another shape or dtype.
        """
        self._move(target, force, forward=True)

    def revert_(self, target: Target, force: bool = False) -> None:
        """Brings a tuned model back to the base, in place and bit for bit.

        Raises:
            FormatError: The old values are not known: the delta was saved without them
                (``reversible=True`` keeps them) and was not applied by this object.
            BaseMismatchError: The target is not the result of this delta.
        """
        lacking = [n for n, e in self.items() if e.old is None and e.kind != "added"]
        if lacking:
            raise FormatError(
                f"this delta does not hold the old values of {_some(lacking)}: save it with "
                "reversible=True, or apply it with this object first"
            )
        self._move(target, force, forward=False)

    def _move(self, target: Target, force: bool, *, forward: bool) -> None:
        tensors = _named(target)
        wrong: list[str] = []
        todo: list[tuple[str, Entry]] = []
        for name, entry in self.items():
            whole = entry.kind in ("added", "removed")
            present = name in tensors
            if whole and isinstance(target, nn.Module):
                raise ShapeError(
                    f"{name} was {entry.kind}: a model cannot gain or lose a tensor; apply the delta to "
                    "a state dict or, with `retouch apply`, to a checkpoint"
                )
            creates = (entry.kind == "added") == forward
            if whole:
                if present == creates and not (creates and self._is(entry, tensors[name], forward)):
                    wrong.append(name)
                elif present != creates:
                    todo.append((name, entry))
                continue
            if not present:
                raise ShapeError(f"the target has no tensor {name}")
            tensor = tensors[name]
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ShapeError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; the delta is for "
                    f"{entry.dtype} of shape {entry.shape}"
                )
            before, after = entry.base_hash, entry.result_hash
            if not forward:
                before, after = after, before
            now = ops.fingerprint(tensor)
            if now == after:
                continue
            if before is not None and now != before:
                wrong.append(name)
            todo.append((name, entry))
        if wrong and not force:
            raise BaseMismatchError(
                f"this is not the {'base' if forward else 'result'} of the delta: {len(wrong)} tensors "
                f"differ ({_some(wrong)}); force=True goes on all the same"
            )
        for name, entry in todo:
            if entry.kind in ("added", "removed"):
                self._whole(target, name, entry, forward)
                continue
            tensor = tensors[name]
            values = entry.value if forward else entry.old
            assert values is not None
            if forward and entry.old is None:
                entry.old = entry.read(tensor).cpu()
            entry.write(tensor, values.to(tensor.device), name)
        _resync(target)

    @staticmethod
    def _is(entry: Entry, tensor: Tensor, forward: bool) -> bool:
        return ops.fingerprint(tensor) == (entry.result_hash if forward else entry.base_hash)

    @staticmethod
    def _whole(target: Target, name: str, entry: Entry, forward: bool) -> None:
        assert isinstance(target, dict)
        if (entry.kind == "added") == forward:
            new = entry.value if forward else entry.old
            assert new is not None
            target[name] = new.clone()
        else:
            if entry.kind == "removed" and entry.old is None:
                entry.old = target[name].detach().clone()
            del target[name]

    @contextlib.contextmanager
    def applied(self, model: Target) -> Iterator[None]:
        """Inside, the base has the tuned weights; swaps the changed elements, exact both ways."""
        self.apply_(model)
        try:
            yield
        finally:
            self.revert_(model)

    @contextlib.contextmanager
    def reverted(self, model: Target) -> Iterator[None]:
        """Inside, the tuned model has the weights of its base; exact both ways.

        Checks and swaps only what the delta changed, O(k).

        Raises:
            BaseMismatchError: The model does not hold the values of this delta.
        """
        tensors, held = _named(model), []
        for name, entry in self.items():
            if entry.kind in ("added", "removed"):
                raise ShapeError(f"{name} was {entry.kind}: a model cannot gain or lose a tensor")
            if entry.old is None or entry.value is None:
                raise FormatError(f"this delta does not hold the old values of {name}")
            if name not in tensors or tuple(tensors[name].shape) != entry.shape:
                raise ShapeError(f"the target has no tensor {name} of shape {entry.shape}")
            now = entry.read(tensors[name])
            value = entry.value.to(now.device)
            if not bool(same_bits(now.reshape(-1), value.reshape(-1)).all()):
                raise BaseMismatchError(
                    f"{name} does not hold the values of this delta: apply it first"
                )
            held.append((tensors[name], entry, name))
        try:
            for tensor, entry, name in held:
                assert entry.old is not None
                entry.write(tensor, entry.old.to(tensor.device), name)
            yield
        finally:
            for tensor, entry, name in held:
                assert entry.value is not None
                entry.write(tensor, entry.value.to(tensor.device), name)

    # --- figures -------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Changed elements."""
        return sum(e.count for e in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes of positions and new values in memory."""
        parts = [t for e in self.values() for t in (e.index, e.value) if t is not None]
        return sum(t.numel() * t.element_size() for t in parts)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each tensor: `kind`, `changed`, `numel`, `fraction`; `max_abs` and `l2` of the change
        where the old values are known.
        """  # noqa: D205
        out: dict[str, dict[str, Any]] = {}
        for name, e in self.items():
            numel = torch.Size(e.shape).numel()
            row: dict[str, Any] = {
                "kind": e.kind, "changed": e.count, "numel": numel,
                "fraction": e.count / max(numel, 1),
            }  # fmt: skip
            if e.old is not None and e.value is not None and e.dtype.is_floating_point and e.count:
                change = e.value.reshape(-1).double() - e.old.reshape(-1).double()
                row["max_abs"], row["l2"] = float(change.abs().max()), float(change.norm())
            out[name] = row
        return out

    def __repr__(self) -> str:
        size = f"{self.count:,} values in {len(self)} tensors"
        return f"Delta({size}, {self.nbytes / 2**20:.2f} MiB)"

    # --- files ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, reversible: bool = False) -> None:
        """Writes `delta.safetensors` and `delta_config.json` into a folder.

        Args:
            folder: Made if needed. Each file appears under its name only when it is complete.
            reversible: Also the old values (about half as large again): the delta can then be
                reverted without the base.

        Raises:
            FormatError: `reversible`, but the old values are not known.
        """
        deltafile.save(Path(folder), self, reversible=reversible)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a folder that `save_pretrained` or `retouch diff` wrote; no code is executed.

        Raises:
            FormatError: A file is damaged, truncated or of an unknown version.
        """
        entries, config = deltafile.load(Path(folder))
        return cls(entries, config.get("aliases"), config.get("base_model"), config.get("metadata"))

    from_pretrained = load

    def push_to_hub(self, repo_id: str, reversible: bool = False, **kwargs: Any) -> str:
        """Uploads the delta, with a model card, to the Hugging Face Hub.

        Args:
            repo_id: Such as "me/my-delta".
            reversible: See `save_pretrained`.
            **kwargs: For `HfApi.upload_folder`, such as `token`, `revision`, `commit_message`.

        Returns:
            The URL of the commit.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, reversible)
            (Path(folder) / "README.md").write_text(self.card(), encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))

    def card(self) -> str:
        """The model card, in Markdown."""
        head = ["library_name: retouch", "tags: [retouch, selective-fine-tuning]"]
        if self.base_model:
            head += [f"base_model: {self.base_model}", "base_model_relation: adapter"]
        body = (
            f"{self.count:,} weights in {len(self)} tensors differ from the base.\n\n"
            "```python\nretouch.Delta.load(folder).apply_(model)\n```\n"
        )
        return "---\n" + "\n".join(head) + "\n---\n\n# Delta\n\n" + body


# --- helpers ----------------------------------------------------------------------------------------


def _compared(name: str, before: Tensor, after: Tensor) -> Entry | None:
    """What leads from one tensor to the other, None if nothing."""
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ShapeError(
            f"{name} is {before.dtype} of shape {tuple(before.shape)} in the base, "
            f"{after.dtype} of shape {tuple(after.shape)} in the tuned model"
        )
    before, after = before.detach().cpu().contiguous(), after.detach().cpu().contiguous()
    index = ops.diff(before, after, name)
    if not index.numel():
        return None
    hashes = ops.fingerprint(before), ops.fingerprint(after)
    shape = tuple(after.shape)
    if 2 * index.numel() > after.numel():
        return Entry("dense", shape, after.dtype, None, after.clone(), before.clone(), *hashes)
    values = ops.take(after, index, name), ops.take(before, index, name)
    return Entry("sparse-replace", shape, after.dtype, index, *values, *hashes)


def _named(target: Target) -> dict[str, Tensor]:
    """The tensors of a target, themselves."""
    if isinstance(target, nn.Module):
        return {n: t for n, t in target.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    return target


def _resync(target: Target) -> None:
    """Tells the engine of a wrapped model that its weights were written."""
    engine: Any = target._modules.get(PLACE) if isinstance(target, nn.Module) else None
    if engine is not None and hasattr(engine, "sync_from_weights"):
        engine.sync_from_weights()


def _tensors(source: Any) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a checkpoint, model or state dict, each read when it is called for."""
    if isinstance(source, str | os.PathLike):
        return _checkpoint(Path(source))
    if isinstance(source, nn.Module | Mapping):
        state = _named(source) if isinstance(source, nn.Module) else source
        return {n: partial(_same, t) for n, t in state.items() if isinstance(t, Tensor)}
    raise EngineError(
        f"wanted a checkpoint path, a model or a state dict, got {type(source).__name__}"
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _checkpoint(path: Path) -> dict[str, Callable[[], Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{path}: no .safetensors file in this folder")
    out: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        try:
            opened: Any = safe_open(file, "pt")
            names = list(opened.keys())
        except SafetensorError as e:
            raise FormatError(f"{file}: damaged or truncated ({e})") from e
        for name in names:
            if name in out:
                raise FormatError(f"{file}: {name} is in another file of this folder too")
            out[name] = partial(opened.get_tensor, name)
    return out


def _aliases(source: Any) -> dict[str, str]:
    """Names that share the memory of an earlier one (tied weights), to that one."""
    if isinstance(source, str | os.PathLike):
        return {}
    first: dict[tuple[Any, ...], str] = {}
    out = {}
    state = _named(source) if isinstance(source, nn.Module) else source
    for name, t in state.items():
        if isinstance(t, Tensor) and t.numel() and t.layout == torch.strided and not t.is_meta:
            key = (t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride())
            if key in first:
                out[name] = first[key]
            first.setdefault(key, name)
    return out


def _id(source: Any) -> str | None:
    if isinstance(source, str | os.PathLike):
        return str(source)
    name = getattr(getattr(source, "config", None), "_name_or_path", None)
    return str(name) if name else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""Deltas: what moved, exactly.

A `Delta` holds, for each tensor that changed, the positions, the new values (replacements, so nothing
is lost to rounding), where known the old ones, and fingerprints of the tensor before and after. It
refuses a base that is not its own.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from retouch import compress as compression
from retouch import deltafile, deltamove, deltapeft, deltaview, hub, ops, updates
from retouch.deltaentry import Entry
from retouch.deltamove import Target
from retouch.deltasource import Source, check_ties
from retouch.eligible import own_parameters
from retouch.errors import FormatError, ShapeError
from retouch.masks import Mask
from retouch.slots import same_bits

__all__ = ["Delta", "Entry"]


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
            ShapeError: A tensor has another shape or dtype in the other, or the base ties two names
                that have different values in the tuned model.
            FormatError: A checkpoint is damaged or truncated.
        """
        old, new = Source(base), Source(tuned)
        check_ties(old, new)
        entries: dict[str, Entry] = {}
        aliases: dict[str, str] = {}
        for name, names in new.names.items():
            after = new.read[name]()
            known = [n for n in names if n in old]
            if not known:
                entries[name] = Entry(
                    "added", tuple(after.shape), after.dtype, value=after.detach().clone(),
                    result_hash=ops.fingerprint(after),
                )  # fmt: skip
                aliases |= {n: name for n in names if n != name}
                continue
            first = known[0]
            # tied in the tuned model, but not in the base: they may come from different values
            apart = [n for n in known[1:] if not _equal(old, first, n)]
            for one in (first, *apart):
                entry = _compared(one, old.read[one](), after)
                if entry is not None:
                    entries[one] = entry
            if first in entries:
                aliases |= {n: first for n in names if n != first and n not in apart}
        for name, names in old.names.items():
            if not any(n in new for n in names):
                before = old.read[name]()
                entries[name] = Entry(
                    "removed", tuple(before.shape), before.dtype, old=before.detach().clone(),
                    base_hash=ops.fingerprint(before),
                )  # fmt: skip
                aliases |= {n: name for n in names if n != name}
        return cls(entries, aliases, old.id)

    @classmethod
    def from_model(cls, model: nn.Module) -> Self:
        """What has moved in a wrapped model since its first mask was set; O(selected), and exact.

        Raises:
            EngineError: The model is not wrapped.
        """
        from retouch.engine import get_engine

        engine = get_engine(model)
        entries = {}
        for name, param in own_parameters(engine.owner()):
            piece = engine.base_of(name)
            if piece is None:
                continue
            now = piece.selection.take(param.detach()).reshape(-1)
            moved = ~same_bits(now, piece.values)
            if not bool(moved.any()):
                continue
            where = moved.nonzero().squeeze(1).cpu()
            index = piece.selection.flat()[where]
            value, old = (x.cpu()[where] for x in (now, piece.values))
            slot = engine.slots.get(name)
            base_hash = slot.base_hash if slot is not None else engine.hashes.get(name)
            entries[name] = Entry(
                "sparse-replace", tuple(param.shape), param.dtype, index, value, old,
                base_hash or None, ops.fingerprint(param),
            )  # fmt: skip
        source = Source(engine.owner())
        for name, before in engine.base_buffers.items():
            if name in source:
                entry = _compared(name, before, source.read[name]().cpu())
                if entry is not None:
                    entries[name] = entry
        aliases = {a: n for a, n in source.aliases().items() if n in entries}
        metadata = {"mask": engine.mask.metadata} if engine.mask is not None else {}
        return cls(entries, aliases, source.id, metadata)

    # --- using ---------------------------------------------------------------------------------

    def apply_(self, target: Target, force: bool = False) -> None:
        """Brings a base to the tuned state, in place; nothing is written before all is checked.

        Applying it again changes nothing (of a compressed delta that knows its result by no fingerprint,
        it is refused). What the base had there is remembered, so `revert_` is exact.

        Args:
            target: A model, or a state dict.
            force: Also onto a tensor that is neither the base nor the result. What such a tensor had
                is not remembered: its values are not those of the base.

        Raises:
            BaseMismatchError: The target is not the base; the tensors that differ are named.
            ShapeError: A tensor is missing or has another shape or dtype, or the target ties two names
                that the delta changes differently.
            FormatError: The values of the delta are damaged: they do not lead to its result.
        """
        deltamove.move(self, target, force, forward=True)

    def revert_(self, target: Target, force: bool = False) -> None:
        """Brings a tuned model back to the base, in place and bit for bit.

        Args:
            target: A model, or a state dict.
            force: Also from a tensor that is neither the result nor the base.

        Raises:
            FormatError: The old values are not known: the delta was saved without them
                (``reversible=True`` keeps them) and was not applied by this object; or they are
                damaged.
            BaseMismatchError: The target is not the result of this delta.
        """
        lacking = [n for n, e in self.items() if e.old is None and e.kind != "added"]
        if lacking:
            raise FormatError(
                f"this delta does not hold the old values of {deltamove.some(lacking)}: save it with "
                "reversible=True, or apply it with this object first"
            )
        deltamove.move(self, target, force, forward=False)

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
        held = deltamove.swap_out(self, model)
        news = [entry.new for _, entry, _ in held]
        try:
            for tensor, entry, name in held:
                assert entry.old is not None
                entry.write(tensor, entry.old, name)
            yield
        finally:
            for (tensor, entry, name), new in zip(held, news, strict=True):
                assert new is not None
                entry.write(tensor, new, name)

    def compress(self, *steps: "compression.Step", base: Any = None, min_dims: int = 2) -> "Delta":
        """A smaller delta that does nearly the same: lossy, with the loss of each tensor in `stats`.

        Its values are added to the base and rounded once. It keeps old values where they are known.

        Args:
            *steps: In order: `compress.Magnitude` and `compress.Dare` make the difference sparse; then at
                most one of `compress.BitDelta`, `compress.Quantise` and `compress.LowRank`.
            base: The model that the delta is for (checkpoint, model or state dict). Needed where the delta
                does not hold old values or fingerprints; with it the result has a fingerprint too.
            min_dims: Tensors with fewer dimensions stay exact, as do integers, 8-bit floats, and tensors
                that were added or removed.

        Raises:
            FormatError: Old values or fingerprints are not known, and there is no base.
            BaseMismatchError: `base` is another one.
            ScoreError: A change is NaN or infinite.
            HyperparameterError: A step is out of range, or cannot follow the one before it.
        """
        entries = compression.compressed(self, steps, base, min_dims)
        metadata = self.metadata | {"compressed": [*map(repr, steps)]}
        return Delta(entries, self.aliases, self.base_model, metadata)

    def to_peft(
        self,
        folder: str | Path,
        rank: int,
        base: Any = None,
        *,
        others: "deltapeft.Others" = "error",
        fan_in_fan_out: bool = False,
        task_type: str | None = None,
        overwrite: bool = False,
    ) -> dict[str, dict[str, float]]:
        """Writes the nearest LoRA adapter of some rank, as a folder that PEFT loads.

        Of each weight of a linear layer the leading singular triplets of its change, both factors of one
        size (`compress.LowRank`), float32, with a scale of 1. Which matrix is of a linear layer is told
        by name and shape; an embedding, and a weight that is tied to another name, has no such adapter.

        Args:
            folder: The new folder, which appears when it is complete.
            rank: Of each change; at most what its shape allows.
            base: The model that the delta is for; needed where the delta does not hold old values.
            others: What a LoRA adapter has no place for (norms, biases, embeddings, tied weights, tensors
                that were added): "error", or "drop": they stay as in the base.
            fan_in_fan_out: Weights are stored [in, out] (`Conv1D` of GPT-2), as in PEFT's `LoraConfig`.
            task_type: Of PEFT, such as "CAUSAL_LM": which class of model it makes.
            overwrite: Replace `folder`.

        Returns:
            By tensor: `rank` (0: dropped), and `residual`, the share of the change's energy (squared
            Frobenius norm) that is lost; of a delta that was compressed before at most so much.

        Raises:
            LayoutError: A changed tensor has no place in the adapter, or no linear layer is changed.
            FormatError: Old values are not known, and there is no base.
            BaseMismatchError: `base` is another one.
            HyperparameterError: A rank below 1, another word for `others`, or a folder that is there already.
            ScoreError: A change is NaN or infinite.
        """
        return deltapeft.to_peft(
            self, folder, rank, base, others, fan_in_fan_out, task_type, overwrite
        )

    # --- figures -------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Changed elements."""
        return sum(e.count for e in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes of positions and new values in memory."""
        return sum(e.nbytes for e in self.values())

    def stats(self) -> dict[str, dict[str, Any]]:
        """Figures of each tensor.

        Returns:
            By name: `kind`, `changed`, `numel`, `fraction` and `bytes` (in the file); of compressed
            tensors `error` (norm of what is missing, relative to that of the change). For floats whose
            old values are known also `not_finite` (changes from or to NaN or infinity) and, of the
            others, `max_abs` and `l2` of the change, and `max_ulp`, `median_ulp` and `one_ulp` (the
            fraction that moved to the next float; a change from 0 to -0 counts as none).
        """
        return {name: deltaview.figures(entry) for name, entry in self.items()}

    def updates(
        self, base: Any = None, *, atol: float = 1e-5, ranks: bool = False
    ) -> updates.Updates:
        """How sparse the update is, and how much of that is due to the storage.

        The measurements of "Reinforcement Learning Finetunes Small Subnetworks" (arXiv 2505.11711),
        over the floating-point tensors that both models have. `print` the result for a report.

        Args:
            base: The model that the delta is for (checkpoint, model or state dict), so that tensors
                without a change count too; also for old values that the delta does not hold.
            atol: A second sparsity counts changes of at most this as none; the paper's is 1e-5.
            ranks: Also the numerical rank of each matrix's change, by singular values: O(n^3).

        Raises:
            FormatError: Old values are not known, and there is no base.
        """
        return updates.measure(self, base, atol, ranks)

    def mask(self) -> Mask:
        """What changed, as a mask: train it again, or compare it with others by `Mask.overlap`.

        A tensor that is held whole, without its old values, counts as changed everywhere.
        """
        return updates.mask_of(self)

    def __repr__(self) -> str:
        size = f"{self.count:,} values in {len(self)} tensors"
        return f"Delta({size}, {self.nbytes / 2**20:.2f} MiB)"

    def _repr_html_(self) -> str:
        return deltaview.as_html(self)

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

        Args:
            folder: The folder, or an id of the Hugging Face Hub.

        Raises:
            FormatError: A file is damaged, truncated or of an unknown version.
        """
        entries, config = deltafile.load(Path(hub.local(folder)))
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
        return deltaview.card(self)


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


def _equal(source: Source, a: str, b: str) -> bool:
    """Whether two tensors of a source have one dtype, one shape and the same bits."""
    if source.tied(a, b):
        return True
    x, y = source.read[a](), source.read[b]()
    return x.dtype == y.dtype and x.shape == y.shape and not ops.diff(x, y, b).numel()

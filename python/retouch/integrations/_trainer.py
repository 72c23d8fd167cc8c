"""What selective training adds to the class of a Trainer."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from retouch.binding import innermost
from retouch.config import SelectConfig
from retouch.eligible import PLACE
from retouch.engine import Engine, follow, get_engine, wrap
from retouch.errors import EngineError, MaskError
from retouch.integrations import _checkpoint
from retouch.integrations._calibration import Batch, data_and_loss, undisturbed
from retouch.masks import Mask
from retouch.optim.configured import configure
from retouch.routes import Gradient
from retouch.select import select

Checkpoint = Literal["full", "delta"]
MIB = 2**20


@dataclass
class Run:
    """What `attach` was asked for, and what has come of it so far.

    Attributes:
        config: What to select (a recipe is resolved already), or the mask itself.
        data: Batches for a data-driven score; None for the training data.
        checkpoint: Whether checkpoints hold the whole model or only its delta.
        optimizer: A class and arguments that go before those of ``TrainingArguments``.
        gradient: How gradients are taken, see `retouch.wrap`.
        resume: The checkpoint that the present ``train()`` goes on from.
        start: The mask and the selected weights from before that checkpoint was loaded; only where
            it holds no optimizer state.
        engine: The engine of the model, once there is an optimizer.
    """

    config: SelectConfig | Mask
    data: Iterable[Batch] | None
    checkpoint: Checkpoint
    optimizer: tuple[type[Optimizer], dict[str, Any]] | None
    gradient: Gradient = "auto"
    resume: Path | None = None
    start: tuple[Mask, dict[str, Tensor]] | None = None
    engine: Engine | None = None
    bound: Optimizer | None = field(default=None, repr=False)


class SelectiveTrainer(Trainer):
    """A Trainer that trains selected weights only.

    Never constructed: `attach` puts it in front of the class that a trainer has already, so each
    method below runs first and calls the trainer's own, also TRL's, through ``super()``.
    """

    _retouch: Run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Forgets the checkpoint of an earlier call; `_load_from_checkpoint` notes a new one."""
        run = self._retouch
        run.resume = run.start = None
        return super().train(*args, **kwargs)

    # --- optimizer -----------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Lets the Trainer make its optimizer, selects, and leaves it the selected weights only.

        Class, arguments and the groups with and without weight decay are the Trainer's; an
        optimizer that the user gave is kept and edited in place.
        """
        run = self._retouch
        if run.bound is not None and self.optimizer is not None:
            if innermost(self.optimizer) is run.bound:  # train() was called before
                return self.optimizer
        refuse_the_impossible(self)
        if run.optimizer is not None:
            self.optimizer_cls_and_kwargs = run.optimizer[0], arguments_for(self, *run.optimizer)
        super().create_optimizer(model)
        optimizer = self.optimizer
        assert optimizer is not None
        inner = innermost(optimizer)
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        inner.register_step_pre_hook(self._measure_if_due)  # before the engine's own hook
        self._install(target, inner)
        run.bound = inner
        return optimizer

    def _install(self, model: nn.Module, optimizer: Optimizer) -> None:
        run = self._retouch
        if isinstance(run.config, SelectConfig):
            configure(optimizer, run.config)
        if run.resume is not None and _checkpoint.has_optimizer(run.resume):
            # Mask, float32 values and base come with the optimizer state, which the Trainer loads
            # when Accelerate has prepared model and optimizer.
            wrap(optimizer, None, model, gradient=run.gradient)
            run.engine = get_engine(model)
            self._follow(start=False)
        elif run.start is not None and not moves(run.config):
            mask, base = run.start
            trained = _checkpoint.swap(model, mask, base)
            wrap(optimizer, mask, model, gradient=run.gradient)
            _checkpoint.swap(model, mask, trained)
            run.engine = get_engine(model)
            run.engine.sync_from_weights()
        elif moves(run.config):
            wrap(optimizer, None, model, gradient=run.gradient)
            run.engine = get_engine(model)
            self._follow(start=True)
        else:
            wrap(optimizer, self._mask(model), model, gradient=run.gradient)
            run.engine = get_engine(model)

    def _follow(self, start: bool) -> None:
        """Has the mask move by the schedule of the config, if it has one."""
        run = self._retouch
        if not moves(run.config):
            return
        if run.start is not None:
            raise EngineError(
                "a run whose mask moves can go on only from a checkpoint with its optimizer state"
            )
        assert run.engine is not None and isinstance(run.config, SelectConfig)
        data, loss = data_and_loss(self, run.data)
        follow(
            run.engine, run.config, data=data, loss_fn=loss, start=start,
            around=lambda: undisturbed(self),
        )  # fmt: skip

    def _mask(self, model: nn.Module) -> Mask:
        run = self._retouch
        if isinstance(run.config, Mask):
            return run.config
        with undisturbed(self):
            data, loss = data_and_loss(self, run.data)
            mask = select(model, run.config, data, loss_fn=loss).broadcast()
        named = dict(model.named_parameters())
        frozen = [n for n, s in mask.items() if s.count and not named[n].requires_grad]
        if frozen:
            raise MaskError(
                f"{len(frozen)} of the selected parameters have requires_grad=False, such as "
                f"{frozen[0]}: thaw them, or leave them out by exclude_modules or target_modules"
            )
        return mask

    # --- metrics -------------------------------------------------------------------------------

    def _measure_if_due(self, *_: Any) -> None:
        """Turns measuring on for the steps that will be logged."""
        if self._retouch.engine is None:
            return
        step = self.state.global_step + 1
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS
        self._retouch.engine.measure = (
            (step == 1 and self.args.logging_first_step)
            or (by_steps and step % self.state.logging_steps == 0)
            # which step is the last of its epoch is not known here
            or self.args.logging_strategy == IntervalStrategy.EPOCH
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds ``retouch/...`` to what is logged of training, for the history and the reporters."""
        engine = self._retouch.engine
        if engine is not None and "loss" in logs:
            for name, value in engine.metrics().items():
                if name.endswith("_bytes"):
                    name, value = name.removesuffix("bytes") + "mib", value / MIB
                logs[f"retouch/{name}"] = value
        super().log(logs, *args, **kwargs)

    # --- checkpoints ---------------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        run, folder = self._retouch, Path(output_dir or self.args.output_dir or ".")
        if run.checkpoint == "full":
            super()._save(output_dir, state_dict)
        elif run.engine is None:
            raise EngineError(
                "there is no delta to save before trainer.train(): nothing has been selected yet"
            )
        elif self.args.should_save:
            _checkpoint.save_delta(self, folder)
        if run.engine is not None and self.args.should_save:
            _checkpoint.save_record(folder, run.engine)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        run, folder = self._retouch, Path(resume_from_checkpoint)
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        run.resume = folder
        self._compare(folder, target)
        if _checkpoint.has_delta(folder):
            _checkpoint.load_delta(target, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        if _checkpoint.has_delta(best):
            _checkpoint.load_delta(self.accelerator.unwrap_model(self.model), best)
        else:
            super()._load_best_model()
        if self._retouch.engine is not None:
            self._retouch.engine.sync_from_weights()

    def _compare(self, folder: Path, model: nn.Module) -> None:
        """Says what a checkpoint has to do with this run before it is loaded."""
        run = self._retouch
        if not folder.is_dir():
            return  # the Trainer says so
        if not (folder / _checkpoint.MASK).is_file():
            raise EngineError(
                f"{folder} holds no mask ({_checkpoint.MASK}): it was not saved by a run with "
                "retouch. To train from its weights, load them into the model and start a new run."
            )
        mask = Mask.load(folder / _checkpoint.MASK)
        differences = _checkpoint.differences(mask, run.config)
        if differences:
            warnings.warn(
                f"{folder} was made with another selection ({differences}); the mask of the "
                "checkpoint is trained on",
                stacklevel=2,
            )
        if not _checkpoint.has_optimizer(folder) and PLACE not in model._modules:
            named = dict(model.named_parameters())
            mask.check(model)
            run.start = mask, {name: s.take(named[name].detach()) for name, s in mask.items()}


def moves(config: SelectConfig | Mask) -> bool:
    """Whether the mask changes during training."""
    return isinstance(config, SelectConfig) and config.schedule is not None


class Epochs(TrainerCallback):
    """Tells the mover of a run when an epoch is over, and the run when all weights are frozen."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops a run in which nothing may move any more."""
        mover = self._run.engine.mover if self._run.engine is not None else None
        if mover is not None and mover.finished:
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts an epoch."""
        mover = self._run.engine.mover if self._run.engine is not None else None
        if mover is not None:
            mover.new_epoch()


def arguments_for(
    trainer: Trainer, kind: type[Optimizer], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of an optimizer class, as far as ``TrainingArguments`` has them."""
    args = trainer.args
    known: dict[str, Any] = {"lr": args.learning_rate}
    names = inspect.signature(kind).parameters
    if "betas" in names:  # AdamW, Adam, Lion: adam_epsilon is not for others
        known |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {name: value for name, value in known.items() if name in names} | dict(given)


def refuse_the_impossible(trainer: Trainer) -> None:
    """Raises EngineError where compact values would be trained wrongly or not at all."""
    why = ""
    if trainer.is_deepspeed_enabled:
        why = "DeepSpeed replaces the optimizer and flattens the parameters"
    elif trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        why = "FSDP shards the weights after the selection"
    elif trainer.args.n_gpu > 1:
        why = (
            f"nn.DataParallel would copy the model to {trainer.args.n_gpu} GPUs: make one visible "
            "with CUDA_VISIBLE_DEVICES"
        )
    if why:
        raise EngineError(f"retouch trains whole models, in one process or with DDP: {why}.")

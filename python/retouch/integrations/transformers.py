"""Selective updates in the Hugging Face `Trainer`, and in the TRL trainers that derive from it."""

import dataclasses
import json
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any, TypeVar, get_args

from torch.optim import Optimizer

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "retouch.attach and retouch.SelectiveUpdates work with the Trainer of transformers, which "
        'cannot be imported: `pip install "retouch[hf]"`.'
    ) from error

from retouch.config import SelectConfig, resolve
from retouch.engine import get_engine
from retouch.errors import EngineError, HyperparameterError
from retouch.integrations._calibration import Batch
from retouch.integrations._trainer import Checkpoint, Epochs, Run, SelectiveTrainer, moves
from retouch.masks import Mask
from retouch.optim import AdamW
from retouch.optim.configured import asks
from retouch.routes import Gradient, check_gradient
from retouch.scores import as_score

SAMPLES = 256  # of the training data, for scores that need data
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(
    trainer: AnyTrainer,
    config: SelectConfig | str | Mask,
    *,
    data: Iterable[Batch] | None = None,
    checkpoint: Checkpoint = "full",
    optimizer: type[Optimizer] | tuple[type[Optimizer], dict[str, Any]] | None = None,
    gradient: Gradient = "auto",
    **overrides: Any,
) -> AnyTrainer:
    """Makes a Trainer, or a TRL trainer, train selected weights only.

    Nothing is selected here: that happens when the trainer makes its optimizer, at the start of
    ``train()``, so that models given by name are loaded and on their device by then. Learning rate,
    betas, decay and the class of the optimizer come from ``TrainingArguments``; an instance that
    was passed as ``optimizers=`` is kept and edited in place.

    Training goes on from a checkpoint bit for bit, with the mask of the checkpoint: nothing is
    selected anew, and a config that differs from the saved one is reported by a warning. Each
    checkpoint and ``save_model`` also hold ``retouch_config.json`` and ``mask.safetensors``.
    Logs of the training loss get ``retouch/density``, ``selected``, ``update_norm``,
    ``lost_updates``, ``state_mib`` and ``delta_mib``; a logged step holds a second copy of the
    selected values while it is measured.

    Args:
        trainer: A trainer that has not trained yet. It keeps its identity; its class becomes a
            subclass of the one it had.
        config: What to select, the name of a recipe, or a mask of this very model.
        data: Collated batches, a row per sample, for scores that need data; default the trainer's
            own training data, sampled as it samples them but by the seed of the config, so that
            the run itself is not disturbed. The loss is the trainer's own. The config says how
            many ``samples`` are seen; where it does not, a recipe sees all of them and other
            configs see 256.
        checkpoint: ``"full"``: checkpoints and ``save_model`` hold the whole model, as ever.
            ``"delta"``: they hold the difference to the model that the trainer was given
            (`retouch.Delta.load` reads it); resuming needs that model again.
        optimizer: A class, or a class and its arguments, instead of the one that
            ``TrainingArguments.optim`` names (where the mask moves, or the config has a gate, decay to
            the base or a pull, `retouch.AdamW` is the default): ``retouch.AdamW`` or ``(retouch.SGD,
            {"momentum": 0.9})``. It gets the learning rate, and betas and epsilon if it knows them, from
            ``TrainingArguments``.
        gradient: How gradients are taken: "auto", "sampled" or "dense", see `retouch.wrap`.
        **overrides: Fields of `SelectConfig` that replace those of ``config``.

    Returns:
        The same trainer.

    Raises:
        HyperparameterError: An argument that is wrong in itself.
        EngineError: The trainer is attached already.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=dataset)
        >>> retouch.attach(trainer, "fisher", density=0.005).train()
    """
    if not isinstance(trainer, Trainer):
        raise HyperparameterError(
            f"trainer: got {type(trainer).__name__}, wanted a transformers.Trainer"
        )
    if isinstance(trainer, SelectiveTrainer):
        raise EngineError(
            "this trainer is attached to retouch already (by retouch.attach or a SelectiveUpdates "
            "callback): attach once, to a new trainer"
        )
    if checkpoint not in get_args(Checkpoint):
        raise HyperparameterError(f'checkpoint={checkpoint!r}: wanted "full" or "delta"')
    check_gradient(gradient)
    run = Run(
        resolved(config, overrides, own_data=data is None),
        data,
        checkpoint,
        _optimizer(optimizer),
        gradient,
    )
    ours = moves(run.config) or (isinstance(run.config, SelectConfig) and asks(run.config))
    if ours and run.optimizer is None and trainer.optimizer is None:
        run.optimizer = AdamW, {"weight_decay": trainer.args.weight_decay}
    if run.optimizer is not None and trainer.optimizer is not None:
        raise HyperparameterError(
            "the trainer was given an instance by optimizers=, so optimizer= cannot replace it: "
            "pass one of the two"
        )
    kind = type(trainer)
    vars(trainer)["_retouch"] = run
    if moves(run.config):
        trainer.add_callback(Epochs(run))
    trainer.__class__ = type(
        kind.__name__, (SelectiveTrainer, kind), {"__module__": kind.__module__}
    )
    return trainer


class SelectiveUpdates(TrainerCallback, ExportableState):
    """`attach` in the shape of a callback: ``Trainer(..., callbacks=[SelectiveUpdates(config)])``.

    A callback is not told its trainer, so it looks for the one that holds it among the callers of
    the event. What it finds is attached to; all that `attach` says holds. Data for scores are the
    training data; to pass others, or a mask, use `attach`.

    Args:
        config: What to select, its ``to_dict()``, or the name of a recipe.
        checkpoint: See `attach`.
        gradient: See `attach`.
        **overrides: Fields of `SelectConfig` that replace those of ``config``.

    Raises:
        HyperparameterError: Something that cannot be written as JSON, or is wrong in itself.
    """

    def __init__(
        self,
        config: SelectConfig | str | dict[str, Any],
        checkpoint: Checkpoint = "full",
        gradient: Gradient = "auto",
        **overrides: Any,
    ) -> None:
        check_gradient(gradient)
        if checkpoint not in get_args(Checkpoint):
            raise HyperparameterError(f'checkpoint={checkpoint!r}: wanted "full" or "delta"')
        if isinstance(config, dict):
            config = SelectConfig.from_dict(config)
        if not isinstance(config, SelectConfig | str):
            raise HyperparameterError(
                f"config: got {type(config).__name__}, wanted a SelectConfig, its dict, or the "
                "name of a recipe. A callback must be able to be built from JSON; a mask is for "
                "retouch.attach(trainer, mask)"
            )
        self.config = config
        self.checkpoint = checkpoint
        self.gradient = gradient
        self.overrides = overrides
        custom = isinstance(config, SelectConfig) and config.to_dict()["score"] == "custom"
        if custom or not _is_json(self._arguments()):
            raise HyperparameterError(
                "the Trainer saves its callbacks as JSON, and this config, or an override, has "
                "something that JSON cannot hold: use retouch.attach(trainer, config)"
            )
        resolve(config, overrides)  # a mistake shows here and not in train()

    def _arguments(self) -> dict[str, Any]:
        config = self.config.to_dict() if isinstance(self.config, SelectConfig) else self.config
        own = {"config": config, "checkpoint": self.checkpoint, "gradient": self.gradient}
        return own | self.overrides

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to ``trainer_state.json`` and builds a new instance from.

        The Trainer also asks for it at the start of ``train()``, before it makes the optimizer: the
        only sign that a callback gets which was added to a finished trainer.
        """
        trainer, frame = _holder(self)
        if trainer is not None and getattr(trainer, "is_in_train", False):
            if not isinstance(trainer, SelectiveTrainer):
                if frame is not None and frame.f_locals.get("resume_from_checkpoint"):
                    raise EngineError(
                        "SelectiveUpdates was added to a trainer that was built without it, which "
                        "has loaded the checkpoint already: pass it in callbacks=, or use "
                        "retouch.attach"
                    )
                self._attach(trainer)
        return {"args": self._arguments(), "attributes": {}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Attaches to the trainer that has just been built."""
        trainer, _ = _holder(self)
        if trainer is None:
            raise EngineError(
                "SelectiveUpdates found no transformers.Trainer that holds it among the callers; "
                "use retouch.attach(trainer, config) instead"
            )
        self._attach(trainer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Makes sure that the selection has happened."""
        try:
            get_engine(kwargs["model"])
        except EngineError as error:
            raise EngineError(
                "SelectiveUpdates is in the callbacks, but the model is not being trained "
                "selectively: use retouch.attach(trainer, config) before trainer.train()"
            ) from error

    def _attach(self, trainer: Trainer) -> None:
        attach(
            trainer,
            self.config,
            checkpoint=self.checkpoint,
            gradient=self.gradient,
            **self.overrides,
        )


def _is_json(data: Any) -> bool:
    """Whether data come back from JSON as they are."""
    try:
        return bool(json.loads(json.dumps(data)) == data)
    except TypeError:
        return False


def _holder(callback: TrainerCallback) -> tuple[Trainer | None, FrameType | None]:
    """The trainer among the callers that holds a callback, and the frame of its method."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            handler = getattr(found, "callback_handler", None)
            if any(held is callback for held in getattr(handler, "callbacks", ())):
                return found, frame
        frame = frame.f_back
    return None, None


def resolved(
    config: SelectConfig | str | Mask, overrides: dict[str, Any], *, own_data: bool
) -> SelectConfig | Mask:
    """A config with everything decided, or the mask."""
    if not isinstance(config, Mask):
        config = resolve(config, overrides)
        score = as_score(config.score) if config.score is not None else None
        if own_data and config.recipe is None and config.samples is None:
            if getattr(score, "needs_data", False):
                config = dataclasses.replace(config, samples=SAMPLES)
        return config
    if overrides:
        raise HyperparameterError(
            f"{', '.join(overrides)}: these change a config, and a mask was given"
        )
    return config


def _optimizer(
    given: type[Optimizer] | tuple[type[Optimizer], dict[str, Any]] | None,
) -> tuple[type[Optimizer], dict[str, Any]] | None:
    if given is None:
        return None
    kind, arguments = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if not (isinstance(kind, type) and issubclass(kind, Optimizer) and isinstance(arguments, dict)):
        raise HyperparameterError(
            f"optimizer={given!r}: wanted a class of torch.optim.Optimizer, or that class and a "
            "dict of its arguments"
        )
    return kind, arguments

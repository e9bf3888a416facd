"""Promises about single steps: they are taken, stay finite in half precision, and change nothing where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.data.views import VIEWS
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.gradients import switched_on
from nnunet_ssl.testing.networks import counted, differing, scale_heads, weights_of
from nnunet_ssl.training.method import NETWORK, Step

STEP, FINITE, SKIPPING = "step", "finite", "skipping"
EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant images": lambda images: torch.full_like(images, 3.0),
    "images of zeros": torch.zeros_like,
    "huge values": lambda images: images * 1e4,
}
# A gradient scaler starts too high, and skips steps until its scale fits.
_TRIES = 5
CONFIDENT = "networks that are sure of every voxel"


def a_step_is_taken(cls: type, bench: Bench) -> None:
    """Networks are built, and a step with labeled and unlabeled images changes the plan's network.

    Raises:
        BrokenPromise: Where it does not.
    """
    with bench.data(device=bench.device) as tiny:
        trainer = tiny.initialized(cls, supervised_fraction=0.0)
        labeled, unlabeled = tiny.batches(trainer)
        feed(trainer, unlabeled)
        before = weights_of(trainer)
        for _ in range(_TRIES):
            trainer.train_step(labeled)
        changed = differing(before, weights_of(trainer))
    if not any(name.startswith(f"{NETWORK}.") for name in changed):
        raise BrokenPromise(
            STEP, "A step does not change the plan's network.", f"Look whether {cls.__name__} overrides train_step."
        )


def steps_are_finite(cls: type, bench: Bench, patch: str = "2d", **ssl: Any) -> None:
    """Under autocast, losses and weights are finite after a step, whatever images and predictions are.

    Raises:
        BrokenPromise: Naming the situation and the term.
    """
    for situation in (*EXTREMES, CONFIDENT):
        step_is_finite(cls, bench, situation, patch, **ssl)


def step_is_finite(cls: type, bench: Bench, situation: str, patch: str = "2d", **ssl: Any) -> None:
    """The same in one situation, of ``EXTREMES`` or ``CONFIDENT``; labels show the background alone."""
    with bench.data(patch) as tiny:
        trainer = tiny.initialized(cls, **{"supervised_fraction": 0.0, "cpu_bfloat16": True, **switched_on(cls), **ssl})
        labeled, unlabeled = tiny.batches(trainer)
        if situation == CONFIDENT:
            # Probabilities are 0 and 1.
            scale_heads(trainer, 1e4)
        else:
            change = EXTREMES[situation]
            labeled["data"] = change(labeled["data"])
            unlabeled |= {view: change(unlabeled[view]) for view in VIEWS}
        labeled["target"] = torch.zeros_like(labeled["target"])
        feed(trainer, unlabeled)
        given = _noted_terms(trainer)
        output = trainer.train_step(labeled)
        values = dict(zip(trainer.logger.local_logger.step_names, output["terms"].tolist()))
        bad = [name for name in (*given, *trainer._statistics) if not math.isfinite(values[name])]
        weights = [name for name, value in weights_of(trainer).items() if not torch.isfinite(value).all()]
    if bad or weights or not output["finite"]:
        what = f"{', '.join(bad)} is" if bad else "a weight is" if weights else "the gradient is"
        raise BrokenPromise(
            FINITE,
            f"With {situation} and bfloat16, {what} not finite.",
            "Sums, logarithms and divisions need float32: use self.probabilities and self.log_probabilities, or "
            "runtime.precision.at_least_float32, and add to what is divided by.",
        )


def skipped_steps_change_nothing(cls: type, bench: Bench, patch: str = "2d") -> None:
    """After a step whose losses are not finite, all networks are as before, averaged ones too.

    Raises:
        BrokenPromise: Naming the weights that changed.
    """
    with bench.data(patch, device=bench.device) as tiny:
        trainer = tiny.initialized(cls, supervised_fraction=0.0)
        labeled, unlabeled = tiny.batches(trainer)
        feed(trainer, unlabeled)
        trainer.train_step(labeled)
        before, memory = weights_of(trainer), _memory(trainer)
        break_losses(trainer)
        output = trainer.train_step(labeled)
        names = differing(before, weights_of(trainer))
        changed = [name for name, value in _memory(trainer).items() if str(value) != str(memory[name])]
    if names or changed or output["finite"]:
        what = counted(names, len(before)) if names else f"the memory of {', '.join(changed) or 'nothing'}"
        raise BrokenPromise(
            SKIPPING,
            f"A step with losses that are not finite changed {what}.",
            f"Let companions follow in Companion.after_step, which is not called then, and not in a step or a hook of "
            f"{cls.__name__}.",
        )


def feed(trainer: Any, unlabeled: dict[str, Any]) -> None:
    """Give the same unlabeled batch at every step."""
    if trainer.uses_unlabeled:
        trainer.dataloader_unlabeled = iter(lambda: unlabeled, None)


def break_losses(trainer: Any) -> None:
    """From now on, all losses of a trainer are NaN, as with a broken image in the batch."""
    made = trainer.step

    def broken(*batches: Any) -> Step:
        step: Step = made(*batches)
        return step._replace(losses={name: loss * float("nan") for name, loss in step.losses.items()})

    trainer.step = broken


def _noted_terms(trainer: Any) -> list[str]:
    """Names of the losses that the next steps give, in a list that they fill."""
    names: list[str] = []
    made = trainer.step

    def noted(*batches: Any) -> Step:
        step: Step = made(*batches)
        names.extend(step.losses)
        return step

    trainer.step = noted
    return names


def _memory(trainer: Any) -> dict[str, Any]:
    return {name: companion.memory() for name, companion in trainer.companions.items()}

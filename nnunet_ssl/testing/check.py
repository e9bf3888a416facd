"""All promises, and a trainer that is put to the test."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.testing import gradients, kinds, leakage, masks, prediction, processes, resuming, steps
from nnunet_ssl.testing.bench import Bench, random_numbers_restored, without_drawing
from nnunet_ssl.testing.broken import BrokenPromise, describe, place_of_error

_LOG_LINES = 15

Keep = Callable[[type, Bench], object]


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a method promises.

    Attributes:
        name: On the command line.
        says: In one line.
        keep: Returns where a trainer keeps it on a bench, and raises BrokenPromise where not.
        start: Starts what may run beside other promises.
        after: Promises without which this one says nothing, besides the first, without which none does; where one of
            them is broken, it is not tried.
        in_3d: Whether ``keep`` takes a patch and is tried with a 3D one too.
    """

    name: str
    says: str
    keep: Callable[..., object]
    start: Keep | None = None
    after: tuple[str, ...] = ()
    in_3d: bool = False

    def check(self, cls: type, bench: Bench) -> None:
        """Try it.

        Raises:
            BrokenPromise: Where the trainer does not keep it.
        """
        self.keep(cls, bench)
        if self.in_3d:
            self.keep(cls, bench, "3d")


PROMISES: tuple[Promise, ...] = (
    Promise(steps.STEP, "networks are built, and a step is taken", steps.a_step_is_taken),
    Promise(
        gradients.GRADIENTS,
        "every loss term trains the networks that it names, wholly, and no other",
        gradients.terms_train_their_networks,
        in_3d=True,
    ),
    Promise(
        gradients.SIGNAL,
        "unlabeled images matter to every unlabeled term",
        gradients.unlabeled_images_matter,
        after=(gradients.GRADIENTS,),
        in_3d=True,
    ),
    Promise(masks.MASKS, "voxels that nobody annotated teach nothing about labels", masks.ignored_voxels_teach_nothing),
    Promise(steps.FINITE, "losses and weights stay finite in half precision", steps.steps_are_finite),
    Promise(
        steps.SKIPPING,
        "a step that is not finite changes nothing",
        steps.skipped_steps_change_nothing,
    ),
    Promise(kinds.KINDS, "regions, ignored voxels and 3D images train too", kinds.every_kind_of_data_trains),
    Promise(leakage.LEAKAGE, "labels of unlabeled cases cannot change a weight", leakage.hidden_labels_change_nothing),
    Promise(resuming.COMPANIONS_PROMISE, "a checkpoint holds everything with weights", resuming.every_network_is_saved),
    Promise(
        resuming.RESUMING,
        "a training that stops and goes on equals one that does not stop",
        resuming.resuming_changes_nothing,
        after=(resuming.COMPANIONS_PROMISE,),
    ),
    Promise(
        prediction.PREDICTION,
        "nnU-Net predicts with the model without this package, and alike",
        prediction.stock_nnunet_predicts_alike,
        start=prediction.start_stock_prediction,
    ),
    Promise(
        processes.PROCESSES,
        "two processes train one model, as one would",
        processes.two_processes_train_one_model,
        start=processes.start_pair,
    ),
)
OK, BROKEN, NOT_TRIED = "ok", "BROKEN", "not tried"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a promise.

    Attributes:
        promise: Its name.
        says: The promise in one line.
        state: ``OK``, ``BROKEN`` or ``NOT_TRIED``.
        seconds: How long it took.
        found: What was found, where it is broken, or why it was not tried.
        look: Where to look, where it is broken.
        log: The last lines that were printed, after an error in the method itself.
    """

    promise: str
    says: str
    state: str
    seconds: float
    found: str = ""
    look: str = ""
    log: str = ""


def check_method(cls: type, only: Sequence[str] = (), device: str = "cpu") -> list[Outcome]:
    """Put a trainer to the test, in a temporary folder and with nnU-Net's printing held back.

    Args:
        cls: Derived from SemiSupervisedTrainer.
        only: Names of promises; all if empty.
        device: "cpu", "cuda" or "mps", where steps are tried. What is compared bit by bit, half precision and what
            needs two processes run on the CPU.

    Returns:
        What came of each promise, in their order.

    Raises:
        UserError: For a promise or a device that does not exist.
    """
    wanted = select(only)
    require_device(device)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, without_drawing(), random_numbers_restored():
        bench = Bench(Path(folder), device)
        try:
            for promise in sorted(wanted, key=lambda p: p.start is not None):
                outcomes.append(_try(promise, cls, bench, outcomes))
                if len(outcomes) == 1 and outcomes[0].state == OK:
                    _start(wanted, cls, bench)
        finally:
            bench.clear()
    order = [promise.name for promise in wanted]
    return sorted(outcomes, key=lambda outcome: order.index(outcome.promise))


def select(only: Iterable[str]) -> list[Promise]:
    """Promises by name, in their order; all if none is named.

    Raises:
        UserError: Naming the promises there are.
    """
    names = [promise.name for promise in PROMISES]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"There is no promise {unknown[0]!r}; there are {', '.join(names)}.")
    return [promise for promise in PROMISES if not only or promise.name in only]


def require_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UserError: Naming it.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, False):
        raise UserError(f"PyTorch finds no device {device!r} here; it finds {', '.join(d for d in there if there[d])}.")


def _start(promises: Sequence[Promise], cls: type, bench: Bench) -> None:
    """Let run what may run beside other promises: importing everything takes a process longer than most of them take.

    Two processes first. An error comes up again where the promise is tried.
    """
    for promise in reversed(promises):
        if promise.start is not None:
            _quietly(promise.start, cls, bench)


def _try(promise: Promise, cls: type, bench: Bench, before: Sequence[Outcome]) -> Outcome:
    broken = [o.promise for o in before if o.promise in (steps.STEP, *promise.after) and o.state != OK]
    if broken:
        return Outcome(promise.name, promise.says, NOT_TRIED, 0.0, f"because {broken[0]} is broken")
    start = time.monotonic()
    error, printed = _quietly(promise.check, cls, bench)
    outcome = Outcome(promise.name, promise.says, OK, time.monotonic() - start)
    if error is None:
        return outcome
    if isinstance(error, BrokenPromise):
        return dataclasses.replace(outcome, state=BROKEN, found=error.found, look=error.look)
    log = "\n".join(printed.strip().splitlines()[-_LOG_LINES:])
    look = f"It was raised at {place_of_error(error, cls)}."
    return dataclasses.replace(outcome, state=BROKEN, found=describe(error), look=look, log=log)


def _quietly(work: Keep, cls: type, bench: Bench) -> tuple[Exception | None, str]:
    """The error that something ends with, if any, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            work(cls, bench)
        except Exception as error:
            return error, printed.getvalue()
    return None, printed.getvalue()

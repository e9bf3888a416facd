"""What each of two processes does that train together on the CPU; see ``processes``."""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.foreign_trainers import load_trainers
from nnunet_ssl.testing.broken import describe, own_files, place_of_error
from nnunet_ssl.testing.networks import Weights, weights_of
from nnunet_ssl.testing.steps import break_losses, feed
from nnunet_ssl.testing.tiny import TinyDataset, step_of
from nnunet_ssl.training.trainer import SemiSupervisedTrainer

# Without random transforms and thresholds over a rank's own batch, a loss that is a mean over samples, or nnU-Net's
# Dice over the whole batch, is that of one process on the joined batch.
SEPARABLE: dict[str, Any] = {"supervised_fraction": 0.0, "unlabeled_ramp": 0.0, "identity_probability": 1.0}
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """What both processes are told.

    Attributes:
        module: Of the trainer's class.
        name: Of the trainer's class.
        dataset: What to train on.
        batches: A labeled and an unlabeled batch, to be shared between both.
        port: Where they meet on this machine.
        timeout: How long one waits for the other, in seconds.
    """

    module: str
    name: str
    dataset: TinyDataset
    batches: tuple[dict[str, Any], dict[str, Any]]
    port: int
    timeout: float


@dataclasses.dataclass
class Found:
    """What a process came to.

    Attributes:
        supervised: The gradient of the losses on labels, of all networks in a row.
        after_steps: Weights of all networks after steps on data of its own.
        after_broken_step: The same after a step that was broken on the second process alone.
        finite: Whether that step was taken.
        error: What went wrong, and where; None if nothing did.
        failed_at: When, in seconds since 1970.
        in_own_files: Whether that place is in the method's own files.
    """

    supervised: Tensor | None = None
    after_steps: Weights | None = None
    after_broken_step: Weights | None = None
    finite: bool = True
    error: tuple[str, str] | None = None
    failed_at: float = 0.0
    in_own_files: bool = False


def main(folder: str, rank: int) -> None:
    """Entry of a process: read the job, train, write what was found."""
    job: Job = torch.load(Path(folder) / "job.pt", weights_only=False)
    torch.set_num_threads(1)
    found = Found()
    cls: type = SemiSupervisedTrainer
    # Where neither an error nor a collective operation ends the waiting, the file tells where each thread stands.
    with open(Path(folder) / f"stuck{rank}.txt", "w") as stuck:
        try:
            cls = find_trainer(job.module, job.name)
            _join(rank, job)
            faulthandler.dump_traceback_later(2 * job.timeout, exit=True, file=stuck)
            _train(cls, rank, job, found)
            dist.destroy_process_group()
        except Exception as error:
            found.error, found.failed_at = (describe(error), place_of_error(error, cls)), time.time()
            found.in_own_files = found.error[1].rpartition(":")[0] in own_files(cls)
        faulthandler.cancel_dump_traceback_later()
        torch.save(found, Path(folder) / f"found{rank}.pt")
    # Not sys.exit: with the other process gone, gloo's threads may wait for it.
    sys.stdout.flush()
    os._exit(0)


def find_trainer(module: str, name: str) -> type:
    """The class of that name in a module, or in the folders that nnUNet_extTrainer names.

    Raises:
        UserError: Where it is in neither.
    """
    try:
        found: type = getattr(importlib.import_module(module), name)
        return found
    except (ImportError, AttributeError):
        for trainer in (t for trainers in load_trainers(SemiSupervisedTrainer).values() for t in trainers):
            if trainer.__name__ == name:
                return trainer
    raise UserError(
        f"Another process does not find {name} of module {module}. Write it at the top level of a file that can be "
        f"imported, or lies in a folder that nnUNet_extTrainer names."
    )


def supervised_gradient(trainer: Any, labeled: dict[str, Any]) -> Tensor:
    """Of the sum of all losses on labels, of all networks in a row."""
    losses = step_of(trainer, labeled, None).losses
    sum(losses[name] for name in trainer.supervised_terms).backward()  # type: ignore[union-attr]
    parameters = [p for network in trainer.predictors for p in bare(network).parameters()]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def part(batch: dict[str, Any], rank: int) -> dict[str, Any]:
    """A rank's half of a batch."""
    return {k: v.tensor_split(2)[rank] if isinstance(v, Tensor) else v for k, v in batch.items()}


def _join(rank: int, job: Job) -> None:
    timeout = datetime.timedelta(seconds=job.timeout)
    store = dist.TCPStore("127.0.0.1", job.port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)


def _train(cls: type, rank: int, job: Job, found: Found) -> None:
    tiny = job.dataset
    trainer = tiny.initialized(cls, **SEPARABLE)
    found.supervised = supervised_gradient(trainer, part(job.batches[0], rank))
    trainer = tiny.initialized(cls, supervised_fraction=0.0)
    for step in range(STEPS):
        labeled, unlabeled = tiny.batches(trainer, seed=2 * step + rank)
        feed(trainer, unlabeled)
        trainer.train_step(labeled)
    found.after_steps = weights_of(trainer)
    if rank == 1:
        break_losses(trainer)
    labeled, unlabeled = tiny.batches(trainer, seed=rank)
    feed(trainer, unlabeled)
    found.finite = bool(trainer.train_step(labeled)["finite"])
    found.after_broken_step = weights_of(trainer)

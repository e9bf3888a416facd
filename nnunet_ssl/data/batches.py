"""Batches: how the plan's is shared, and how stage 1 fills it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer
from nnunet_ssl.data.cases import UnlabeledCase


def describe_training(trainer: SemiSupervisedTrainer, cases: Sequence[UnlabeledCase]) -> str:
    """One line for the log: "Training with 95 unlabeled cases (95 hidden label), 2 labeled + 2 unlabeled per batch"."""
    counts = ", ".join(f"{n} {source}" for source, n in sorted(Counter(case.source for case in cases).items()))
    batch = f"{trainer.batch_size} labeled + {trainer.unlabeled_batch_size} unlabeled per batch"
    total = trainer.batch_size + trainer.unlabeled_batch_size
    first = f", all {total} labeled in stage 1" if trainer.switch_epoch else ""
    return f"Training with {len(cases)} unlabeled cases ({counts}), {batch}{first}"


def share_batch(
    total: int, centered_fraction: float, labeled_cases: int, unlabeled_cases: int, largest: float = 0.5
) -> tuple[int, int, float]:
    """Share the plan's batch between labeled and unlabeled examples, at least one of either.

    Half each by default, as in the papers, whose unlabeled cases are the many. Every unlabeled example takes the place
    of a labeled one, which is worth more the more labels there are to learn from: so unlabeled ones get the nearest
    number to the square of their share of the cases, where that is less. (Their share itself, of which half the cases
    make half the batch, lost to training on labels alone with 50 labeled cases of 99.)

    Args:
        total: The plan's batch size, or a process's part of it.
        centered_fraction: Of the labeled examples that nnU-Net centers on a structure.
        labeled_cases: How many there are to draw from.
        unlabeled_cases: The same.
        largest: Part of the batch that unlabeled examples never exceed, but for the one.

    Returns:
        Labeled and unlabeled examples per step, and the fraction that nnU-Net really reaches with a batch of
        ``total``: of 2 it centers 1, not 0.33, on a structure.
    """
    share = (unlabeled_cases / (labeled_cases + unlabeled_cases)) ** 2
    # Whole examples, also where a product like 10 * 0.3 falls a rounding error short of them.
    most = math.floor(total * largest + 1e-6)
    unlabeled = max(1, min(most, round(total * share), total - 1))
    centered = total - round(total * (1 - centered_fraction))
    return max(1, total - unlabeled), unlabeled, centered / total


class LabeledBatches:
    """Batches for stage 1: as many labeled examples as the plan's batch has, out of smaller labeled ones.

    What is too many for one batch goes into the next: nothing is loaded in vain.
    """

    def __init__(self) -> None:
        self._rest: list[dict[str, Any]] = []

    def fill(self, batch: dict[str, Any], more: Iterator[dict[str, Any]], total: int) -> dict[str, Any]:
        """A batch of ``total`` examples.

        Args:
            batch: Its first examples, after those that the last batch left over: ``data`` and ``target`` on a device,
                and ``keys``.
            more: Where to draw further ones. They are joined on the device of ``batch``, as a copy that joins them on
                the host would not lie in pinned memory.
            total: Wanted examples.
        """
        parts = [*self._rest, batch]
        while sum(len(part["data"]) for part in parts) < total:
            parts.append(to_device(next(more), batch["data"].device))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in ("data", "target")}
        keys = [key for part in parts for key in part["keys"]]
        rest = {name: values[total:] for name, values in tensors.items()} | {"keys": keys[total:]}
        self._rest = [rest] if len(rest["data"]) else []
        return {name: values[:total] for name, values in tensors.items()} | {"keys": keys[:total]}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; what is no tensor stays."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

"""Batches: what a method gets, how the plan's is shared, and how stage 1 fills it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.views import PSEUDO_LABELS, STRONG, STRONG_2, VIEWS, WEAK


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Labeled examples.

    Attributes:
        images: (B, C, *S).
        target: At full resolution, labels (B, 1, *S) or region channels (B, R, *S).
        keys: Identifiers of the B cases.
    """

    images: Tensor
    target: Tensor
    keys: list[str]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Labeled:
        """From what nnU-Net's loader gives."""
        return cls(batch["data"], batch["target"], list(batch["keys"]))

    def to(self, device: torch.device) -> Labeled:
        """The same on a device."""
        images, target = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.target))
        return Labeled(images, target, self.keys)


@dataclasses.dataclass(frozen=True)
class Unlabeled:
    """Unlabeled examples, in the views that a method declares.

    Attributes:
        keys: Identifiers of the B cases.
        views: By name, each (B, C, *(S + 2 unlabeled_margin)). All show the same patches, voxel by voxel; pseudo-labels
            of them, (B, 1, *S), stand among them.
    """

    keys: list[str]
    views: dict[str, Tensor]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Unlabeled:
        """From what the unlabeled loader gives."""
        return cls(list(batch["keys"]), {name: batch[name] for name in (*VIEWS, PSEUDO_LABELS) if name in batch})

    def to(self, device: torch.device) -> Unlabeled:
        """The same on a device."""
        return Unlabeled(self.keys, {name: view.to(device, non_blocking=True) for name, view in self.views.items()})

    @property
    def strong(self) -> Tensor:
        """The patches with all of nnU-Net's augmentation."""
        return self._view(STRONG)

    @property
    def weak(self) -> Tensor:
        """The patches without changes of their intensities."""
        return self._view(WEAK)

    @property
    def strong_2(self) -> Tensor:
        """Like ``strong``, with intensities drawn anew."""
        return self._view(STRONG_2)

    @property
    def pseudo_labels(self) -> Tensor:
        """The stored labels of the patches, (B, 1, *S) integers; ``data.pseudo_labels.UNCERTAIN`` where none is."""
        return self._view(PSEUDO_LABELS)

    def _view(self, name: str) -> Tensor:
        if name not in self.views:
            raise AttributeError(
                f"There is no view {name!r} of these unlabeled images, there is {', '.join(self.views)}. Declare it: "
                f"add {name!r} to the method's `views`."
            )
        return self.views[name]


def describe_training(
    cases: Sequence[UnlabeledCase], labeled: int, unlabeled: int, stage_1: int | None, added: bool = False
) -> str:
    """One line for the log: "Training with 95 unlabeled cases (95 hidden label), 2 labeled + 2 unlabeled per batch".

    Args:
        cases: The unlabeled ones.
        labeled: Examples per batch.
        unlabeled: The same.
        stage_1: Labeled examples per batch where training starts with labels alone.
        added: Whether unlabeled examples come on top of the plan's batch.
    """
    counts = ", ".join(f"{n} {source}" for source, n in sorted(Counter(case.source for case in cases).items()))
    batch = f"{labeled} labeled + {unlabeled} unlabeled per batch"
    first = f", all {stage_1} labeled in stage 1" if stage_1 is not None else ""
    factor = f"{(labeled + unlabeled) / labeled:.1f}"
    more = f"; unlabeled examples are added to the plan's batch, so that a step takes about {factor} times its memory "
    more += "and time"
    return f"Training with {len(cases)} unlabeled cases ({counts}), {batch}{first}{more if added else ''}"


def share_batch(
    total: int,
    centered_fraction: float,
    labeled_cases: int,
    unlabeled_cases: int,
    largest: float = 0.5,
    added: bool = False,
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
        added: Whether labeled examples fill the plan's batch, and unlabeled ones come on top in the same proportion.

    Returns:
        Labeled and unlabeled examples per step, and the fraction that nnU-Net really reaches with a batch of
        ``total``: of 2 it centers 1, not 0.33, on a structure.
    """
    share = (unlabeled_cases / (labeled_cases + unlabeled_cases)) ** 2
    # Whole examples, also where a product like 10 * 0.3 falls a rounding error short of them.
    most = math.floor(total * largest + 1e-6)
    unlabeled = max(1, min(most, round(total * share), total - 1))
    centered = total - round(total * (1 - centered_fraction))
    labeled = max(1, total - unlabeled)
    if added:
        unlabeled, labeled = max(1, round(total * unlabeled / labeled)), total
    return labeled, unlabeled, centered / total


class LabeledBatches:
    """Batches for stage 1: as many labeled examples as the plan's batch has, out of smaller labeled ones.

    What is too many for one batch goes into the next: nothing is loaded in vain.
    """

    def __init__(self) -> None:
        self._rest: list[Labeled] = []

    def fill(self, batch: Labeled, more: Iterator[Mapping[str, Any]], total: int) -> Labeled:
        """A batch of ``total`` examples.

        Args:
            batch: Its first examples, after those that the last batch left over, on a device.
            more: Where to draw further ones, as nnU-Net's loader gives them. They are joined on the device of
                ``batch``, as a copy that joins them on the host would not lie in pinned memory.
            total: Wanted examples.
        """
        parts = [*self._rest, batch]
        while sum(len(part.images) for part in parts) < total:
            parts.append(Labeled.of(next(more)).to(batch.images.device))
        images, target = (torch.cat(tensors) for tensors in zip(*((part.images, part.target) for part in parts)))
        keys = [key for part in parts for key in part.keys]
        rest = Labeled(images[total:], target[total:], keys[total:])
        self._rest = [rest] if len(rest.images) else []
        return Labeled(images[:total], target[:total], keys[:total])

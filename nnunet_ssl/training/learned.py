"""Which structures a training has learned: what is learned without labels says nothing about the others.

A structure that the networks do not find yet is missing from every pseudo-label and every prediction that is to be
consistent. To learn from those means to learn that it is not there: small structures, which appear last, then never
appear. So until a structure is known on the labeled batches, unlabeled terms do not tell it from the background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_ssl.losses.predictions import likeliest

# What the running counts keep from step to step: they look back about 20 steps that show a structure.
_DECAY = 0.95


@torch.no_grad()
def overlap_counts(logits: Tensor, target: Tensor, has_regions: bool, ignore_label: int | None) -> Tensor:
    """What the Dice coefficients of a batch are made of, without gradient; nothing is handed to the host.

    Args:
        logits: (B, K, *S).
        target: At full resolution, (B, 1, *S) or region channels (B, R, *S), ignored voxels being a last channel.
        has_regions: Whether channels are overlapping regions.
        ignore_label: nnU-Net's ignore label, if the data set has one.

    Returns:
        Voxels (3, structures) that are right, predicted and true, of all classes but the background, or of all regions.
    """
    if has_regions:
        predicted, truth = logits > 0, target[:, : logits.shape[1]] > 0
        # A last channel of ignored voxels, and not the last region.
        if target.shape[1] > logits.shape[1]:
            counted = target[:, -1:] == 0
            predicted, truth = predicted & counted, truth & counted
        axes = [0, *range(2, logits.ndim)]
        return torch.stack([part.sum(axes) for part in (predicted & truth, predicted, truth)]).float()
    # A row of voxels each: a GPU adds up few classes slowly where all voxels share one counter per class.
    labels, wanted = (values.flatten(0, 1).flatten(1) for values in (likeliest(logits), target[:, 0].long()))
    if ignore_label is not None:
        # Voxels that do not count are sent to the background, which is left out.
        counted = wanted != ignore_label
        labels, wanted = (torch.where(counted, values, 0) for values in (labels, wanted))
    ones = torch.ones_like(wanted)
    empty = wanted.new_zeros(len(wanted), logits.shape[1])
    parts = torch.where(labels == wanted, labels, 0), labels, wanted
    counts = torch.stack([empty.scatter_add(1, values, ones).sum(0) for values in parts])
    return counts[:, 1:].float()


def names_of_channels(labels: Mapping[str, Any], label_manager: LabelManager) -> list[str]:
    """What dataset.json calls each structure that the network tells apart, in the order of its channels.

    The channels are nnU-Net's: dataset.json may name a label twice.
    """

    def as_tuple(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)

    # Of several names the first.
    names = {as_tuple(value): name for name, value in reversed(list(labels.items()))}
    channels = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    return [names.get(as_tuple(channel), f"label {channel}") for channel in channels]


class LearnedStructures:
    """Running Dice coefficients of every structure and network, and which structures are waited for.

    Args:
        names: Of the structures.
        num_networks: How many networks learn.
        wanted_dice: The coefficient from which a structure counts as learned; 0 for at once.
    """

    def __init__(self, names: Sequence[str], num_networks: int, wanted_dice: float) -> None:
        self.names = list(names)
        self.wanted_dice = wanted_dice
        # (networks, 3, structures), as overlap_counts gives them; not in float64, which some devices cannot load.
        self.counts = np.zeros((num_networks, 3, len(self.names)), np.float32)

    def note(self, counts: np.ndarray) -> None:
        """Take in the counts of a step, (networks, 3, structures).

        Structures that the step's labels do not show keep theirs: nothing has been unlearned where nothing was asked.
        """
        updated = _DECAY * self.counts + (1.0 - _DECAY) * counts
        self.counts = np.where(counts[:, 2:] > 0, updated, self.counts)

    def dice(self) -> np.ndarray:
        """Of every structure (structures,), of the network that knows it least; 0 where no label has shown it yet."""
        right, predicted, true = self.counts.swapaxes(0, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(true > 0, 2.0 * right / (predicted + true), 0.0).min(0)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Numbers of the structures that are waited for; the same on all ranks."""
        if self.wanted_dice <= 0:
            return ()
        return tuple(np.flatnonzero(self.dice() < self.wanted_dice).tolist())

    @property
    def all_wait(self) -> bool:
        """Whether nothing is learned yet: unlabeled terms then have nothing to say."""
        return len(self.waiting) == len(self.names)

    def describe(self) -> str | None:
        """What is still waited for, for the log; None if nothing is."""
        waiting = self.waiting
        if not waiting:
            return None
        dice = self.dice()
        shown = np.asarray(self.counts[:, 2].any(0))
        names = [f"{self.names[i]!r} ({f'Dice {dice[i]:.2f}' if shown[i] else 'not shown yet'})" for i in waiting]
        effect = "do not count yet" if len(waiting) == len(self.names) else "take for background what may be"
        return f"The unlabeled terms {effect}, until learned_dice ({self.wanted_dice}): {', '.join(names)}"

    def state(self) -> Tensor:
        """What a checkpoint keeps."""
        return torch.from_numpy(self.counts)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint; one that knows of no counts starts anew."""
        if "learned" in state:
            self.counts = state["learned"].cpu().numpy()

"""Which of two networks that teach each other counts by how much: each where it is the better one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# What a network without an error is taken to err: otherwise it would never learn again.
_LEAST_ERROR = 0.01


def teaching_shares(counts: np.ndarray) -> np.ndarray:
    """How much each of two networks teaches the other of every structure: (2, structures), together 1.

    In inverse proportion to its error, 1 - Dice on labels: the better one teaches more, both teach alike where they are
    alike, and the one that is behind can still catch up.

    Args:
        counts: Running counts (2, 3, structures), as ``LearnedStructures`` keeps them: what a batch does not show
            keeps its own, and zeros stand for what no label has shown yet.
    """
    right, predicted, true = counts.swapaxes(0, 1)
    error = 1 + _LEAST_ERROR - 2 * right / np.maximum(predicted + true, 1e-9)
    return np.asarray(error[::-1] / error.sum(0))


def weights_by_label(shares: np.ndarray, has_regions: bool) -> Tensor:
    """A weight for every label in every group of exclusive classes, on the CPU: (G, K).

    Args:
        shares: Of every structure.
        has_regions: Whether structures are overlapping regions, a group each, rather than classes of one group. What
            is none of them, background or absence, gets their mean.
    """
    groups = shares[:, None] if has_regions else shares[None]
    none = np.full((len(groups), 1), shares.mean())
    return torch.from_numpy(np.concatenate([none, groups], axis=1).astype(np.float32))


def weights_of_labels(labels: Tensor, table: Tensor) -> Tensor:
    """The weight of every voxel's label, the mean over groups; without gradient.

    Args:
        labels: (B, G, *S), whole numbers below K.
        table: Weights (G, K).

    Returns:
        (B, *S).
    """
    return torch.stack([weights[group] for weights, group in zip(table, labels.unbind(1))]).mean(0)

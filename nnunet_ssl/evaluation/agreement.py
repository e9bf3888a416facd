"""How far segmentations of one image agree, and what that says about a pseudo-label."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask

Structures = Mapping[str, "int | tuple[int, ...]"]

# All structures together, in a table of scores.
OVERALL = "all"


def agreement(
    maps: Sequence[np.ndarray], structures: Structures, counting: np.ndarray | None = None
) -> dict[str, float]:
    """Mean Dice coefficient over all pairs of segmentations, per structure.

    Args:
        maps: Label maps (*S), two or more.
        structures: Name to label or region.
        counting: Boolean (*S), the voxels that count; all by default.

    Returns:
        By structure, and for all of them together (sums over structures before the quotient). A pair in which neither
        has a structure does not count for it; NaN where none has it.
    """
    pairs = list(itertools.combinations(range(len(maps)), 2))
    common, sums = (np.zeros((len(structures), len(pairs))) for _ in range(2))
    for row, label in enumerate(structures.values()):
        # One structure at a time: all masks of a large volume would fill the memory.
        masks = [_mask(labels, label, counting) for labels in maps]
        sizes = [np.count_nonzero(mask) for mask in masks]
        common[row] = [np.count_nonzero(masks[i] & masks[j]) for i, j in pairs]
        sums[row] = [sizes[i] + sizes[j] for i, j in pairs]
    means = [_mean_dice(*rows) for rows in (*zip(common, sums), (common.sum(0), sums.sum(0)))]
    return dict(zip((*structures, OVERALL), means))


def uncertain_voxels(probabilities: np.ndarray, has_regions: bool, certain_from: float) -> np.ndarray:
    """Where probabilities say too little.

    Args:
        probabilities: (K, *S), of classes or of regions.
        has_regions: Which of the two.
        certain_from: A class is certain from this probability on, a region also where it is at most one minus that.

    Returns:
        Boolean (*S).
    """
    if has_regions:
        return np.asarray((np.maximum(probabilities, 1 - probabilities) < certain_from).any(0))
    return np.asarray(probabilities.max(0) < certain_from)


def voxels_of(names: Sequence[str], maps: Sequence[np.ndarray], structures: Structures) -> np.ndarray:
    """Where at least one segmentation shows one of some structures, boolean (*S)."""
    found = np.zeros(maps[0].shape, bool)
    for name, labels in itertools.product(names, maps):
        found |= region_or_label_to_mask(labels, structures[name])
    return found


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether a case is kept, why not, and which of its structures are doubted: their voxels do not count."""

    kept: bool
    why: str
    doubted: tuple[str, ...]


def decide(
    agreed: Mapping[str, float] | None, unchanged: Mapping[str, float] | None, threshold: float, found: bool
) -> Decision:
    """Keep a case whose networks agree, and whose labels are those of the round before, as far as these are known.

    Args:
        agreed: See ``agreement``; None with one network that cannot be asked twice.
        unchanged: Agreement with the labels of the round before; None in the first.
        threshold: Smallest Dice coefficient, of a structure and of all together.
        found: Whether the labels show any structure.
    """
    known = {"agreement": agreed, "agreement with the round before": unchanged}
    scores = {what: values for what, values in known.items() if values is not None}
    names = [name for name in next(iter(scores.values()), {}) if name != OVERALL]
    doubted = tuple(name for name in names if any(values[name] < threshold for values in scores.values()))
    if not found:
        return Decision(False, "no structure was found", doubted)
    for what, values in scores.items():
        if values[OVERALL] < threshold:
            return Decision(False, f"{what} {values[OVERALL]:.3f}, less than {threshold:g}", doubted)
    if names and len(doubted) == len(names):
        return Decision(False, f"every structure has an agreement of less than {threshold:g}", doubted)
    return Decision(True, f"doubted: {', '.join(doubted)}" if doubted else "", doubted)


def _mask(labels: np.ndarray, label: int | tuple[int, ...], counting: np.ndarray | None) -> np.ndarray:
    mask = region_or_label_to_mask(labels, label)
    return mask if counting is None else mask & counting


def _mean_dice(common: np.ndarray, sums: np.ndarray) -> float:
    there = sums > 0
    return float((2 * common[there] / sums[there]).mean()) if there.any() else math.nan

"""Overlap, surface distances and volumes of one case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask

from nnunet_ssl.evaluation.distances import surface_distances

# Column -> what it says. Distances are in mm, or in pixels where the image format knows no spacing.
METRICS = {
    "Dice": "Dice coefficient",
    "IoU": "intersection over union",
    "HD95": "95th percentile of the surface distances",
    "ASD": "average symmetric surface distance",
    "MACD": "mean absolute contour distance, mean of both directions",
    "volume_difference": "(predicted - true) / true volume",
}
DISTANCES = ("HD95", "ASD", "MACD")
# Where less is better; a volume difference is best at zero and is not tested.
LOWER_IS_BETTER = DISTANCES


def structures_of(labels: Mapping[str, Any]) -> dict[str, int | tuple[int, ...]]:
    """The structures of a dataset.json: name to label, or to the labels of a region.

    Args:
        labels: Its ``labels``.
    """
    named = {name: value for name, value in labels.items() if name not in ("background", "ignore")}
    return {name: tuple(value) if isinstance(value, (list, tuple)) else int(value) for name, value in named.items()}


def case_metrics(
    truth: np.ndarray,
    predicted: np.ndarray,
    structures: Mapping[str, int | tuple[int, ...]],
    spacing: Sequence[float],
    ignore_label: int | None = None,
) -> dict[str, dict[str, float]]:
    """All metrics of every structure of one case.

    Overlap is as in nnU-Net's evaluation: not a number where truth and prediction are both empty, 0 where one is.
    Distances are not a number where one is empty; where the truth is ignored there is no surface.

    Args:
        truth: Label map (*S), 2D or 3D.
        predicted: Of the same shape.
        structures: Name to label or region.
        spacing: Voxel size per axis, in mm.
        ignore_label: Where the truth has this value, nothing counts.

    Returns:
        Structure to the columns of ``METRICS`` and ``true_voxels``, ``predicted_voxels``.

    Raises:
        ValueError: Where the shapes differ.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"The prediction has shape {predicted.shape}, the label map {truth.shape}.")
    ignored = None if ignore_label is None else truth == ignore_label
    result = {}
    for name, label in structures.items():
        masks = [region_or_label_to_mask(labels, label) for labels in (truth, predicted)]
        if ignored is not None:
            masks = [mask & ~ignored for mask in masks]
        result[name] = _mask_metrics(masks[0], masks[1], spacing, ignored)
    return result


def _mask_metrics(
    truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], ignored: np.ndarray | None
) -> dict[str, float]:
    num_true, num_predicted = int(truth.sum()), int(predicted.sum())
    common = int((truth & predicted).sum())
    union = num_true + num_predicted - common
    distances = surface_distances(truth, predicted, spacing, ignored)
    missing = math.nan
    return {
        "Dice": 2 * common / (num_true + num_predicted) if union else missing,
        "IoU": common / union if union else missing,
        "HD95": distances.hausdorff_95 if distances else missing,
        "ASD": distances.average if distances else missing,
        "MACD": distances.mean_absolute if distances else missing,
        "volume_difference": (num_predicted - num_true) / num_true if num_true else missing,
        "true_voxels": num_true,
        "predicted_voxels": num_predicted,
    }

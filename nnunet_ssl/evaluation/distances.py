"""Distances between the surfaces of two masks, in mm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure


def surface_distances(
    first: np.ndarray, second: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """How far each surface voxel of one mask lies from the nearest surface voxel of the other.

    A surface voxel belongs to the mask and has a face neighbor that does not; outside the image nothing does.

    Args:
        first: Boolean (*S), 2D or 3D.
        second: Of the same shape.
        spacing: Voxel size per axis, in mm.

    Returns:
        Distances in mm from the first surface to the second and back; None where a mask is empty, because there is no
        distance then.

    Raises:
        ValueError: Where shapes or spacing do not fit.
    """
    if first.shape != second.shape or first.ndim != len(spacing):
        raise ValueError(
            f"Expected masks of one shape and a spacing per axis, got {first.shape}, {second.shape} and {spacing}."
        )
    if not first.any() or not second.any():
        return None
    surfaces = [_surface(mask.astype(bool)) for mask in (first, second)]
    to_second, to_first = (distance_transform_edt(~surface, sampling=spacing) for surface in surfaces[::-1])
    return to_second[surfaces[0]], to_first[surfaces[1]]


def hausdorff_95(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> float:
    """The 95th percentile of all surface distances, both ways together, in mm; NaN where a mask is empty.

    Args:
        first: Boolean (*S).
        second: Of the same shape.
        spacing: Voxel size per axis, in mm.
    """
    distances = surface_distances(first, second, spacing)
    return float("nan") if distances is None else float(np.percentile(np.concatenate(distances), 95))


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~binary_erosion(mask, generate_binary_structure(mask.ndim, 1))

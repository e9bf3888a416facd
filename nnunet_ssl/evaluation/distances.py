"""Distances between the surfaces of two masks, in the unit of their spacing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_erosion, find_objects, generate_binary_structure
from scipy.spatial import cKDTree


@dataclasses.dataclass(frozen=True)
class SurfaceDistances:
    """How far each surface voxel of one mask lies from the nearest surface voxel of the other, both ways.

    Attributes:
        to_second: From the surface of the first mask, in mm (or pixels, where these are the unit of the spacing).
        to_first: From the surface of the second mask.
    """

    to_second: np.ndarray
    to_first: np.ndarray

    @property
    def hausdorff_95(self) -> float:
        """The 95th percentile of all distances, both ways together."""
        return float(np.percentile(np.concatenate([self.to_second, self.to_first]), 95))

    @property
    def average(self) -> float:
        """Average symmetric surface distance (ASD): the mean of all distances, both ways together."""
        return float(np.concatenate([self.to_second, self.to_first]).mean())

    @property
    def mean_absolute(self) -> float:
        """Mean absolute contour distance (MACD): the mean of the two directions' means, each counting half."""
        return float((self.to_second.mean() + self.to_first.mean()) / 2)


def surface_distances(
    first: np.ndarray, second: np.ndarray, spacing: Sequence[float], ignored: np.ndarray | None = None
) -> SurfaceDistances | None:
    """Distances between the surfaces of two masks.

    A surface voxel belongs to the mask and has a face neighbor that does not; outside the image nothing does. An
    ignored neighbor may belong to it or not, and makes no surface.

    Args:
        first: Boolean (*S), 2D or 3D.
        second: Of the same shape.
        spacing: Voxel size per axis, in mm.
        ignored: Boolean (*S), voxels of which nothing is known; the masks do not hold there.

    Returns:
        None where a mask is empty, because there is no distance then, and where ignored voxels hide a whole surface.

    Raises:
        ValueError: Where shapes or spacing do not fit.
    """
    if first.shape != second.shape or first.ndim != len(spacing):
        raise ValueError(
            f"Expected masks of one shape and a spacing per axis, got {first.shape}, {second.shape} and {spacing}."
        )
    points = [_surface(mask, ignored) * np.asarray(spacing, dtype=float) for mask in (first, second)]
    if not all(map(len, points)):
        return None
    trees = [cKDTree(p) for p in points]
    return SurfaceDistances(trees[1].query(points[0])[0], trees[0].query(points[1])[0])


def _surface(mask: np.ndarray, ignored: np.ndarray | None) -> np.ndarray:
    """Positions (N, D) of a mask's surface voxels."""
    # Structures are small in most images: the box around one, and its neighbors, is all that matters.
    found = find_objects(mask.astype(np.uint8))
    if not found:
        return np.empty((0, mask.ndim))
    box = tuple(slice(max(0, axis.start - 1), axis.stop + 1) for axis in found[0])
    inside = mask[box].astype(bool)
    filled = inside if ignored is None else inside | ignored[box]
    surface = inside & ~binary_erosion(filled, generate_binary_structure(mask.ndim, 1))
    return np.argwhere(surface) + [axis.start for axis in box]

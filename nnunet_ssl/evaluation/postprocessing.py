"""Small or separate objects are removed and holes filled, per structure; sizes and holes as in Bortsova et al. 2019."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes, generate_binary_structure, label

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.label_maps import read_labels, write_labels

Labels = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """What is done to a label map. A structure is one label, or the labels of a region together.

    Attributes:
        smallest: Structure to the size in mm^3 (in 2D mm^2 or pixels) that an object must reach to stay.
        filled: Structures whose holes are filled, with the first of their labels.
        single: Structures of which the largest object alone stays.
        names: Structure to its name.
    """

    smallest: Mapping[Labels, float]
    filled: tuple[Labels, ...]
    names: Mapping[Labels, str]
    single: tuple[Labels, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.smallest or self.filled or self.single)

    def describe(self) -> str:
        """In words."""
        parts = []
        if self.smallest:
            sizes = ", ".join(f"{self.names[labels]} {size:g}" for labels, size in self.smallest.items())
            parts.append(f"objects removed below {sizes}")
        if self.single:
            parts.append(f"the largest object kept of {', '.join(self.names[labels] for labels in self.single)}")
        if self.filled:
            parts.append(f"holes filled in {', '.join(self.names[labels] for labels in self.filled)}")
        return "; ".join(parts)


def clean(labels: np.ndarray, spacing: Sequence[float], cleaning: Cleaning) -> np.ndarray:
    """Remove small objects, then all but the largest, then fill holes.

    An object is a set of voxels of one structure that touch, at corners too; of several largest ones of equal size
    all stay. What is removed becomes background, also where it lies inside a larger region. A hole is background that
    its structure encloses: no path over faces leads from it to the border of the image. Voxels of other structures stay
    as they are.

    Args:
        labels: Label map (*S), 2D or 3D.
        spacing: Voxel size per axis, in mm.
        cleaning: What to do.

    Returns:
        A new label map.
    """
    cleaned = labels.copy()
    touching = generate_binary_structure(labels.ndim, labels.ndim)
    for structure, smallest in cleaning.smallest.items():
        objects, _ = label(np.isin(labels, structure), touching)
        sizes = np.bincount(objects.ravel()) * float(np.prod(spacing))
        too_small = sizes < smallest
        too_small[0] = False
        cleaned[too_small[objects]] = 0
    # Of nested regions the outer one first: the inner one's largest object is one that stays.
    for structure in sorted(cleaning.single, key=len, reverse=True):
        objects, _ = label(np.isin(cleaned, structure), touching)
        voxels = np.bincount(objects.ravel())
        voxels[0] = 0
        smaller = voxels < voxels.max()
        smaller[0] = False
        cleaned[smaller[objects]] = 0
    for structure in cleaning.filled:
        holes = binary_fill_holes(np.isin(cleaned, structure)) & (cleaned == 0)
        cleaned[holes] = structure[0]
    return cleaned


def read_cleaning(
    labels: Mapping[str, Any],
    remove_below: Sequence[str] | None,
    fill: Sequence[str] | None,
    keep_largest: Sequence[str] | None = None,
) -> Cleaning:
    """What the command line asks for.

    Args:
        labels: ``labels`` of dataset.json.
        remove_below: ``SIZE`` for all structures, ``NAME=SIZE`` for one; the last word counts.
        fill: Names of structures; all if empty, none if absent.
        keep_largest: The same.

    Raises:
        UserError: For an unknown name or a size that is no number.
    """
    structures = {
        name: tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
        for name, value in labels.items()
        if name not in ("background", "ignore")
    }
    smallest: dict[Labels, float] = {}
    for word in remove_below or ():
        name, separator, size = word.rpartition("=")
        try:
            number = float(size)
        except ValueError:
            number = -1.0
        if not number > 0:
            raise UserError(f"--remove-below {word!r}: expected SIZE or NAME=SIZE with a size above zero.")
        smallest |= dict.fromkeys(_chosen(structures, [name] if separator else []), number)
    filled, single = (
        tuple(_chosen(structures, wanted)) if wanted is not None else () for wanted in (fill, keep_largest)
    )
    return Cleaning(smallest, filled, {labels: name for name, labels in structures.items()}, single)


def clean_file(source: Path, target: Path, reader: type, cleaning: Cleaning) -> int:
    """Clean one file; it appears complete or not at all.

    Args:
        source: Label map.
        target: Where the result goes, with the same ending.
        reader: nnU-Net's reader and writer.
        cleaning: What to do.

    Returns:
        How many voxels changed.

    Raises:
        UserError: Where the file cannot be read.
    """
    found = read_labels(source, reader)
    cleaned = clean(found.labels, found.spacing, cleaning)
    write_labels(cleaned, found, target, reader)
    return int((cleaned != found.labels).sum())


def _chosen(structures: Mapping[str, Labels], wanted: Sequence[str]) -> list[Labels]:
    unknown = [name for name in wanted if name not in structures]
    if unknown:
        raise UserError(f"There is no structure {unknown[0]!r}; there are {', '.join(structures)}.")
    return [structures[name] for name in wanted or structures]

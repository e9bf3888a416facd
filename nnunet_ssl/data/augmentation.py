"""nnU-Net's choices for augmentation, and how hyper-parameters change them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size

from nnunet_ssl.errors import UserError

# nnU-Net enlarges the patch it cuts out by these, whatever range it scales by.
_NNUNET_SCALE_RANGE = (0.85, 1.25)
# Words that tell left from right in the name of a label.
_SIDES = {"left", "right", "l", "r", "lt", "rt", "sinister", "dexter", "sin", "dex", "links", "rechts"}


class Augmentation(NamedTuple):
    """What nnU-Net's trainer asks for, in its order.

    rotation: range in radians; slice_by_slice: whether 3D patches are augmented as 2D slices; initial_patch_size:
    what is cut out before rotating, in voxels; mirror_axes: spatial axes, None for none.
    """

    rotation: tuple[float, float]
    slice_by_slice: bool
    initial_patch_size: Sequence[int]
    mirror_axes: tuple[int, ...] | None


def check_mirror_axes(mirror_axes: Sequence[int] | None, patch_size: Sequence[int]) -> None:
    """Refuse mirroring axes that the patch does not have, or that are named twice.

    Raises:
        UserError: Naming the axes there are.
    """
    axes = mirror_axes or ()
    if len(set(axes)) < len(axes) or any(axis >= len(patch_size) for axis in axes):
        raise UserError(
            f"mirror_axes is {list(axes)}; expected some of the patch's axes {list(range(len(patch_size)))}, each once."
        )


def adjust(
    stock: Augmentation,
    rotation_degrees: float | None,
    mirror_axes: tuple[int, ...] | None,
    patch_size: Sequence[int],
) -> Augmentation:
    """Replace rotation range and mirroring axes, where they are given.

    Args:
        stock: nnU-Net's choices.
        rotation_degrees: Largest rotation to either side.
        mirror_axes: Spatial axes; () for no mirroring.
        patch_size: In voxels.
    """
    adjusted = stock
    if rotation_degrees is not None:
        angle = float(np.deg2rad(rotation_degrees))
        size = initial_patch_size(patch_size, (-angle, angle), stock.slice_by_slice)
        adjusted = adjusted._replace(rotation=(-angle, angle), initial_patch_size=size)
    if mirror_axes is not None:
        # nnU-Net's predictor takes None, not an empty list, for "no mirroring".
        adjusted = adjusted._replace(mirror_axes=mirror_axes or None)
    return adjusted


def initial_patch_size(patch_size: Sequence[int], rotation: tuple[float, float], slice_by_slice: bool) -> Sequence[int]:
    """What nnU-Net cuts out before it rotates and scales, so that a patch of this size remains; in voxels.

    Args:
        patch_size: In voxels.
        rotation: Range in radians.
        slice_by_slice: Whether 3D patches are augmented as 2D slices: then the first axis stays as it is.
    """
    size: Any = get_patch_size(patch_size, rotation, rotation, rotation, _NNUNET_SCALE_RANGE)
    if slice_by_slice:
        size[0] = patch_size[0]
    return size


def warning_about_sides(labels: Iterable[str], augmentation: Augmentation) -> str:
    """A warning where label names tell left from right and augmentation does not; empty otherwise."""
    sided = labels_that_name_sides(labels)
    degrees = float(np.rad2deg(max(np.abs(augmentation.rotation))))
    if not sided or (not augmentation.mirror_axes and degrees <= 90):
        return ""
    return (
        f"WARNING: the labels {', '.join(sided)} tell left from right, but augmentation mirrors along axes "
        f"{list(augmentation.mirror_axes or ())} and rotates by up to {degrees:.0f} degrees. Unlabeled images cannot "
        f"repair what that destroys. Consider 'nnunet-ssl configure ... --set 'mirror_axes=[]' --set "
        f"rotation_degrees=15' for all trainers you compare."
    )


def labels_that_name_sides(names: Iterable[str]) -> list[str]:
    """Those names with a word for a side in them: ``left_lung``, ``Kidney-R``, ``LungRight``; not ``vertebra_L1``."""
    return [name for name in names if _SIDES & set(_words(name))]


def _words(name: str) -> list[str]:
    separated = re.sub(r"(?<![A-Za-z])[A-Za-z]\d+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return [word.lower() for word in re.split(r"[^A-Za-z]+", separated) if word]

"""Interpolation at arbitrary places, and from knots to voxels: the machinery of ``displacement``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor
from torch.nn import functional

# Whole voxels along an axis; hashable, for what is kept.
Places = tuple[int, ...] | range

# Their intermediate values stay in a core's cache, and in memory that the process has at hand.
_QUERIES_AT_A_TIME = 2**15


def look_up(
    image: Tensor, displacement: Tensor, places: Sequence[Places] | None = None, mode: str = "bilinear"
) -> Tensor:
    """Values of an image (B, C, *S) at displaced places, with the border voxels repeated outside.

    Args:
        image: Of any type for nearest, otherwise a floating type.
        displacement: (B, D, *Q), in voxels, float32 or float64.
        places: From where it leads, per axis; 0 is the first voxel's center. The image's own voxels (Q = S) if absent.
        mode: As for ``torch.nn.functional.grid_sample``: bilinear (trilinear in 3D), nearest or bicubic.

    Returns:
        (B, C, *Q), of the image's type.
    """
    sides, dims = image.shape[2:], image.ndim - 2
    places = [range(side) for side in sides] if places is None else places
    differentiable = torch.is_grad_enabled() and (image.requires_grad or displacement.requires_grad)
    if dims == 3 and image.device.type == "cpu" and mode != "bicubic" and not differentiable:
        positions = [
            coordinates(start, 0.0, 1.0, dims - axis - 1, displacement) + displacement[:, axis]
            for axis, start in enumerate(places)
        ]
        return _look_up_in_volume(image, positions, mode)
    work = torch.promote_types(displacement.dtype, image.dtype) if image.is_floating_point() else displacement.dtype
    # From -1 to 1. An axis of one voxel has nowhere to go; 0 is its center.
    scales = [2.0 / (side - 1) if side > 1 else 0.0 for side in sides]
    positions = [
        torch.add(
            coordinates(places[axis], (sides[axis] - 1) / 2, scale, dims - axis - 1, displacement),
            displacement[:, axis],
            alpha=scale,
        )
        for axis, scale in enumerate(scales)
    ]
    # The last spatial axis comes first in the grid. Stacked in front, the coordinates stay planes: faster to read.
    grid = torch.stack(positions[::-1], dim=1).movedim(1, -1).to(work)
    values = functional.grid_sample(image.to(work), grid, mode=mode, padding_mode="border", align_corners=True)
    return values.to(image.dtype)


def coordinates(places: Places, origin: float, scale: float, axes_after: int, like: Tensor) -> Tensor:
    """(place - origin) * scale for the places of an axis, shaped to broadcast before the axes after it; kept.

    Args:
        places: Whole voxels.
        origin: In voxels.
        scale: Per voxel.
        axes_after: How many axes follow.
        like: Whose device the result is on, and whose type it has, float32 or float64.
    """
    return _coordinates(places, origin, scale, axes_after, like.dtype, like.device)


@lru_cache(maxsize=1024)
def _coordinates(
    places: Places, origin: float, scale: float, axes_after: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # Cast before it becomes a tensor of the device: some know no double precision.
    values = (np.asarray(places, dtype=np.float64) - origin) * scale
    return torch.from_numpy(values).to(dtype).to(device).view(-1, *[1] * axes_after)


def _look_up_in_volume(image: Tensor, positions: Sequence[Tensor], mode: str) -> Tensor:
    """``look_up`` in 3D on the CPU, where grid_sample goes voxel by voxel: indexing in bulk is 2 to 7 times faster.

    Not for gradients: the backward pass of indexing is the slow one.
    """
    sides = image.shape[2:]
    work = image.dtype if mode == "nearest" else torch.promote_types(positions[0].dtype, image.dtype)
    volumes = image.flatten(2).to(work)
    places = [p.flatten(1) for p in positions]
    values = volumes.new_empty((*volumes.shape[:2], places[0].shape[1]))
    for volume, *axes, found in zip(volumes, *places, values, strict=True):
        pieces = zip(*(axis.split(_QUERIES_AT_A_TIME) for axis in axes), found.split(_QUERIES_AT_A_TIME, dim=1))
        for *piece, target in pieces:
            if mode == "nearest":
                _take_nearest(volume, piece, sides, target)
            else:
                _take_linear(volume, piece, sides, target)
    return values.view(*image.shape[:2], *positions[0].shape[1:]).to(image.dtype)


def _take_nearest(volume: Tensor, places: Sequence[Tensor], sides: Sequence[int], target: Tensor) -> None:
    index = _flat_index([p.clamp(0, side - 1).round_() for p, side in zip(places, sides)], sides)
    torch.index_select(volume, 1, index, out=target)


def _take_linear(volume: Tensor, places: Sequence[Tensor], sides: Sequence[int], target: Tensor) -> None:
    inside = [p.clamp(0, side - 1) for p, side in zip(places, sides)]
    lower = [p.floor().clamp_(max=max(side - 2, 0)) for p, side in zip(inside, sides)]
    fractions = [p.sub_(low).to(volume.dtype) for p, low in zip(inside, lower)]
    index = _flat_index(lower, sides)
    # An axis of one voxel has no upper neighbor, and a fraction of 0.
    steps = [math.prod(sides[axis + 1 :]) if side > 1 else 0 for axis, side in enumerate(sides)]
    corners = [sum(corner) for corner in product(*((0, step) for step in steps))]
    values = [volume.index_select(1, index + corner) for corner in corners]
    for fraction in reversed(fractions):
        values = [low.lerp_(high, fraction) for low, high in zip(values[::2], values[1::2])]
    target.copy_(values[0])


def _flat_index(places: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    """Places (Q,) along three axes as indices into the flattened volume."""
    # Half the memory of int64, where it can hold the last index.
    dtype = torch.int32 if math.prod(sides) < 2**31 else torch.int64
    first, second, third = (p.to(dtype) for p in places)
    return first.mul_(sides[1]).add_(second).mul_(sides[2]).add_(third)


def knots_between(first: int, last: int, spacing: float) -> tuple[int, ...]:
    """Voxels from first to last, both included, evenly apart as nearly as whole numbers can be; one for spacing 0."""
    if spacing == 0:
        return (first,)
    count = math.ceil((last - first) / spacing) + 1
    return tuple(int(p) for p in np.unique(np.linspace(first, last, count).round()))


@lru_cache(maxsize=256)
def spline_matrix(knots: tuple[int, ...], queries: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (Q, N) that takes values at knots to the interpolating cubic spline's values at the queries.

    With fewer than four knots the polynomial through them. Kept, because making it costs more than using it.
    """
    if len(knots) == 1:
        return torch.ones((len(queries), 1), dtype=dtype, device=device)
    spline = make_interp_spline(knots, np.eye(len(knots)), k=min(3, len(knots) - 1))
    # Cast before it becomes a tensor: some devices know no double precision.
    values = spline(queries).astype(np.float64 if dtype == torch.float64 else np.float32)
    return torch.from_numpy(values).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def index_of(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole positions as an index on the device; kept, so that a step copies nothing to it."""
    return torch.tensor(positions, device=device)

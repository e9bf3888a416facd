"""Interpolation at arbitrary places, and from knots to voxels: the machinery of ``spatial``."""

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


def look_up(image: Tensor, positions: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Values of an image (B, C, *S) at places in voxels, with the border voxels repeated outside.

    Args:
        image: Of any type for nearest, otherwise a floating type.
        positions: One tensor (B, *Q) per spatial axis, float32 or float64; 0 is the first voxel's center.
        mode: As for ``torch.nn.functional.grid_sample``: bilinear (trilinear in 3D), nearest or bicubic.

    Returns:
        (B, C, *Q), of the image's type.
    """
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (image, *positions))
    if image.ndim == 5 and image.device.type == "cpu" and mode != "bicubic" and not differentiable:
        return _look_up_in_volume(image, positions, mode)
    work = torch.promote_types(positions[0].dtype, image.dtype) if image.is_floating_point() else positions[0].dtype
    # An axis of one voxel has nowhere to go; 0 is its center.
    coordinates = [
        p * (2.0 / (side - 1)) - 1.0 if side > 1 else torch.zeros_like(p) for p, side in zip(positions, image.shape[2:])
    ]
    # The last spatial axis comes first in the grid. Stacked in front, the coordinates stay planes: faster to read.
    grid = torch.stack(coordinates[::-1], dim=1).movedim(1, -1).to(work)
    values = functional.grid_sample(image.to(work), grid, mode=mode, padding_mode="border", align_corners=True)
    return values.to(image.dtype)


def _look_up_in_volume(image: Tensor, positions: Sequence[Tensor], mode: str) -> Tensor:
    """``look_up`` in 3D on the CPU, where grid_sample goes voxel by voxel: indexing in bulk is 2 to 7 times faster.

    Not for gradients: the backward pass of indexing is the slow one.
    """
    sides = image.shape[2:]
    inside = [p.clamp(0, side - 1) for p, side in zip(positions, sides)]
    if mode == "nearest":
        return _take(image, _flat_index([p.round_() for p in inside], sides), 0, inside[0].shape)
    work = torch.promote_types(inside[0].dtype, image.dtype)
    lower = [p.floor().clamp_(max=max(side - 2, 0)) for p, side in zip(inside, sides)]
    fractions = [(p - low).to(work)[:, None] for p, low in zip(inside, lower)]
    index = _flat_index(lower, sides)
    # An axis of one voxel has no upper neighbor, and a fraction of 0.
    steps = [math.prod(sides[axis + 1 :]) if side > 1 else 0 for axis, side in enumerate(sides)]
    volume = image.to(work)
    values = [_take(volume, index, sum(corner), inside[0].shape) for corner in product(*((0, step) for step in steps))]
    for fraction in reversed(fractions):
        values = [low.lerp_(high, fraction) for low, high in zip(values[::2], values[1::2])]
    return values[0].to(image.dtype)


def _flat_index(places: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    """Places (B, *Q) along three axes as indices (B, Q) into the flattened volume."""
    # Half the memory of int64, where it can hold the last index.
    dtype = torch.int32 if math.prod(sides) < 2**31 else torch.int64
    first, second, third = (p.to(dtype) for p in places)
    return first.mul_(sides[1]).add_(second).mul_(sides[2]).add_(third).flatten(1)


def _take(image: Tensor, index: Tensor, offset: int, shape: Sequence[int]) -> Tensor:
    """Values of each image (B, C, *S) at its own flat indices (B, Q) plus an offset, as (B, C, *shape[1:])."""
    taken = image.new_empty((*image.shape[:2], *shape[1:]))
    # One flat volume at a time: selecting from those is several times faster than gather.
    for volumes, i, rows in zip(image.flatten(2), index, taken.flatten(2)):
        for volume, row in zip(volumes, rows):
            torch.index_select(volume[offset:], 0, i, out=row)
    return taken


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
    return torch.from_numpy(spline(queries)).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def index_of(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole positions as an index on the device; kept, so that a step copies nothing to it."""
    return torch.tensor(positions, device=device)

"""Interpolation at arbitrary places, and from knots to voxels: the machinery of ``spatial``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor
from torch.nn import functional


def look_up(image: Tensor, positions: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Values of an image (B, C, *S) at places in voxels, with the border voxels repeated outside.

    Args:
        image: float32 or float64.
        positions: One tensor (B, *Q) per spatial axis, of the image's type; 0 is the first voxel's center.
        mode: As for ``torch.nn.functional.grid_sample``: bilinear (trilinear in 3D), nearest or bicubic.

    Returns:
        (B, C, *Q).
    """
    # An axis of one voxel has nowhere to go; 0 is its center.
    coordinates = [
        p * (2.0 / (side - 1)) - 1.0 if side > 1 else torch.zeros_like(p) for p, side in zip(positions, image.shape[2:])
    ]
    # The last spatial axis comes first in the grid. Stacked in front, the coordinates stay planes: faster to read.
    grid = torch.stack(coordinates[::-1], dim=1).movedim(1, -1)
    return functional.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=True)


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

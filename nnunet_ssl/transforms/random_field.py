"""Smooth random vector fields from coarse noise, the machinery of ``displacement.sample_displacement``.

White noise smoothed by a Gaussian of width sigma is the same random field, to a tenth of a per mille, when the noise
lives on a grid nearly as coarse as sigma. So there is no wide convolution: the Gaussian is evaluated from the coarse
noise at every voxel, one small matrix per axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Noise points per sigma. The covariance of the field then ripples by 2 exp(-(1.25 pi)^2), less than a millionth.
_NOISE_POINTS_PER_SIGMA = 1.25
# Noise further away than this many sigmas carries less than 1e-5 of a voxel's variance.
_KERNEL_RADIUS_IN_SIGMAS = 3.5
# Where the strain of a field is evaluated: this many points per sigma see its maximum to 2 %.
_STRAIN_POINTS_PER_SIGMA = 3.0


def gaussian_field(
    batch_size: int,
    spatial_shape: Sequence[int],
    margin: Sequence[int],
    sigma: float,
    std: float,
    moving: tuple[bool, ...],
    max_strain: float,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Draw vector fields (B, D, *(S + 2 margin)) whose strain does not exceed a bound.

    Args:
        batch_size: B.
        spatial_shape: S, in voxels.
        margin: Voxels beyond the patch, on both sides of each axis.
        sigma: Width of the Gaussian, in voxels.
        std: Standard deviation of each component, in voxels; stronger fields are scaled down to the bound.
        moving: Per axis; along others the component is 0, and the field does not change.
        max_strain: Bound on the largest absolute row sum of the field's gradient.
        generator: Draws the noise, on its own device; the default generator of ``device`` if absent.
        device: Where the field is computed.
        dtype: float32 or float64.
    """
    dims = len(spatial_shape)
    # Infinitely smooth along fixed axes: one noise point serves all voxels.
    axes = [
        _Axis(-m, side - 1 + m, sigma if moves else math.inf, dtype, device)
        for side, m, moves in zip(spatial_shape, margin, moving)
    ]
    noise = torch.randn(
        (batch_size, sum(moving), *(axis.num_noise_points for axis in axes)),
        generator=generator,
        device=device if generator is None else generator.device,
        dtype=dtype,
    ).to(device)
    strain = _largest_row_sum_of_gradient(noise, [axis.at_strain_points() for axis in axes], moving)
    noise = noise * (max_strain / strain).clamp_max(std).view(batch_size, 1, *[1] * dims)
    field = apply_per_axis(noise, [axis.at_voxels() for axis in axes])
    if all(moving):
        return field
    components = iter(field.split(1, dim=1))
    still = field.new_zeros((batch_size, 1, *field.shape[2:]))
    return torch.cat([next(components) if moves else still for moves in moving], dim=1)


def apply_per_axis(field: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each spatial axis of (B, C, *N) by its matrix (Q_d, N_d); returns (B, C, *Q)."""
    # From the last axis on, so that every product works on contiguous memory.
    for axis, matrix in reversed(list(enumerate(matrices, start=2))):
        shape = (*field.shape[:axis], len(matrix), *field.shape[axis + 1 :])
        if axis == field.ndim - 1:
            field = field @ matrix.T
        else:
            field = (matrix @ field.reshape(-1, field.shape[axis], math.prod(field.shape[axis + 1 :]))).view(shape)
    return field


class _Axis(NamedTuple):
    """An axis from its first to its last voxel; what depends on nothing else is kept."""

    first: int
    last: int
    sigma: float
    dtype: torch.dtype
    device: torch.device

    @property
    def num_noise_points(self) -> int:
        return len(_noise_positions(self))

    def at_voxels(self) -> Tensor:
        """Weights (voxels, noise points)."""
        return _gaussian_matrices(self, None)[0]

    def at_strain_points(self) -> tuple[Tensor, Tensor]:
        """Weights (strain points, noise points), and their derivative."""
        length = self.last - self.first
        return _gaussian_matrices(self, min(length + 1, int(length / self.sigma * _STRAIN_POINTS_PER_SIGMA) + 2))


def _noise_positions(axis: _Axis) -> NDArray[np.float64]:
    """Where the noise of one axis lives, in voxels: centered, and reaching beyond the voxels from first to last."""
    center = (axis.first + axis.last) / 2
    if math.isinf(axis.sigma):
        return np.array([center])
    spacing = axis.sigma / _NOISE_POINTS_PER_SIGMA
    count = int(((axis.last - axis.first) / 2 + _KERNEL_RADIUS_IN_SIGMAS * axis.sigma) / spacing) + 1
    return np.arange(-count, count + 1, dtype=np.float64) * spacing + center


@lru_cache(maxsize=256)
def _gaussian_matrices(axis: _Axis, num_queries: int | None) -> tuple[Tensor, Tensor]:
    """Weights (Q, N) that turn unit white noise into a smooth field of unit variance, and their derivative.

    Args:
        axis: With its noise points.
        num_queries: So many places from the first to the last voxel; every voxel if None.
    """
    count = axis.last - axis.first + 1 if num_queries is None else num_queries
    queries = np.linspace(axis.first, axis.last, count)
    offset = (queries[:, None] - _noise_positions(axis)[None]) / axis.sigma
    weights = np.exp(-0.5 * offset**2)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    # The norm hardly depends on the position (see _NOISE_POINTS_PER_SIGMA), so only the exponent is differentiated.
    first, second = (
        torch.from_numpy(m).to(axis.dtype).to(axis.device) for m in (weights, -offset / axis.sigma * weights)
    )
    return first, second


def _largest_row_sum_of_gradient(
    noise: Tensor, matrices: Sequence[tuple[Tensor, Tensor]], moving: Sequence[bool]
) -> Tensor:
    """The strain of each field, (B,): the largest sum of absolute derivatives of a component at a place."""
    row_sums = torch.zeros((), dtype=noise.dtype, device=noise.device)
    for axis in (axis for axis, moves in enumerate(moving) if moves):
        per_axis = [derivative if d == axis else value for d, (value, derivative) in enumerate(matrices)]
        row_sums = row_sums + apply_per_axis(noise, per_axis).abs()
    return row_sums.flatten(1).amax(1)

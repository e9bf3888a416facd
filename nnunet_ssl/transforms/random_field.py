"""Smooth random vector fields from coarse noise, the machinery of ``displacement.sample_displacement``.

White noise smoothed by a Gaussian of width sigma is the same random field, to a tenth of a per mille, when the noise
lives on a grid nearly as coarse as sigma. So there is no wide convolution: the Gaussian is evaluated from the coarse
noise at every voxel, one small matrix per axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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
    sigmas: Sequence[float],
    amplitudes: Sequence[float],
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
        sigmas: Width of the Gaussian along each axis, in voxels; infinite where the field does not change.
        amplitudes: Standard deviation of each component, in voxels, before stronger fields are scaled down.
        max_strain: Bound on the largest absolute row sum of the field's gradient.
        generator: Draws the noise, on its own device; the default generator of ``device`` if absent.
        device: Where the field is computed.
        dtype: float32 or float64.
    """
    dims = len(spatial_shape)
    first = [float(-m) for m in margin]
    last = [float(side - 1 + m) for side, m in zip(spatial_shape, margin)]
    points = [_noise_positions(*bounds, dtype, device) for bounds in zip(first, last, sigmas)]
    noise = torch.randn(
        (batch_size, dims, *(len(p) for p in points)),
        generator=generator,
        device=device if generator is None else generator.device,
        dtype=dtype,
    ).to(device)
    for component, amplitude in enumerate(amplitudes):
        noise[:, component] *= amplitude
    strain_matrices = [
        _gaussian_matrix(_strain_positions(low, high, sigma, dtype, device), p, sigma)
        for low, high, sigma, p in zip(first, last, sigmas, points)
    ]
    strain = _largest_row_sum_of_gradient(noise, strain_matrices)
    noise *= (max_strain / strain.clamp_min(max_strain)).view(batch_size, 1, *[1] * dims)
    voxels = [torch.arange(low, high + 1, device=device, dtype=dtype) for low, high in zip(first, last)]
    return apply_per_axis(noise, [_gaussian_matrix(q, p, s)[0] for q, p, s in zip(voxels, points, sigmas)])


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


def _noise_positions(first: float, last: float, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the noise of one axis lives, in voxels: centered, and reaching beyond the voxels from first to last."""
    center = (first + last) / 2
    if math.isinf(sigma):
        return torch.full((1,), center, dtype=dtype, device=device)
    spacing = sigma / _NOISE_POINTS_PER_SIGMA
    count = int(((last - first) / 2 + _KERNEL_RADIUS_IN_SIGMAS * sigma) / spacing) + 1
    return torch.arange(-count, count + 1, dtype=dtype, device=device) * spacing + center


def _strain_positions(first: float, last: float, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    count = min(int(last - first) + 1, int((last - first) / sigma * _STRAIN_POINTS_PER_SIGMA) + 2)
    return torch.linspace(first, last, count, dtype=dtype, device=device)


def _gaussian_matrix(queries: Tensor, noise_points: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Weights (Q, N) that turn unit white noise into a smooth field of unit variance, and their derivative."""
    offset = (queries[:, None] - noise_points[None]) / sigma
    weights = torch.exp(-0.5 * offset**2)
    weights = weights / weights.norm(dim=1, keepdim=True)
    # The norm hardly depends on the position (see _NOISE_POINTS_PER_SIGMA), so only the exponent is differentiated.
    return weights, -offset / sigma * weights


def _largest_row_sum_of_gradient(noise: Tensor, matrices: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The strain of each field, (B,): the largest sum of absolute derivatives of a component at a place."""
    row_sums = torch.zeros((), dtype=noise.dtype, device=noise.device)
    for axis in range(len(matrices)):
        per_axis = [derivative if d == axis else value for d, (value, derivative) in enumerate(matrices)]
        row_sums = row_sums + apply_per_axis(noise, per_axis).abs()
    return row_sums.flatten(1).amax(1)

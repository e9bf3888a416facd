"""Displacement fields on the device: sample, invert, compose, warp; 2D and 3D.

Conventions, the same in every function:

* A displacement ``u`` is a tensor (B, D, *S) in voxels; channel d moves along spatial axis d of S.
* It stands for the map phi(q) = q + u(q) on voxel coordinates q, the center of the first voxel being 0.
* ``warp(image, u)(q) = image(q + u(q))``: phi says where the output voxel q takes its value from.
* Voxels outside the image take the value of the nearest border voxel.

The functions are pure and follow the device of their inputs. Geometry is computed in float32 (float64 where the field
is float64), because 10 bits of mantissa cannot hold a voxel coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Interpolation = Literal["linear", "nearest", "cubic"]

# A field whose strain (largest row sum of its gradient, in absolute values) stays below 1 cannot fold, and the
# fixed-point inversion contracts by that factor per iteration. 0.5 leaves room for the finite differences of the
# sampled field and gains a binary digit per iteration.
MAX_STRAIN = 0.5

# Leaves a residual under 0.01 voxels for fields at MAX_STRAIN up to patches of 512 voxels (measured: 0.005; an
# iteration more or less changes it by a factor of 2.7, because the strain is at its maximum in few places only).
INVERSION_ITERATIONS = 7

# Noise points per sigma. At 2, the ripple of the summed Gaussians against a dense sum is below 1e-6 of its mean.
_NOISE_POINTS_PER_SIGMA = 2.0
# Noise further away than this many sigmas adds less than 2e-4 of the kernel's peak.
_KERNEL_RADIUS_IN_SIGMAS = 4.2
# Where the strain of a field is evaluated: this many points per sigma see its maximum to about 1 %.
_STRAIN_POINTS_PER_SIGMA = 4.0


def sample_displacement(
    batch_size: int,
    spatial_shape: Sequence[int],
    *,
    smoothness: float,
    displacement_std: float,
    generator: torch.Generator | None = None,
    fixed_axes: Sequence[int] = (),
    max_strain: float = MAX_STRAIN,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw smooth random displacement fields: white noise convolved with a Gaussian.

    Elastic deformation as in Bortsova et al., "Semi-supervised medical image segmentation via learning consistency
    under transformations" (MICCAI 2019). The noise lives on a grid of half a sigma and the Gaussian is evaluated from
    there at every voxel, one small matrix per axis. This is the same random field as smoothing full-resolution noise,
    without a wide convolution; the variance is exact at every voxel, at the border too.

    Fields that could fold are scaled down until their strain is ``max_strain``: then the Jacobian determinant of phi
    is positive everywhere and ``invert_displacement`` converges.

    Args:
        batch_size: Number of independent fields B.
        spatial_shape: S, in voxels; two or three axes.
        smoothness: The Gaussian's sigma as a fraction of the side, axis by axis.
        displacement_std: Standard deviation of each displacement component as a fraction of the side along it, before
            fields that could fold are scaled down. 0 gives the identity.
        generator: Source of the noise, on the device the noise is drawn on. The default generator if absent.
        fixed_axes: Axes along which nothing moves and the field does not change: with the slices' axis of anisotropic
            images, every slice is deformed alike, as nnU-Net's own augmentation does.
        max_strain: Bound on the largest absolute row sum of the displacement's gradient; must lie in (0, 1).
        device: Where to put the field; the generator's device if absent.
        dtype: A floating type.

    Returns:
        Displacement (B, D, *S), in voxels.

    Raises:
        ValueError: For sizes, axes or strengths out of range.
    """
    _check_sampling_arguments(batch_size, spatial_shape, smoothness, displacement_std, fixed_axes, max_strain, dtype)
    noise_device = generator.device if generator is not None else torch.device(device or "cpu")
    target = torch.device(device) if device is not None else noise_device
    work = torch.float64 if dtype == torch.float64 else torch.float32
    with _without_autocast(target):
        return _sample(
            batch_size,
            spatial_shape,
            smoothness,
            displacement_std,
            generator,
            fixed_axes,
            max_strain,
            noise_device,
            target,
            work,
        ).to(dtype)


def _sample(
    batch_size: int,
    spatial_shape: Sequence[int],
    smoothness: float,
    displacement_std: float,
    generator: torch.Generator | None,
    fixed_axes: Sequence[int],
    max_strain: float,
    noise_device: torch.device,
    target: torch.device,
    work: torch.dtype,
) -> Tensor:
    dims = len(spatial_shape)
    # Infinitely smooth along fixed axes: one noise point serves all voxels.
    sigmas = [math.inf if axis in fixed_axes else smoothness * side for axis, side in enumerate(spatial_shape)]
    noise_points = [_noise_positions(side, sigma, work, target) for side, sigma in zip(spatial_shape, sigmas)]
    noise = torch.randn(
        (batch_size, dims, *(len(p) for p in noise_points)), generator=generator, device=noise_device, dtype=work
    ).to(target)
    amplitude = torch.tensor(
        [0.0 if axis in fixed_axes else displacement_std * side for axis, side in enumerate(spatial_shape)],
        device=target,
        dtype=work,
    ).view(1, dims, *[1] * dims)
    noise = noise * amplitude
    strain = _strain(noise, noise_points, spatial_shape, sigmas)
    scale = (max_strain / strain.clamp_min(max_strain)).view(batch_size, 1, *[1] * dims)
    positions = [torch.arange(side, device=target, dtype=work) for side in spatial_shape]
    values = [_gaussian_matrix(q, p, s)[0] for q, p, s in zip(positions, noise_points, sigmas)]
    return _apply_per_axis(noise * scale, values)


def warp(image: Tensor, displacement: Tensor, interpolation: Interpolation = "linear") -> Tensor:
    """Resample an image: output(q) = image(q + u(q)), with the border voxels repeated outside.

    Differentiable in the image, and in the displacement except for ``nearest``. The backward pass of ``nearest`` adds
    each gradient to the voxel the value came from, and voxels that were not read receive none: the transformation
    layer of Bortsova et al. (MICCAI 2019).

    Args:
        image: (B, C, *S); integer and boolean images need ``nearest`` and keep their type.
        displacement: (B, D, *S), in voxels.
        interpolation: ``linear``, ``nearest``, or ``cubic`` (2D only).

    Returns:
        The warped image (B, C, *S), of the image's type.

    Raises:
        ValueError: Where shapes do not fit, or the interpolation is not available for the image.
    """
    _check_displacement(displacement)
    dims = displacement.shape[1]
    if image.ndim != dims + 2 or image.shape[2:] != displacement.shape[2:] or image.shape[0] != displacement.shape[0]:
        raise ValueError(
            f"warp: the image has shape {tuple(image.shape)}, the displacement {tuple(displacement.shape)}; expected "
            f"(B, C, *S) and (B, D, *S) with the same B and S."
        )
    modes = {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}
    if interpolation not in modes or (interpolation == "cubic" and dims == 3):
        known = ["linear", "nearest"] if dims == 3 else sorted(modes)
        raise ValueError(f"warp: interpolation {interpolation!r} is not one of {known} for {dims}D images.")
    if interpolation != "nearest" and not image.is_floating_point():
        raise ValueError(
            f"warp: {interpolation} interpolation of {image.dtype} labels would invent labels; "
            f"use interpolation='nearest'."
        )
    work = torch.float64 if torch.float64 in (image.dtype, displacement.dtype) else torch.float32
    grid = _sampling_grid(displacement.to(work))
    sampled = functional.grid_sample(
        image.to(work), grid, mode=modes[interpolation], padding_mode="border", align_corners=True
    )
    return sampled.to(image.dtype)


def compose_displacements(outer: Tensor, inner: Tensor) -> Tensor:
    """The displacement of phi_outer after phi_inner: q -> inner(q) + outer(q + inner(q)).

    Args:
        outer: (B, D, *S), in voxels; sampled linearly, its border value repeated outside.
        inner: (B, D, *S), in voxels.

    Returns:
        (B, D, *S), in voxels.
    """
    return inner + warp(outer, inner)


def invert_displacement(displacement: Tensor, iterations: int = INVERSION_ITERATIONS) -> Tensor:
    """The displacement v of the inverse map: (q + v(q)) + u(q + v(q)) = q.

    Fixed-point iteration v <- -u(q + v) (Chen et al., "A simple fixed-point approach to invert a deformation field",
    Medical Physics 2008). It converges where the strain of u is below 1 and then shrinks the error by that factor per
    iteration. Near the border, where q + v leaves the patch, u is continued by its border value.

    Args:
        displacement: u (B, D, *S), in voxels.
        iterations: How often to iterate; the default reaches 0.01 voxels for every field that
            ``sample_displacement`` makes at the default strengths.

    Returns:
        v (B, D, *S), in voxels.
    """
    return align_displacements(displacement, torch.zeros_like(displacement), iterations)


def align_displacements(first: Tensor, second: Tensor, iterations: int = INVERSION_ITERATIONS) -> Tensor:
    """The displacement of phi_1^-1 after phi_2, which moves predictions of branch 1 into the frame of branch 2.

    Equals ``compose_displacements(invert_displacement(first), second)``, but solves a = u_2(q) - u_1(q + a) directly:
    one interpolation less, hence more accurate, and it starts close to the solution.

    Args:
        first: u_1 (B, D, *S), in voxels; its strain must be below 1.
        second: u_2 (B, D, *S), in voxels.
        iterations: As for ``invert_displacement``.

    Returns:
        a (B, D, *S), in voxels, with (q + a) + u_1(q + a) = q + u_2(q).
    """
    _check_displacement(first)
    if first.shape != second.shape:
        raise ValueError(
            f"The displacements have shapes {tuple(first.shape)} and {tuple(second.shape)}; they must match."
        )
    aligned = second - first
    for _ in range(iterations):
        aligned = second - warp(first, aligned)
    return aligned


def inside_mask(displacement: Tensor) -> Tensor:
    """Where q + u(q) lies within the patch, so that ``warp`` reads the image and not its repeated border.

    Args:
        displacement: (B, D, *S), in voxels.

    Returns:
        Boolean (B, 1, *S).
    """
    _check_displacement(displacement)
    # A rounding error outside the outermost voxel center is still inside.
    tolerance = 1e-3
    inside = torch.ones_like(displacement[:, :1], dtype=torch.bool)
    for axis, side in enumerate(displacement.shape[2:]):
        position = _identity_coordinates(displacement, axis) + displacement[:, axis : axis + 1].float()
        inside &= (position >= -tolerance) & (position <= side - 1 + tolerance)
    return inside


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """The determinant of the Jacobian of phi(q) = q + u(q): local volume change; 0 or less means folding.

    Central differences, one-sided at the border.

    Args:
        displacement: (B, D, *S), in voxels; every side at least 2.

    Returns:
        (B, *S), without unit.

    Raises:
        ValueError: Where a side is shorter than 2 voxels.
    """
    _check_displacement(displacement)
    dims = displacement.shape[1]
    if min(displacement.shape[2:]) < 2:
        raise ValueError(f"jacobian_determinant needs at least 2 voxels per axis, got {tuple(displacement.shape[2:])}.")
    field = displacement if displacement.dtype == torch.float64 else displacement.float()
    rows = [torch.stack(torch.gradient(field[:, d], dim=list(range(1, dims + 1))), dim=-1) for d in range(dims)]
    jacobian = torch.stack(rows, dim=-2) + torch.eye(dims, dtype=field.dtype, device=field.device)
    return torch.linalg.det(jacobian).to(displacement.dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products of coordinates must not run in half precision."""
    # As in nnU-Net, which uses no autocast elsewhere: older versions refuse even to switch it off for mps.
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def _check_displacement(displacement: Tensor) -> None:
    dims = displacement.ndim - 2
    if dims not in (2, 3) or displacement.shape[1] != dims or not displacement.is_floating_point():
        raise ValueError(
            f"A displacement is a floating tensor (B, 2, H, W) or (B, 3, D, H, W) in voxels, got "
            f"{displacement.dtype} of shape {tuple(displacement.shape)}."
        )


def _check_sampling_arguments(
    batch_size: int,
    spatial_shape: Sequence[int],
    smoothness: float,
    displacement_std: float,
    fixed_axes: Sequence[int],
    max_strain: float,
    dtype: torch.dtype,
) -> None:
    dims = len(spatial_shape)
    if dims not in (2, 3) or min(spatial_shape) < 1 or batch_size < 0:
        raise ValueError(
            f"Expected a batch size and 2 or 3 positive sides, got {batch_size} and {tuple(spatial_shape)}."
        )
    if smoothness <= 0 or displacement_std < 0 or not 0 < max_strain < 1:
        raise ValueError(
            f"smoothness must be > 0, displacement_std >= 0 and max_strain in (0, 1), got {smoothness}, "
            f"{displacement_std} and {max_strain}."
        )
    if any(axis not in range(dims) for axis in fixed_axes):
        raise ValueError(f"fixed_axes must be among {tuple(range(dims))}, got {tuple(fixed_axes)}.")
    if not dtype.is_floating_point:
        raise ValueError(f"A displacement needs a floating dtype, got {dtype}.")


def _noise_positions(side: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the noise of one axis lives, in voxels: centered on the patch and reaching over its border."""
    if math.isinf(sigma):
        return torch.full((1,), (side - 1) / 2, dtype=dtype, device=device)
    spacing = sigma / _NOISE_POINTS_PER_SIGMA
    half = (side - 1) / 2 + _KERNEL_RADIUS_IN_SIGMAS * sigma
    count = int(half / spacing) + 1
    return (torch.arange(-count, count + 1, dtype=dtype, device=device)) * spacing + (side - 1) / 2


def _gaussian_matrix(queries: Tensor, noise_points: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Weights (Q, N) that turn unit white noise into a smooth field of unit variance, and their derivative."""
    offset = (queries[:, None] - noise_points[None]) / sigma
    weights = torch.exp(-0.5 * offset**2)
    weights = weights / weights.norm(dim=1, keepdim=True)
    # The norm hardly depends on the position (see _NOISE_POINTS_PER_SIGMA), so only the exponent is differentiated.
    return weights, -offset / sigma * weights


def _apply_per_axis(noise: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Contract the spatial axes of (B, D, *N) with one matrix (Q_d, N_d) each; returns (B, D, *Q)."""
    field = noise
    for matrix in matrices:
        # The axis in front is consumed and its result appended, so after all of them the order is restored.
        field = torch.tensordot(field, matrix, dims=([2], [1]))
    return field


def _strain(
    noise: Tensor, noise_points: Sequence[Tensor], spatial_shape: Sequence[int], sigmas: Sequence[float]
) -> Tensor:
    """Largest absolute row sum of the gradient of each field, (B,)."""
    matrices = []
    for points, side, sigma in zip(noise_points, spatial_shape, sigmas):
        count = min(side, int((side - 1) / sigma * _STRAIN_POINTS_PER_SIGMA) + 2)
        queries = torch.linspace(0, side - 1, count, dtype=noise.dtype, device=noise.device)
        matrices.append(_gaussian_matrix(queries, points, sigma))
    row_sums = torch.zeros((), dtype=noise.dtype, device=noise.device)
    for axis in range(len(matrices)):
        per_axis = [derivative if d == axis else value for d, (value, derivative) in enumerate(matrices)]
        row_sums = row_sums + _apply_per_axis(noise, per_axis).abs()
    return row_sums.flatten(1).amax(1)


def _identity_coordinates(displacement: Tensor, axis: int) -> Tensor:
    side = displacement.shape[axis + 2]
    dtype = torch.float64 if displacement.dtype == torch.float64 else torch.float32
    shape = [1] * displacement.ndim
    shape[axis + 2] = side
    return torch.arange(side, device=displacement.device, dtype=dtype).view(shape)


def _sampling_grid(displacement: Tensor) -> Tensor:
    """grid_sample's grid (B, *S, D): coordinates scaled to [-1, 1], the last spatial axis first."""
    coordinates = []
    for axis, side in enumerate(displacement.shape[2:]):
        position = _identity_coordinates(displacement, axis) + displacement[:, axis : axis + 1]
        # An axis of one voxel has nowhere to go; 0 is its center.
        coordinates.append(position * (2.0 / (side - 1)) - 1.0 if side > 1 else torch.zeros_like(position))
    return torch.cat(coordinates[::-1], dim=1).movedim(1, -1)

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

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nnunet_ssl.runtime.precision import at_least_float32, without_autocast
from nnunet_ssl.transforms.interpolation import look_up
from nnunet_ssl.transforms.random_field import gaussian_field

Interpolation = Literal["linear", "nearest", "cubic"]


# A field whose strain (largest row sum of its gradient, in absolute values) stays below 1 cannot fold, and the
# fixed-point inversion contracts by that factor per iteration. 0.5 leaves room for the finite differences of the
# sampled field and gains a binary digit per iteration.
MAX_STRAIN = 0.5


def sample_displacement(
    batch_size: int,
    spatial_shape: Sequence[int],
    *,
    sigma: float,
    std: float,
    generator: torch.Generator | None = None,
    fixed_axes: Sequence[int] = (),
    max_strain: float = MAX_STRAIN,
    margin: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw smooth random displacement fields: white noise convolved with a Gaussian.

    Elastic deformation as in Bortsova et al., "Semi-supervised medical image segmentation via learning consistency
    under transformations" (MICCAI 2019). The same random field as smoothing full-resolution noise, without a wide
    convolution (see ``random_field``); the variance is exact at every voxel, at the border too.

    Fields that could fold are scaled down until their strain is ``max_strain``: then the Jacobian determinant of phi
    is positive everywhere and ``invert_displacement`` converges.

    Args:
        batch_size: Number of independent fields B.
        spatial_shape: S, in voxels; two or three axes.
        sigma: Of the Gaussian, in voxels, the same along every axis.
        std: Standard deviation of each displacement component, in voxels, before fields that could fold are scaled
            down. 0 gives the identity.
        generator: Source of the noise, on the device the noise is drawn on. The default generator if absent.
        fixed_axes: Axes along which nothing moves and the field does not change: with the slices' axis of anisotropic
            images, every slice is deformed alike, as nnU-Net's own augmentation does.
        max_strain: Bound on the largest absolute row sum of the displacement's gradient; must lie in (0, 1).
        margin: Voxels per axis by which the field shall reach beyond the patch on both sides; none if absent.
        device: Where to put the field; the generator's device if absent.
        dtype: A floating type.

    Returns:
        Displacement (B, D, *S), in voxels; with a margin (B, D, *(S + 2 margin)).

    Raises:
        ValueError: For sizes, axes or strengths out of range.
    """
    margin = [0] * len(spatial_shape) if margin is None else list(margin)
    _check_sampling_arguments(batch_size, spatial_shape, sigma, std, fixed_axes, max_strain, margin, dtype)
    target = torch.device(device if device is not None else generator.device if generator is not None else "cpu")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    moving = tuple(axis not in fixed_axes for axis in range(len(spatial_shape)))
    with without_autocast(target):
        field = gaussian_field(
            batch_size, spatial_shape, margin, sigma, std, moving, max_strain, generator, target, work
        )
    return field.to(dtype)


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
    check_displacement(displacement)
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
    return look_up(image, at_least_float32(displacement), mode=modes[interpolation])


def compose_displacements(outer: Tensor, inner: Tensor) -> Tensor:
    """The displacement of phi_outer after phi_inner: q -> inner(q) + outer(q + inner(q)).

    Args:
        outer: (B, D, *S), in voxels; sampled linearly, its border value repeated outside.
        inner: (B, D, *S), in voxels.

    Returns:
        (B, D, *S), in voxels.
    """
    return inner + warp(outer, inner)


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
    check_displacement(displacement)
    dims = displacement.shape[1]
    if min(displacement.shape[2:]) < 2:
        raise ValueError(f"jacobian_determinant needs at least 2 voxels per axis, got {tuple(displacement.shape[2:])}.")
    field = displacement if displacement.dtype == torch.float64 else displacement.float()
    rows = [torch.stack(torch.gradient(field[:, d], dim=list(range(1, dims + 1))), dim=-1) for d in range(dims)]
    jacobian = torch.stack(rows, dim=-2) + torch.eye(dims, dtype=field.dtype, device=field.device)
    return torch.linalg.det(jacobian).to(displacement.dtype)


def check_displacement(displacement: Tensor) -> None:
    """Refuse what is no displacement field (ValueError)."""
    dims = displacement.ndim - 2
    if dims not in (2, 3) or displacement.shape[1] != dims or not displacement.is_floating_point():
        raise ValueError(
            f"A displacement is a floating tensor (B, 2, H, W) or (B, 3, D, H, W) in voxels, got "
            f"{displacement.dtype} of shape {tuple(displacement.shape)}."
        )


def _check_sampling_arguments(
    batch_size: int,
    spatial_shape: Sequence[int],
    sigma: float,
    std: float,
    fixed_axes: Sequence[int],
    max_strain: float,
    margin: Sequence[int],
    dtype: torch.dtype,
) -> None:
    dims = len(spatial_shape)
    if dims not in (2, 3) or min(spatial_shape) < 1 or batch_size < 0:
        raise ValueError(
            f"Expected a batch size and 2 or 3 positive sides, got {batch_size} and {tuple(spatial_shape)}."
        )
    if sigma <= 0 or std < 0 or not 0 < max_strain < 1:
        raise ValueError(f"sigma must be > 0, std >= 0 and max_strain in (0, 1), got {sigma}, {std} and {max_strain}.")
    if any(axis not in range(dims) for axis in fixed_axes):
        raise ValueError(f"fixed_axes must be among {tuple(range(dims))}, got {tuple(fixed_axes)}.")
    if len(margin) != dims or min(margin) < 0:
        raise ValueError(f"margin must be {dims} numbers of voxels, got {tuple(margin)}.")
    if not dtype.is_floating_point:
        raise ValueError(f"A displacement needs a floating dtype, got {dtype}.")

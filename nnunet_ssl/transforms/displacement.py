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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.runtime.precision import without_autocast
from nnunet_ssl.transforms.interpolation import index_of, knots_between, look_up, spline_matrix
from nnunet_ssl.transforms.mixing import shifted_crop
from nnunet_ssl.transforms.random_field import apply_per_axis, gaussian_field

Interpolation = Literal["linear", "nearest", "cubic"]

# A field whose strain (largest row sum of its gradient, in absolute values) stays below 1 cannot fold, and the
# fixed-point inversion contracts by that factor per iteration. 0.5 leaves room for the finite differences of the
# sampled field and gains a binary digit per iteration.
MAX_STRAIN = 0.5

# Leaves a residual under 0.01 voxels for fields at MAX_STRAIN up to patches of 512 voxels (measured: 0.005; an
# iteration more or less changes it by a factor of 2.7, because the strain is at its maximum in few places only).
INVERSION_ITERATIONS = 7

# On knots, most iterations run on few of them (this many times further apart), and these many follow on all of them: by
# dimension, because the same strain is shared by more axes in 3D and the iteration converges faster.
_COARSE_KNOT_FACTOR = 2.5
_FINE_ITERATIONS = {2: 3, 3: 2}


class SolverGrid(NamedTuple):
    """Where ``align_displacements`` solves for smooth fields: at knots, from which a cubic spline reaches the voxels.

    Attributes:
        margin: By how many voxels per axis and side the fields reach beyond the patch. Near the border the solution
            looks up displacements outside, and a field that simply stopped there would make the spline ring inside.
        knot_spacing: Distance of the knots per axis, in voxels; 0 along axes where nothing changes.
    """

    margin: tuple[int, ...]
    knot_spacing: tuple[int, ...]


def solver_grid(spatial_shape: Sequence[int], smoothness: float, fixed_axes: Sequence[int] = ()) -> SolverGrid:
    """The grid that reaches a residual of 0.01 voxels for fields that ``sample_displacement`` draws.

    Args:
        spatial_shape: S, in voxels.
        smoothness: As for ``sample_displacement``.
        fixed_axes: As for ``sample_displacement``.
    """
    sigmas = [0.0 if axis in fixed_axes else smoothness * side for axis, side in enumerate(spatial_shape)]
    # The spline's error in voxels is proportional to sigma (h / sigma)^4 at the strain that fields are limited to. It
    # is a sum over axes, so each axis has less of it in 3D. The factors were measured on many fields.
    factor = 0.3 if len(spatial_shape) == 2 or fixed_axes else 0.44
    spacing = [max(1, round(factor * sigma**0.75)) if sigma else 0 for sigma in sigmas]
    return SolverGrid(tuple(math.ceil(sigma / 2) for sigma in sigmas), tuple(spacing))


def sample_displacement(
    batch_size: int,
    spatial_shape: Sequence[int],
    *,
    smoothness: float,
    displacement_std: float,
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
        smoothness: The Gaussian's sigma as a fraction of the side, axis by axis.
        displacement_std: Standard deviation of each displacement component as a fraction of the side along it, before
            fields that could fold are scaled down. 0 gives the identity.
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
    _check_sampling_arguments(
        batch_size, spatial_shape, smoothness, displacement_std, fixed_axes, max_strain, margin, dtype
    )
    target = torch.device(device if device is not None else generator.device if generator is not None else "cpu")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    # Infinitely smooth along fixed axes: one noise point serves all voxels.
    sigmas = [math.inf if axis in fixed_axes else smoothness * side for axis, side in enumerate(spatial_shape)]
    amplitudes = [0.0 if axis in fixed_axes else displacement_std * side for axis, side in enumerate(spatial_shape)]
    with without_autocast(target):
        field = gaussian_field(
            batch_size, spatial_shape, margin, sigmas, amplitudes, max_strain, generator, target, work
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
    positions = [_identity_coordinates(displacement, axis) + displacement[:, axis] for axis in range(dims)]
    return look_up(image, positions, modes[interpolation])


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


def align_displacements(
    first: Tensor, second: Tensor, iterations: int = INVERSION_ITERATIONS, grid: SolverGrid | None = None
) -> Tensor:
    """The displacement of phi_1^-1 after phi_2, which moves predictions of branch 1 into the frame of branch 2.

    Equals ``compose_displacements(invert_displacement(first), second)``, but solves a = u_2(q) - u_1(q + a) directly:
    one interpolation less, hence more accurate, and it starts close to the solution.

    With a grid, the equation is solved at its knots alone, with the same look-ups in the full field, and a cubic spline
    takes the smooth solution to the voxels: many times faster in 3D.

    Args:
        first: u_1 (B, D, *S), in voxels; its strain must be below 1. With a grid (B, D, *(S + 2 grid.margin)).
        second: u_2, of the same shape.
        iterations: As for ``invert_displacement``.
        grid: From ``solver_grid``; without it every voxel is a knot and nothing is assumed of the fields.

    Returns:
        a (B, D, *S), in voxels, with (q + a) + u_1(q + a) = q + u_2(q).

    Raises:
        ValueError: Where shapes do not fit.
    """
    _check_displacement(first)
    if first.shape != second.shape:
        raise ValueError(
            f"The displacements have shapes {tuple(first.shape)} and {tuple(second.shape)}; they must match."
        )
    if grid is None:
        aligned = second - first
        for _ in range(iterations):
            aligned = second - warp(first, aligned)
        return aligned
    work = torch.float64 if first.dtype == torch.float64 else torch.float32
    with without_autocast(first.device):
        return _align_on_knots(first.to(work), second.to(work), iterations, grid).to(first.dtype)


def without_margin(displacement: Tensor, margin: Sequence[int]) -> Tensor:
    """The part of a displacement (B, D, *(S + 2 margin)) that lies on the patch, (B, D, *S); a view."""
    return shifted_crop(displacement, margin, [0] * len(margin))


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
        position = _identity_coordinates(displacement, axis) + displacement[:, axis].float()
        inside &= ((position >= -tolerance) & (position <= side - 1 + tolerance))[:, None]
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


def _align_on_knots(first: Tensor, second: Tensor, iterations: int, grid: SolverGrid) -> Tensor:
    """``align_displacements`` for float32 and float64 fields with a margin: on coarse knots, then on all of them."""
    sides = [side - 2 * margin for side, margin in zip(first.shape[2:], grid.margin)]
    # Knots reach half a margin beyond the patch: a spline is least accurate at its ends.
    ends = [(-(margin // 2), side - 1 + margin // 2) for side, margin in zip(sides, grid.margin)]
    aligned: Tensor | None = None
    coarser: list[tuple[int, ...]] = []
    for factor, repetitions in ((_COARSE_KNOT_FACTOR, iterations), (1.0, _FINE_ITERATIONS[len(sides)])):
        knots = [knots_between(*end, factor * spacing) for end, spacing in zip(ends, grid.knot_spacing)]
        # In the fields' own voxels, which start with the margin.
        indices = [index_of(tuple(k + m for k in ks), first.device) for ks, m in zip(knots, grid.margin)]
        wanted = second
        for axis, index in enumerate(indices, start=2):
            wanted = wanted.index_select(axis, index)
        aligned = torch.zeros_like(wanted) if aligned is None else _resample(aligned, coarser, knots)
        places = [index.view(-1, *[1] * (len(knots) - axis)) for axis, index in enumerate(indices, start=1)]
        for _ in range(repetitions):
            aligned = wanted - look_up(first, [place + aligned[:, d] for d, place in enumerate(places)])
        coarser = knots
    assert aligned is not None
    return _resample(aligned, coarser, [tuple(range(side)) for side in sides])


def _resample(values: Tensor, knots: Sequence[tuple[int, ...]], queries: Sequence[tuple[int, ...]]) -> Tensor:
    """Cubic spline interpolation of (B, C, *N) from knots to queries, axis by axis."""
    matrices = [spline_matrix(k, q, values.dtype, values.device) for k, q in zip(knots, queries)]
    return apply_per_axis(values, matrices)


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
    margin: Sequence[int],
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
    if len(margin) != dims or min(margin) < 0:
        raise ValueError(f"margin must be {dims} numbers of voxels, got {tuple(margin)}.")
    if not dtype.is_floating_point:
        raise ValueError(f"A displacement needs a floating dtype, got {dtype}.")


def _identity_coordinates(displacement: Tensor, axis: int) -> Tensor:
    """The voxels' own positions along an axis, in a shape that broadcasts to one component (B, *S)."""
    side = displacement.shape[axis + 2]
    dtype = torch.float64 if displacement.dtype == torch.float64 else torch.float32
    return torch.arange(side, device=displacement.device, dtype=dtype).view(-1, *[1] * (displacement.ndim - axis - 3))

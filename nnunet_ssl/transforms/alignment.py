"""Inverting displacement fields and bringing two into one frame; conventions as in ``displacement``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.runtime.precision import at_least_float32, without_autocast
from nnunet_ssl.transforms.affine import affine_after
from nnunet_ssl.transforms.displacement import check_displacement, warp
from nnunet_ssl.transforms.interpolation import coordinates, index_of, knots_between, look_up, spline_matrix
from nnunet_ssl.transforms.mixing import shifted_crop
from nnunet_ssl.transforms.random_field import apply_per_axis

# Leaves a residual under 0.01 voxels for fields at MAX_STRAIN up to patches of 512 voxels (measured: 0.005; an
# iteration more or less changes it by a factor of 2.7, because the strain is at its maximum in few places only).
INVERSION_ITERATIONS = 7


# On knots, most iterations run on few of them (this many times further apart), these many follow on all of them, and
# one at every voxel: by dimension, because the same strain is shared by more axes in 3D and the iteration converges
# faster.
_COARSE_KNOT_FACTOR = 2.5
_FINE_ITERATIONS = {2: 2, 3: 1}


class SolverGrid(NamedTuple):
    """Where ``align_displacements`` solves for smooth fields: at knots, from which a cubic spline reaches the voxels.

    Attributes:
        margin: By how many voxels per axis and side the fields reach beyond the patch. Near the border the solution
            looks up displacements outside, and a field that simply stopped there would make the spline ring inside.
        knot_spacing: Distance of the knots per axis, in voxels; 0 along axes where nothing changes.
    """

    margin: tuple[int, ...]
    knot_spacing: tuple[int, ...]


def solver_grid(spatial_shape: Sequence[int], sigma: float, fixed_axes: Sequence[int] = ()) -> SolverGrid:
    """The grid that reaches a residual of 0.01 voxels for fields that ``sample_displacement`` draws.

    Args:
        spatial_shape: S, in voxels.
        sigma: As for ``sample_displacement``.
        fixed_axes: As for ``sample_displacement``.
    """
    sigmas = [0.0 if axis in fixed_axes else sigma for axis in range(len(spatial_shape))]
    # The spline's error in voxels is proportional to sigma (h / sigma)^4 at the strain that fields are limited to. It
    # is a sum over axes, so each axis has less of it in 3D. The factors were measured on many fields.
    factor = 0.3 if len(spatial_shape) == 2 or fixed_axes else 0.44
    spacing = [max(1, round(factor * s**0.75)) if s else 0 for s in sigmas]
    return SolverGrid(tuple(math.ceil(s / 2) for s in sigmas), tuple(spacing))


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
    first: Tensor,
    second: Tensor,
    iterations: int = INVERSION_ITERATIONS,
    grid: SolverGrid | None = None,
    between: Tensor | None = None,
) -> Tensor:
    """The displacement of phi_1^-1 after phi_2, which moves predictions of branch 1 into the frame of branch 2.

    Equals ``compose_displacements(invert_displacement(first), second)``, but solves a = u_2(q) - u_1(q + a) directly:
    one interpolation less, hence more accurate, and it starts close to the solution.

    Where affine maps follow the displacements, phi_i(q) = A_i(q + u_i(q)), it solves a = w(q) - u_1(q + a) with
    q + w(q) = A_1^-1 A_2 (q + u_2(q)): the affine part is exact, whatever its strength, and the iteration contracts as
    without it.

    With a grid, the equation is solved at its knots alone, with the same look-ups in the full field, and a cubic spline
    takes the smooth solution to the voxels: many times faster in 3D.

    Args:
        first: u_1 (B, D, *S), in voxels; its strain must be below 1. With a grid (B, D, *(S + 2 grid.margin)).
        second: u_2, of the same shape.
        iterations: As for ``invert_displacement``.
        grid: From ``solver_grid``; without it every voxel is a knot and nothing is assumed of the fields.
        between: The matrix (B, D, D) of A_1^-1 A_2, about the center of the patch; none if absent.

    Returns:
        a (B, D, *S), in voxels, with A_1((q + a) + u_1(q + a)) = A_2(q + u_2(q)).

    Raises:
        ValueError: Where shapes do not fit.
    """
    check_displacement(first)
    if first.shape != second.shape:
        raise ValueError(
            f"The displacements have shapes {tuple(first.shape)} and {tuple(second.shape)}; they must match."
        )
    if grid is None:
        wanted = second if between is None else affine_after(between, second, second.shape[2:])
        aligned = wanted
        for _ in range(iterations):
            aligned = wanted - warp(first, aligned)
        return aligned
    work = torch.float64 if first.dtype == torch.float64 else torch.float32
    with without_autocast(first.device):
        return _align_on_knots(first.to(work), second.to(work), iterations, grid, between).to(first.dtype)


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
    check_displacement(displacement)
    # A rounding error outside the outermost voxel center is still inside.
    tolerance = 1e-3
    field = at_least_float32(displacement)
    sides = field.shape[2:]
    distances = [
        (coordinates(range(side), (side - 1) / 2, 1.0, len(sides) - axis - 1, field) + field[:, axis]).abs()
        for axis, side in enumerate(sides)
    ]
    inside = [distance <= (side - 1) / 2 + tolerance for distance, side in zip(distances, sides)]
    return functools.reduce(torch.logical_and, inside)[:, None]


def _align_on_knots(first: Tensor, second: Tensor, iterations: int, grid: SolverGrid, between: Tensor | None) -> Tensor:
    """``align_displacements`` for float32 and float64 fields with a margin: on coarse knots, then on all of them."""
    sides = [side - 2 * margin for side, margin in zip(first.shape[2:], grid.margin)]
    # Knots reach half a margin beyond the patch: a spline is least accurate at its ends.
    ends = [(-(margin // 2), side - 1 + margin // 2) for side, margin in zip(sides, grid.margin)]
    aligned: Tensor | None = None
    coarser: list[tuple[int, ...]] = []
    for factor, repetitions in ((_COARSE_KNOT_FACTOR, iterations), (1.0, _FINE_ITERATIONS[len(sides)])):
        knots = [knots_between(*end, factor * spacing) for end, spacing in zip(ends, grid.knot_spacing)]
        # In the fields' own voxels, which start with the margin.
        places = [tuple(k + m for k in ks) for ks, m in zip(knots, grid.margin)]
        wanted = second
        for axis, place in enumerate(places, start=2):
            wanted = wanted.index_select(axis, index_of(place, first.device))
        wanted = wanted if between is None else affine_after(between, wanted, sides, knots)
        aligned = wanted if aligned is None else _resample(aligned, coarser, knots)
        for _ in range(repetitions):
            aligned = wanted - look_up(first, aligned, places)
        coarser = knots
    assert aligned is not None
    aligned = _resample(aligned, coarser, [tuple(range(side)) for side in sides])
    # Once at every voxel: what the spline errs by shrinks as any error does.
    wanted = without_margin(second, grid.margin)
    wanted = wanted if between is None else affine_after(between, wanted, sides)
    own = [range(m, m + side) for side, m in zip(sides, grid.margin)]
    return wanted - look_up(first, aligned, own)


def _resample(values: Tensor, knots: Sequence[tuple[int, ...]], queries: Sequence[tuple[int, ...]]) -> Tensor:
    """Cubic spline interpolation of (B, C, *N) from knots to queries, axis by axis."""
    matrices = [spline_matrix(k, q, values.dtype, values.device) for k, q in zip(knots, queries)]
    return apply_per_axis(values, matrices)

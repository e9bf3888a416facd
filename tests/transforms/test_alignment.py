"""Inverting fields and bringing two into one frame, against other ways to the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fields import SHAPES, field, grid, mean_side
from scipy.ndimage import map_coordinates

from nnunet_ssl.transforms.alignment import (
    align_displacements,
    inside_mask,
    invert_displacement,
    solver_grid,
    without_margin,
)
from nnunet_ssl.transforms.displacement import (
    compose_displacements,
    warp,
)


@pytest.mark.parametrize("shape", [*SHAPES, (256, 256), (64, 64, 64)])
def test_inverse_residual_is_below_a_hundredth_of_a_voxel(shape):
    u = field(shape, batch=4, smoothness=0.1, std=0.05, dtype=torch.float32)
    v = invert_displacement(u)
    assert v.abs().max() > 0.5, "a field this weak tests nothing"
    assert compose_displacements(u, v).abs().max() < 0.01
    # The other order interpolates v instead of the smooth u, and knows nothing of what lies outside.
    # With a sigma of 2.4 voxels, v is not smooth on the scale of a voxel.
    assert (compose_displacements(v, u).abs() * inside_mask(u)).mean() < (0.015 if min(shape) < 30 else 0.01)


def test_inverse_of_a_translation_is_its_negative():
    u = torch.full((1, 2, 9, 9), 1.7)
    torch.testing.assert_close(invert_displacement(u), -u)


@pytest.mark.parametrize("shape", SHAPES)
def test_alignment_is_inverse_then_composition_and_undoes_the_transforms(shape):
    u1, u2 = field(shape, seed=1), field(shape, seed=2)
    aligned = align_displacements(u1, u2, 30)
    two_steps = compose_displacements(invert_displacement(u1, 30), u2)
    keep = (inside_mask(aligned) & inside_mask(u2)).expand_as(aligned)
    # The two-step way interpolates the inverse, which costs a few hundredths of a voxel.
    assert (aligned - two_steps)[keep].abs().max() < 0.15
    # An image of coordinates shows where each voxel ended up: t1's, moved by the alignment, must be t2's.
    coordinates = grid(shape)[None].expand(2, -1, *[-1] * len(shape))
    moved, wanted = warp(coordinates + u1, aligned), coordinates + u2
    # inside_mask lets through what is outside by a thousandth of a voxel.
    assert (moved - wanted)[keep].abs().max() < 2e-3


SMOOTH = [
    ((128, 128), 0.1, ()),
    ((256, 224), 0.1, ()),
    ((96, 96), 0.2, ()),
    ((64, 64, 64), 0.1, ()),
    ((24, 40, 32), 0.2, ()),
    ((9, 96, 80), 0.1, (0,)),
]


@pytest.mark.parametrize(("shape", "smoothness", "fixed_axes"), SMOOTH)
def test_alignment_on_knots_has_a_residual_below_a_hundredth_of_a_voxel(shape, smoothness, fixed_axes):
    knots = solver_grid(shape, smoothness * mean_side(shape, fixed_axes), fixed_axes)
    u1, u2 = (
        field(
            shape,
            smoothness=smoothness,
            std=0.2,
            seed=s,
            dtype=torch.float32,
            fixed_axes=fixed_axes,
            margin=knots.margin,
        )
        for s in (1, 2)
    )
    on_patch_1, on_patch_2 = (without_margin(u, knots.margin) for u in (u1, u2))
    for second, target in ((u2, on_patch_2), (torch.zeros_like(u2), torch.zeros_like(on_patch_2))):
        aligned = align_displacements(u1, second, grid=knots)
        assert aligned.shape == target.shape
        residual = (aligned + warp(on_patch_1, aligned) - target) * inside_mask(aligned)
        assert residual.abs().max() < 0.01
        assert aligned.abs().max() > 1, "a field this weak tests nothing"


def test_alignment_on_knots_solves_the_equation_of_the_smooth_field():
    """Look-ups by scipy's spline instead of ours: what the field is between the voxels counts too."""
    shape, smoothness = (128, 96), 0.1
    knots = solver_grid(shape, smoothness * mean_side(shape))
    u1, u2 = (field(shape, batch=1, smoothness=smoothness, std=0.02, seed=s, margin=knots.margin) for s in (3, 4))
    aligned = align_displacements(u1, u2, grid=knots)
    places = (grid(shape) + aligned[0] + torch.tensor(knots.margin).view(2, 1, 1)).numpy()
    wanted = without_margin(u2, knots.margin)[0].numpy()
    keep = inside_mask(aligned)[0, 0].numpy()
    for d in range(2):
        residual = aligned[0, d].numpy() + map_coordinates(u1[0, d].numpy(), places, order=5) - wanted[d]
        assert np.abs(residual[keep]).max() < 0.01

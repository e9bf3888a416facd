"""Rotations and changes of size, and transforms made of them and an elastic field, against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from nnunet_ssl.transforms.affine import affine_after, inverse, product, random_similarities
from nnunet_ssl.transforms.displacement import jacobian_determinant, warp
from nnunet_ssl.transforms.spatial import SpatialTransforms

SHAPES = [((48, 48), ()), ((128, 96), ()), ((16, 24, 32), ()), ((40, 32, 40), ()), ((8, 64, 48), (0,))]


def similarities(count, dims, rotation=15.0, scaling=0.15, **options):
    return random_similarities(count, dims, rotation, scaling, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(("dims", "fixed"), [(2, ()), (3, ()), (3, (0,))])
def test_similarities_are_rotations_times_one_size_within_their_ranges(dims, fixed):
    matrix = similarities(500, dims, 20.0, 0.25, fixed_axes=fixed).double().numpy()
    moving = [axis for axis in range(dims) if axis not in fixed]
    block = matrix[:, moving][:, :, moving]
    sizes = np.linalg.det(block) ** (1 / len(moving))
    assert sizes.min() >= 1 / 1.25 - 1e-6
    assert sizes.max() <= 1.25 + 1e-6
    assert abs(np.log(sizes).mean()) < 0.02
    turns = matrix.copy()
    turns[:, moving] /= sizes[:, None, None]
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(dims), turns.shape), atol=1e-6)
    for axis in fixed:
        assert (matrix[:, axis] == np.eye(dims)[axis]).all()
    whole = np.eye(3)[None].repeat(500, 0)
    whole[:, -dims:, -dims:] = turns
    # scipy's rotation vectors are what was drawn.
    vectors = Rotation.from_matrix(whole).as_rotvec(degrees=True)
    used = vectors if dims == 3 and not fixed else vectors[:, :1]
    assert 19 < np.abs(used).max() <= 20 + 1e-4
    assert used.std() == pytest.approx(20 / np.sqrt(3), rel=0.1)


@pytest.mark.parametrize(("dims", "fixed"), [(2, ()), (3, ()), (3, (0,))])
def test_inverse_and_product_equal_numpy(dims, fixed):
    first, second = similarities(16, dims, fixed_axes=fixed).split(8)
    np.testing.assert_allclose(inverse(first).numpy(), np.linalg.inv(first.numpy()), atol=1e-6)
    np.testing.assert_allclose(product(first, second).numpy(), first.numpy() @ second.numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 9), (4, 6, 5)])
def test_affine_after_a_displacement_equals_numpy(shape):
    matrix = similarities(2, len(shape))
    displacement = torch.randn(2, len(shape), *shape)
    center = (np.array(shape) - 1).reshape(-1, 1) / 2
    q = np.indices(shape).reshape(len(shape), -1)
    moved = matrix.numpy() @ (q + displacement.flatten(2).numpy() - center) + center - q
    np.testing.assert_allclose(affine_after(matrix, displacement, shape).flatten(2).numpy(), moved, atol=1e-4)
    places = [(0, 2), *[tuple(range(side)) for side in shape[1:]]]
    part = affine_after(matrix, displacement[:, :, [0, 2]], shape, places)
    torch.testing.assert_close(part, affine_after(matrix, displacement, shape)[:, :, [0, 2]])


@pytest.mark.parametrize(("shape", "fixed"), SHAPES)
def test_alignment_of_whole_transforms_errs_by_less_than_a_hundredth_of_a_voxel(shape, fixed):
    """phi_1(q + a(q)) = phi_2(q), where phi_1 is put together anew at the places that the alignment leads to."""
    transforms = SpatialTransforms(15.0, 0.15, 0.1, 0.02, fixed_axes=fixed)
    t1, t2 = transforms.draw(torch.zeros(4, 1, *shape), torch.Generator().manual_seed(1)).halves()
    alignment, compared = transforms.align(t1, t2)
    margin = transforms.grid(shape).margin
    on_patch = t1.elastic[(..., *(slice(m, side + m) for m, side in zip(margin, shape)))]
    reached = affine_after(t1.matrix, alignment + warp(on_patch, alignment), shape)
    assert ((reached - t2.displacement).abs() * compared).max() < 0.01
    assert alignment.norm(dim=1).mean() > 2, "transforms this weak test nothing"
    # The mask: both the voxel itself and its counterpart.
    q = torch.from_numpy(np.indices(shape)).float()
    for leads in (alignment, t2.displacement):
        places = (q + leads).movedim(1, -1)[compared[:, 0]]
        assert places.min() > -0.01
        assert (places < torch.tensor(shape) - 0.99).all()
    assert compared.float().mean() > 0.6


@pytest.mark.parametrize(("shape", "fixed"), SHAPES)
def test_transforms_do_not_fold_and_are_alike_along_all_axes(shape, fixed):
    transforms = SpatialTransforms(15.0, 0.15, 0.1, 5.0, fixed_axes=fixed)
    drawn = transforms.draw(torch.zeros(8, 1, *shape), torch.Generator().manual_seed(1))
    assert jacobian_determinant(drawn.displacement).min() > 0.05
    spread = [drawn.elastic[:, axis].std().item() for axis in range(len(shape)) if axis not in fixed]
    assert max(spread) < 1.4 * min(spread)
    for axis in fixed:
        assert not drawn.displacement[:, axis].any()
        torch.testing.assert_close(drawn.displacement[:, :, 0], drawn.displacement[:, :, -1])


def test_the_strength_that_is_said_is_the_one_that_is_drawn():
    shape = (16, 24, 32)
    transforms = SpatialTransforms(15.0, 0.15, 0.1, 0.02)
    drawn = transforms.draw(torch.zeros(100, 1, *shape), torch.Generator().manual_seed(1))
    said = float(transforms.describe(shape).partition("moves by ")[2].split()[0])
    assert said == pytest.approx(drawn.displacement.norm(dim=1).mean().item(), rel=0.1)

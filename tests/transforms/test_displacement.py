"""Spatial transforms against scipy, closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fields import SHAPES, field, grid, mean_side
from scipy.ndimage import gaussian_filter, map_coordinates

from nnunet_ssl.transforms.alignment import (
    inside_mask,
    invert_displacement,
    without_margin,
)
from nnunet_ssl.transforms.displacement import (
    MAX_STRAIN,
    compose_displacements,
    jacobian_determinant,
    sample_displacement,
    warp,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("interpolation", "order"), [("linear", 1), ("nearest", 0)])
def test_warp_equals_map_coordinates(shape, interpolation, order):
    u = field(shape)
    image = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = warp(image, u, interpolation).numpy()
    for b in range(2):
        coordinates = (grid(shape) + u[b]).numpy()
        for c in range(3):
            reference = map_coordinates(image[b, c].numpy(), coordinates, order=order, mode="nearest")
            np.testing.assert_allclose(ours[b, c], reference, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_warp_far_outside_repeats_the_border(shape):
    image = torch.randn(1, 1, *shape, dtype=torch.float64)
    u = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
    u[:, 0] = 1000.0
    torch.testing.assert_close(warp(image, u), image[:, :, -1:].expand_as(image), atol=1e-10, rtol=0)


def keys_kernel(distance, a=-0.75):
    """Keys' cubic convolution kernel, with the parameter that image libraries use."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def test_cubic_equals_keys_kernel_summed_by_hand():
    shape = (9, 11)
    u = field(shape, batch=1)
    image = torch.randn(1, 1, *shape, dtype=torch.float64)
    ours = warp(image, u, "cubic")[0, 0].numpy()
    position = (grid(shape) + u[0]).numpy()
    for i in range(shape[0]):
        for j in range(shape[1]):
            # Outside, each of the 16 taps reads the nearest border pixel.
            y, x = position[:, i, j]
            rows = np.arange(np.floor(y) - 1, np.floor(y) + 3).astype(int)
            columns = np.arange(np.floor(x) - 1, np.floor(x) + 3).astype(int)
            weights = keys_kernel(y - rows)[:, None] * keys_kernel(x - columns)[None]
            values = image[0, 0].numpy()[np.clip(rows, 0, shape[0] - 1)][:, np.clip(columns, 0, shape[1] - 1)]
            assert ours[i, j] == pytest.approx((weights * values).sum(), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_translation_by_whole_voxels_moves_content_exactly(shape):
    image = torch.randn(1, 2, *shape, dtype=torch.float64)
    for axis in range(len(shape)):
        u = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
        u[:, axis] = 2.0
        moved = torch.roll(image, -2, dims=axis + 2)
        keep = [slice(None)] * image.ndim
        keep[axis + 2] = slice(0, shape[axis] - 2)
        torch.testing.assert_close(warp(image, u)[tuple(keep)], moved[tuple(keep)], atol=1e-10, rtol=0)


def test_rotation_by_90_degrees_equals_rot90():
    side = 17
    y, x = grid((side, side)) - (side - 1) / 2
    # phi(y, x) = (x, -y): output (y, x) reads the input there.
    u = torch.stack([x - y, -y - x])[None]
    image = torch.randn(1, 1, side, side, dtype=torch.float64)
    expected = torch.empty_like(image)
    for i in range(side):
        for j in range(side):
            expected[0, 0, i, j] = image[0, 0, j, side - 1 - i]
    torch.testing.assert_close(warp(image, u), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(warp(image, u, "nearest"), expected, atol=0, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.bool, torch.int64])
def test_labels_are_warped_by_nearest_neighbor_as_by_hand(shape, dtype):
    u = field(shape, batch=1)
    labels = torch.randint(0, 2 if dtype == torch.bool else 5, (1, 1, *shape)).to(dtype)
    ours = warp(labels, u, "nearest")
    assert ours.dtype == dtype
    source = torch.round(grid(shape) + u[0]).long()
    for axis, side in enumerate(shape):
        source[axis].clamp_(0, side - 1)
    assert torch.equal(ours[0, 0], labels[0, 0][tuple(source)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_displacement_is_the_identity(shape, dtype):
    image = torch.randn(2, 1, *shape).to(dtype)
    u = torch.zeros(2, len(shape), *shape, dtype=dtype)
    for mode in ("linear", "nearest"):
        assert warp(image, u, mode).dtype == dtype
        torch.testing.assert_close(warp(image, u, mode), image, atol=2e-5, rtol=1e-4)
    assert torch.equal(invert_displacement(u), u)
    assert torch.equal(compose_displacements(u, u), u)
    torch.testing.assert_close(jacobian_determinant(u), torch.ones_like(u[:, 0]))
    assert inside_mask(u).all()
    assert not sample_displacement(2, shape, sigma=1.0, std=0.0).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_in_float64(shape):
    small = tuple(max(4, s // 4) for s in shape)
    image = torch.randn(1, 2, *small, dtype=torch.float64, requires_grad=True)
    # Away from whole voxels, where linear interpolation has a kink.
    u = (0.3 + 0.1 * torch.rand(1, len(small), *small, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(warp, (image, u))
    outer = torch.randn_like(u).requires_grad_()
    assert torch.autograd.gradcheck(compose_displacements, (outer, u))


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_sends_gradients_to_where_values_came_from(shape):
    u = field(shape, batch=1)
    image = torch.randn(1, 1, *shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 1, *shape, dtype=torch.float64)
    warp(image, u, "nearest").backward(upstream)
    expected = torch.zeros(shape, dtype=torch.float64)
    source = torch.round(grid(shape) + u[0]).long()
    for axis, side in enumerate(shape):
        source[axis].clamp_(0, side - 1)
    expected.index_put_(tuple(source), upstream[0, 0], accumulate=True)
    torch.testing.assert_close(image.grad[0, 0], expected)
    assert (expected == 0).any(), "some voxel is not read, or the test shows nothing"


def test_composition_of_affine_maps_is_exact():
    shape = (21, 25)
    center = torch.tensor([10.0, 12.0], dtype=torch.float64).view(2, 1, 1)
    q = grid(shape) - center
    a = torch.tensor([[1.02, 0.05], [-0.04, 0.97]], dtype=torch.float64)
    b = torch.tensor([[0.96, -0.03], [0.06, 1.01]], dtype=torch.float64)
    u_a = torch.einsum("ij,jyx->iyx", a - torch.eye(2), q)[None]
    u_b = torch.einsum("ij,jyx->iyx", b - torch.eye(2), q)[None]
    expected = torch.einsum("ij,jyx->iyx", a @ b - torch.eye(2), q)[None]
    composed = compose_displacements(u_a, u_b)
    keep = inside_mask(u_b).expand_as(expected)
    torch.testing.assert_close(composed[keep], expected[keep], atol=1e-9, rtol=0)
    assert keep.float().mean() > 0.8


@pytest.mark.parametrize("shape", SHAPES)
def test_composition_warps_like_warping_twice(shape):
    outer, inner = field(shape, seed=1), field(shape, seed=2)
    smooth = torch.from_numpy(
        gaussian_filter(np.random.default_rng(0).normal(size=(2, 1, *shape)), (0, 0, *[3] * len(shape)))
    )
    twice = warp(warp(smooth, outer), inner)
    once = warp(smooth, compose_displacements(outer, inner))
    assert (twice - once).abs().max() < 0.1 * smooth.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_margin_reaches_beyond_the_patch_and_has_the_same_statistics(shape):
    margin = tuple(range(2, 2 + len(shape)))
    u = field(shape, batch=300, std=0.004, margin=margin)
    assert u.shape[2:] == tuple(s + 2 * m for s, m in zip(shape, margin))
    inner = without_margin(u, margin)
    assert inner.shape[2:] == shape
    assert torch.equal(inner[..., 0], u[(Ellipsis, *[slice(m, -m) for m in margin])][..., 0])
    for axis in range(len(shape)):
        for place in (u[:, axis].flatten(1)[:, 0], inner[:, axis].flatten(1)[:, 0]):
            assert place.std().item() == pytest.approx(0.004 * mean_side(shape), rel=0.15)


@pytest.mark.parametrize("shape", SHAPES)
def test_jacobian_determinant_against_numpy(shape):
    u = field(shape)
    ours = jacobian_determinant(u).numpy()
    for b in range(2):
        phi = (grid(shape) + u[b]).numpy()
        rows = [np.stack(np.gradient(phi[d]), -1) for d in range(len(shape))]
        np.testing.assert_allclose(ours[b], np.linalg.det(np.stack(rows, -2)), atol=1e-10)


@pytest.mark.parametrize("std", [0.02, 0.2, 5.0])
@pytest.mark.parametrize("shape", [(64, 80), (24, 32, 28)])
def test_fields_never_fold_however_strong(shape, std):
    u = field(shape, batch=16, smoothness=0.1, std=std, dtype=torch.float32)
    assert jacobian_determinant(u).min() > 0.05
    rows = torch.stack(
        [torch.stack(torch.gradient(u[:, d], dim=list(range(1, u.ndim - 1)))) for d in range(u.shape[1])]
    )
    assert rows.abs().sum(1).max() < MAX_STRAIN * 1.05


@pytest.mark.parametrize("shape", [(96, 64), (20, 24, 28)])
def test_statistics_of_the_field(shape):
    smoothness, std = 0.15, 0.004
    u = field(shape, batch=600, smoothness=smoothness, std=std)
    side = mean_side(shape)
    distance = 8
    for axis in range(len(shape)):
        # Also at the corner: no border effect.
        corner = u[:, axis][(slice(None), *[0] * len(shape))]
        assert u[:, axis].std().item() == pytest.approx(std * side, rel=0.05)
        assert corner.std().item() == pytest.approx(std * side, rel=0.15)
        # White noise smoothed by a Gaussian is correlated like exp(-d^2 / (4 sigma^2)), along every axis alike.
        first, second = u[:, 0].select(axis + 1, 4), u[:, 0].select(axis + 1, 4 + distance)
        correlation = (first * second).mean() / (first.std() * second.std())
        sigma = smoothness * side
        assert correlation.item() == pytest.approx(np.exp(-(distance**2) / (4 * sigma**2)), abs=0.08)


def test_fixed_axes_and_determinism():
    u = field((6, 32, 32), fixed_axes=(0,))
    assert not u[:, 0].any()
    # Every slice is deformed alike, and having slices does not weaken the field.
    torch.testing.assert_close(u[:, :, 0], u[:, :, 5])
    stack, plane = field((6, 32, 32), batch=200, fixed_axes=(0,)), field((32, 32), batch=200)
    assert stack[:, 1:].std().item() == pytest.approx(plane.std().item(), rel=0.1)
    assert torch.equal(u, field((6, 32, 32), fixed_axes=(0,)))
    assert not torch.equal(u, field((6, 32, 32), fixed_axes=(0,), seed=1))


def test_autocast_does_not_touch_the_geometry():
    plain = field((32, 32), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(field((32, 32), dtype=torch.float32), plain)
        image = torch.randn(2, 1, 32, 32)
        inside = warp(image, plain)
    torch.testing.assert_close(inside, warp(image, plain))


def test_batch_equals_singles():
    u, image = field((20, 20), batch=3), torch.randn(3, 2, 20, 20, dtype=torch.float64)
    together = warp(image, u)
    for b in range(3):
        torch.testing.assert_close(together[b : b + 1], warp(image[b : b + 1], u[b : b + 1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warp(torch.zeros(1, 1, 4, 5), torch.zeros(1, 2, 4, 4)), r"with the same B and S"),
        (lambda: warp(torch.zeros(1, 1, 4, 4, dtype=torch.int16), torch.zeros(1, 2, 4, 4)), r"would invent labels"),
        (lambda: warp(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4), "cubic"), r"not one of \['linear'"),
        (lambda: warp(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)), r"\(B, 2, H, W\) or \(B, 3, D, H, W\)"),
        (lambda: invert_displacement(torch.zeros(1, 2, 4, 4, dtype=torch.int64)), r"floating tensor"),
        (lambda: sample_displacement(1, (8,), sigma=1.0, std=0.1), r"2 or 3 positive sides"),
        (lambda: sample_displacement(1, (8, 8), sigma=0.0, std=0.1), r"sigma must be > 0"),
        (lambda: sample_displacement(1, (8, 8), sigma=1.0, std=0.1, fixed_axes=(2,)), r"fixed_axes"),
        (
            lambda: sample_displacement(1, (8, 8), sigma=1.0, std=0.1, dtype=torch.int32),
            r"needs a floating dtype",
        ),
        (
            lambda: sample_displacement(1, (8, 8), sigma=1.0, std=0.1, margin=(1,)),
            r"margin must be 2",
        ),
        (lambda: jacobian_determinant(torch.zeros(1, 2, 1, 4)), r"at least 2 voxels"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Knots and splines, against scipy, and look-ups in bulk against PyTorch. test_displacement compares warps to scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from nnunet_ssl.transforms.interpolation import knots_between, look_up, spline_matrix


@pytest.mark.parametrize(("first", "last", "spacing"), [(0, 63, 2), (-4, 100, 7.5), (0, 1, 1), (0, 9, 100), (0, 0, 1)])
def test_knots_cover_the_range_evenly(first, last, spacing):
    knots = knots_between(first, last, spacing)
    assert (knots[0], knots[-1]) == (first, last)
    gaps = np.diff(knots)
    assert (gaps > 0).all()
    assert len(gaps) == 0 or (gaps.max() <= np.ceil(spacing) and np.ptp(gaps) <= 1)


def test_one_knot_serves_an_axis_where_nothing_changes():
    assert knots_between(-2, 30, 0) == (-2,)
    assert spline_matrix((-2,), (0, 1, 2), torch.float32, torch.device("cpu")).eq(1).all()


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_spline_matrix_equals_scipy_s_cubic_spline(count):
    knots = tuple(int(k) for k in np.cumsum(np.arange(count) % 3 + 1))
    queries = tuple(range(knots[0], knots[-1] + 1))
    values = np.random.default_rng(0).normal(size=count)
    matrix = spline_matrix(knots, queries, torch.float64, torch.device("cpu")).numpy()
    # With few knots, the polynomial through them.
    reference = (
        CubicSpline(knots, values)(queries)
        if count >= 4
        else np.polynomial.Polynomial.fit(knots, values, count - 1)(np.array(queries))
    )
    np.testing.assert_allclose(matrix @ values, reference, atol=1e-9)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("shape", [(7, 5, 6), (1, 5, 6), (4, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_look_ups_in_volumes_are_the_same_with_and_without_gradient(mode, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 3, *shape), generator=generator, dtype=dtype)
    # A third of the places lies outside, more along short axes; some lie on voxels and at both borders exactly.
    positions = [
        (torch.rand((2, 4, 5, 10), generator=generator, dtype=dtype) * 1.5 - 0.25) * (side + 1) for side in shape
    ]
    for position, side in zip(positions, shape):
        position[:, 0, 0, :3] = torch.tensor([0, side - 1, side // 2], dtype=dtype)
    places = [(0,) * side for side in (4, 5, 10)]
    leading = torch.stack(positions, 1)
    in_bulk = look_up(image, leading, places, mode)
    by_torch = look_up(image.clone().requires_grad_(), leading, places, mode)
    assert by_torch.requires_grad
    assert in_bulk.dtype == by_torch.dtype == dtype
    torch.testing.assert_close(in_bulk, by_torch.detach(), atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0)
    with torch.no_grad():
        assert torch.equal(look_up(image.clone().requires_grad_(), leading, places, mode), in_bulk)


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.int64])
def test_labels_are_looked_up_in_their_own_type(dtype):
    labels = torch.arange(24).view(1, 1, 2, 3, 4).to(dtype)
    leading = torch.tensor([[1.2, 0.4], [2.4, -9.0], [0.6, 99.0]]).view(1, 3, 1, 1, 2)
    found = look_up(labels, leading, [(0,), (0,), (0, 0)], "nearest")
    assert found.dtype == dtype
    assert torch.equal(found, torch.tensor([12 + 8 + 1, 3]).view(1, 1, 1, 1, 2).to(dtype))

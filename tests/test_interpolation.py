"""Knots and splines, against scipy. Look-ups are tested with the warps that are made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from nnunet_ssl.interpolation import knots_between, spline_matrix


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

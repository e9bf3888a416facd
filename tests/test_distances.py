"""Surface distances against brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nnunet_ssl.evaluation.distances import hausdorff_95, surface_distances


def blob(shape, seed):
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return noise > np.quantile(noise, 0.7)


def surface_by_hand(mask):
    points = []
    for place in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                neighbor = place.copy()
                neighbor[axis] += step
                outside = neighbor[axis] < 0 or neighbor[axis] >= mask.shape[axis]
                if outside or not mask[tuple(neighbor)]:
                    points.append(tuple(place))
    return np.array(sorted(set(points)))


@pytest.mark.parametrize(("shape", "spacing"), [((14, 17), (1.0, 0.7)), ((9, 10, 8), (3.0, 1.0, 1.25))])
def test_equals_brute_force(shape, spacing):
    first, second = blob(shape, 0), blob(shape, 1)
    a, b = (surface_by_hand(m) * np.array(spacing) for m in (first, second))
    pairs = np.linalg.norm(a[:, None] - b[None], axis=-1)
    ours = surface_distances(first, second, spacing)
    np.testing.assert_allclose(np.sort(ours[0]), np.sort(pairs.min(1)))
    np.testing.assert_allclose(np.sort(ours[1]), np.sort(pairs.min(0)))
    expected = np.percentile(np.concatenate([pairs.min(1), pairs.min(0)]), 95)
    assert hausdorff_95(first, second, spacing) == pytest.approx(expected)
    assert hausdorff_95(second, first, spacing) == pytest.approx(expected)


def test_closed_forms():
    square = np.zeros((20, 20), dtype=bool)
    square[5:10, 5:10] = True
    assert hausdorff_95(square, square, (1, 1)) == 0
    assert hausdorff_95(square, np.roll(square, 3, axis=1), (1.0, 2.0)) == pytest.approx(6.0)
    assert np.isnan(hausdorff_95(square, np.zeros_like(square), (1, 1)))
    assert surface_distances(np.zeros_like(square), square, (1, 1)) is None


def test_a_wrong_spacing_is_refused():
    with pytest.raises(ValueError, match="a spacing per axis"):
        surface_distances(np.ones((3, 3), bool), np.ones((3, 3), bool), (1, 1, 1))

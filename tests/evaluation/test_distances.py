"""Surface distances against brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nnunet_ssl.evaluation.distances import surface_distances


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
    np.testing.assert_allclose(np.sort(ours.to_second), np.sort(pairs.min(1)))
    np.testing.assert_allclose(np.sort(ours.to_first), np.sort(pairs.min(0)))
    both = np.concatenate([pairs.min(1), pairs.min(0)])
    for distances in (ours, surface_distances(second, first, spacing)):
        assert distances.hausdorff_95 == pytest.approx(np.percentile(both, 95))
        assert distances.average == pytest.approx(both.mean())
        assert distances.mean_absolute == pytest.approx((pairs.min(1).mean() + pairs.min(0).mean()) / 2)


def test_closed_forms():
    square = np.zeros((20, 20), dtype=bool)
    square[5:10, 5:10] = True
    assert surface_distances(square, square, (1, 1)).hausdorff_95 == 0
    moved = surface_distances(square, np.roll(square, 3, axis=1), (1.0, 2.0))
    assert moved.hausdorff_95 == pytest.approx(6.0)
    assert surface_distances(square, np.zeros_like(square), (1, 1)) is None
    assert surface_distances(np.zeros_like(square), square, (1, 1)) is None


def test_ignored_voxels_make_no_surface():
    first, second, ignored = (np.zeros((12, 12), dtype=bool) for _ in range(3))
    first[2:8, 2:8] = True
    second[2:8, 4:10] = True
    ignored[5:] = True
    distances = surface_distances(first & ~ignored, second & ~ignored, (1, 1), ignored)
    # Rows 2 to 4 are known: the top row and the two sides of each, but not row 4 as a whole.
    by_hand = [[(2, x) for x in range(a, a + 6)] + [(y, x) for y in (3, 4) for x in (a, a + 5)] for a in (2, 4)]
    pairs = np.linalg.norm(np.array(by_hand[0])[:, None] - np.array(by_hand[1])[None], axis=-1)
    np.testing.assert_allclose(np.sort(distances.to_second), np.sort(pairs.min(1)))
    np.testing.assert_allclose(np.sort(distances.to_first), np.sort(pairs.min(0)))


def test_a_wrong_spacing_is_refused():
    with pytest.raises(ValueError, match="a spacing per axis"):
        surface_distances(np.ones((3, 3), bool), np.ones((3, 3), bool), (1, 1, 1))

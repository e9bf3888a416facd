"""Shifted crops, COM and mixtures, against loops over voxels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from nnunet_ssl.transforms.mixing import (
    boxes_of_side,
    compose_pseudo_labels,
    cutmix_boxes,
    draw_beta,
    draw_shift,
    mix,
    mixed_with_others,
    shifted_crop,
)

# Patch and margin; the last is anisotropic, with no shift across its slices.
CASES = {"2d": ((7, 6), (2, 1)), "3d": ((5, 6, 4), (1, 2, 2)), "anisotropic": ((3, 8, 6), (0, 3, 1))}


def directions(margin: tuple[int, ...]) -> list[tuple[int, ...]]:
    return sorted(set(itertools.product(*((-m, m) for m in margin))))


def coordinates(shape: tuple[int, ...], start: tuple[int, ...]) -> torch.Tensor:
    """An image whose channels are the voxels' own positions, the first voxel's being ``start``: (1, D, *S)."""
    axes = [torch.arange(side) + first for side, first in zip(shape, start)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


@pytest.mark.parametrize("case", CASES)
def test_crops_hold_the_voxels_they_should(case):
    patch, margin = CASES[case]
    whole = coordinates(tuple(s + 2 * m for s, m in zip(patch, margin)), tuple(-m for m in margin))
    for shift in [(0,) * len(patch), *directions(margin)]:
        crop = shifted_crop(whole, margin, shift)
        assert crop.shape[2:] == patch
        for voxel in np.ndindex(patch):
            assert crop[(0, slice(None), *voxel)].tolist() == [q + s for q, s in zip(voxel, shift)]


def test_a_shift_beyond_the_margin_is_refused():
    with pytest.raises(ValueError, match=r"shift of \(3, 0\).*margins of \(2, 2\)"):
        shifted_crop(torch.zeros(1, 1, 8, 8), (2, 2), (3, 0))


def depth(voxel: tuple[int, ...], patch: tuple[int, ...], axes: list[int]) -> int:
    """How many voxels lie between a voxel and the nearest face of its crop, along some axes; below 0 outside."""
    return min(min(voxel[a], patch[a] - 1 - voxel[a]) for a in axes)


def com_by_loops(fixed: np.ndarray, temporary: np.ndarray, shift: tuple[int, ...]) -> np.ndarray:
    composed = fixed.copy()
    patch, axes = fixed.shape[2:], [axis for axis, s in enumerate(shift) if s]
    for voxel in np.ndindex(patch):
        source = tuple(q - s for q, s in zip(voxel, shift))
        if axes and depth(source, patch, axes) > depth(voxel, patch, axes):
            composed[(slice(None), slice(None), *voxel)] = temporary[(slice(None), slice(None), *source)]
    return composed


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_com_equals_loops_over_voxels_in_all_directions(case, channels):
    patch, margin = CASES[case]
    generator = torch.Generator().manual_seed(0)
    fixed, temporary = torch.randint(0, 9, (2, 2, channels, *patch), generator=generator)
    far = tuple(side + 1 for side in patch)
    for shift in [*directions(margin), tuple(s // 2 for s in patch), patch, far, tuple(-f for f in far)]:
        before = fixed.clone()
        composed = compose_pseudo_labels(fixed, temporary, shift)
        assert composed.dtype == fixed.dtype
        assert np.array_equal(composed, com_by_loops(fixed.numpy(), temporary.numpy(), shift)), shift
        assert torch.equal(fixed, before), "the fixed labels were changed"


@pytest.mark.parametrize("case", CASES)
def test_com_never_takes_a_label_from_nearer_the_border(case):
    """Label maps that tell how deep in its crop each voxel lies: composed, every voxel has the greater depth."""
    patch, margin = CASES[case]
    for shift in directions(margin):
        axes = [axis for axis, s in enumerate(shift) if s]
        depths = torch.tensor([depth(q, patch, axes) for q in np.ndindex(patch)]).view(1, 1, *patch)
        composed = compose_pseudo_labels(depths, depths, shift)[0, 0]
        for voxel in np.ndindex(patch):
            source = tuple(q - s for q, s in zip(voxel, shift))
            assert composed[voxel] == max(depth(voxel, patch, axes), depth(source, patch, axes))
        assert (composed > depths[0, 0]).any()


def test_com_without_a_shift_keeps_the_fixed_labels():
    fixed, temporary = torch.randint(0, 9, (2, 2, 1, 5, 4))
    assert torch.equal(compose_pseudo_labels(fixed, temporary, (0, 0)), fixed)


@pytest.mark.parametrize("case", CASES)
def test_com_brings_the_shifted_crop_back_into_place(case):
    """Every voxel that both crops show must carry its own position, whichever crop it came from."""
    patch, margin = CASES[case]
    whole = coordinates(tuple(s + 2 * m for s, m in zip(patch, margin)), (0,) * len(patch))
    center = shifted_crop(whole, margin, (0,) * len(patch))
    for shift in directions(margin):
        assert torch.equal(compose_pseudo_labels(center, shifted_crop(whole, margin, shift), shift), center)


def test_all_directions_are_drawn_alike_and_none_across_slices():
    """From one generator, and from those of many steps."""
    generator = np.random.default_rng(0)
    for drawn in (
        [draw_shift((1, 2, 3), generator) for _ in range(400)],
        [draw_shift((1, 2, 3), np.random.default_rng((7, n // 100, n % 100))) for n in range(400)],
    ):
        counts = {d: drawn.count(d) for d in directions((1, 2, 3))}
        assert sum(counts.values()) == 400
        assert min(counts.values()) > 25
    assert {draw_shift((0, 2, 2), generator)[0] for _ in range(20)} == {0}
    first = [draw_shift((1, 1), np.random.default_rng(5)) for _ in range(2)]
    assert first[0] == first[1]


@pytest.mark.parametrize("shape", [(32, 24), (16, 20, 24), (4, 32, 32), (1, 16)])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_boxes_are_boxes_of_the_share_asked_for(shape, share):
    boxes = cutmix_boxes(200, shape, share, torch.Generator().manual_seed(0))
    assert boxes.shape == (200, 1, *shape)
    for box in boxes[:, 0]:
        places = box.nonzero()
        lower, upper = places.min(0).values, places.max(0).values + 1
        assert len(places) == (upper - lower).prod(), "not a box"
        # Each side is rounded to whole voxels.
        sides = (upper - lower).tolist()
        low, high = (np.prod([(s + step) / side for s, side in zip(sides, shape)]) for step in (-0.5, 0.5))
        assert low <= share + 1e-9
        assert high >= share - 1e-9
    # Places are mixed everywhere; a corner of a volume only by few boxes.
    assert boxes.any(0).float().mean() > 0.9
    if share < 1:
        assert not boxes.flatten(1).all(1).any()
        assert len({tuple(box.nonzero().min(0).values.tolist()) for box in boxes[:, 0]}) > 5


def test_boxes_come_from_the_generator():
    boxes = [cutmix_boxes(3, (16, 16), 0.5, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


@pytest.mark.parametrize("case", CASES)
def test_mixing_equals_loops_over_voxels(case):
    patch, _ = CASES[case]
    own, partner = torch.randn(2, 2, 3, *patch)
    boxes = cutmix_boxes(2, patch, 0.4, torch.Generator().manual_seed(0))
    mixed = mix(own, partner, boxes)
    for image in range(2):
        for voxel in np.ndindex(patch):
            source = partner if boxes[(image, 0, *voxel)] else own
            assert torch.equal(mixed[(image, slice(None), *voxel)], source[(image, slice(None), *voxel)])


@pytest.mark.parametrize("shape", [(32, 24), (16, 20, 24), (4, 32, 32), (1, 16)])
@pytest.mark.parametrize("side", [0.01, 0.25, 0.667, 1.0])
def test_boxes_of_a_side_have_it_along_every_axis_and_lie_anywhere(shape, side):
    boxes = boxes_of_side(300, shape, side, torch.Generator().manual_seed(0))
    assert boxes.shape == (300, 1, *shape)
    length = [max(1, round(side * whole)) for whole in shape]
    corners = set()
    for box in boxes[:, 0]:
        places = box.nonzero()
        lower, upper = places.min(0).values, places.max(0).values + 1
        assert (upper - lower).tolist() == length
        assert len(places) == np.prod(length)
        corners.add(tuple(lower.tolist()))
    for axis, (whole, part) in enumerate(zip(shape, length)):
        found = [corner[axis] for corner in corners]
        assert min(found) == 0
        assert max(found) == whole - part, "the last place is never drawn"


def test_boxes_of_a_side_come_from_the_generator():
    boxes = [boxes_of_side(3, (16, 16), 0.5, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0])
def test_shares_of_mixtures_are_beta_distributed(alpha):
    drawn = draw_beta(4000, alpha, torch.Generator().manual_seed(0)).double().numpy()
    assert ((drawn >= 0) & (drawn <= 1)).all()
    # float32 rounds what is nearly 0 or 1, where a small alpha puts most: there the distribution has steps.
    for place in (0.001, 0.05, 0.3, 0.5, 0.7, 0.95, 0.999):
        assert (drawn <= place).mean() == pytest.approx(stats.beta(alpha, alpha).cdf(place), abs=0.03)
    again = draw_beta(5, alpha, torch.Generator().manual_seed(0))
    assert torch.equal(again, draw_beta(5, alpha, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_image_is_mixed_with_another_one(count):
    own, further = torch.randn(count, 2, 6, 5), torch.randn(2, 2, 6, 5)
    boxes = cutmix_boxes(count, (6, 5), 0.4, torch.Generator().manual_seed(0))
    mixed = mixed_with_others(own, further, boxes)
    for i in range(count):
        other = own[i - 1] if count > 1 else further[0]
        inside = boxes[i, 0]
        assert torch.equal(mixed[i][:, inside], other[:, inside])
        assert torch.equal(mixed[i][:, ~inside], own[i][:, ~inside])
    assert mixed_with_others(own, further, None) is own

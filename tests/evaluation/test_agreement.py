"""Agreement of segmentations against plain loops, and what follows from it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nnunet_ssl.evaluation.agreement import OVERALL, agreement, decide, uncertain_voxels, voxels_of

CLASSES = {"one": 1, "two": 2, "three": 3}
REGIONS = {"whole": (1, 2, 3), "core": (2, 3), "heart": 3}


def in_structure(value: int, label: int | tuple[int, ...]) -> bool:
    return bool(value in label if isinstance(label, tuple) else value == label)


def by_loops(maps, structures, counting):
    """Dice of every pair and structure, voxel by voxel."""
    found: dict[str, list[float]] = {name: [] for name in (*structures, OVERALL)}
    for first, second in itertools.combinations(maps, 2):
        all_common = all_sum = 0
        for name, label in structures.items():
            common = total = 0
            for a, b, counts in zip(first.flat, second.flat, counting.flat):
                if counts:
                    common += in_structure(a, label) and in_structure(b, label)
                    total += in_structure(a, label) + in_structure(b, label)
            all_common, all_sum = all_common + common, all_sum + total
            found[name] += [2 * common / total] if total else []
        found[OVERALL] += [2 * all_common / all_sum] if all_sum else []
    return {name: sum(values) / len(values) if values else math.nan for name, values in found.items()}


@pytest.mark.parametrize("structures", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_agreement_is_the_mean_dice_of_pairs(structures, number):
    rng = np.random.default_rng(number)
    for highest in (1, 2, 4):  # of some structures nothing is there
        maps = [rng.integers(0, highest, (3, 5, 4)) for _ in range(number)]
        counting = rng.random((3, 5, 4)) < 0.7
        for given, mask in ((None, np.ones_like(counting)), (counting, counting)):
            found = agreement(maps, structures, given)
            assert found == pytest.approx(by_loops(maps, structures, mask), nan_ok=True)


def test_a_structure_that_one_network_alone_finds_has_no_agreement():
    empty, some = np.zeros((4, 4), int), np.eye(4, dtype=int)
    assert agreement([some, empty, empty], CLASSES)["one"] == 0
    assert math.isnan(agreement([some, empty, empty], CLASSES)["two"])
    assert math.isnan(agreement([empty, empty], CLASSES)[OVERALL])


def test_uncertain_voxels():
    p = np.array([[0.7, 0.69, 0.2], [0.3, 0.31, 0.8]])
    assert uncertain_voxels(p, False, 0.7).tolist() == [False, True, False]
    regions = np.array([[0.95, 0.65, 0.05], [0.05, 0.05, 0.35]])
    assert uncertain_voxels(regions, True, 0.7).tolist() == [False, True, True]


def test_voxels_of_structures_are_those_of_any_network():
    first, second = np.array([1, 0, 2, 3]), np.array([0, 1, 2, 3])
    assert voxels_of(["one"], [first, second], CLASSES).tolist() == [True, True, False, False]
    assert voxels_of(["core"], [first, second], REGIONS).tolist() == [False, False, True, True]
    assert not voxels_of([], [first], CLASSES).any()


def scores(one: float, two: float, overall: float) -> dict[str, float]:
    return {"one": one, "two": two, OVERALL: overall}


GOOD, POOR, WEAK = scores(0.9, 0.8, 0.85), scores(0.4, 0.3, 0.35), scores(0.9, 0.2, 0.8)


@pytest.mark.parametrize(("agreed", "unchanged", "kept", "why", "doubted"), [
    (GOOD, None, True, "", ()),
    (WEAK, None, True, "doubted: two", ("two",)),
    (POOR, None, False, "agreement 0.350, less than 0.7", ("one", "two")),
    (GOOD, WEAK, True, "doubted: two", ("two",)),
    (GOOD, POOR, False, "agreement with the round before 0.350, less than 0.7", ("one", "two")),
    (None, WEAK, True, "doubted: two", ("two",)),
    (None, None, True, "", ()),
    (scores(math.nan, 0.8, 0.8), None, True, "", ()),
])  # fmt: skip
def test_what_is_kept_and_why_not(agreed, unchanged, kept, why, doubted):
    made = decide(agreed, unchanged, 0.7, found=True)
    assert (made.kept, made.why, made.doubted) == (kept, why, doubted)


def test_a_case_without_any_structure_is_dropped():
    assert decide(scores(math.nan, math.nan, math.nan), None, 0.7, found=False).why == "no structure was found"

"""Metrics of a case against brute force, nnU-Net's own and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import compute_metrics

from nnunet_ssl.evaluation.metrics import METRICS, case_metrics, structures_of


class ArrayReader:
    """Stands for nnU-Net's readers: "files" are arrays."""

    def read_seg(self, array):
        return array, {}


def random_labels(shape, seed, num_labels=4):
    return np.random.default_rng(seed).integers(0, num_labels, shape).astype(np.int16)


@pytest.mark.parametrize("shape", [(9, 11), (5, 6, 7)])
@pytest.mark.parametrize("ignore", [None, 3])
def test_overlap_equals_nnunets(shape, ignore):
    truth, predicted = random_labels(shape, 0), random_labels(shape, 1, 3)
    structures = {"one": 1, "two": 2, "both": (1, 2), "absent": 7}
    ours = case_metrics(truth, predicted, structures, [1.0] * len(shape), ignore)
    theirs = compute_metrics(truth, predicted, ArrayReader(), list(structures.values()), ignore)["metrics"]
    for name, label in structures.items():
        for ours_key, theirs_key in (
            ("Dice", "Dice"),
            ("IoU", "IoU"),
            ("true_voxels", "n_ref"),
            ("predicted_voxels", "n_pred"),
        ):
            np.testing.assert_equal(ours[name][ours_key], theirs[label][theirs_key])


def test_distances_and_volume_by_hand():
    truth, predicted = (np.zeros((20, 20), np.uint8) for _ in range(2))
    truth[5:10, 5:10] = 1
    predicted[5:10, 7:12] = 1
    predicted[10, 7:12] = 1
    scores = case_metrics(truth, predicted, {"square": 1}, (1.0, 2.0))["square"]
    points = [
        np.array([(y, x * 2.0) for y, x in np.argwhere(mask) if on_border(mask, y, x)])
        for mask in (truth == 1, predicted == 1)
    ]
    pairs = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    there, back = pairs.min(1), pairs.min(0)
    assert scores["HD95"] == pytest.approx(np.percentile(np.concatenate([there, back]), 95))
    assert scores["ASD"] == pytest.approx(np.concatenate([there, back]).mean())
    assert scores["MACD"] == pytest.approx((there.mean() + back.mean()) / 2)
    assert scores["ASD"] != pytest.approx(scores["MACD"], abs=1e-6)
    assert scores["volume_difference"] == pytest.approx(5 / 25)


def on_border(mask, y, x):
    neighbors = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return any(not (0 <= a < mask.shape[0] and 0 <= b < mask.shape[1] and mask[a, b]) for a, b in neighbors)


def test_a_missing_structure_has_no_distance_and_an_overlap_of_zero():
    truth, empty = np.ones((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    only_true, only_predicted, neither = (
        case_metrics(t, p, {"a": 1}, (1.0, 1.0))["a"] for t, p in ((truth, empty), (empty, truth), (empty, empty))
    )
    for scores in (only_true, only_predicted):
        assert scores["Dice"] == scores["IoU"] == 0
        assert all(math.isnan(scores[metric]) for metric in ("HD95", "ASD", "MACD"))
    assert only_true["volume_difference"] == -1
    assert math.isnan(only_predicted["volume_difference"])
    assert all(math.isnan(neither[metric]) for metric in METRICS)


def test_ignored_voxels_count_nowhere():
    truth, predicted = random_labels((8, 8), 2), random_labels((8, 8), 3)
    truth[:4] = 9
    other = predicted.copy()
    other[:4] = random_labels((4, 8), 4)
    structures = {"one": 1, "region": (1, 2)}
    first, second = (case_metrics(truth, p, structures, (1.0, 1.0), ignore_label=9) for p in (predicted, other))
    assert first == second
    assert first != case_metrics(truth, other, structures, (1.0, 1.0))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        case_metrics(np.zeros((3, 3)), np.zeros((3, 4)), {"a": 1}, (1.0, 1.0))


def test_structures_of_labels_and_regions():
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    assert structures_of(labels) == {"whole": (1, 2), "core": 2}

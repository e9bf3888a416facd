"""Who teaches by how much: against numpy, and what must not turn the roles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.losses.roles import teaching_shares, weights_by_label, weights_of_labels
from nnunet_ssl.training.learned import LearnedStructures


def counts(*dices: tuple[float, ...]) -> np.ndarray:
    """Of networks that know structures of 100 voxels by these Dice coefficients."""
    return np.stack([[100 * np.array(d), np.full(len(d), 100.0), np.full(len(d), 100.0)] for d in dices])


def test_each_teaches_what_it_knows_better_in_inverse_proportion_to_its_error():
    shares = teaching_shares(counts((0.9, 0.5, 0.7), (0.8, 0.9, 0.7)))
    first = [0.21 / 0.32, 0.11 / 0.62, 0.5]
    np.testing.assert_allclose(shares, [first, [1 - s for s in first]])


def test_nobody_stops_to_learn():
    """The error of a network that knows all of its labels is taken for one percent."""
    shares = teaching_shares(counts((1.0, 1.0), (0.0, 1.0)))
    assert shares[1, 0] == pytest.approx(0.01 / 1.02)
    assert shares[:, 1].tolist() == [0.5, 0.5]


def test_what_no_label_has_shown_is_taught_by_both_alike():
    assert teaching_shares(np.zeros((2, 3, 2))).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_batch_without_a_structure_does_not_turn_its_roles():
    """However many of its voxels a network invents there."""
    learned = LearnedStructures(["a", "b"], 2, 0.5)
    learned.note(counts((0.9, 0.5), (0.8, 0.6)))
    before = teaching_shares(learned.counts)
    shown = counts((0.9, 0.0), (0.8, 0.0))
    shown[:, :, 1] = 0
    shown[1, 1, 1] = 5000
    learned.note(shown)
    np.testing.assert_allclose(teaching_shares(learned.counts), before)


def test_one_batch_does_not_turn_the_roles():
    learned = LearnedStructures(["a"], 2, 0.5)
    for _ in range(40):
        learned.note(counts((0.9,), (0.6,)))
    learned.note(counts((0.2,), (0.9,)))
    assert teaching_shares(learned.counts)[0] > 0.5


def test_weights_of_labels_equal_loops():
    shares = np.array([0.2, 0.6, 0.7])
    labels = torch.randint(0, 4, (2, 1, 5, 4))
    found = weights_of_labels(labels, weights_by_label(shares, has_regions=False))
    assert found.dtype == torch.float32
    for q in np.ndindex(2, 5, 4):
        assert found[q].item() == pytest.approx([0.5, 0.2, 0.6, 0.7][labels[q[0], 0, q[1], q[2]]])
    regions = torch.randint(0, 2, (2, 3, 5, 4))
    found = weights_of_labels(regions, weights_by_label(shares, has_regions=True))
    for q in np.ndindex(2, 5, 4):
        present = regions[q[0], :, q[1], q[2]].tolist()
        assert found[q].item() == pytest.approx(np.mean([s if p else 0.5 for s, p in zip(shares, present)]))

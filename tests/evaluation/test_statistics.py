"""Paired statistics against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, wilcoxon

from nnunet_ssl.evaluation.statistics import bootstrap_interval, compare_to_first, holm, signed_rank_p


def values(seed=0, num_cases=40):
    generator = np.random.default_rng(seed)
    first = generator.uniform(0.5, 0.9, num_cases)
    return np.stack([first, first + generator.normal(0.02, 0.04, num_cases), first - 0.05])


def test_interval_agrees_with_scipys_bootstrap():
    difference = values()[1] - values()[0]
    low, high = bootstrap_interval(difference[None])
    theirs = bootstrap((difference,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert low[0] == pytest.approx(theirs.low, abs=5e-4)
    assert high[0] == pytest.approx(theirs.high, abs=5e-4)
    assert low[0] < difference.mean() < high[0]


def test_interval_of_rows_with_gaps_is_that_of_what_is_there():
    row = values()[1] - values()[0]
    gaps = np.concatenate([row, np.full(5, np.nan)])
    low, high = bootstrap_interval(np.stack([gaps, np.full(45, np.nan)]))
    alone = bootstrap_interval(row[None])
    assert low[0] == pytest.approx(alone[0][0], abs=2e-3)
    assert high[0] == pytest.approx(alone[1][0], abs=2e-3)
    assert np.isnan([low[1], high[1]]).all()


def test_p_values_are_scipys():
    difference = values()[1] - values()[0]
    assert signed_rank_p(difference) == pytest.approx(wilcoxon(difference).pvalue)
    assert signed_rank_p(np.zeros(5)) == 1.0
    assert math.isnan(signed_rank_p(np.empty(0)))


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, made non-decreasing.
    assert holm([0.02, 0.01, 0.5, 0.03]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    corrected = holm([0.02, math.nan, 0.04])
    assert corrected[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(corrected[1])


def test_wins_ties_and_losses_follow_the_metric():
    table = np.array([[1.0, 2.0, 3.0, np.nan], [2.0, 2.0, 1.0, 5.0]])
    (difference,) = compare_to_first(table)
    assert (difference.wins, difference.ties, difference.losses, difference.missing) == (1, 1, 1, 1)
    assert difference.mean == pytest.approx(-1 / 3)
    table = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    assert compare_to_first(table)[0].wins == 2
    assert compare_to_first(table, lower_is_better=True)[0].wins == 1


def test_a_constant_difference_has_an_interval_of_that_value():
    second, third = compare_to_first(values())
    assert third.low == pytest.approx(third.high) == pytest.approx(-0.05)
    assert third.losses == 40
    assert third.p_holm >= third.p_value
    assert second.low < second.mean < second.high


def test_one_value_has_no_interval():
    low, high = bootstrap_interval(np.array([[0.1, np.nan, np.nan]]))
    assert np.isnan([low[0], high[0]]).all()


def test_all_values_missing():
    (difference,) = compare_to_first(np.array([[np.nan, 1.0], [1.0, np.nan]]))
    assert difference.missing == 2
    assert np.isnan([difference.mean, difference.p_value, difference.low]).all()

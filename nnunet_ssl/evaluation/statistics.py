"""Paired statistics over cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import wilcoxon

NUM_RESAMPLES = 10_000
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Difference:
    """A trainer beside the reference, over the cases that both have a value for.

    Attributes:
        mean: Of the differences, trainer minus reference.
        low: Lower end of the 95 % bootstrap interval of that mean.
        high: Its upper end.
        p_value: Two-sided Wilcoxon signed-rank test.
        p_holm: Corrected for the number of trainers compared.
        wins: Cases in which the trainer is better.
        ties: Cases in which both are equal.
        losses: Cases in which it is worse.
        missing: Cases in which one of the two has no value.
    """

    mean: float
    low: float
    high: float
    p_value: float
    p_holm: float
    wins: int
    ties: int
    losses: int
    missing: int


def compare_to_first(values: np.ndarray, lower_is_better: bool = False) -> list[Difference]:
    """Every trainer beside the first one.

    Args:
        values: (trainers, cases); not a number where there is none.
        lower_is_better: Whether a smaller value wins.

    Returns:
        One entry per trainer but the first.
    """
    differences = values[1:] - values[0]
    lows, highs = bootstrap_interval(differences)
    p_values = [signed_rank_p(d[~np.isnan(d)]) for d in differences]
    sign = -1 if lower_is_better else 1
    results = []
    for row, low, high, p, corrected in zip(differences, lows, highs, p_values, holm(p_values)):
        valid = row[~np.isnan(row)]
        results.append(
            Difference(
                mean=float(valid.mean()) if len(valid) else math.nan,
                low=float(low),
                high=float(high),
                p_value=p,
                p_holm=corrected,
                wins=int((sign * valid > 0).sum()),
                ties=int((valid == 0).sum()),
                losses=int((sign * valid < 0).sum()),
                missing=int(len(row) - len(valid)),
            )
        )
    return results


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of the mean over cases, from the same resamples for every row.

    Args:
        values: (rows, cases); not a number where there is none.
        confidence: Of the interval.

    Returns:
        Lower and upper ends (rows,); not a number for rows with less than two values. With few cases such intervals
        are too narrow.
    """
    present = ~np.isnan(values)
    drawn = _draws(values.shape[1])
    with np.errstate(invalid="ignore"):
        means = (drawn @ np.where(present, values, 0.0).T) / (drawn @ present.T)
    ends = np.full((2, len(values)), np.nan)
    for row in np.flatnonzero(present.sum(1) > 1):
        tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        ends[:, row] = np.nanpercentile(means[:, row], tails)
    return ends[0], ends[1]


@lru_cache(maxsize=1)
def _draws(num_cases: int) -> np.ndarray:
    """How often each case is in each resample, (resamples, cases): one matrix product then gives all means."""
    shares = np.full(num_cases, 1 / max(1, num_cases))
    return np.random.default_rng(_SEED).multinomial(num_cases, shares, size=NUM_RESAMPLES).astype(np.float32)


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the Wilcoxon signed-rank test; 1 where all are zero, not a number without cases."""
    if len(differences) == 0:
        return math.nan
    if not differences.any():
        return 1.0
    return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scand J Stat 6:65, 1979); values that are not a number stay so and do not count."""
    p = np.asarray(p_values, dtype=float)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    corrected, largest = np.full(len(p), np.nan), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected.tolist()

"""The tables of the accuracy scripts, from what ``nnunet-ssl compare`` writes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# What is printed, in percent or in the unit of distances that comparison.csv names.
_METRICS = ("IoU", "Dice", "HD95")
# By metric and row, what every split has: an array (2, structures) of means, and of how many cases have no value, as a
# structure that was not predicted has no distance. The row "" holds the names of the structures.
Values = dict[str, dict[str, list[np.ndarray]]]


def collect(file: Path, rows: Iterable[str], folds: Sequence[str], values: Values) -> None:
    """Add the folds of a comparison.csv to ``values``.

    Args:
        file: The comparison.
        rows: Names of its trainers in a table, in their order there.
        folds: As the file names them.
        values: To add to.
    """
    with open(file, newline="") as text:
        records = list(csv.DictReader(text))
    written = list(dict.fromkeys(record["trainer"] for record in records))
    structures = list(dict.fromkeys(record["structure"] for record in records))
    for metric in _METRICS:
        column = next(c for c in records[0] if c.partition("_")[0] == metric)
        factor, unit = (100.0, "in percent") if column == metric else (1.0, f"in {column.partition('_')[2]}")
        by_row = values.setdefault(f"{metric} {unit}", {"": [np.array(structures)]})
        for row, trainer in zip(rows, written):
            for fold in folds:
                found: dict[str, list[float]] = {s: [] for s in structures}
                for record in records:
                    if record["trainer"] == trainer and record["fold"] == fold:
                        found[record["structure"]].append(float(record[column] or "nan"))
                missing = [np.isnan(of_one).sum() for of_one in found.values()]
                means = [
                    factor * np.nanmean(of_one) if len(of_one) > absent else np.nan
                    for of_one, absent in zip(found.values(), missing)
                ]
                by_row.setdefault(row, []).append(np.array([means, missing]))


def tables(title: str, values: Values, splits: Sequence[str]) -> str:
    """A table per metric: mean and standard deviation over splits, each split, and each structure over all splits.

    Below it stands by how much every row differs from the first one: on average, and split by split.
    """
    lines = []
    for metric, by_row in values.items():
        lines += ["", f"{title}, {metric}", "", *_head(["mean ± sd", *splits, *by_row[""][0]])]
        without: list[str] = []
        for row, of_splits in _rows(by_row).items():
            table, missing = np.stack(by_row[row], 1)
            if missing.any():
                without.append(f"{row} {missing.sum():.0f}")
            cells = [_mean_and_spread(of_splits), *(f"{v:.1f}" for v in (*of_splits, *table.mean(0)))]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        (name, first), *others = _rows(by_row).items()
        if others:
            differences = (
                f"{row} {np.mean(of_splits - first):+.1f} ({', '.join(f'{d:+.1f}' for d in of_splits - first)})"
                for row, of_splits in others
            )
            lines += ["", f"Beside {name}: {'; '.join(differences)}"]
        if without:
            lines += ["", f"Left out, because a structure is missing there: {', '.join(without)} structures of cases"]
    return "\n".join(lines) + "\n"


def overview(cases: str, by_title: Mapping[str, Values]) -> str:
    """A table per metric with a column per comparison, as papers print them: mean ± sd and the gain over the first row.

    Args:
        cases: Which they are, for the titles.
        by_title: What the comparisons found, by the names of the columns.
    """
    lines = []
    metrics = dict.fromkeys(metric for values in by_title.values() for metric in values)
    for metric in metrics:
        columns = {title: _rows(values[metric]) for title, values in by_title.items()}
        lines += ["", f"{cases.capitalize()}, {metric}", "", *_head(list(columns))]
        names = list(dict.fromkeys(row for rows in columns.values() for row in rows))
        for row in names:
            cells = [_in_overview(rows, row, names[0]) for rows in columns.values()]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _in_overview(rows: Mapping[str, np.ndarray], row: str, first: str) -> str:
    if row not in rows:
        return ""
    gain = f" ({np.mean(rows[row] - rows[first]):+.1f})" if row != first and first in rows else ""
    return _mean_and_spread(rows[row]) + gain


class Costs(NamedTuple):
    """What a training took: seconds, and the most memory in MiB."""

    seconds: float
    memory: float


def summary(
    values: Values, ceiling: Mapping[str, np.ndarray], costs: Mapping[str, Sequence[Costs]]
) -> list[dict[str, Any]]:
    """What every row gains over the first one, pair by pair, by metric.

    Args:
        values: What a comparison found.
        ceiling: By metric, of every split what the first row reaches with all labels; may be empty.
        costs: By row, of every split.

    Returns:
        Records: metric, row, value, spread (over splits), gain, its standard error, closed_gap (the share of the
        distance to all labels that is gained, of the means), minutes and memory_mib (means), and splits (all values).
    """
    records = []
    for metric, by_row in values.items():
        rows = _rows(by_row)
        first = next(iter(rows.values()))
        for row, of_splits in rows.items():
            gain = of_splits - first
            gap = float(np.mean(ceiling[metric] - first)) if metric in ceiling else np.nan
            several = len(gain) > 1
            records.append(
                {
                    "metric": metric,
                    "row": row,
                    "value": float(of_splits.mean()),
                    "spread": float(of_splits.std(ddof=1)) if several else None,
                    "gain": float(gain.mean()),
                    "standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))) if several else None,
                    "closed_gap": float(gain.mean() / gap) if gap else None,
                    "minutes": float(np.mean([cost.seconds for cost in costs[row]])) / 60,
                    "memory_mib": float(np.mean([cost.memory for cost in costs[row]])),
                    "splits": of_splits.tolist(),
                }
            )
    return records


def summary_table(title: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The records of ``summary`` as a table per metric, for people."""
    lines = []
    for metric in dict.fromkeys(record["metric"] for record in records):
        lines += ["", f"{title}, {metric}", "", *_head(["mean ± sd", "gain ± se", "gap closed", "minutes", "MiB"])]
        for record in (r for r in records if r["metric"] == metric):
            spread = f" ± {record['spread']:.1f}" if record["spread"] is not None else ""
            error = f" ± {record['standard_error']:.1f}" if record["standard_error"] is not None else ""
            closed = (
                "" if record["closed_gap"] is None or np.isnan(record["closed_gap"]) else f"{record['closed_gap']:.0%}"
            )
            cells = [f"{record['value']:.1f}{spread}", f"{record['gain']:+.1f}{error}", closed]
            cells += ["" if np.isnan(record[cost]) else f"{record[cost]:.0f}" for cost in ("minutes", "memory_mib")]
            lines.append(f"| {record['row']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _head(columns: Sequence[str]) -> list[str]:
    return [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]


def _rows(by_row: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean over structures of every split, by row.

    Not a number where a structure has no value in any case: a mean of the others would praise that it was not found.
    """
    return {row: np.array([np.mean(means) for means, _ in splits]) for row, splits in by_row.items() if row}


def first_row(by_row: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """Of every split the mean over structures, of the row that others are compared with."""
    return next(iter(_rows(by_row).values()))


def _mean_and_spread(of_splits: np.ndarray) -> str:
    spread = f" ± {of_splits.std(ddof=1):.1f}" if len(of_splits) > 1 else ""
    return f"{of_splits.mean():.1f}{spread}"

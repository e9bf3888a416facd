"""How values are shown, on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunet_ssl.evaluation.comparison import Comparison
from nnunet_ssl.evaluation.metrics import DISTANCES

_IN_TERMINAL = ("Dice", "IoU", "HD95")


def scale_of(metric: str, unit: str) -> tuple[float, str, int]:
    """Factor, unit and digits in which a metric is shown: distances in ``unit``, all others in percent."""
    return (1.0, unit, 2) if metric in DISTANCES else (100.0, "%", 1)


def number(value: float, digits: int, sign: bool = False) -> str:
    """A value as text; a dash where there is none."""
    if math.isnan(value):
        return "-"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def p_value(value: float) -> str:
    """A p-value as text; a dash where there is none."""
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def terminal_tables(comparison: Comparison) -> str:
    """Structures and trainers for the main metrics, then what differs from the first trainer."""
    parts = []
    for metric in _IN_TERMINAL:
        scale, unit, digits = scale_of(metric, comparison.unit)
        rows = [[f"{metric} ({unit})", *comparison.names]]
        for structure in comparison.per_structure(metric):
            cells = []
            for summary in comparison.summary(metric, structure):
                missing = f" ({summary['missing']} missing)" if summary["missing"] else ""
                spread = number(scale * summary["sd"], digits)
                cells.append(f"{number(scale * summary['mean'], digits)} ± {spread}{missing}")
            rows.append([structure, *cells])
        # Long names of trainers stand better in rows, many structures too.
        parts.append(min(align(rows), align(list(zip(*rows))), key=lambda table: max(map(len, table.splitlines()))))
    last = list(comparison.per_structure("Dice"))[-1]
    rows = [[f"difference to {comparison.names[0]}", "mean [95 % interval]", "p (Holm)", "won/tied/lost"]]
    for metric in _IN_TERMINAL:
        scale, unit, digits = scale_of(metric, comparison.unit)
        for name, d in zip(comparison.names[1:], comparison.differences(metric, last)):
            low, high = number(scale * d.low, digits, True), number(scale * d.high, digits, True)
            rows.append(
                [
                    f"{name}, {last} {metric} ({unit})",
                    f"{number(scale * d.mean, digits, True)} [{low}, {high}]",
                    p_value(d.p_holm),
                    f"{d.wins}/{d.ties}/{d.losses}",
                ]
            )
    if len(rows) > 1:
        parts.append(align(rows))
    return "\n\n".join(parts)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)

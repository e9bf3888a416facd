"""The comparison as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from nnunet_ssl import __version__
from nnunet_ssl.evaluation import figures
from nnunet_ssl.evaluation.candidates import NOT_RECORDED, Candidate
from nnunet_ssl.evaluation.case_pictures import CasePicture
from nnunet_ssl.evaluation.comparison import MEAN, Comparison
from nnunet_ssl.evaluation.formatting import number, p_value, scale_of
from nnunet_ssl.evaluation.metrics import DISTANCES, METRICS
from nnunet_ssl.evaluation.statistics import NUM_RESAMPLES, Difference

# nnU-Net's own curves; every other series in a checkpoint is a loss term or statistic of a method.
_CURVES = {"train_losses": "training loss", "val_losses": "validation loss", "mean_fg_dice": "pseudo Dice per epoch"}
# Of Holm's p-values; such differences are colored.
_SIGNIFICANT = 0.05
_NOT_DRAWN = ("ema_fg_dice", "lrs")
_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c1e21; --faint: #5d636b; --line: #d5d9de; --good: #00734f;
  --bad: #b3400e; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e4e6e9; --faint: #a0a7b0; --line: #3a3f45;
  --good: #4cc79b; --bad: #f0875a; } }
@media print { :root { --page: #ffffff; --ink: #000000; --faint: #444444; --line: #bbbbbb; --good: #00734f;
  --bad: #b3400e; } details { break-inside: avoid; } figure { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1320px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; } p.note, figcaption { color: var(--faint); }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.better { color: var(--good); } .worse { color: var(--bad); } .warning { border: 2px solid var(--bad); padding: .5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
.planes { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } img { max-width: 100%; height: auto; background: #000000; }
.key { display: inline-block; width: .8em; height: .8em; border: 1px solid var(--faint); margin-right: .3em; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
summary { cursor: pointer; }
"""


def build_report(
    title: str, comparison: Comparison, candidates: Sequence[Candidate], pictures: Sequence[CasePicture]
) -> str:
    """The page's HTML.

    Args:
        title: What was compared, e.g. data set and configuration.
        comparison: All values.
        candidates: In the same order.
        pictures: Of single cases; may be empty.
    """
    sections = [
        _head(title, comparison, candidates),
        *(_metric_section(comparison, metric) for metric in METRICS),
        _distributions(comparison),
        _worst(comparison),
        _pictures(comparison, pictures),
        _learning_curves(candidates),
        _settings(candidates),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _head(title: str, comparison: Comparison, candidates: Sequence[Candidate]) -> str:
    folds = sorted({fold for candidate in candidates for fold in candidate.folds.values() if fold})
    where = f"{len(comparison.cases)} cases" + (f" of fold {', '.join(folds)}" if folds else "")
    warnings = ""
    if any(candidate.checkpoint.startswith("best") for candidate in candidates):
        warnings = (
            '<p class="warning">Predicted by checkpoint_best, which was chosen on the very cases shown here: these '
            "values are too good. Publish those of the final checkpoints.</p>"
        )
    unrecorded = [candidate.name for candidate in candidates if candidate.checkpoint.endswith(NOT_RECORDED)]
    if unrecorded:
        warnings += (
            f'<p class="note">{escape(", ".join(unrecorded))}: nnU-Net does not record which checkpoint predicted its '
            f"validation cases, nor which cases a training learned from; their number was checked.</p>"
        )
    return (
        f"<h1>{escape(title)}</h1>\n{warnings}<p>{where}; every trainer predicted the same ones. Differences are to "
        f"{escape(comparison.names[0])}, paired by case: mean with a 95 % bootstrap interval ({NUM_RESAMPLES} "
        f"resamples of the cases), p of the Wilcoxon signed-rank test, corrected by Holm over the trainers, and in how "
        f"many cases a trainer won, tied and lost.</p>\n{_legend(comparison.names)}"
        f'<p class="note">nnunet-ssl {__version__}. The interval says how sure the mean over these cases is, not how '
        f"much another training run would differ.</p>"
    )


def _legend(names: Sequence[str], first: Iterable[tuple[str, str]] = ()) -> str:
    entries = [*first, *((name, figures.color(i)) for i, name in enumerate(names))]
    items = [f'<li><span class="key" style="background:{c}"></span>{escape(name)}</li>' for name, c in entries]
    return f'<ul class="legend">{"".join(items)}</ul>\n'


def _metric_section(comparison: Comparison, metric: str) -> str:
    scale, unit, digits = scale_of(metric, comparison.unit)
    tested = metric != "volume_difference"
    columns = ["structure", "trainer", f"mean ± sd ({unit})", "median", "missing"]
    columns += ["difference", "p (Holm)", "won / tied / lost"] if tested else []
    rows = []
    for structure in comparison.per_structure(metric):
        differences = comparison.differences(metric, structure) if tested else []
        for j, (name, summary) in enumerate(zip(comparison.names, comparison.summary(metric, structure))):
            cells = [
                escape(structure) if j == 0 else "",
                escape(name),
                f"{number(scale * summary['mean'], digits)} ± {number(scale * summary['sd'], digits)}",
                number(scale * summary["median"], digits),
                str(summary["missing"]),
            ]
            if tested:
                cells += _difference_cells(differences[j - 1], metric, scale, digits) if j else ["", "", ""]
            rows.append(cells)
    table = _table(columns, rows)
    heading = f"<h2>{metric.replace('_', ' ')}</h2>\n<p>{METRICS[metric]}, in {unit}."
    if metric in DISTANCES:
        heading += " Missing: cases in which the structure or its prediction is empty; there is no distance then."
    return f"{heading}</p>\n{table}"


def _difference_cells(difference: Difference, metric: str, scale: float, digits: int) -> list[str]:
    style = ""
    if difference.p_holm < _SIGNIFICANT:
        style = ' class="better"' if (difference.mean > 0) != (metric in DISTANCES) else ' class="worse"'
    said = (
        f"{number(scale * difference.mean, digits, sign=True)} [{number(scale * difference.low, digits, sign=True)}, "
        f"{number(scale * difference.high, digits, sign=True)}]"
    )
    counts = f"{difference.wins} / {difference.ties} / {difference.losses}"
    counts += f" ({difference.missing} missing)" if difference.missing else ""
    return [f"<span{style}>{said}</span>", escape(p_value(difference.p_holm)), counts]


def _distributions(comparison: Comparison) -> str:
    plots = [
        _figure(figures.box_plot(100 * values, comparison.names, f"{structure}: Dice (%)"))
        for structure, values in comparison.per_structure("Dice").items()
    ]
    if len(comparison.names) > 1:
        dice = comparison.per_structure("Dice")
        values = 100 * dice.get(MEAN, next(iter(dice.values())))
        plots.insert(0, _figure(figures.scatter(values[0], values[1:], comparison.names, "mean Dice (%)")))
    return f'<h2>Case by case</h2>\n<div class="plots">{"".join(plots)}</div>'


def _worst(comparison: Comparison) -> str:
    rows = [
        [escape(name), "; ".join(f"{escape(case)} {100 * dice:.1f}" for case, dice in comparison.worst_cases(j))]
        for j, name in enumerate(comparison.names)
    ]
    return f"<h2>Worst cases</h2>\n{_table(['trainer', 'lowest mean Dice (%)'], rows)}"


def _pictures(comparison: Comparison, pictures: Sequence[CasePicture]) -> str:
    if not pictures:
        return ""
    parts = []
    for case in pictures:
        images = "".join(
            f'<img alt="{escape(case.title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            for png in case.pictures
        )
        parts.append(
            f'<figure><div class="planes">{images}</div><figcaption>{escape(case.title)}</figcaption></figure>'
        )
    legend = _legend(comparison.names, [("truth (white)", figures.TRUTH_COLOR)])
    return f"<h2>Outlines</h2>\n{legend}{''.join(parts)}"


def _learning_curves(candidates: Sequence[Candidate]) -> str:
    drawn = [(j, candidate) for j, candidate in enumerate(candidates) if candidate.curves]
    if not drawn:
        return ""
    plots = []
    for key, title in _CURVES.items():
        series = {c.name: [fold[key] for fold in c.curves.values() if key in fold] for _, c in drawn}
        colors = {c.name: figures.color(j) for j, c in drawn}
        plots.append(_figure(figures.curves(series, colors, title)))
    for _, candidate in drawn:
        own = [k for k in next(iter(candidate.curves.values())) if k not in _CURVES and k not in _NOT_DRAWN]
        series = {k.removeprefix("ssl_"): [fold[k] for fold in candidate.curves.values() if k in fold] for k in own}
        if series:
            colors = {name: figures.color(i) for i, name in enumerate(series)}
            plots.append(_figure(figures.curves(series, colors, candidate.name)))
    return f'<h2>Learning curves</h2>\n<div class="plots">{"".join(plots)}</div>'


def _settings(candidates: Sequence[Candidate]) -> str:
    names = list(dict.fromkeys(key for candidate in candidates for key in candidate.settings))
    if not names:
        return ""
    rows = [[escape(key), *(_setting(c.settings.get(key, "")) for c in candidates)] for key in names]
    table = _table(["setting", *(escape(c.name) for c in candidates)], rows)
    return (
        f"<h2>What each ran with</h2>\n<details open><summary>Hyper-parameters and versions</summary>{table}</details>"
    )


def _setting(value: Any) -> str:
    return "nnU-Net's own" if value is None else escape(str(value))


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

"""What became of the cases of a set of pseudo-labels: a table, and pictures of the best and the worst."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import blosc2
import numpy as np

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.pseudo_labels import PseudoLabels
from nnunet_ssl.evaluation.agreement import OVERALL
from nnunet_ssl.evaluation.figures import COLORS, contour_picture
from nnunet_ssl.files import write_among_others

TABLE = "cases.csv"
_COLUMNS = ("case", "kept", "why", "uncertain")
# Display window of an image's gray values, in percentiles.
_WINDOW = (0.5, 99.5)


def describe(manifest: Mapping[str, Any]) -> list[str]:
    """Lines for people: how many are kept, why others are not, and how far networks and rounds agree."""
    cases = manifest["cases"].values()
    dropped = Counter(_reason(case["why"]) for case in cases if not case["kept"])
    lines = [f"{manifest['name']}: {sum(case['kept'] for case in cases)} of {len(cases)} cases kept"]
    lines += [f"  dropped: {count} ({reason})" for reason, count in sorted(dropped.items())]
    doubted = sum(case["kept"] and bool(case["why"]) for case in cases)
    lines += [f"  {doubted} of those kept have structures that do not count"] if doubted else []
    for key, what in (("agreement", "agreement of the networks"), ("unchanged", "agreement with the round before")):
        values = _overall(manifest, key)
        if values:
            lines.append(f"  {what} (Dice): median {statistics.median(values):.3f}, least {min(values):.3f}")
    lines.append(f"  uncertain voxels: {100 * statistics.mean(case['uncertain'] for case in cases):.2f} %")
    return lines


def rounds_table(manifests: Sequence[Mapping[str, Any]]) -> str:
    """A table of rounds in Markdown: what was kept and why not, and medians of what the cases' scores say."""
    lines = [
        "| pseudo-labels | kept | dropped | agreement | as in the round before | uncertain |",
        "|---|---|---|---|---|---|",
    ]
    for manifest in manifests:
        cases = manifest["cases"].values()
        dropped = Counter(_reason(case["why"]) for case in cases if not case["kept"])
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(dropped.items()))
        medians = [
            f"{statistics.median(found):.3f}" if (found := _overall(manifest, key)) else ""
            for key in ("agreement", "unchanged")
        ]
        uncertain = 100 * statistics.mean(case["uncertain"] for case in cases)
        kept = sum(case["kept"] for case in cases)
        lines.append(f"| {' | '.join([manifest['name'], str(kept), reasons, *medians, f'{uncertain:.2f} %'])} |")
    return "\n".join(lines) + "\n"


def _overall(manifest: Mapping[str, Any], key: str) -> list[float]:
    cases = manifest["cases"].values()
    return [case[key][OVERALL] for case in cases if case[key] and case[key][OVERALL] is not None]


def table(manifest: Mapping[str, Any]) -> bytes:
    """A CSV file: a row per case, with its scores by structure."""
    keys = ("agreement", "unchanged")
    names = {key: sorted({n for c in manifest["cases"].values() for n in c[key] or ()}) for key in keys}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(f"{key} {name}" for key in keys for name in names[key])])
    for identifier, case in manifest["cases"].items():
        scores = [(case[key] or {}).get(name) for key in keys for name in names[key]]
        writer.writerow([identifier, *(case[c] for c in _COLUMNS[1:]), *("" if v is None else v for v in scores)])
    return file.getvalue().encode()


def write_report(
    labels: PseudoLabels, manifest: Mapping[str, Any], cases: Sequence[UnlabeledCase], spacing: Sequence[float]
) -> None:
    """Write the table, and pictures of the best and the worst case where cases have scores, beside the manifest."""
    write_among_others(str(labels.folder / TABLE), table(manifest))
    scored = {}
    for identifier, case in manifest["cases"].items():
        values = [case[key][OVERALL] for key in ("agreement", "unchanged") if case[key]]
        if values and None not in values:
            scored[identifier] = min(values)
    order = sorted(scored, key=lambda identifier: (scored[identifier], identifier))
    by_name = {case.identifier: case for case in cases}
    for what, of in (("best", order[-1:]), ("worst", order[:1])):
        for identifier in of:
            content = picture(labels, by_name[identifier], spacing)
            write_among_others(str(labels.folder / f"{what}.png"), content)


def picture(labels: PseudoLabels, case: UnlabeledCase, spacing: Sequence[float]) -> bytes:
    """The slice with most labeled voxels: outlines of labels in color, those of uncertain voxels in gray.

    Args:
        labels: Of the case.
        case: Which.
        spacing: Of the last axes, in mm.
    """
    stored = labels.load(case.identifier)[:]
    middle = int(np.argmax((stored > 0).sum((1, 2))))
    image = blosc2.open(urlpath=f"{case.folder}/{case.identifier}.b2nd", mode="r")[0, middle]
    low, high = np.percentile(image, _WINDOW)
    shown = np.clip((image - low) / max(high - low, 1e-9), 0, 1)
    return contour_picture(shown, list(_outlines(stored[middle])), spacing[-2] / spacing[-1])


def _outlines(stored: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    yield (stored < 0).astype(int), "#7f7f7f"
    for label in np.unique(stored[stored > 0]):
        yield (stored == label).astype(int), COLORS[(int(label) - 1) % len(COLORS)]


def _reason(why: str) -> str:
    """Without the case's own value."""
    words = why.split(", less than ")
    return f"{words[0].rpartition(' ')[0]} less than {words[1]}" if len(words) == 2 else why

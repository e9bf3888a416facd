"""Reports, tables and summaries of the accuracy scripts, by nnunet-ssl's own commands."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from options import Cell, Split
from tables import Costs, Values, collect, first_row, overview, summary, summary_table, tables

from nnunet_ssl.files import write_atomically
from nnunet_ssl.training.run_record import RECORD_FILE

if TYPE_CHECKING:
    from runs import Experiment

Rows = Mapping[str, Sequence[Cell]]
# By title, which is the name of their folder of reports and tables.md too: the splits, which are columns, and by row a
# cell per split. Rows of several networks that predict together stand last.
Comparisons = dict[str, tuple[list[Split], dict[str, list[Cell]]]]


def compare(experiment: Experiment, comparisons: Comparisons) -> None:
    """Write reports, and write and print tables of Dice, IoU and HD95: of validation cases, and of test cases.

    Several comparisons share an overview.md, where each is one column; a summary says what every row gains and costs.
    Rows of several networks are scored on validation cases alone.
    """
    found: dict[str, dict[str, Values]] = {"validation cases": {}, "test cases": {}}
    for title, (splits, rows) in comparisons.items():
        reports = experiment.out / "reports" / title.replace(" ", "_").replace(",", "")
        found["validation cases"][title] = _compare_validation_cases(experiment, reports, splits, rows)
        if experiment.arguments.test_images is not None:
            found["test cases"][title] = _compare_test_cases(experiment, reports, splits, rows)
        columns = [split.name for split in splits]
        texts = (tables(f"{title}, {cases}", of[title], columns) for cases, of in found.items() if of)
        _write_and_print(reports / "tables.md", texts)
    if len(comparisons) > 1:
        file = experiment.out / "reports" / "overview.md"
        _write_and_print(file, (overview(cases, of) for cases, of in found.items() if of))
    _summarize(experiment, comparisons, found["validation cases"])


def _compare_validation_cases(experiment: Experiment, reports: Path, splits: Sequence[Split], rows: Rows) -> Values:
    first = next(iter(rows.values()))
    values: Values = {}
    # Splits that hold out the same cases go to reports of their own.
    for draw in sorted({split.draw for split in splits}):
        chosen = [i for i, split in enumerate(splits) if split.draw == draw]
        folds = [str(first[i].trainings[0].fold) for i in chosen]
        report = reports / f"draw_{draw}"
        single, together = [], []
        for row, cells in rows.items():
            if cells[0].variant.predicts_together:
                together.append(f"{row}={_predict_together(experiment, report, cells[chosen[0]], folds)}")
            else:
                single.append(cells[chosen[0]].trainings[0])
        target = ("-d", experiment.dataset, "-c", experiment.configuration, "-f", *folds)
        names = [f"nnUNetTrainer{training.variant.trainer}" for training in single]
        words = ("-tr", *names, "-p", *(training.plans for training in single), "-o", str(report), "-np", "2")
        more = ("--predictions", *together) if together else ()
        experiment.commands.run("nnunet-ssl", "compare", *target, *words, *more)
        collect(report / "comparison.csv", rows, folds, values)
    return values


def _predict_together(experiment: Experiment, report: Path, cell: Cell, folds: Sequence[str]) -> Path:
    """The folder of the mean predictions of a row; made where it is missing."""
    variant = cell.variant
    output = report.with_name(f"{report.name}_together") / "".join(c for c in variant.name.title() if c.isalnum())
    if not output.exists():
        unfinished = output.with_name(f"{output.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        target = ("-d", experiment.dataset, "-c", experiment.configuration, "-f", *folds)
        plans = [training.plans for training in cell.trainings]
        models = (
            "-tr",
            f"nnUNetTrainer{variant.trainer}",
            "-p",
            *plans,
            "--networks",
            "both" if variant.both else "first",
        )
        device = experiment.arguments.devices[0].partition(":")[0]
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        experiment.commands.run("nnunet-ssl", "validate", *target, *models, "-device", device, "-o", str(unfinished))
        os.replace(unfinished, output)
    return output


def _compare_test_cases(experiment: Experiment, reports: Path, splits: Sequence[Split], rows: Rows) -> Values:
    values: Values = {}
    rows = {row: cells for row, cells in rows.items() if not cells[0].variant.predicts_together}
    for i, split in enumerate(splits):
        report = reports / f"test_{split.base}_{split.draw}"
        folders = [f"{row}={experiment.test_predictions(cells[i].trainings[0])}" for row, cells in rows.items()]
        arguments = experiment.arguments
        words = ("--labels", str(arguments.test_labels), "--images", str(arguments.test_images))
        target = ("-o", str(report), "-np", "2")
        experiment.commands.run("nnunet-ssl", "compare", "--predictions", *folders, *words, *target)
        collect(report / "comparison.csv", rows, [""], values)
    return values


def _summarize(experiment: Experiment, comparisons: Comparisons, found: Mapping[str, Values]) -> None:
    """Write and print what every row gains and costs: summary.md, summary.csv and summary.json."""
    records: dict[str, list[dict[str, Any]]] = {}
    for title, (splits, rows) in comparisons.items():
        # All labels, with the same seed; their splits are nnU-Net's folds.
        whole = f"all labeled{title.partition('labeled')[2]}"
        ceiling: dict[str, np.ndarray] = {}
        if whole in found and whole != title:
            bases = [split.base for split in comparisons[whole][0]]
            places = [bases.index(split.base) for split in splits]
            ceiling = {metric: first_row(of)[places] for metric, of in found[whole].items()}
        costs = {row: [_costs(experiment, cell) for cell in cells] for row, cells in rows.items()}
        records[title] = summary(found[title], ceiling, costs)
    reports = experiment.out / "reports"
    _write_and_print(reports / "summary.md", (summary_table(title, of_one) for title, of_one in records.items()))
    write_atomically(str(reports / "summary.json"), json.dumps(records, indent=1).encode())
    flat = [{"title": title, **record} for title, of_one in records.items() for record in of_one]
    table = io.StringIO()
    writer = csv.DictWriter(table, [name for name in flat[0] if name != "splits"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    write_atomically(str(reports / "summary.csv"), table.getvalue().encode())


def _costs(experiment: Experiment, cell: Cell) -> Costs:
    """Of all trainings of a cell together."""
    files = (experiment.model(training) / f"fold_{training.fold}" / RECORD_FILE for training in cell.trainings)
    costs = [load_json(str(file)).get("costs", {}) for file in files]
    # What a device does not tell is None.
    memory = [of_one.get("peak_memory_mib") or np.nan for of_one in costs]
    return Costs(sum(of_one.get("seconds", np.nan) for of_one in costs), max(memory))


def _write_and_print(file: Path, parts: Iterable[str]) -> None:
    text = "".join(parts)
    write_atomically(str(file), text.encode())
    print(text, end="", flush=True)

"""Score every candidate on every case, and say what differs from the first one."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.candidates import Candidate, Reference
from nnunet_ssl.evaluation.metrics import DISTANCES, LOWER_IS_BETTER, METRICS, case_metrics, structures_of
from nnunet_ssl.evaluation.postprocessing import Cleaning, clean
from nnunet_ssl.evaluation.statistics import Difference, compare_to_first
from nnunet_ssl.nnunet.label_maps import knows_spacing, read_labels, reader_class

MEAN = "mean of structures"
NUM_WORST = 5
_COLUMNS = (*METRICS, "true_voxels", "predicted_voxels")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All values, and what follows from them.

    Attributes:
        names: Of the candidates; the first is the reference of all differences.
        cases: Their names.
        structures: Their names.
        unit: Of distances.
        values: Metric to (candidates, cases, structures); not a number where there is none.
    """

    names: list[str]
    cases: list[str]
    structures: list[str]
    unit: str
    values: dict[str, np.ndarray]

    def per_structure(self, metric: str) -> dict[str, np.ndarray]:
        """Structure to (candidates, cases), and their mean in each case, over those that have a value."""
        values = self.values[metric]
        rows = {name: values[:, :, i] for i, name in enumerate(self.structures)}
        return {**rows, MEAN: _mean(values, 2)} if len(rows) > 1 else rows

    def summary(self, metric: str, structure: str) -> list[dict[str, float]]:
        """Mean, standard deviation and median over cases per candidate, and how many cases have no value.

        The mean over structures is the mean of their means, as in nnU-Net's evaluation: there is none where a structure
        has no value in any case. A case counts as missing there where one of its structures is.
        """
        values = self.per_structure(metric)[structure]
        means = _mean(values, 1)
        if structure == MEAN:
            means = _mean(self.values[metric], 1).mean(1)
        absent = np.isnan(self.values[metric]).any(2) if structure == MEAN else np.isnan(values)
        result = []
        for row, mean, missing in zip(values, means, absent.sum(1)):
            valid = row[~np.isnan(row)]
            result.append(
                {
                    "mean": float(mean),
                    "sd": float(valid.std(ddof=1)) if len(valid) > 1 else math.nan,
                    "median": float(np.median(valid)) if len(valid) else math.nan,
                    "missing": int(missing),
                }
            )
        return result

    def differences(self, metric: str, structure: str) -> list[Difference]:
        """Every candidate beside the first, paired by case.

        The mean over structures takes, in each case, the structures that both have a value for.
        """
        if structure == MEAN:
            values = self.values[metric]
            paired = _mean(values - values[:1], 2)
            # Where only the reference's own value counts it is 0: the difference of a candidate to itself.
            paired[0] = 0.0
        else:
            paired = self.per_structure(metric)[structure]
        return compare_to_first(paired, metric in LOWER_IS_BETTER)

    def worst_cases(self, candidate: int) -> list[tuple[str, float]]:
        """The cases with the lowest mean Dice of a candidate."""
        dice = _mean(self.values["Dice"][candidate], 1)
        order = np.argsort(np.where(np.isnan(dice), np.inf, dice), kind="stable")
        return [(self.cases[i], float(dice[i])) for i in order[:NUM_WORST] if not np.isnan(dice[i])]


def evaluate(
    candidates: Sequence[Candidate], reference: Reference, processes: int, cleaning: Cleaning | None = None
) -> Comparison:
    """Score all candidates in parallel processes, with a progress bar.

    Args:
        candidates: Checked to have the same cases.
        reference: The truth.
        processes: How many; 1 works in this process.
        cleaning: Done to every prediction first.

    Raises:
        UserError: Where candidates differ in cases, or a file cannot be read or has another shape.
    """
    cases = sorted(reference.labels)
    for candidate in candidates:
        if set(candidate.predictions) != set(cases):
            other = ", ".join(sorted(set(candidate.predictions) ^ set(cases))[:5])
            raise UserError(f"{candidate.name} and {candidates[0].name} differ in cases: {other}")
        different = [case for case in cases if candidate.folds[case] != candidates[0].folds[case]]
        if different:
            raise UserError(f"{candidate.name} predicted {different[0]} in another fold than {candidates[0].name}.")
    structures = structures_of(reference.dataset_json["labels"])
    ignore = reference.dataset_json["labels"].get("ignore")
    reader = reader_class(reference.dataset_json, reference.labels[cases[0]])
    jobs = {
        case: (reference.labels[case], [c.predictions[case] for c in candidates], reader, structures, ignore, cleaning)
        for case in cases
    }
    results = _run(jobs, processes)
    shape = (len(candidates), len(cases), len(structures))
    values = {column: np.full(shape, np.nan) for column in _COLUMNS}
    for i, case in enumerate(cases):
        for j, scores in enumerate(results[case]):
            for k, name in enumerate(structures):
                for column in _COLUMNS:
                    values[column][j, i, k] = scores[name][column]
    example = [reference.labels[cases[0]], *(c.predictions[cases[0]] for c in candidates)]
    unit = "mm" if any(knows_spacing(file, reader) for file in example) else "px"
    return Comparison([c.name for c in candidates], cases, list(structures), unit, values)


def read_truth(label: Path, predictions: Sequence[Path], reader: type) -> tuple[np.ndarray, tuple[float, ...]]:
    """The label map of a case and its spacing: the first prediction's where the label map's file does not know it."""
    truth = read_labels(label, reader)
    if knows_spacing(label, reader):
        return truth.labels, truth.spacing
    file = next((file for file in predictions if knows_spacing(file, reader)), None)
    return truth.labels, truth.spacing if file is None else read_labels(file, reader).spacing


def write_csv(comparison: Comparison, candidates: Sequence[Candidate]) -> bytes:
    """One row per case, structure and candidate; empty cells where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = [f"{m}_{comparison.unit}" if m in DISTANCES else m for m in _COLUMNS]
    writer.writerow(["case", "fold", "structure", "trainer", "checkpoint", *header])
    for i, case in enumerate(comparison.cases):
        for k, structure in enumerate(comparison.structures):
            for j, candidate in enumerate(candidates):
                row = [comparison.values[column][j, i, k] for column in _COLUMNS]
                cells = ["" if np.isnan(v) else f"{v:.6g}" for v in row]
                writer.writerow([case, candidate.folds[case], structure, candidate.name, candidate.checkpoint, *cells])
    return text.getvalue().encode()


def as_json(comparison: Comparison, candidates: Sequence[Candidate], post_processing: str | None) -> dict[str, Any]:
    """Summary and differences of every metric and structure; null where there is no value."""
    rows = [
        {
            "metric": metric,
            "structure": structure,
            "trainers": dict(zip(comparison.names, comparison.summary(metric, structure))),
            "differences": {}
            if metric == "volume_difference"
            else dict(zip(comparison.names[1:], map(dataclasses.asdict, comparison.differences(metric, structure)))),
        }
        for metric in METRICS
        for structure in comparison.per_structure(metric)
    ]
    return _without_nan(
        {
            "reference": comparison.names[0],
            "unit_of_distances": comparison.unit,
            "post_processing": post_processing,
            "cases": comparison.cases,
            "trainers": {
                c.name: {
                    "checkpoint": c.checkpoint,
                    "folds": sorted(set(c.folds.values()) - {""}),
                    "settings": c.settings,
                    "worst_cases": comparison.worst_cases(j),
                }
                for j, c in enumerate(candidates)
            },
            "results": rows,
        }
    )


def _run(jobs: dict[str, tuple[Any, ...]], processes: int) -> dict[str, list[dict[str, dict[str, float]]]]:
    progress = tqdm(total=len(jobs), desc="comparing", unit="case", disable=None)
    results = {}
    with progress:
        if processes <= 1:
            for case, job in jobs.items():
                results[case] = _score_case(*job)
                progress.update()
            return results
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
            futures = {pool.submit(_score_case, *job): case for case, job in jobs.items()}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return results


def _score_case(
    label: Path,
    predictions: list[Path],
    reader: type,
    structures: dict[str, Any],
    ignore: int | None,
    cleaning: Cleaning | None,
) -> list[dict[str, dict[str, float]]]:
    truth, spacing = read_truth(label, predictions, reader)
    scores = []
    for file in predictions:
        predicted = read_labels(file, reader).labels
        if predicted.shape != truth.shape:
            raise UserError(f"{file} has shape {predicted.shape}, its label map {label} has {truth.shape}.")
        if cleaning:
            predicted = clean(predicted, spacing, cleaning)
        scores.append(case_metrics(truth, predicted, structures, spacing, ignore))
    return scores


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing there: not a number, as it should be
        return np.asarray(np.nanmean(values, axis=axis))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value

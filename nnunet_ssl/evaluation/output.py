"""The files of a comparison; each appears complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.candidates import Candidate, Reference
from nnunet_ssl.evaluation.case_pictures import draw_cases
from nnunet_ssl.evaluation.comparison import Comparison, as_json, write_csv
from nnunet_ssl.evaluation.postprocessing import Cleaning
from nnunet_ssl.evaluation.report import build_report
from nnunet_ssl.files import write_together


def check_output_folder(folder: Path) -> None:
    """Before time is spent on its content: whether a folder can be written to, or made.

    Raises:
        UserError: Where not.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        problem = "is not writable" if nearest.is_dir() else "is a file"
        raise UserError(f"{folder} cannot be the output folder: {nearest} {problem}. Name another with -o.")


def write_comparison(
    folder: Path,
    title: str,
    comparison: Comparison,
    candidates: Sequence[Candidate],
    reference: Reference,
    cleaning: Cleaning | None = None,
) -> list[Path]:
    """Write comparison.csv, comparison.json and report.html.

    Args:
        folder: Made if missing; files of an earlier comparison are replaced.
        title: Of the report.
        comparison: All values.
        candidates: In the same order.
        reference: For the pictures.
        cleaning: What was done to every prediction before it was scored.

    Returns:
        The files.
    """
    said = cleaning.describe() if cleaning else None
    report = build_report(
        f"{title}; {said}" if said else title,
        comparison,
        candidates,
        draw_cases(comparison, candidates, reference, cleaning),
    )
    contents = {
        "comparison.csv": write_csv(comparison, candidates),
        "comparison.json": json.dumps(as_json(comparison, candidates, said), indent=2).encode(),
        "report.html": report.encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_together({str(folder / name): content for name, content in contents.items()})
    return [folder / name for name in contents]

"""Compare trainers on the cases they did not train with: tables, a CSV file, JSON, and a report page.

By default the validation predictions that nnUNetv2_train wrote at the end of each training are read. They must come
from the final checkpoints of the same folds, with the same labeled cases; what differs is named. --predictions adds
folders with predictions of these cases, such as those of nnunet-ssl validate. A test set is compared with --predictions
and --labels. The first trainer is the reference that the others are compared with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.cli.postprocess import add_cleaning_arguments, cleaning_of

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.candidates import Candidate, Reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    trained = parser.add_argument_group("validation cases of trainings")
    trained.add_argument("-d", dest="dataset", metavar="DATASET", help="data set, number or name")
    trained.add_argument("-c", dest="configuration", metavar="CONFIGURATION", help="e.g. 2d")
    trained.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="folds, e.g. 0 1 2")
    trained.add_argument("-tr", dest="trainers", nargs="+", metavar="TRAINER", help="the reference first")
    trained.add_argument(
        "-p", dest="plans", nargs="+", metavar="PLANS",
        help="one name for all, or one for each trainer (default nnUNetPlans)",
    )  # fmt: skip
    trained.add_argument(
        "--best", action="store_true",
        help="the predictions come from checkpoint_best (--val_best), chosen on these very cases; the report says so",
    )  # fmt: skip
    given = parser.add_argument_group("folders of predictions, e.g. of a test set")
    given.add_argument(
        "--predictions", nargs="+", metavar="NAME=FOLDER",
        help="the reference first; with -tr further columns, of the same validation cases",
    )  # fmt: skip
    given.add_argument("--labels", type=Path, metavar="FOLDER", help="the true label maps")
    given.add_argument(
        "--dataset-json", type=Path, metavar="FILE", help="default: beside the predictions, or above the labels"
    )
    given.add_argument(
        "--images", type=Path, metavar="FOLDER", help="for the pictures (default: images.. beside labels.. if there)"
    )
    add_cleaning_arguments(parser)
    parser.add_argument(
        "-o", dest="output", type=Path, default=Path("comparison"), metavar="DIR",
        help="folder for comparison.csv, comparison.json and report.html (default: comparison)",
    )  # fmt: skip
    parser.add_argument(
        "-np", dest="processes", type=int, default=2, metavar="N", help="parallel processes (default 2)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Score, print the tables and write the files."""
    from nnunet_ssl.evaluation.comparison import evaluate
    from nnunet_ssl.evaluation.formatting import terminal_tables
    from nnunet_ssl.evaluation.output import check_output_folder, write_comparison

    title, candidates, reference = _what_to_compare(arguments)
    check_output_folder(arguments.output)
    cleaning = cleaning_of(arguments, reference.dataset_json["labels"])
    comparison = evaluate(candidates, reference, arguments.processes, cleaning)
    files = write_comparison(arguments.output, title, comparison, candidates, reference, cleaning)
    print(terminal_tables(comparison))
    if arguments.best:
        print("\nWARNING: checkpoint_best was chosen on these cases; the values are too good.")
    for remark in filter(None, (candidate.remark() for candidate in candidates)):
        print(f"\n{remark}")
    print()
    for file in files:
        print(file)
    return 0


def _what_to_compare(arguments: argparse.Namespace) -> tuple[str, list[Candidate], Reference]:
    from nnunet_ssl.errors import UserError
    from nnunet_ssl.evaluation.averaging import candidates_beside
    from nnunet_ssl.evaluation.candidates import Query, find_trained
    from nnunet_ssl.nnunet.folders import dataset_name, require_variables

    of_trainings = arguments.dataset, arguments.configuration, arguments.folds, arguments.trainers, arguments.plans
    if arguments.predictions and (arguments.labels is not None or not any(of_trainings)):
        return _given(arguments)
    missing = [
        option
        for option, value in (
            ("-d", arguments.dataset),
            ("-c", arguments.configuration),
            ("-f", arguments.folds),
            ("-tr", arguments.trainers),
        )
        if not value
    ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} is missing. Give -d, -c, -f and -tr for the validation cases of trainings, or "
            f"--predictions NAME=FOLDER ... and --labels FOLDER."
        )
    only_given = {
        "--labels": arguments.labels, "--images": arguments.images, "--dataset-json": arguments.dataset_json
    }  # fmt: skip
    unused = [option for option, value in only_given.items() if value is not None]
    if unused:
        raise UserError(f"{' and '.join(unused)} goes with --predictions alone; leave it out for trainings.")
    raw, preprocessed, results = require_variables("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    name = dataset_name(arguments.dataset)
    query = Query(
        results / name, preprocessed / name, raw / name, arguments.configuration, arguments.folds, arguments.best
    )
    candidates, reference = find_trained(query, arguments.trainers, arguments.plans or ["nnUNetPlans"])
    folders = _folders(arguments.predictions or [])
    twice = [shown for shown in folders if shown in {candidate.name for candidate in candidates}]
    if twice:
        raise UserError(f"--predictions {twice[0]}=...: a training has this name already; give another.")
    candidates += candidates_beside(candidates[0], folders, reference.dataset_json["file_ending"])
    return f"{name}, {arguments.configuration}", candidates, reference


def _given(arguments: argparse.Namespace) -> tuple[str, list[Candidate], Reference]:
    from nnunet_ssl.errors import UserError
    from nnunet_ssl.evaluation.candidates import find_given
    from nnunet_ssl.nnunet.folders import read_dataset_json

    if any((arguments.dataset, arguments.configuration, arguments.folds, arguments.trainers, arguments.plans,
            arguments.best)):  # fmt: skip
        raise UserError("--predictions with --labels needs no training; leave -d, -c, -f, -tr, -p and --best out.")
    if arguments.labels is None:
        raise UserError("--predictions needs --labels FOLDER, or trainings to stand beside (-d, -c, -f, -tr).")
    folders = _folders(arguments.predictions)
    candidates = [arguments.dataset_json] if arguments.dataset_json else [
        *(folder / "dataset.json" for folder in folders.values()), arguments.labels.resolve().parent / "dataset.json"
    ]  # fmt: skip
    file = next((file for file in candidates if file.is_file()), candidates[-1])
    if not file.is_file():
        raise UserError(f"{file} is missing. Name nnU-Net's dataset.json with --dataset-json.")
    dataset_json = read_dataset_json(file)
    images = arguments.images
    if images is None:
        beside = arguments.labels.resolve().with_name(arguments.labels.resolve().name.replace("labels", "images"))
        images = beside if beside.is_dir() and beside != arguments.labels.resolve() else None
    return str(arguments.labels), *find_given(folders, arguments.labels, dataset_json, images)


def _folders(words: list[str]) -> dict[str, Path]:
    """Names and folders of NAME=FOLDER."""
    from nnunet_ssl.errors import UserError

    folders: dict[str, Path] = {}
    for word in words:
        name, separator, folder = word.partition("=")
        if not separator or not name or not Path(folder).is_dir() or name in folders:
            raise UserError(f"--predictions {word!r}: expected NAME=FOLDER, each name once, each folder existing.")
        folders[name] = Path(folder)
    return folders

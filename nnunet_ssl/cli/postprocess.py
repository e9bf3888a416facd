"""Remove small or separate objects and fill holes in a folder of predicted label maps, structure by structure.

Sizes are in mm^3, in 2D in mm^2, and in pixels where the image format knows no spacing. Objects are removed first. The
same options of compare score predictions as if they had been cleaned; choose sizes on cases that you do not report.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.postprocessing import Cleaning


def add_cleaning_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is done to predictions."""
    group = parser.add_argument_group("post-processing")
    group.add_argument(
        "--remove-below", nargs="+", metavar="[NAME=]SIZE", help="remove smaller objects, of all structures or of one"
    )
    group.add_argument(
        "--keep-largest", nargs="*", metavar="NAME", help="remove all other objects of a structure (default: of all)"
    )
    group.add_argument(
        "--fill-holes", nargs="*", metavar="NAME", help="fill background that a structure encloses (default: all)"
    )


def cleaning_of(arguments: argparse.Namespace, labels: Mapping[str, Any]) -> Cleaning:
    """What these options ask for, given ``labels`` of dataset.json."""
    from nnunet_ssl.evaluation.postprocessing import read_cleaning

    return read_cleaning(labels, arguments.remove_below, arguments.fill_holes, arguments.keep_largest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-i", dest="input", type=Path, required=True, metavar="DIR", help="label maps")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR", help="where the cleaned ones go")
    parser.add_argument("--dataset-json", type=Path, metavar="FILE", help="nnU-Net's (default: in the input folder)")
    add_cleaning_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Clean every file; 1 if one could not be read."""
    from tqdm import tqdm

    from nnunet_ssl.errors import UserError
    from nnunet_ssl.evaluation.postprocessing import clean_file
    from nnunet_ssl.nnunet.folders import read_dataset_json
    from nnunet_ssl.nnunet.label_maps import reader_class

    file = arguments.dataset_json or arguments.input / "dataset.json"
    if not file.is_file():
        raise UserError(f"{file} is missing. Name nnU-Net's dataset.json with --dataset-json.")
    dataset_json = read_dataset_json(file)
    cleaning = cleaning_of(arguments, dataset_json["labels"])
    if not cleaning:
        raise UserError("Nothing to do: give --remove-below, --keep-largest or --fill-holes.")
    files = sorted(arguments.input.glob(f"*{dataset_json['file_ending']}"))
    if not files:
        raise UserError(f"No file with the ending {dataset_json['file_ending']} lies in {arguments.input}.")
    if arguments.output.resolve() == arguments.input.resolve():
        raise UserError("-o names the input folder; choose another, so that the predictions are kept.")
    reader = reader_class(dataset_json, files[0])
    arguments.output.mkdir(parents=True, exist_ok=True)
    changed, failed = 0, []
    for file in tqdm(files, desc="cleaning", unit="case", disable=None):
        try:
            changed += clean_file(file, arguments.output / file.name, reader, cleaning) > 0
        except UserError as error:
            failed.append(str(error))
    print(f"{len(files) - len(failed)} label maps in {arguments.output}, {changed} of them changed")
    for reason in failed:
        print(f"failed: {reason}")
    return 1 if failed else 0

"""Preprocess images without labels (imagesUn/ of the raw data set) with nnU-Net's own preprocessing and plans.

Run it after nnUNetv2_plan_and_preprocess. Finished cases are skipped, so the command can be stopped and run again. A
broken case does not stop the others; the end of the output lists what failed and why, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ssl.preprocessing import CaseReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument(
        "-c", dest="configurations", nargs="+", required=True, metavar="CONFIGURATION", help="e.g. 2d 3d_fullres"
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default nnUNetPlans")
    parser.add_argument(
        "-np", dest="processes", type=int, default=4, metavar="N", help="parallel processes (default 4)"
    )
    parser.add_argument(
        "--test-images",
        action="store_true",
        help="also imagesTs/, for nnUNetTrainerSemiTCPlus, which learns from test images without labels",
    )
    parser.add_argument("--overwrite", action="store_true", help="redo finished cases")
    parser.add_argument(
        "--num-parts", type=int, default=1, metavar="N", help="share the cases among N runs of this command (default 1)"
    )
    parser.add_argument("--part-id", type=int, default=0, metavar="I", help="which share this run does, 0 to N - 1")


def run(arguments: argparse.Namespace) -> int:
    """Preprocess every configuration; 1 if a case failed."""
    from nnunet_ssl.errors import UserError
    from nnunet_ssl.nnunet_folders import (
        dataset_name,
        read_json,
        read_plans,
        require_configurations,
        require_variables,
    )
    from nnunet_ssl.preprocessing import TEST_SUFFIX, UNLABELED_SUFFIX

    raw, preprocessed = require_variables("nnUNet_raw", "nnUNet_preprocessed")
    name = dataset_name(arguments.dataset)
    plans = read_plans(preprocessed / name, arguments.plans)
    require_configurations(plans, arguments.configurations)
    if arguments.processes < 1:
        raise UserError(f"-np must be at least 1, got {arguments.processes}.")
    if not 0 <= arguments.part_id < arguments.num_parts:
        raise UserError(
            f"--part-id counts from 0 to --num-parts - 1: got {arguments.part_id} with {arguments.num_parts} parts."
        )
    if arguments.num_parts > 1 and arguments.overwrite:
        raise UserError("--overwrite would remove what other parts have made; remove the folder first, then run parts.")
    dataset_json = read_json(preprocessed / name / "dataset.json", "Run nnUNetv2_plan_and_preprocess first.")
    folders = [("imagesUn", UNLABELED_SUFFIX)] + [("imagesTs", TEST_SUFFIX)] * arguments.test_images
    if arguments.test_images and not (raw / name / "imagesUn").is_dir():
        folders = folders[1:]
    for folder, _ in folders:
        if not (raw / name / folder).is_dir():
            raise UserError(f"{raw / name / folder} is missing. Put the images there, named like those of imagesTr.")
    failed: list[CaseReport] = []
    for configuration in arguments.configurations:
        for folder, suffix in folders:
            output = preprocessed / name / (_data_identifier(plans, configuration) + suffix)
            failed += _preprocess_folder(arguments, raw / name, folder, plans, configuration, dataset_json, output)
    if failed:
        print(f"\n{len(failed)} failed:")
        for report in failed:
            print(f"  {report.identifier}: {report.error}")
        print("Mend or remove them and run the same command again; finished cases are skipped.")
    return 1 if failed else 0


def _data_identifier(plans: dict[str, Any], configuration: str) -> str:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(plans).get_configuration(configuration).data_identifier


def _preprocess_folder(
    arguments: argparse.Namespace,
    raw: Path,
    folder: str,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    output: Path,
) -> list[CaseReport]:
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
    from tqdm import tqdm

    from nnunet_ssl.preprocessing import find_raw_cases, number_of_channels, preprocess_cases

    labeled = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    num_channels = number_of_channels(dataset_json)
    cases, reports = find_raw_cases(str(raw / folder), dataset_json["file_ending"], num_channels, labeled)
    cases = cases[arguments.part_id :: arguments.num_parts]
    total, running = preprocess_cases(
        cases, plans, configuration, dataset_json, str(output), arguments.processes, arguments.overwrite
    )
    for report in tqdm(running, total=total, desc=f"{folder} {configuration}"):
        reports.append(report)
        if report.note:
            tqdm.write(f"note: {report.identifier}: {report.note}")
    failed = [r for r in reports if r.error]
    done = total - sum(1 for r in failed if r.identifier in {c.identifier for c in cases})
    print(
        f"{folder} {configuration}: {done} preprocessed, {len(cases) - total} were there already, {len(failed)} failed"
    )
    print(f"  -> {output}")
    return failed

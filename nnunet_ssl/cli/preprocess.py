"""Preprocess images without labels with nnU-Net's own preprocessing and plans.

They lie in imagesUn/ of the raw data set, named like those of imagesTr, or are listed in dataset.json, as in
"unlabeled": {"case_7": {"images": ["/archive/7.nii.gz"]}}, one file per channel.

Run it after nnUNetv2_plan_and_preprocess. Finished cases are skipped, so the command can be stopped and run again. A
broken case does not stop the others; the end of the output lists what failed and why, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ssl.data.raw_images import CaseReport, RawCase


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
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunet_ssl.data.preprocessing import TEST_SUFFIX, UNLABELED_SUFFIX
    from nnunet_ssl.data.raw_images import TEST_FOLDER, UNLABELED_FOLDER, find_raw_cases, raw_identifiers
    from nnunet_ssl.errors import UserError
    from nnunet_ssl.nnunet.folders import (
        dataset_name,
        read_dataset_json,
        read_plans,
        require_configurations,
        require_variables,
    )

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
    dataset_json = read_dataset_json(preprocessed / name / "dataset.json")
    folders = [(UNLABELED_FOLDER, UNLABELED_SUFFIX)] + [(TEST_FOLDER, TEST_SUFFIX)] * arguments.test_images
    if arguments.test_images and raw_identifiers(str(raw / name), UNLABELED_FOLDER) is None:
        folders = folders[1:]
    labeled = get_filenames_of_train_images_and_targets(str(raw / name), dataset_json)
    found = {folder: find_raw_cases(str(raw / name), folder, dataset_json, labeled) for folder, _ in folders}
    failed: list[CaseReport] = [report for _, unusable in found.values() for report in unusable]
    for configuration in arguments.configurations:
        for folder, suffix in folders:
            output = preprocessed / name / (_data_identifier(plans, configuration) + suffix)
            failed += _preprocess(arguments, folder, found[folder][0], plans, configuration, dataset_json, output)
    if failed:
        print(f"\n{len(failed)} failed:")
        for report in failed:
            print(f"  {report.identifier}: {report.error}")
        print("Mend or remove them and run the same command again; finished cases are skipped.")
    return 1 if failed else 0


def _data_identifier(plans: dict[str, Any], configuration: str) -> str:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(plans).get_configuration(configuration).data_identifier


def _preprocess(
    arguments: argparse.Namespace,
    folder: str,
    cases: list[RawCase],
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    output: Path,
) -> list[CaseReport]:
    from tqdm import tqdm

    from nnunet_ssl.data.preprocessing import preprocess_cases

    cases = cases[arguments.part_id :: arguments.num_parts]
    total, running = preprocess_cases(
        cases, plans, configuration, dataset_json, str(output), arguments.processes, arguments.overwrite
    )
    failed = []
    for report in tqdm(running, total=total, desc=f"{folder} {configuration}"):
        if report.error:
            failed.append(report)
        if report.note:
            tqdm.write(f"note: {report.identifier}: {report.note}")
    done, before = total - len(failed), len(cases) - total
    print(f"{folder} {configuration}: {done} preprocessed, {before} were there already, {len(failed)} failed")
    print(f"  -> {output}")
    return failed

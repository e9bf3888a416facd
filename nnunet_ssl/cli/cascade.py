"""Segment the unlabeled images with the first stage of nnU-Net's cascade, which the second stage needs as input.

Train the folds of 3d_lowres first, preprocess the unlabeled images for both stages, and run this before training
3d_cascade_fullres with the same trainer. Finished cases are skipped.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument(
        "-c", dest="configuration", default="3d_cascade_fullres", help="the second stage (default 3d_cascade_fullres)"
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default nnUNetPlans")
    parser.add_argument("-tr", dest="trainer", required=True, metavar="TRAINER", help="that trains both stages")
    parser.add_argument(
        "-f", dest="folds", nargs="+", required=True, metavar="FOLD", help="folds of the first stage, averaged"
    )
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default cuda")
    parser.add_argument("--overwrite", action="store_true", help="redo finished cases")


def run(arguments: argparse.Namespace) -> int:
    """Predict every case that lacks it."""
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from tqdm import tqdm

    from nnunet_ssl.data.prediction import predict_previous_stage
    from nnunet_ssl.errors import UserError
    from nnunet_ssl.nnunet.folders import dataset_name, read_plans, require_configurations, require_variables

    preprocessed, results = require_variables("nnUNet_preprocessed", "nnUNet_results")
    name = dataset_name(arguments.dataset)
    plans = read_plans(preprocessed / name, arguments.plans)
    require_configurations(plans, [arguments.configuration])
    first = PlansManager(plans).get_configuration(arguments.configuration).previous_stage_name
    if first is None:
        raise UserError(f"{arguments.configuration} is no second stage of a cascade; nothing has to be predicted.")
    model = results / name / f"{arguments.trainer}__{arguments.plans}__{first}"
    for fold in arguments.folds:
        if not (model / f"fold_{fold}" / "checkpoint_final.pth").is_file():
            raise UserError(f"{model / f'fold_{fold}'} has no checkpoint_final.pth; train it first.")
    total, cases = predict_previous_stage(
        preprocessed / name, model, arguments.folds, arguments.configuration, torch.device(arguments.device),
        arguments.overwrite,
    )  # fmt: skip
    for _ in tqdm(cases, total=total, desc=f"unlabeled images, {first}"):
        pass
    print(f"{total} images segmented for {arguments.configuration}")
    return 0

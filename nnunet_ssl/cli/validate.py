"""Predict the validation cases of folds with the mean of several networks, to be compared with single ones.

Both networks of a training (--networks both), or several trainings: with other seeds, two supervised ones are the fair
baseline of two networks. Predictions are made as at the end of nnUNetv2_train, in the voxels of the original images;
nnunet-ssl compare ... --predictions NAME=DIR scores them beside those of trainings.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="e.g. 3d_fullres")
    parser.add_argument(
        "-f", dest="folds", nargs="+", required=True, metavar="FOLD", help="each is predicted by its own"
    )
    parser.add_argument("-tr", dest="trainers", nargs="+", required=True, metavar="TRAINER", help="averaged")
    parser.add_argument(
        "-p", dest="plans", nargs="+", default=["nnUNetPlans"], metavar="PLANS",
        help="one name for all, or one for each trainer (default nnUNetPlans)",
    )  # fmt: skip
    parser.add_argument(
        "--networks", choices=("first", "both"), default="first",
        help="of each training the plan's network, or the mean of it and the further one (default first)",
    )  # fmt: skip
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="whose weights")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default cuda")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR", help="for the label maps")


def run(arguments: argparse.Namespace) -> int:
    """Predict, and say how to compare."""
    import torch
    from tqdm import tqdm

    from nnunet_ssl.evaluation.averaging import Averaged, predict_validation
    from nnunet_ssl.evaluation.candidates import Query, pairs_of
    from nnunet_ssl.evaluation.output import check_output_folder
    from nnunet_ssl.nnunet.folders import dataset_name, require_variables

    raw, preprocessed, results = require_variables("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    name, configuration, folds = dataset_name(arguments.dataset), arguments.configuration, arguments.folds
    check_output_folder(arguments.output)
    # One plans name stands for all trainers, or one trainer for all plans: two trainings of one trainer have two.
    trainers = arguments.trainers * len(arguments.plans) if len(arguments.trainers) == 1 else arguments.trainers
    averaged = Averaged(
        Query(results / name, preprocessed / name, raw / name, configuration, folds),
        pairs_of(trainers, arguments.plans),
        arguments.networks == "both",
        arguments.checkpoint,
        torch.device(arguments.device),
    )
    total, cases = predict_validation(averaged, arguments.output)
    for _ in tqdm(cases, total=total, desc="validation cases", disable=None):
        pass
    print(f"{total} label maps in {arguments.output}; compare them with")
    print(
        f"nnunet-ssl compare -d {name} -c {configuration} -f {' '.join(folds)} -tr {trainers[0]} "
        f"-p {arguments.plans[0]} --predictions mean={arguments.output}"
    )
    return 0

"""Make a model folder of a further network of a training, for stock nnU-Net.

That is the second one of a dual training, or an averaged one. nnUNetv2_predict then uses it like any model, with -tr as
printed, and nnUNetv2_ensemble averages its predictions with those of the plan's network. Predicting needs nothing of
this package.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="e.g. 3d_fullres")
    parser.add_argument(
        "-tr", dest="trainer", required=True, metavar="TRAINER", help="the trainer, e.g. nnUNetTrainerDualNet"
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="the plans it trained with")
    parser.add_argument("-f", dest="folds", nargs="+", default=["0"], metavar="FOLD", help="folds, e.g. 0 1 2 or all")
    parser.add_argument(
        "-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="checkpoint file to export"
    )
    parser.add_argument(
        "--network", metavar="NAME", help="which one, e.g. partner; may be left out where there is one only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and say how to predict with it."""
    from nnunet_ssl.nnunet.folders import dataset_name, require_variables
    from nnunet_ssl.training.export import export_network

    (results,) = require_variables("nnUNet_results")
    dataset = dataset_name(arguments.dataset)
    source = results / dataset / f"{arguments.trainer}__{arguments.plans}__{arguments.configuration}"
    target = export_network(source, arguments.folds, arguments.checkpoint, arguments.network, arguments.overwrite)
    print(f"Written to {target}; predict with")
    print(
        f"nnUNetv2_predict -d {dataset} -c {arguments.configuration} -p {arguments.plans} "
        f"-tr {target.name.split('__')[0]} -f {' '.join(arguments.folds)} -chk {arguments.checkpoint} -i IN -o OUT"
    )
    return 0

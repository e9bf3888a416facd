"""Make a model folder of a further network of a training, for stock nnU-Net.

That is the second one of a dual training, or an averaged one. nnUNetv2_predict then uses it like any model, with -tr as
printed. With --network both, what is printed predicts with the mean of both networks: two folds of one folder where
they are alike, else two predictions and nnUNetv2_ensemble. Predicting needs nothing of this package.
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
        "--network", metavar="NAME",
        help="which one, e.g. partner, or both: the plan's network too; may be left out where there is one only",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and say how to predict with it."""
    from nnunet_ssl.nnunet.folders import dataset_name, require_variables
    from nnunet_ssl.training.export import BOTH, export_network

    (results,) = require_variables("nnUNet_results")
    dataset = dataset_name(arguments.dataset)
    source = results / dataset / f"{arguments.trainer}__{arguments.plans}__{arguments.configuration}"
    made = export_network(source, arguments.folds, arguments.checkpoint, arguments.network, arguments.overwrite)

    def command(trainer: str, folds: list[str], output: str) -> str:
        return (
            f"nnUNetv2_predict -d {dataset} -c {arguments.configuration} -p {arguments.plans} -tr {trainer} "
            f"-f {' '.join(folds)} -chk {arguments.checkpoint} -i IN -o {output}"
        )

    print(f"Written to {made.folder}; predict with")
    trainer = made.folder.name.split("__")[0]
    if arguments.network == BOTH and not made.both:
        for number, (name, folds) in enumerate(((arguments.trainer, arguments.folds), (trainer, made.folds)), start=1):
            print(command(name, folds, f"OUT_{number} --save_probabilities"))
        print("nnUNetv2_ensemble -i OUT_1 OUT_2 -o OUT")
    else:
        print(command(trainer, made.folds, "OUT"))
    return 0

"""Run the whole path on a small data set: plan, preprocess, train with and without unlabeled cases, compare.

Without --data it makes synthetic radiographs: 5 labeled, 60 unlabeled, 20 test cases. With --data it takes any nnU-Net
raw data set, hides the labels of all but --labeled training cases of nnU-Net's fold 0, and reports on the validation
cases of that fold. Networks are shrunk to what two CPU cores train in minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "-o", dest="folder", type=Path, default=Path("demo_output"), metavar="DIR", help="output folder"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="an nnU-Net raw data set, named like Dataset501_JSRT")
    parser.add_argument(
        "--labeled", type=int, metavar="N", help="with --data: cases that keep their labels (default 5)"
    )
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="length of each training (default 8)")
    parser.add_argument("--iterations", type=int, default=70, metavar="N", help="steps per epoch (default 70)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="as for nnUNetv2_train")


def run(arguments: argparse.Namespace) -> int:
    """Run it; the table comes last."""
    from nnunet_ssl.demo.run import Budget, run_demo
    from nnunet_ssl.errors import UserError

    if arguments.labeled is not None and arguments.data is None:
        raise UserError("--labeled goes with --data; the synthetic data set has 5 labeled cases.")
    budget = Budget(arguments.epochs, arguments.iterations, arguments.device)
    run_demo(arguments.folder.resolve(), arguments.data, 5 if arguments.labeled is None else arguments.labeled, budget)
    return 0

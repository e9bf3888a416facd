"""The command line: one file per verb, each with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys

from nnunet_ssl import __version__
from nnunet_ssl.errors import UserError

# Verb -> what it is for. The modules are imported when needed: torch takes seconds.
VERBS = {
    "env": "print the line that lets nnU-Net find the trainers",
    "trainers": "list the trainers and their hyper-parameters",
    "preprocess": "preprocess the images without labels",
    "cascade": "segment the unlabeled images with a cascade's first stage, for its second",
    "pseudo-label": "label the unlabeled images by trained models or from files, for nnUNetTrainerSelfTraining",
    "self-train": "train, label the unlabeled images and train anew on both, in rounds",
    "split": "append folds that hide the labels of some cases, for experiments",
    "configure": "write a plans file with hyper-parameters, or with a smaller network",
    "check": "put trainers to the test that all of this package pass, yours too",
    "train": "train in processes that torchrun starts, on several machines",
    "validate": "predict validation cases with the mean of several networks",
    "compare": "score trainers on held-out cases, and write tables and a report page",
    "postprocess": "remove small or separate objects and fill holes in predictions",
    "export": "make a model folder of a further network of a training",
    "demo": "run everything on a small data set and compare with supervised training",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="nnunet-ssl",
        description="Semi-supervised segmentation for nnU-Net. Training and prediction stay nnU-Net's own commands: "
        "nnUNetv2_train ... -tr nnUNetTrainerSemiTC.",
    )
    parser.add_argument("--version", action="version", version=f"nnunet-ssl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in VERBS.items():
        module = importlib.import_module(f"nnunet_ssl.cli.{verb.replace('-', '_')}")
        sub = verbs.add_parser(verb, help=purpose, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 some cases failed, 2 wrong use or bad input."""
    parsed = make_parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except UserError as error:
        print(f"nnunet-ssl {parsed.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1

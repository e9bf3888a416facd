"""Rows and columns of the accuracy tables, and the options that choose them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.training.trainer import SemiSupervisedTrainer


@dataclass(frozen=True)
class Variant:
    """One row of a table: a trainer, with settings of its own, perhaps on the partner network.

    Attributes:
        name: In tables.
        trainer: Short name.
        settings: Of this row alone, as for nnunet-ssl configure.
        partner_network: Whether the network is the one that DualNet pairs with the plans' own.
        longer: How many times as many epochs as the other rows.
        averaged: How many trainings, with seeds of their own, predict together.
        both: Whether the further network of each training predicts too.
    """

    name: str
    trainer: str
    settings: tuple[str, ...] = ()
    partner_network: bool = False
    longer: int = 1
    averaged: int = 1
    both: bool = False

    @property
    def predicts_together(self) -> bool:
        """Whether several networks do."""
        return self.both or self.averaged > 1

    @property
    def trainer_class(self) -> type[SemiSupervisedTrainer]:
        """Of the package."""
        return next(t for t in TRAINERS if t.__name__ == f"nnUNetTrainer{self.trainer}")

    def has_something_to_learn(self, labeled: str) -> bool:
        """Whether so many labels leave images without: with all of them SemiTC+ has those of other cases."""
        return labeled != "all" or not self.trainer_class.uses_unlabeled or self.trainer_class.transductive


@dataclass(frozen=True)
class Split:
    """One column of a table: one of nnU-Net's folds to report on, and a draw of the cases that keep their labels."""

    base: int
    draw: int

    @property
    def name(self) -> str:
        """As the columns of the tables say it."""
        return f"fold {self.base}" + (f", draw {self.draw}" if self.draw else "")


@dataclass(frozen=True)
class Training:
    """What a command trains: plans by name, and the number of a fold in splits_final.json."""

    variant: Variant
    plans: str
    fold: int


@dataclass(frozen=True)
class Cell:
    """A row's part of a column: the trainings whose networks predict, one after all or several together."""

    variant: Variant
    trainings: tuple[Training, ...]


METHODS = (
    *("SupTC", "SemiTC", "SemiTCPlus", "DualNet", "FDPL", "MeanTeacher", "UAMT", "ICT", "EM", "CPS", "FixMatch"),
    *("UniMatch", "BCP"),
)
# EM without its term is training on labels alone; with unlabeled images that come on top, on full batches.
_LABELS_ALONE = ("EM.entropy_weight=0", "EM.unlabeled_examples=added")
_ELASTIC = ("SupTC.consistency_weight=0", "SupTC.supervised_fraction=0")
# What a gain must be seen beside: each differs from Supervised by what some method does besides using images without
# labels.
CONTROLS = {
    "Supervised": Variant("Supervised", "Supervised"),
    "Longer": Variant("Supervised, twice as long", "Supervised", longer=2),
    "Restart": Variant("Supervised, restart", "EM", (*_LABELS_ALONE, "EM.supervised_fraction=0.5")),
    "Elastic": Variant("Supervised, moved twice", "SupTC", _ELASTIC),
    "Averaged": Variant("Supervised, averaged weights", "Supervised", ("averaged_decay=0.99",)),
    "Two": Variant("Supervised, two networks", "Supervised", averaged=2),
    "SupTC-consistency": Variant("SupTC without consistency", "SupTC", ("SupTC.consistency_weight=0",)),
    "SemiTC-consistency": Variant("SemiTC without consistency", "SemiTC", ("SemiTC.consistency_weight=0",)),
    "BCP-pseudo": Variant("BCP without pseudo-labels", "BCP", ("BCP.pseudo_label_weight=0",)),
}
ROWS = {
    **CONTROLS,
    **{name: Variant(name, name) for name in METHODS},
    **{f"{name}-both": Variant(f"{name}, both networks", name, both=True) for name in ("DualNet", "FDPL", "CPS")},
}


def parse_arguments(
    description: str, scales: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Variant]
) -> argparse.Namespace:
    """The options of a table's script; a scale sets those that are not given.

    Args:
        description: For --help.
        scales: Options by scale; every option that is None here must be in each.
        rows: What --rows may name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True,
        help="the raw data set, named like Dataset501_JSRT; of its images those in imagesTr are used",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for everything the script makes")
    parser.add_argument(
        "--scale", choices=scales, default="cpu",
        help="smoke: does everything work (minutes); cpu: small networks on small images; gpu: nnU-Net's own plans",
    )  # fmt: skip
    parser.add_argument("--labeled", nargs="+", help="how many training cases keep their labels; all: every one")
    parser.add_argument("--folds", type=int, nargs="+", help="nnU-Net's folds to report on")
    parser.add_argument(
        "--draws", type=int, nargs="+",
        help="seeds by which labeled cases are drawn from a fold's training cases: one per entry of --folds",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings; every split is trained with each")
    parser.add_argument("--rows", nargs="+", choices=rows, help="what to train")
    parser.add_argument("--downscale", type=float, help="coarser voxels by this factor; 1 for the plan's own")
    parser.add_argument("--patch-size", type=int, nargs="+", help="patch, in voxels")
    parser.add_argument("--batch-size", type=int, help="batch of the plans, labeled and unlabeled together")
    parser.add_argument("--base-features", type=int)
    parser.add_argument("--max-features", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--iterations", type=int, help="steps per epoch")
    parser.add_argument(
        "--set", dest="settings", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="further hyper-parameters, as for nnunet-ssl configure",
    )  # fmt: skip
    parser.add_argument(
        "--devices", nargs="+", default=["cpu"],
        help="one training at a time on each: cpu cpu shares the cores between two, cuda:0 cuda:1 takes two GPUs",
    )  # fmt: skip
    parser.add_argument("--test-images", type=Path, metavar="DIR", help="images of test cases, to report on them too")
    parser.add_argument("--test-labels", type=Path, metavar="DIR", help="their label maps")
    arguments = parser.parse_args()
    for name, value in scales[arguments.scale].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if len(arguments.draws) != len(arguments.folds):
        parser.error(f"--folds has {len(arguments.folds)} entries and --draws {len(arguments.draws)}; give as many.")
    for labeled in arguments.labeled:
        if not any(rows[row].has_something_to_learn(labeled) for row in arguments.rows):
            parser.error(f"--labeled {labeled} leaves nothing without a label for {', '.join(arguments.rows)}.")
    if (arguments.test_images is None) != (arguments.test_labels is None):
        parser.error("--test-images and --test-labels go together.")
    return arguments

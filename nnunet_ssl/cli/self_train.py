"""Self-training: train, label the unlabeled images, and train anew on labels and pseudo-labels, in rounds.

Several networks label the images of every round: each is trained on another part of the fold's labels (folds for them
are appended to splits_final.json), or from another seed where labels are few. What they agree on is kept, and what the
round before said alike. Later rounds learn from the pseudo-labels, too, and at the end nnUNetTrainerSelfTraining is
trained on the fold itself. Nobody learns from validation cases of the fold. Run it again after a stop: what is finished
is skipped. For another data set of images or other settings, choose another --name.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from nnunet_ssl.cli.pseudo_label import add_rule_arguments, check_rule
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnunet_ssl.cli.fold_data import FoldData
    from nnunet_ssl.training.rounds import Member, Rounds

# A member that trains on fewer labels than this knows too little to judge others.
_FEWEST_PER_MEMBER = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="e.g. 3d_fullres")
    parser.add_argument(
        "-f", dest="folds", nargs="+", default=["all"], metavar="FOLD",
        help="folds, each by itself (default all: every labeled case)",
    )  # fmt: skip
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default nnUNetPlans")
    parser.add_argument(
        "-tr", dest="trainer", default="nnUNetTrainerSupervised", metavar="TRAINER",
        help="of the first round (default nnUNetTrainerSupervised)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="how often images are labeled (default 2)")
    parser.add_argument("--members", type=int, default=3, metavar="N", help="networks that label them (default 3)")
    parser.add_argument(
        "--name", default="self", help="in the names of plans and pseudo-labels that are made (default self)"
    )
    add_rule_arguments(parser)
    parser.add_argument(
        "--fine-tune", type=int, default=0, metavar="EPOCHS",
        help="then train the result on the labels alone, with a tenth of the learning rate (default 0: do not)",
    )  # fmt: skip
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default cuda")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the commands, to run them yourself, e.g. on a cluster; the folds they need are made",
    )  # fmt: skip


def run(arguments: argparse.Namespace, run_command: Callable[..., None] | None = None) -> int:
    """Do one fold after the other.

    Args:
        arguments: Of the command line.
        run_command: Runs the words of a command; by default in a process of its own.
    """
    from nnunet_ssl.cli.fold_data import FoldData

    for option, value in (("--rounds", arguments.rounds), ("--members", arguments.members)):
        if value < 1:
            raise UserError(f"{option} must be at least 1, got {value}.")
    if arguments.fine_tune < 0:
        raise UserError(f"--fine-tune takes a number of epochs, got {arguments.fine_tune}.")
    check_rule(arguments)
    found = [FoldData.of(arguments.dataset, arguments.configuration, arguments.plans, f) for f in arguments.folds]
    if found[0].is_cascade:
        raise UserError(
            f"{arguments.configuration} needs its previous stage, which self-training does not label. Use 3d_fullres."
        )
    for data in found:
        rounds = _rounds(arguments, data)
        if arguments.dry_run:
            print("\n".join(" ".join(step.words) for step in rounds.steps() if not step.is_done))
        else:
            _run_fold(rounds, data, run_command)
    return 0


def _run_fold(rounds: Rounds, data: FoldData, run_command: Callable[..., None] | None) -> None:
    from nnunet_ssl.demo.commands import Commands
    from nnunet_ssl.evaluation.pseudo_label_report import describe, rounds_table
    from nnunet_ssl.files import write_atomically
    from nnunet_ssl.nnunet.trainers_folder import trainers_folder

    folder = data.results / "self_training" / f"{rounds.plans}_{rounds.name}__{rounds.configuration}"
    folder = folder / f"fold_{rounds.fold}"
    folder.mkdir(parents=True, exist_ok=True)
    if run_command is None:
        names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        variables = {"nnUNet_extTrainer": str(trainers_folder())} | {
            name: os.environ[name] for name in (*names, "nnUNet_extTrainer") if os.environ.get(name)
        }
        run_command = Commands(folder, variables).run
    print(f"Fold {rounds.fold}: {len(rounds.members)} members, {len(data.cases)} unlabeled cases", flush=True)
    manifests: list[dict[str, Any]] = []
    for step in rounds.steps():
        if step.is_done:
            print(f"done before: {' '.join(step.words)}", flush=True)
        else:
            run_command(*step.words)
        if step.made is not None:
            manifests.append(step.made.manifest())
            print("\n".join([*describe(manifests[-1]), f"-> {step.made.folder}"]), flush=True)
            write_atomically(str(folder / "rounds.md"), rounds_table(manifests).encode())
    print(f"\n{rounds_table(manifests)}\n-> {folder / 'rounds.md'}\nModel: {rounds.result}")


def _rounds(arguments: argparse.Namespace, data: FoldData) -> Rounds:
    from nnunet_ssl.training.rounds import Rounds

    rule = ["--certain-from", f"{arguments.certain_from:g}", "--agreement-from", f"{arguments.agreement_from:g}"]
    return Rounds(
        data.dataset, arguments.configuration, arguments.plans, arguments.trainer, data.fold, arguments.name,
        _members(arguments.members, data), arguments.rounds, arguments.device, rule, arguments.fine_tune,
        data.folder.parent, data.folder, data.results,
    )  # fmt: skip


def _members(wanted: int, data: FoldData) -> list[Member]:
    """Folds inside the fold, written to splits_final.json; seeds where labels are too few for these."""
    from nnunet_ssl.data.splits import NNUNET_NUM_FOLDS, inner_folds, load_or_make_splits, write_splits
    from nnunet_ssl.training.rounds import Member

    if wanted == 1:
        return [Member(data.fold)]
    # nnU-Net makes its five folds of five cases at least; ours must not stand in their place.
    too_few = not data.splits_file.is_file() and len(data.identifiers) < NNUNET_NUM_FOLDS
    if too_few or len(data.train) < _FEWEST_PER_MEMBER * wanted:
        return [Member(data.fold, seed) for seed in range(1, wanted + 1)]
    splits = load_or_make_splits(str(data.splits_file), data.identifiers)
    made = inner_folds(splits, data.fold, data.identifiers, wanted)
    new = [split for number, split in made if number >= len(splits)]
    if new or not data.splits_file.is_file():
        write_splits(str(data.splits_file), [*splits, *new])
    return [Member(number) for number, _ in made]

"""Give the unlabeled cases of a fold pseudo-labels, which nnUNetTrainerSelfTraining learns from.

Either trained models vote on every case (-tr, or --models), and what they agree on is kept; or label files of your own
are taken (--from), made by another model or with an interactive tool. Files and models must know nothing of the fold's
validation cases. Finished cases are skipped, so the command can be stopped and run again, and shared among machines
(--num-parts); the manifest is written once all cases are there, with a table and pictures of the best and worst.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.cli.fold_data import FoldData
    from nnunet_ssl.data.pseudo_labels import PseudoLabels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="e.g. 3d_fullres")
    parser.add_argument("-f", dest="fold", required=True, metavar="FOLD", help="whose unlabeled cases; number or all")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default nnUNetPlans")
    parser.add_argument("--name", default="round_1", help="of these pseudo-labels (default round_1)")
    voting = parser.add_argument_group("labels by trained models")
    voting.add_argument("-tr", dest="trainer", metavar="TRAINER", help="of the models, with the same -p and -c")
    voting.add_argument(
        "--folds", nargs="+", metavar="FOLD",
        help="of the models (default: the trained folds made inside of -f; else -f alone)",
    )  # fmt: skip
    voting.add_argument(
        "--models", nargs="+", metavar="DIR",
        help="instead of -tr: folders TRAINER__PLANS__CONFIGURATION/fold_N, in the data set's results or anywhere",
    )  # fmt: skip
    voting.add_argument("--previous", metavar="NAME", help="pseudo-labels of the round before, to score the change")
    add_rule_arguments(voting)
    voting.add_argument(
        "--may-know-validation-cases", action="store_true",
        help="take models that have learned from validation cases of the fold: scores on these mean nothing then",
    )  # fmt: skip
    voting.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default cuda")
    files = parser.add_argument_group("labels from files")
    files.add_argument(
        "--from", dest="source", type=Path, metavar="DIR",
        help="CASE and the file ending of dataset.json, in the geometry of the raw image; cases without are dropped",
    )  # fmt: skip
    files.add_argument(
        "--uncertain-value", type=int, metavar="V",
        help="what marks uncertain voxels in the files; the data set's ignore label does so anyway",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="begin anew, also with other settings")
    parser.add_argument(
        "--num-parts", type=int, default=1, metavar="N", help="share the cases among N runs of this command (default 1)"
    )
    parser.add_argument("--part-id", type=int, default=0, metavar="I", help="which share this run does, 0 to N - 1")


def add_rule_arguments(group: Any) -> None:
    """Declare what is kept."""
    group.add_argument(
        "--certain-from", type=float, default=0.7, metavar="P",
        help="a voxel counts from this mean probability on (default 0.7: not where one of three networks disagrees)",
    )  # fmt: skip
    group.add_argument(
        "--agreement-from", type=float, default=0.7, metavar="DICE",
        help="a case is kept, and a structure counts, from this agreement of the networks on, and with the round "
        "before (default 0.7)",
    )  # fmt: skip


def check_rule(arguments: argparse.Namespace) -> None:
    """Refuse thresholds that are no probabilities.

    Raises:
        UserError: Naming the option.
    """
    for option, value in (("certain", arguments.certain_from), ("agreement", arguments.agreement_from)):
        if not 0 <= value <= 1:
            raise UserError(f"--{option}-from is {value}; expected a number from 0 to 1.")


def run(arguments: argparse.Namespace) -> int:
    """Label the cases of this part; write the manifest where it was the last one. 1 if a file could not be taken."""
    from nnunet_ssl.cli.fold_data import FoldData
    from nnunet_ssl.data.pseudo_labels import PseudoLabels
    from nnunet_ssl.evaluation.pseudo_label_report import describe, write_report

    if not 0 <= arguments.part_id < arguments.num_parts:
        raise UserError(
            f"--part-id counts from 0 to --num-parts - 1: got {arguments.part_id} with {arguments.num_parts} parts."
        )
    if arguments.num_parts > 1 and arguments.overwrite:
        raise UserError("--overwrite would remove what other parts have made; remove the folder first, then run parts.")
    given = [arguments.trainer, arguments.models, arguments.source]
    if sum(value is not None for value in given) != 1:
        raise UserError("Give one of -tr TRAINER, --models DIR ... and --from DIR: where the labels come from.")
    check_rule(arguments)
    data = FoldData.of(arguments.dataset, arguments.configuration, arguments.plans, arguments.fold)
    labels = PseudoLabels.of(str(data.folder), data.fold, arguments.name)
    if arguments.source is not None:
        failed, known = _import(arguments, data, labels)
    else:
        failed, known = [], _vote(arguments, data, labels)
    for error in failed:
        print(f"failed: {error}")
    if failed:
        print("Mend or remove these files and run the same command again; finished cases are skipped.")
        return 1
    names = [case.identifier for case in data.cases]
    manifest = labels.finish(names, data.preprocessing, known)
    if manifest is None:
        print(f"Not all of {len(names)} cases are there yet; the last part writes the manifest. -> {labels.folder}")
        return 0
    write_report(labels, manifest, data.cases, data.spacing)
    print("\n".join(describe(manifest)))
    print(f"-> {labels.folder}")
    return 0


def _vote(arguments: argparse.Namespace, data: FoldData, labels: PseudoLabels) -> set[str]:
    import torch
    from tqdm import tqdm

    from nnunet_ssl.data.pseudo_labels import PseudoLabels
    from nnunet_ssl.evaluation.pseudo_labels import Ensemble, Rule, check_images, check_knowledge, label_cases

    if data.is_cascade:
        raise UserError(
            f"{arguments.configuration} needs its previous stage, which is not voted on. Label the cases with "
            f"3d_fullres, or bring labels with --from."
        )
    folds = _models(arguments, data)
    known = check_knowledge(
        folds, data.splits_file, data.identifiers, data.reported, arguments.may_know_validation_cases
    )
    previous, cases = None, data.cases[arguments.part_id :: arguments.num_parts]
    if arguments.previous is not None:
        previous = PseudoLabels.of(str(data.folder), data.fold, arguments.previous)
        known |= set(previous.manifest()["learned_from"])
        missing = [c.identifier for c in data.cases if not previous.file(c.identifier).is_file()]
        if missing or previous == labels:
            raise UserError(
                f"--previous {arguments.previous}: expected other pseudo-labels of all cases; "
                f"{len(missing)} are missing in {previous.folder}."
            )
    check_images(data.cases, data.preprocessing, str(data.folder))
    ensemble = Ensemble(folds, torch.device(arguments.device))
    ensemble.check(data.preprocessing, data.label_manager.num_segmentation_heads)
    rule = Rule(arguments.certain_from, arguments.agreement_from)
    settings = {
        "models": [f"{fold.parent.name}/{fold.name}" for fold in folds],
        "certain_from": rule.certain_from,
        "agreement_from": rule.agreement_from,
        "previous": arguments.previous,
        "may_know_validation_cases": arguments.may_know_validation_cases,
    }
    labels.start(settings, arguments.overwrite)
    total, running = label_cases(labels, cases, ensemble, data.dataset_json, rule, previous, data.patch_size)
    for _ in tqdm(running, total=total, desc=f"pseudo-labels, {len(folds)} networks", disable=None):
        pass
    print(f"{total} cases labeled by {len(folds)} networks, {len(cases) - total} were there already")
    return known


def _models(arguments: argparse.Namespace, data: FoldData) -> list[Path]:
    if arguments.models is not None:
        # What lies in the data set's results is meant first: its name is no path.
        folds = [data.results / word if (data.results / word).is_dir() else Path(word) for word in arguments.models]
    else:
        model = data.results / f"{arguments.trainer}__{arguments.plans}__{arguments.configuration}"
        inside = [model / f"fold_{number}" for number in data.inner_folds()]
        trained = [fold for fold in inside if (fold / "checkpoint_final.pth").is_file()]
        folds = [model / f"fold_{number}" for number in arguments.folds or ()] or trained
        folds = folds or [model / f"fold_{arguments.fold}"]
    for fold in folds:
        if not (fold / "checkpoint_final.pth").is_file():
            raise UserError(f"{fold} has no checkpoint_final.pth; train it first, or choose others with --folds.")
    return folds


def _import(arguments: argparse.Namespace, data: FoldData, labels: PseudoLabels) -> tuple[list[str], set[str]]:
    from tqdm import tqdm

    from nnunet_ssl.data.imported_labels import find_label_files, import_case

    raw = data.raw_images()
    unlabeled = {case.identifier for case in data.cases}
    ending = data.dataset_json["file_ending"]
    files = find_label_files(arguments.source, ending, unlabeled, data.train, data.reported)
    settings = {"from": str(arguments.source.resolve()), "uncertain_value": arguments.uncertain_value}
    labels.start(settings, arguments.overwrite)
    failed, cases = [], data.cases[arguments.part_id :: arguments.num_parts]
    for case in tqdm(cases, desc="label files", disable=None):
        try:
            import_case(
                labels, case, raw.get(case.identifier, ()), files.get(case.identifier), data.plans_manager,
                arguments.configuration, data.dataset_json, arguments.uncertain_value,
            )  # fmt: skip
        except UserError as error:
            failed.append(str(error))
    print(f"{len(files)} label files for {len(data.cases)} unlabeled cases, {len(failed)} failed")
    return failed, set()

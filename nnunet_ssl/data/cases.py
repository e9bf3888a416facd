"""Which cases of a training are unlabeled.

Nothing in this module opens an image or a label, but for labeled cases with ignored voxels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_ssl.data.preprocessing import (
    TEST_SUFFIX,
    UNLABELED_SUFFIX,
    check_same_preprocessing,
    preprocessed_cases,
)
from nnunet_ssl.data.raw_images import TEST_FOLDER, UNLABELED_FOLDER, raw_identifiers
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.errors import UserError

# Why the images of a fold's validation cases count as unlabeled, in transductive trainers.
TRANSDUCTIVE = "validation image"


@dataclasses.dataclass(frozen=True)
class UnlabeledCase:
    """One image without a label: where its preprocessed file lies, and why it counts as unlabeled."""

    identifier: str
    folder: str
    source: str


def find_unlabeled_cases(
    preprocessed_folder: str,
    raw_folder: str | None,
    preprocessing: dict[str, Any],
    split: Mapping[str, Sequence[str]],
    transductive: bool,
    partly_annotated: Sequence[str] = (),
) -> tuple[list[UnlabeledCase], list[str]]:
    """Collect the unlabeled cases of a training.

    Args:
        preprocessed_folder: nnU-Net's folder of the configuration, ``<dataset>/<data_identifier>``.
        raw_folder: The raw data set, if it is on this machine: then images that were removed from it do not count.
        preprocessing: What the plan says of preprocessing, see ``preprocessing.preprocessing_settings``.
        split: ``train``, ``val`` and ``unlabeled`` identifiers of the fold.
        transductive: Whether the images of the fold's validation cases and of imagesTs count as unlabeled too.
        partly_annotated: Labeled cases with ignored voxels: their images count as unlabeled too.

    Returns:
        The cases, sorted by identifier, at least one; and notes for the log.

    Raises:
        UserError: Where there are none, some are not preprocessed yet, or a case is also labeled or reported on.
    """
    notes: list[str] = []
    unlabeled = _from_folder(preprocessed_folder + UNLABELED_SUFFIX, raw_folder, UNLABELED_FOLDER, preprocessing, notes)
    cases = unlabeled + _from_fold(preprocessed_folder, split["unlabeled"], "hidden label")
    # With fold "all" nnU-Net validates on its training cases; these are labeled.
    reported = sorted(set(split["val"]) - set(split["train"]))
    if transductive:
        cases += _from_fold(preprocessed_folder, reported, TRANSDUCTIVE)
        cases += _from_folder(preprocessed_folder + TEST_SUFFIX, raw_folder, TEST_FOLDER, preprocessing, notes)
    if not cases and not partly_annotated:
        raise UserError(
            "No unlabeled case. There are three ways to add some: put images into imagesUn/ of the raw data set, or "
            "list them in dataset.json, and run 'nnunet-ssl preprocess'; hide labels for an experiment with "
            "'nnunet-ssl split' and train the fold it prints; or train nnUNetTrainerSemiTCPlus, which uses the images "
            "of the validation cases and of imagesTs/."
        )
    _check_disjoint(cases, split["train"], "labeled")
    cases += _from_fold(preprocessed_folder, partly_annotated, "partly annotated")
    if not transductive:
        _check_disjoint(cases, reported, "validation")
    return sorted(cases, key=lambda case: case.identifier), notes


def cases_with_ignored_voxels(dataset: nnUNetBaseDataset, ignore_label: int | None) -> list[str]:
    """The labeled cases of a data set in which some voxels are not annotated; none without an ignore label."""
    if ignore_label is None:
        return []
    # Slice by slice: of most cases the first ones decide.
    segmentations = {identifier: dataset.load_case(identifier)[1] for identifier in dataset.identifiers}
    return [i for i, s in segmentations.items() if any((s[:, z] == ignore_label).any() for z in range(s.shape[1]))]


def hidden_cases(preprocessed_folder: str, fold: int | str) -> list[str]:
    """What a fold of splits_final.json lists under ``unlabeled``; nothing where there is no such fold."""
    splits_file = Path(preprocessed_folder).parent / "splits_final.json"
    if fold == "all" or not splits_file.is_file():
        return []
    splits = read_splits(str(splits_file))
    return splits[int(fold)].get("unlabeled", []) if int(fold) < len(splits) else []


def _from_fold(folder: str, identifiers: Sequence[str], source: str) -> list[UnlabeledCase]:
    missing = [i for i in identifiers if not os.path.isfile(os.path.join(folder, i + ".b2nd"))]
    if missing:
        raise UserError(
            f"{len(missing)} cases of the fold ({source}) are not preprocessed in {folder}, e.g. {missing[0]}. "
            f"Run nnUNetv2_preprocess for this configuration."
        )
    return [UnlabeledCase(i, folder, source) for i in identifiers]


def _from_folder(
    folder: str, raw_folder: str | None, raw_name: str, preprocessing: dict[str, Any], notes: list[str]
) -> list[UnlabeledCase]:
    identifiers = preprocessed_cases(folder)
    raw = raw_identifiers(raw_folder, raw_name)
    command = "nnunet-ssl preprocess" + (" --test-images" if raw_name == TEST_FOLDER else "")
    if not identifiers:
        if raw:
            raise UserError(
                f"{raw_name} holds {len(raw)} images, but none is preprocessed in {folder}. Run '{command} -d DATASET "
                f"-c CONFIGURATION' with the plans you train with."
            )
        return []
    check_same_preprocessing(folder, preprocessing)
    if raw is not None:
        in_raw = set(raw)
        missing, removed = sorted(in_raw - set(identifiers)), sorted(set(identifiers) - in_raw)
        if missing:
            notes.append(
                f"WARNING: {len(missing)} of {len(raw)} images of {raw_name} are not preprocessed and not used, e.g. "
                f"{missing[0]}. Run '{command}' again."
            )
        if removed:
            notes.append(f"{len(removed)} images in {folder} are no longer in {raw_name} and not used.")
        identifiers = [i for i in identifiers if i in in_raw]
    return [UnlabeledCase(i, folder, raw_name) for i in identifiers]


def _check_disjoint(cases: Sequence[UnlabeledCase], others: Sequence[str], meaning: str) -> None:
    sources: dict[str, str] = {}
    for case in cases:
        if case.identifier in sources:
            raise UserError(
                f"Case {case.identifier} counts as unlabeled twice: {sources[case.identifier]} and {case.source}. "
                f"Rename or remove one."
            )
        sources[case.identifier] = case.source
    both = sorted(set(sources) & set(others))
    if both:
        raise UserError(
            f"{len(both)} {meaning} cases of the fold are unlabeled cases too, e.g. {both[0]} ({sources[both[0]]}). "
            f"Remove them from one of the two; to learn from validation images on purpose use nnUNetTrainerSemiTCPlus."
        )

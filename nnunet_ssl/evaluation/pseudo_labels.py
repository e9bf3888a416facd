"""Pseudo-labels by an ensemble: networks vote on unlabeled images, and their agreement says which labels to keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.prediction import TrainedModel
from nnunet_ssl.data.preprocessing import check_same_preprocessing, preprocessing_settings
from nnunet_ssl.data.pseudo_labels import PseudoLabels, as_stored, likeliest
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.agreement import Structures, agreement, decide, uncertain_voxels, voxels_of
from nnunet_ssl.evaluation.metrics import structures_of
from nnunet_ssl.nnunet.folders import read_json
from nnunet_ssl.training.run_record import RECORD_FILE

_FOLD = "fold_"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is kept of the ensemble's labels.

    Attributes:
        certain_from: A voxel counts from this probability on. With three networks, of which one that is sure disagrees
            with two that are, it is 2/3: less than the default.
        agreement_from: A structure counts from this Dice coefficient on, and so does a case, by all its structures.
    """

    certain_from: float = 0.7
    agreement_from: float = 0.7


class Ensemble:
    """The networks of trained folds.

    Args:
        folds: Their folders, TRAINER__PLANS__CONFIGURATION/fold_N.
        device: To predict on.
    """

    def __init__(self, folds: Sequence[Path], device: torch.device) -> None:
        self._models = [TrainedModel(fold.parent, [fold.name.removeprefix(_FOLD)], device) for fold in folds]
        self.checkpoints = [file for model in self._models for file in model.checkpoints]
        self.labels = self._models[0].labels

    def check(self, preprocessing: Mapping[str, Any], num_heads: int) -> None:
        """Refuse models that do not fit the images or the labels.

        Args:
            preprocessing: Of the images, see ``preprocessing.preprocessing_settings``.
            num_heads: Of the data set.

        Raises:
            UserError: Naming the model.
        """
        for model in self._models:
            settings = preprocessing_settings(model.plans, model.configuration_name)
            different = sorted(name for name, value in preprocessing.items() if settings[name] != value)
            if different or model.labels.num_segmentation_heads != num_heads:
                what = f"for other images (different: {', '.join(different)})" if different else "for other labels"
                raise UserError(f"{model.folder} was trained {what}. Choose models of the same plans and labels.")

    def vote(self, image: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """What the networks make of an image.

        Args:
            image: (C, *S), preprocessed.

        Returns:
            The mean of their probabilities (K, *S), and the label map (*S) of each. A single network votes by what it
            makes of the image and of its mirror images; alone, where it may not be mirrored.
        """
        data = torch.from_numpy(image).float()
        if len(self._models) == 1:
            (model,) = self._models
            votes = [self._label_map(p) for p in model.mirrored_probabilities(data)]
            return model.probabilities(data).numpy(), votes
        total, votes = torch.zeros(()), []
        for model in self._models:
            probabilities = model.probabilities(data)
            votes.append(self._label_map(probabilities))
            total = total + probabilities
        return (total / len(self._models)).numpy(), votes

    def _label_map(self, probabilities: torch.Tensor) -> np.ndarray:
        return np.asarray(self.labels.convert_probabilities_to_segmentation(probabilities)).astype(np.int16)

    def label(
        self, image: np.ndarray, structures: Structures, rule: Rule, previous: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The pseudo-label of an image.

        Args:
            image: (C, *S), preprocessed.
            structures: Name to label or region.
            rule: What is kept.
            previous: The stored map (*S) of the round before.

        Returns:
            The map (*S) as it is stored, and its scores, fit for JSON.
        """
        probabilities, votes = self.vote(image)
        labels = self._label_map(torch.from_numpy(probabilities))
        agreed = agreement(votes, structures) if len(votes) > 1 else None
        unchanged = None
        if previous is not None:
            unchanged = agreement([likeliest(previous), labels], structures, previous >= 0)
        decision = decide(agreed, unchanged, rule.agreement_from, bool(labels.any()))
        before = [likeliest(previous)] if previous is not None else []
        uncertain = uncertain_voxels(probabilities, self.labels.has_regions, rule.certain_from)
        uncertain |= voxels_of(decision.doubted, [labels, *votes, *before], structures)
        scores = {
            "kept": decision.kept,
            "why": decision.why,
            "agreement": _fit_for_json(agreed),
            "unchanged": _fit_for_json(unchanged),
            "uncertain": round(float(uncertain.mean()), 6),
        }
        return as_stored(labels, uncertain), scores


def label_cases(
    pseudo_labels: PseudoLabels,
    cases: Sequence[UnlabeledCase],
    ensemble: Ensemble,
    dataset_json: Mapping[str, Any],
    rule: Rule,
    previous: PseudoLabels | None,
    patch_size: Sequence[int],
) -> tuple[int, Iterator[str]]:
    """Label unlabeled cases; finished ones are skipped, unless an image or a model is newer.

    Args:
        pseudo_labels: Where they go; started.
        cases: Which.
        ensemble: By whom.
        dataset_json: nnU-Net's.
        rule: What is kept.
        previous: Those of the round before.
        patch_size: Of the plans, in voxels.

    Returns:
        How many there are to do, and their identifiers as they end.
    """
    structures = structures_of(dataset_json["labels"])

    def sources(case: UnlabeledCase) -> list[Path]:
        before = [] if previous is None else [previous.file(case.identifier)]
        return [_image_file(case), *ensemble.checkpoints, *before]

    def label(case: UnlabeledCase) -> str:
        image = blosc2.open(urlpath=str(_image_file(case)), mode="r")[:]
        before = None if previous is None else previous.load(case.identifier)[:]
        pseudo_labels.write_case(case.identifier, *ensemble.label(image, structures, rule, before), patch_size)
        return case.identifier

    todo = [case for case in cases if not pseudo_labels.is_done(case.identifier, sources(case))]
    return len(todo), map(label, todo)


def check_knowledge(
    folds: Sequence[Path], splits_file: Path, identifiers: Collection[str], reported: Collection[str], allowed: bool
) -> set[str]:
    """Refuse models that know validation cases.

    Args:
        folds: Folders of trained folds.
        splits_file: For models of nnU-Net's own trainer, which records no names.
        identifiers: All labeled cases.
        reported: Validation cases of the fold whose unlabeled cases are to get labels.
        allowed: Do not refuse.

    Returns:
        All cases whose labels the models have learned from.

    Raises:
        UserError: Naming a model and a case.
    """
    known: set[str] = set()
    for fold in folds:
        labels, images = _knowledge(fold, splits_file, identifiers)
        for what, cases in (("labels", labels), ("images", images)):
            both = sorted(cases & set(reported))
            if both and not allowed:
                raise UserError(
                    f"{fold} has learned from the {what} of {len(both)} validation cases of the fold, e.g. {both[0]}. "
                    f"What is measured on them would be too good. Choose folds that were made inside this one "
                    f"(nnunet-ssl self-train makes them), or add --may-know-validation-cases."
                )
        known |= labels
    return known


def check_images(cases: Sequence[UnlabeledCase], preprocessing: dict[str, Any], own_folder: str) -> None:
    """Refuse images that were preprocessed with other settings.

    Raises:
        UserError: Naming the settings.
    """
    for folder in {case.folder for case in cases} - {own_folder}:
        check_same_preprocessing(folder, preprocessing)


def _knowledge(fold: Path, splits_file: Path, identifiers: Collection[str]) -> tuple[set[str], set[str]]:
    """Cases whose labels, and cases whose images alone, a training has learned from."""
    record_file, number = fold / RECORD_FILE, fold.name.removeprefix(_FOLD)
    if record_file.is_file():
        record = read_json(record_file, "")
        return {*record["labeled"], *record.get("pseudo_labels_know", ())}, set(record["unlabeled"])
    if number == "all":
        return set(identifiers), set()
    splits = read_splits(str(splits_file))
    if not number.isdecimal() or int(number) >= len(splits):
        raise UserError(f"{fold} has no {RECORD_FILE} and is no fold of {splits_file}: nobody knows what it learned.")
    return set(splits[int(number)]["train"]), set()


def _image_file(case: UnlabeledCase) -> Path:
    return Path(case.folder) / f"{case.identifier}.b2nd"


def _fit_for_json(values: Mapping[str, float] | None) -> dict[str, float | None] | None:
    if values is None:
        return None
    return {name: None if math.isnan(value) else round(value, 6) for name, value in values.items()}

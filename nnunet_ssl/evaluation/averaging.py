"""Predictions of a fold's validation cases by the mean of several networks, beside those of single trainings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor

from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.candidates import (
    Candidate,
    Query,
    check_labeled_set,
    fold_of,
    record_of,
    require_same_cases,
)
from nnunet_ssl.files import write_atomically
from nnunet_ssl.nnunet.folders import read_dataset_json, read_json
from nnunet_ssl.training.checkpoint import COMPANIONS, STATE_KEY
from nnunet_ssl.training.export import BOTH, name_of_network

RECORD_FILE = "nnunet_ssl_validation.json"


class Averaged(NamedTuple):
    """Whose networks are averaged.

    query: data set, configuration, folds; pairs: trainers and plans; both: whether a further network of each counts;
    checkpoint: file name; device: to predict on.
    """

    query: Query
    pairs: list[tuple[str, str]]
    both: bool
    checkpoint: str
    device: torch.device


def predict_validation(averaged: Averaged, output: Path) -> tuple[int, Iterator[str]]:
    """Predict the validation cases of folds as nnU-Net's own validation does, with the mean of networks' logits.

    Images are read as they are preprocessed, labels are not opened. Everything is checked before anything is written.

    Args:
        averaged: Whose networks; every fold is predicted by those that were trained on it.
        output: Made if missing; gets a label map per case, nnU-Net's dataset.json, and what they come from.

    Returns:
        How many cases there are, and their identifiers as they end.

    Raises:
        UserError: Where a training is missing, learned from other labels than its fold now has, or does not fit the
            others.
    """
    query = averaged.query
    splits = read_splits(str(query.preprocessed / "splits_final.json"))
    models = [query.model(*pair) for pair in averaged.pairs]
    cases: dict[str, str] = {}
    seen: dict[str, str] = {}
    for fold in query.folds:
        split = fold_of(splits, fold)
        for model in models:
            folder = model / f"fold_{fold}"
            if not (folder / averaged.checkpoint).is_file():
                raise UserError(f"{folder} has no {averaged.checkpoint}. Train the fold first, or name one with -chk.")
            record = record_of(folder)
            check_labeled_set(model.name, fold, folder, record, split)
            seen |= {case: why for case, why in record.get("unlabeled", {}).items() if case in split["val"]}
        twice = sorted(set(split["val"]) & set(cases))
        if twice:
            raise UserError(f"{twice[0]} is held out in folds {cases[twice[0]]} and {fold}; predict one of them.")
        cases |= dict.fromkeys(split["val"], fold)
    first = _networks_of_fold(averaged, models, query.folds[0])
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(models[0] / "dataset.json", output / "dataset.json")
    told = {
        "mean of": [f"{network.model.name}, {network.name}" for network in first],
        "checkpoint": averaged.checkpoint.removeprefix("checkpoint_").removesuffix(".pth"),
        "folds": cases,
        "unlabeled": seen,
    }
    write_atomically(str(output / RECORD_FILE), json.dumps(told, indent=2).encode())

    def predict() -> Iterator[str]:
        for fold in query.folds:
            networks = first if fold == query.folds[0] else _networks_of_fold(averaged, models, fold)
            for case in (case for case, held_out_in in cases.items() if held_out_in == fold):
                _predict_case(networks, query.preprocessed, case, output / case)
                yield case

    return len(cases), predict()


def candidates_beside(trained: Candidate, folders: Mapping[str, Path], ending: str) -> list[Candidate]:
    """Folders of predictions of the validation cases that trainings are compared on.

    Args:
        trained: One of these trainings.
        folders: By the name that is shown.
        ending: Of the files of label maps.

    Raises:
        UserError: Where a folder has other cases, or predictions of other folds.
    """
    candidates = []
    for name, folder in folders.items():
        found = {file.name[: -len(ending)]: file for file in folder.glob(f"*{ending}")}
        require_same_cases(f"{name} ({folder})", found, trained.name, trained.predictions)
        record = read_json(folder / RECORD_FILE, "") if (folder / RECORD_FILE).is_file() else {}
        other = [case for case, fold in record.get("folds", {}).items() if trained.folds.get(case) != fold]
        if other:
            raise UserError(
                f"{name} ({folder}): {other[0]} was predicted by networks of fold {record['folds'][other[0]]}, but of "
                f"fold {trained.folds.get(other[0])} by {trained.name}. Run nnunet-ssl validate for the same folds."
            )
        settings = {"mean of": "; ".join(record["mean of"])} if record else {}
        predictions = {case: found[case] for case in trained.predictions}
        checkpoint, seen = record.get("checkpoint", "given"), record.get("unlabeled", {})
        candidates.append(Candidate(name, predictions, dict(trained.folds), checkpoint, settings, {}, seen))
    return candidates


class _Network(NamedTuple):
    """One network of a trained fold, ready to predict."""

    model: Path
    name: str
    predictor: nnUNetPredictor


def _networks_of_fold(averaged: Averaged, models: Sequence[Path], fold: str) -> list[_Network]:
    networks = []
    for model in models:
        networks.append(_Network(model, "network", _plans_network(averaged, model, fold)))
        if averaged.both:
            networks.append(_further_network(averaged, model, fold, networks[-1].predictor))
    first = networks[0].predictor
    for network in networks:
        other = network.predictor
        if other.configuration_manager.data_identifier != first.configuration_manager.data_identifier:
            raise UserError(
                f"{network.model} reads the preprocessed images {other.configuration_manager.data_identifier}, "
                f"{models[0]} reads {first.configuration_manager.data_identifier}: their voxels differ. Average such "
                f"models with nnUNetv2_ensemble."
            )
        labels = [read_dataset_json(m / "dataset.json")["labels"] for m in (network.model, models[0])]
        if labels[0] != labels[1]:
            raise UserError(f"{network.model} has the labels {labels[0]}, {models[0]} has {labels[1]}.")
    return networks


def _predictor(device: torch.device) -> nnUNetPredictor:
    return nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)


def _plans_network(averaged: Averaged, model: Path, fold: str) -> nnUNetPredictor:
    predictor = _predictor(averaged.device)
    predictor.initialize_from_trained_model_folder(str(model), (fold,), averaged.checkpoint)
    return predictor


def _further_network(averaged: Averaged, model: Path, fold: str, beside: nnUNetPredictor) -> _Network:
    file = model / f"fold_{fold}" / averaged.checkpoint
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    name = name_of_network(file, checkpoint, BOTH)
    companion: Mapping[str, Any] = checkpoint[STATE_KEY][COMPANIONS][name]
    architecture = companion["architecture"]
    plans, configuration, dataset_json = beside.plans_manager, beside.configuration_manager, beside.dataset_json
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        determine_num_input_channels(plans, configuration, dataset_json),
        beside.label_manager.num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )
    predictor = _predictor(averaged.device)
    predictor.manual_initialization(
        network, plans, configuration, [companion["weights"]], dataset_json, beside.trainer_name,
        beside.allowed_mirroring_axes,
    )  # fmt: skip
    return _Network(model, name, predictor)


def _predict_case(networks: Sequence[_Network], preprocessed: Path, case: str, output: Path) -> None:
    """The mean of the logits, as nnU-Net averages folds, then into the voxels of the original image."""
    first = networks[0].predictor
    folder = preprocessed / first.configuration_manager.data_identifier
    total: Tensor | None = None
    for network in networks:
        logits = network.predictor.predict_logits_from_preprocessed_data(_input(network, folder, case))
        total = logits if total is None else total + logits
    assert total is not None
    if len(networks) > 1:
        total /= len(networks)
    properties = load_pickle(str(folder / f"{case}.pkl"))
    # Where the structures lie: known from labels.
    properties.pop("class_locations", None)
    export_prediction_from_logits(
        total, properties, first.configuration_manager, first.plans_manager, first.dataset_json, str(output)
    )


def _input(network: _Network, folder: Path, case: str) -> Tensor:
    """A preprocessed image (C, *S), in the second stage of a cascade with the labels of the first."""
    image = torch.from_numpy(blosc2.open(urlpath=str(folder / f"{case}.b2nd"), mode="r")[:])
    predictor = network.predictor
    before = predictor.configuration_manager.previous_stage_name
    if before is None:
        return image
    trainer, plans, configuration = network.model.name.split("__")
    stage = network.model.with_name(f"{trainer}__{plans}__{before}") / "predicted_next_stage" / configuration
    if not (stage / f"{case}.b2nd").is_file():
        raise UserError(
            f"{stage} has no segmentation of {case}. Validate the folds of {before} (nnUNetv2_train --val)."
        )
    previous = PreviousStage(str(stage), tuple(predictor.label_manager.foreground_labels))
    return torch.cat([image, previous.one_hot(torch.from_numpy(previous.load(case)[:]))])

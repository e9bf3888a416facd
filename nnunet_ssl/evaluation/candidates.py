"""What is compared: predictions of trainers, and the checks that make the comparison fair."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.data.cases import TRANSDUCTIVE
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.folders import read_dataset_json, read_json
from nnunet_ssl.training.run_record import RECORD_FILE

NOT_RECORDED = " (not recorded)"
_SPLIT_LINE = re.compile(r"This (?:random 80:20 )?split has (\d+) training and (\d+) validation cases")
# What debug.json of any nnU-Net trainer says about a run.
_DEBUG_KEYS = ("num_epochs", "num_iterations_per_epoch", "batch_size", "initial_lr", "weight_decay", "torch_version")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One column of the comparison.

    Attributes:
        name: Shown.
        predictions: Case to the file of its predicted label map.
        folds: Case to the fold whose model predicted it; "" for a test set.
        checkpoint: Which weights predicted: "final" or "best", with "(not recorded)" where nothing says so but the
            user, as with nnU-Net's own trainer; "given" for folders of predictions.
        settings: What the training ran with, by name; empty where that is not known.
        curves: Fold to the curves of the training, by name, a value per epoch.
        images_seen: Reported cases whose images the training learned from without labels, and why they were unlabeled.
    """

    name: str
    predictions: dict[str, Path]
    folds: dict[str, str]
    checkpoint: str
    settings: dict[str, Any]
    curves: dict[str, dict[str, list[float]]]
    images_seen: dict[str, str] = dataclasses.field(default_factory=dict)

    def remark(self) -> str:
        """What a reader must know about the reported images; empty where there is nothing."""
        if not self.images_seen:
            return ""
        count = f"the images, not the labels, of {len(self.images_seen)} of the {len(self.predictions)} reported cases"
        if set(self.images_seen.values()) == {TRANSDUCTIVE}:
            return f"{self.name} learned from {count}, on purpose (transductive)."
        return f"WARNING: {self.name} learned from {count}."


@dataclasses.dataclass(frozen=True)
class Reference:
    """The truth that all candidates are compared with.

    Attributes:
        dataset_json: nnU-Net's description of the data.
        labels: Case to the file of its label map.
        images: Case to the files of its channels; empty where no images were given.
    """

    dataset_json: dict[str, Any]
    labels: dict[str, Path]
    images: dict[str, list[Path]]


@dataclasses.dataclass(frozen=True)
class Query:
    """Which trainings are meant.

    Attributes:
        results: The data set's folder in nnUNet_results.
        preprocessed: Its folder in nnUNet_preprocessed.
        raw: Its folder in nnUNet_raw.
        configuration: E.g. "2d".
        folds: As given to nnUNetv2_train.
        best: Whether the predictions come from checkpoint_best (nnUNetv2_train --val_best).
    """

    results: Path
    preprocessed: Path
    raw: Path
    configuration: str
    folds: Sequence[str]
    best: bool = False

    def model(self, trainer: str, plans: str) -> Path:
        """The folder of a trained model.

        Raises:
            UserError: Where there is none, naming those there are.
        """
        folder = self.results / f"{trainer}__{plans}__{self.configuration}"
        if not folder.is_dir():
            known = sorted(p.name for p in self.results.glob("*__*__*")) if self.results.is_dir() else []
            raise UserError(f"{folder} does not exist; trained models: {', '.join(known) or 'none'}.")
        return folder


def pairs_of(trainers: Sequence[str], plans: Sequence[str]) -> list[tuple[str, str]]:
    """Every trainer with its plans.

    Args:
        trainers: Class names.
        plans: One name for all, or one for each trainer.

    Raises:
        UserError: Where they do not fit each other, or one pair is there twice.
    """
    if len(plans) not in (1, len(trainers)):
        raise UserError(f"-p has {len(plans)} names for {len(trainers)} trainers; give one, or one for each.")
    pairs = list(zip(trainers, plans if len(plans) > 1 else list(plans) * len(trainers)))
    if len(set(pairs)) < len(pairs):
        raise UserError("The same trainer with the same plans was given twice.")
    return pairs


def find_trained(query: Query, trainers: list[str], plans: Sequence[str]) -> tuple[list[Candidate], Reference]:
    """The validation predictions of trainings, checked to be comparable.

    Args:
        query: Data set, configuration, folds.
        trainers: Class names; the first is the reference.
        plans: One name for all, or one for each trainer.

    Raises:
        UserError: Naming what is missing or what differs.
    """
    pairs = pairs_of(trainers, plans)
    splits = read_splits(str(query.preprocessed / "splits_final.json"))
    candidates = []
    for trainer, plan in pairs:
        name = trainer if trainers.count(trainer) == 1 else f"{trainer} ({plan})"
        candidates.append(_trained_candidate(name, query.model(trainer, plan), query, splits))
    dataset_json = _common_dataset_json(query, pairs)
    truth = query.preprocessed / "gt_segmentations"
    cases = candidates[0].predictions
    labels = {case: truth / f"{case}{dataset_json['file_ending']}" for case in cases}
    return candidates, Reference(dataset_json, labels, _raw_images(query.raw, dataset_json, cases))


def find_given(
    predictions: Mapping[str, Path], labels: Path, dataset_json: dict[str, Any], images: Path | None
) -> tuple[list[Candidate], Reference]:
    """Folders of predictions for one set of labels, e.g. a test set.

    Args:
        predictions: Name to folder; the first is the reference.
        labels: Folder of label maps.
        dataset_json: nnU-Net's description of the data.
        images: Folder of the images, named as nnU-Net wants it; for the pictures.

    Raises:
        UserError: Where a folder lacks a case.
    """
    ending = dataset_json["file_ending"]
    truth = {file.name[: -len(ending)]: file for file in sorted(labels.glob(f"*{ending}"))}
    if not truth:
        raise UserError(f"No label map with the ending {ending} lies in {labels}.")
    candidates = []
    for name, folder in predictions.items():
        found = {file.name[: -len(ending)]: file for file in folder.glob(f"*{ending}")}
        require_same_cases(f"{name} ({folder})", found, f"the labels ({labels})", truth)
        files = {case: found[case] for case in truth}
        candidates.append(Candidate(name, files, dict.fromkeys(truth, ""), "given", {}, {}))
    found_images: dict[str, list[Path]] = {}
    if images is not None:
        found_images = {case: sorted(images.glob(f"{escape(case)}_????{ending}")) for case in truth}
    return candidates, Reference(dataset_json, truth, {case: files for case, files in found_images.items() if files})


def training_details(folder: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What a finished training ran with, by name, and its curves.

    Args:
        folder: Of one fold.
    """
    record = record_of(folder)
    return _settings(folder, record), _curves(folder / "checkpoint_final.pth")


def _trained_candidate(name: str, model: Path, query: Query, splits: list[dict[str, Any]]) -> Candidate:
    ending = read_dataset_json(model / "dataset.json")["file_ending"]
    files: dict[str, Path] = {}
    folds: dict[str, str] = {}
    settings: dict[str, list[Any]] = {}
    curves = {}
    seen: dict[str, str] = {}
    recorded = True
    for fold in query.folds:
        folder = model / f"fold_{fold}"
        split = fold_of(splits, fold)
        if not (folder / "validation" / "summary.json").is_file():
            raise UserError(
                f"{folder} has no finished validation. Finish the training, or run nnUNetv2_train ... --val for it."
            )
        if not (folder / "checkpoint_final.pth").is_file():
            raise UserError(f"{folder} has no checkpoint_final.pth: only finished trainings are compared.")
        record = record_of(folder)
        check_labeled_set(name, fold, folder, record, split)
        _check_checkpoint(name, fold, record, query.best)
        found = {file.name[: -len(ending)]: file for file in (folder / "validation").glob(f"*{ending}")}
        expected = dict.fromkeys(split["val"])
        require_same_cases(f"{name}, fold {fold}", found, f"fold {fold} of splits_final.json", expected)
        twice = sorted(set(found) & set(files))
        if twice:
            raise UserError(f"{twice[0]} is held out in folds {folds[twice[0]]} and {fold}; compare one of them.")
        files |= {case: found[case] for case in sorted(found)}
        folds |= dict.fromkeys(found, fold)
        seen |= {case: source for case, source in record.get("unlabeled", {}).items() if case in found}
        found_settings, curves[fold] = training_details(folder)
        for key, value in found_settings.items():
            settings.setdefault(key, []).append(value)
        recorded &= bool(record)
    checkpoint = ("best" if query.best else "final") + ("" if recorded else NOT_RECORDED)
    # Of folds that differ, all values.
    shown = {
        key: values[0] if all(v == values[0] for v in values) else " / ".join(map(str, values))
        for key, values in settings.items()
    }
    if seen:
        shown["reported images it learned from, without labels"] = f"{len(seen)} of {len(files)}"
    return Candidate(name, files, folds, checkpoint, shown, curves, seen)


def fold_of(splits: list[dict[str, Any]], fold: str) -> dict[str, Any]:
    """A fold of splits_final.json.

    Raises:
        UserError: Where it has no such fold, or one without held-out cases.
    """
    if fold == "all":
        raise UserError("Fold all has no held-out cases: it validates on what it trains with. Use other folds.")
    if not fold.isdecimal() or int(fold) >= len(splits):
        raise UserError(f"splits_final.json has no fold {fold}; it has 0 to {len(splits) - 1}.")
    return splits[int(fold)]


def check_labeled_set(name: str, fold: str, folder: Path, record: dict[str, Any], split: dict[str, Any]) -> None:
    """Refuse a training that learned from other labels than its fold now has.

    Our trainers name the cases they learned from; of others the log says how many.

    Raises:
        UserError: Naming what differs.
    """
    if record:
        require_same_cases(
            f"{name}, fold {fold}, labeled cases at training", dict.fromkeys(record["labeled"]),
            f"fold {fold} of splits_final.json", dict.fromkeys(split["train"]),
        )  # fmt: skip
        known = sorted(set(record.get("pseudo_labels_know", ())) & (set(split["val"]) - set(split["train"])))
        if known:
            raise UserError(
                f"{name}, fold {fold} learned from pseudo-labels of models that knew the labels of {len(known)} "
                f"reported cases, e.g. {known[0]}: scores on them mean nothing. Make other pseudo-labels."
            )
        return
    # Of trainings, the oldest first: the names hold the time, without leading zeros. --val writes logs too.
    logs = sorted(folder.glob("training_log_*.txt"), key=lambda log: list(map(int, re.findall(r"\d+", log.stem))))
    texts = [text for text in (log.read_text(errors="replace") for log in logs) if "Epoch " in text]
    counts = [tuple(map(int, match)) for text in texts for match in _SPLIT_LINE.findall(text)]
    wanted = (len(split["train"]), len(split["val"]))
    if counts and counts[-1] != wanted:
        raise UserError(
            f"{name}, fold {fold} was trained on {counts[-1][0]} and validated on {counts[-1][1]} cases; "
            f"splits_final.json now has {wanted[0]} and {wanted[1]}. Train it again."
        )


def _check_checkpoint(name: str, fold: str, record: dict[str, Any], best: bool) -> None:
    """nnU-Net's own trainer leaves no trace of --val_best; ours do."""
    if not record:
        return
    used = record.get("validated_with")
    wanted = "checkpoint_best.pth" if best else "checkpoint_final.pth"
    if used != wanted:
        advice = "run nnUNetv2_train ... --val --val_best" if best else "run nnUNetv2_train ... --val, or give --best"
        found = f"was validated with {used}" if used else "has not been validated since its last training began"
        raise UserError(f"{name}, fold {fold} {found}, expected {wanted}: {advice}.")


def require_same_cases(what: str, found: Mapping[str, Any], where: str, expected: Mapping[str, Any]) -> None:
    """Refuse cases that are missing or too many.

    Raises:
        UserError: Naming some.
    """
    for title, cases in (("lacks", set(expected) - set(found)), ("has besides", set(found) - set(expected))):
        if cases:
            named = ", ".join(sorted(cases)[:5])
            raise UserError(f"{what} {title} {len(cases)} cases beside {where}: {named}{' ...' * (len(cases) > 5)}")


def _common_dataset_json(query: Query, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    files = [query.results / f"{t}__{p}__{query.configuration}" / "dataset.json" for t, p in pairs]
    contents = [read_dataset_json(file) for file in files]
    for file, content in zip(files, contents):
        if content["labels"] != contents[0]["labels"]:
            raise UserError(f"{file} has the labels {content['labels']}, {files[0]} has {contents[0]['labels']}.")
    first: dict[str, Any] = contents[0]
    return first


def _raw_images(raw: Path, dataset_json: dict[str, Any], cases: Mapping[str, Any]) -> dict[str, list[Path]]:
    if not (raw / "dataset.json").is_file() or not ((raw / "imagesTr").is_dir() or "dataset" in dataset_json):
        return {}
    files = get_filenames_of_train_images_and_targets(str(raw), dict(dataset_json))
    return {case: [Path(image) for image in files[case]["images"]] for case in cases if case in files}


def record_of(folder: Path) -> dict[str, Any]:
    """What a training of this package says about itself in its fold's folder; empty for others."""
    file = folder / RECORD_FILE
    return read_json(file, "") if file.is_file() else {}


def _settings(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    if record:
        batch = {f"{kind} batch": size for kind, size in record["batch"].items()}
        return record["hyperparameters"] | batch | record["versions"] | {"device": record["device"]}
    debug = read_json(folder / "debug.json", "") if (folder / "debug.json").is_file() else {}
    return {key: debug[key] for key in _DEBUG_KEYS if key in debug}


def _curves(checkpoint: Path) -> dict[str, list[float]]:
    """Every logged series of numbers; the weights in the file are not read."""
    try:
        # The oldest PyTorch that nnU-Net allows (2.1) maps a file by its name alone.
        logged = torch.load(str(checkpoint), map_location="cpu", weights_only=False, mmap=True)["logging"]
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint} cannot be read as nnU-Net's checkpoint: {error}") from None
    series = {key: values for key, values in logged.items() if not key.endswith("_timestamps")}
    return {
        key: [float(v) for v in values]
        for key, values in series.items()
        if isinstance(values, list) and all(isinstance(v, (int, float, np.number)) for v in values)
    }

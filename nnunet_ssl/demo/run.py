"""The whole path: data, nnU-Net's planning, our preprocessing, two trainings, prediction, comparison."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

from nnunet_ssl.data.augmentation import labels_that_name_sides
from nnunet_ssl.demo.commands import Commands
from nnunet_ssl.demo.picture import draw_cases
from nnunet_ssl.demo.synthetic import Sizes, write_dataset
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.candidates import (
    Candidate,
    Query,
    Reference,
    find_given,
    find_trained,
    training_details,
)
from nnunet_ssl.evaluation.comparison import evaluate
from nnunet_ssl.evaluation.formatting import terminal_tables
from nnunet_ssl.evaluation.output import write_comparison
from nnunet_ssl.nnunet.folders import read_json
from nnunet_ssl.runtime.cpu import cpu_has_bfloat16

BASELINE = "nnUNetTrainerSupervised"
METHOD = "nnUNetTrainerSemiTC"
PLANS = "nnUNetPlansDemo"
SYNTHETIC_DATASET = "Dataset999_SyntheticChest"
# What two CPU cores train in a few minutes.
LARGEST_PATCH_2D, LARGEST_PATCH_3D = 128, 48
NUM_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long and with what to train."""

    epochs: int
    iterations: int
    device: str


def run_demo(folder: Path, data: Path | None, labeled: int, budget: Budget) -> None:
    """Run the demo and print the table.

    Args:
        folder: Where everything goes; must not exist yet, or be the folder of an earlier demo, which is replaced.
        data: An nnU-Net raw data set with labels; synthetic images if absent.
        labeled: How many cases keep their labels (with ``data``).
        budget: Of each of the two trainings.

    Raises:
        UserError: For a folder or data set that cannot be used, or a command that fails.
    """
    _make_folder(folder)
    commands = Commands(folder)
    raw = folder / "nnUNet_raw"
    if data is None:
        dataset = SYNTHETIC_DATASET
        print(f"Making synthetic radiographs: {Sizes()}")
        write_dataset(raw / dataset, Sizes())
    else:
        dataset = _link_dataset(data, raw)
        _check_labeled(data, labeled)
    number = str(int(dataset[7:10]))
    dataset_json = read_json(raw / dataset / "dataset.json", "A raw data set needs it.")
    configuration = _plan(commands, number, folder, dataset, dataset_json, budget)
    if (raw / dataset / "imagesUn").is_dir():
        commands.run("nnunet-ssl", "preprocess", "-d", number, "-c", configuration, "-p", PLANS, "-np", "2")
    if data is None:
        # All labeled cases train; the test cases below are what counts.
        fold = "all"
    else:
        commands.run("nnunet-ssl", "split", "-d", number, "--folds", "0", "--labeled", str(labeled))
        splits = read_json(folder / "nnUNet_preprocessed" / dataset / "splits_final.json", "")
        fold = str(len(splits) - 1)
    results = folder / "nnUNet_results" / dataset
    predictions: dict[str, Path] = {}
    for trainer in (BASELINE, METHOD):
        options = ("-p", PLANS, "-tr", trainer, "-device", budget.device)
        commands.run("nnUNetv2_train", number, configuration, fold, *options, epochs=budget.epochs)
        model = results / f"{trainer}__{PLANS}__{configuration}"
        if data is not None:
            predictions[trainer] = model / f"fold_{fold}" / "validation"
            continue
        predictions[trainer] = folder / "predictions" / trainer
        source = raw / dataset
        output = str(predictions[trainer])
        words = ("-i", str(source / "imagesTs"), "-o", output, "-d", number, "-c", configuration, "-f", fold, *options)
        commands.run("nnUNetv2_predict", *words, "-npp", "1", "-nps", "1")
    raw_dataset, models = raw / dataset, [results / f"{t}__{PLANS}__{configuration}" for t in predictions]
    if data is None:
        found, reference = find_given(predictions, raw_dataset / "labelsTs", dataset_json, raw_dataset / "imagesTs")
        details = [training_details(model / f"fold_{fold}") for model in models]
        candidates = [dataclasses.replace(c, settings=d[0], curves={fold: d[1]}) for c, d in zip(found, details)]
    else:
        preprocessed = folder / "nnUNet_preprocessed" / dataset
        query = Query(results, preprocessed, raw_dataset, configuration, [fold])
        candidates, reference = find_trained(query, list(predictions), [PLANS])
    _report(folder, raw_dataset, "Ts" if data is None else "Tr", candidates, reference)


def _plan(
    commands: Commands, number: str, folder: Path, dataset: str, dataset_json: dict[str, Any], budget: Budget
) -> str:
    """Let nnU-Net plan, write plans of a size for this machine, and preprocess with them; returns the configuration."""
    commands.run("nnUNetv2_extract_fingerprint", "-d", number, "-np", "2")
    commands.run("nnUNetv2_plan_experiment", "-d", number)
    plans = read_json(folder / "nnUNet_preprocessed" / dataset / "nnUNetPlans.json", "")
    configuration = "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"
    patch = plans["configurations"][configuration]["patch_size"]
    if configuration == "2d":
        sizes = ["--downscale", str(max(1.0, max(patch) / LARGEST_PATCH_2D)), "--batch-size", "8"]
    else:
        sizes = ["--patch-size", *(str(min(side, LARGEST_PATCH_3D)) for side in patch), "--batch-size", "2"]
    # Radiographs are upright, and sides cannot be told apart in mirrored ones.
    upright = dataset == SYNTHETIC_DATASET or labels_that_name_sides(dataset_json["labels"])
    settings = {
        "num_epochs": budget.epochs,
        "num_iterations_per_epoch": budget.iterations,
        "num_val_iterations_per_epoch": 2,
        "cpu_bfloat16": str(cpu_has_bfloat16()).lower(),
        "seed": 0,
        **({"mirror_axes": "[]", "rotation_degrees": 15} if upright else {}),
    }
    pairs = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    features = ["--base-features", "8", "--max-features", "64"]
    commands.run("nnunet-ssl", "configure", "-d", number, "-o", PLANS, "-c", configuration, *sizes, *features, *pairs)
    commands.run("nnUNetv2_preprocess", "-d", number, "-c", configuration, "-plans_name", PLANS, "-np", "2")
    return configuration


def _report(folder: Path, dataset: Path, part: str, candidates: list[Candidate], reference: Reference) -> None:
    comparison = evaluate(candidates, reference, processes=1)
    *_, report = write_comparison(folder / "comparison", dataset.name, comparison, candidates, reference)
    print(f"\n{terminal_tables(comparison)}\n")
    print("Mean and standard deviation over held-out cases; both trainers saw the same labels and iterations.")
    picture = folder / "comparison" / "cases.png"
    predictions = {c.name: next(iter(c.predictions.values())).parent for c in candidates}
    shown = comparison.cases[:NUM_SHOWN]
    folders = (dataset / f"images{part}", dataset / f"labels{part}")
    draw_cases(picture, shown, *folders, predictions, reference.dataset_json)
    print(f"Report:  {report}")
    print(f"Picture: {picture}")
    print(f"Models:  {folder / 'nnUNet_results'}")


def _make_folder(folder: Path) -> None:
    marker = folder / ".nnunet-ssl-demo"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise UserError(f"{folder} is not empty and not from an earlier demo. Choose another folder with -o.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()


def _check_labeled(data: Path, labeled: int) -> None:
    # nnU-Net's fold 0 trains on four of five cases; at least one of them must be left unlabeled.
    pool = len(list((data / "labelsTr").iterdir())) * 4 // 5
    if not 0 < labeled < pool:
        raise UserError(f"--labeled {labeled}: fold 0 of {data.name} has about {pool} training cases; give fewer.")


def _link_dataset(data: Path, raw: Path) -> str:
    data = data.resolve()
    if not re.fullmatch(r"Dataset\d{3}_.+", data.name) or not (data / "labelsTr").is_dir():
        raise UserError(
            f"{data} is not an nnU-Net raw data set: expected a folder Dataset<number>_<name> with dataset.json, "
            f"imagesTr and labelsTr."
        )
    os.symlink(data, raw / data.name, target_is_directory=True)
    return data.name

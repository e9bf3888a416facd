"""nnU-Net's folders with finished validations that the tests of comparisons make up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from nnunet_ssl.cli import main
from nnunet_ssl.training.run_record import RECORD_FILE

DATASET, CONFIGURATION = "Dataset902_Shapes", "2d"
LABELS = {"background": 0, "disk": 1, "square": 2}
SPLITS = [
    {"train": ["t0", "t1"], "val": ["a", "b", "c"]},
    {"train": ["t0", "a"], "val": ["d", "e", "f"]},
]


def label_map(seed: int, side: int = 40) -> np.ndarray:
    generator = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.uint8)
    y, x = np.mgrid[:side, :side]
    center = generator.integers(10, 16, 2)
    labels[(y - center[0]) ** 2 + (x - center[1]) ** 2 < 36] = 1
    corner = generator.integers(22, 28, 2)
    labels[corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] = 2
    return labels


def log_text(num_training: int) -> str:
    return f"This split has {num_training} training and 3 validation cases.\nEpoch 0\n"


class Results:
    """nnU-Net's three folders with two trainers' finished validations; the second one's labels are shifted more."""

    shifts: ClassVar = {"nnUNetTrainer": 1, "nnUNetTrainerSemiTC": 2}

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw, self.preprocessed, self.results = (
            root / v / DATASET for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        )
        dataset_json = {"channel_names": {"0": "x"}, "labels": LABELS, "numTraining": 8, "file_ending": ".png"}
        for folder in (self.raw / "imagesTr", self.raw / "labelsTr", self.preprocessed / "gt_segmentations"):
            folder.mkdir(parents=True)
        (self.raw / "dataset.json").write_text(json.dumps(dataset_json))
        (self.preprocessed / "splits_final.json").write_text(json.dumps(SPLITS))
        for seed, case in enumerate("abcdef"):
            labels = label_map(seed)
            noise = np.random.default_rng(seed).integers(0, 60, labels.shape)
            self.save(self.raw / "imagesTr" / f"{case}_0000.png", labels * 60 + noise)
            self.save(self.raw / "labelsTr" / f"{case}.png", labels)
            self.save(self.preprocessed / "gt_segmentations" / f"{case}.png", labels)
        for trainer in self.shifts:
            for fold in range(2):
                self.add_fold(trainer, fold, dataset_json)

    def folder(self, trainer: str, fold: int) -> Path:
        return self.results / f"{trainer}__nnUNetPlans__{CONFIGURATION}" / f"fold_{fold}"

    def add_fold(self, trainer: str, fold: int, dataset_json: dict) -> None:
        folder = self.folder(trainer, fold)
        (folder / "validation").mkdir(parents=True)
        (folder.parent / "dataset.json").write_text(json.dumps(dataset_json))
        (folder / "validation" / "summary.json").write_text("{}")
        logging = {k: [0.5, 0.4] for k in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs")}
        if trainer == "nnUNetTrainer":
            (folder / "training_log_2026_9_30_1.txt").write_text(log_text(2))
            (folder / "debug.json").write_text(json.dumps({"num_epochs": "2", "torch_version": "2"}))
        else:
            logging["ssl_consistency"] = [0.3, float("nan")]
            record = {
                "versions": {"torch": "2"},
                "device": "cpu",
                "hyperparameters": {"num_epochs": 2, "seed": None},
                "batch": {"labeled": 1, "unlabeled": 1},
                "labeled": SPLITS[fold]["train"],
                "validated_with": "checkpoint_final.pth",
            }
            (folder / RECORD_FILE).write_text(json.dumps(record))
        torch.save({"logging": logging, "network_weights": {"w": torch.zeros(3)}}, folder / "checkpoint_final.pth")
        for case in SPLITS[fold]["val"]:
            labels = np.array(Image.open(self.preprocessed / "gt_segmentations" / f"{case}.png"))
            self.save(folder / "validation" / f"{case}.png", np.roll(labels, self.shifts[trainer], axis=1))

    @staticmethod
    def save(file: Path, values: np.ndarray) -> None:
        Image.fromarray(values.astype(np.uint8)).save(file)


def compare(results: Results, *words: str, trainers: tuple[str, ...] = tuple(Results.shifts)) -> int:
    folders = ("-o", str(results.root / "out"), "-np", "1")
    return main(["compare", "-d", "902", "-c", CONFIGURATION, "-f", "0", "1", "-tr", *trainers, *folders, *words])

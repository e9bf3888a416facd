"""A raw data set of files, for what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import blosc2
import numpy as np
from PIL import Image

from nnunet_ssl.cli import main
from nnunet_ssl.testing.tiny import make_dataset_json, make_plans

LABELS = {"background": 0, "structure": 1}


class RawDataset:
    """A raw 2D data set with a plans file, as after nnUNetv2_plan_and_preprocess."""

    def __init__(self, root: Path, channels: int = 1) -> None:
        self.raw = root / "nnUNet_raw" / "Dataset900_Tiny"
        self.preprocessed = root / "nnUNet_preprocessed" / "Dataset900_Tiny"
        self.images = self.raw / "imagesUn"
        self.output = self.preprocessed / "nnUNetPlans_2d_unlabeled"
        for folder in (self.raw / "imagesTr", self.raw / "labelsTr", self.images, self.preprocessed):
            folder.mkdir(parents=True)
        self.plans = make_plans((32, 32), channels=channels)
        self.dataset_json = make_dataset_json(LABELS, channels)
        (self.preprocessed / "nnUNetPlans.json").write_text(json.dumps(self.plans))
        (self.preprocessed / "dataset.json").write_text(json.dumps(self.dataset_json))
        self.rng = np.random.default_rng(0)
        self.write("imagesTr/labeled_0000.png")

    def write(self, name: str, size=(40, 36), array=None) -> Path:
        array = self.rng.integers(0, 255, size).astype(np.uint8) if array is None else array
        file = self.raw / name
        Image.fromarray(array).save(file)
        return file

    def run(self, *options: str, processes: int = 1) -> int:
        return main(["preprocess", "-d", "900", "-c", "2d", "-np", str(processes), *options])

    def load(self, case: str) -> np.ndarray:
        return np.asarray(blosc2.open(str(self.output / f"{case}.b2nd"))[:])

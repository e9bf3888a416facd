"""Labels that must not matter: trainings are bit-identical with them, without them, and with other ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import assert_equal_weights

from nnunet_ssl.cli import main
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.methods import TRAINERS, nnUNetTrainerSemiTCPlus
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.leakage import no_label_is_opened
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset
from nnunet_ssl.testing.whole import shared_training, train

USING = [t for t in TRAINERS if t.uses_unlabeled]


def at(root: Path, patch: pytest.MonkeyPatch) -> TinyDataset:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        patch.setenv(variable, str(root / variable))
    return TinyDataset(root, PATCHES["2d"])


def test_hidden_labels_deleted_after_preprocessing(tmp_path, trainer_class, monkeypatch):
    weights = []
    for name in ("there", "deleted"):
        tiny = at(tmp_path / name, monkeypatch)
        if name == "deleted":
            for case in tiny.hidden:
                (tiny.folder / f"{case}_seg.b2nd").unlink()
                (tiny.folder / f"{case}.pkl").unlink()
        weights.append(train(tiny.trainer(trainer_class, supervised_fraction=0.25)))
    assert_equal_weights(*weights)


@pytest.mark.parametrize("cls", USING, ids=lambda c: c.__name__)
def test_labels_of_unlabeled_images_corrupted_before_preprocessing(tmp_path, cls, monkeypatch):
    """Wherever in the raw data set somebody keeps them; of test images too, where these are used."""
    weights = []
    for name in ("honest", "corrupt", "other image"):
        tiny = at(tmp_path / name, monkeypatch)
        (tiny.base / "nnUNetPlans.json").write_text(json.dumps(tiny.plans))
        for file in Path(f"{tiny.folder}{UNLABELED_SUFFIX}").iterdir():
            file.unlink()
        raw = tmp_path / name / "nnUNet_raw" / "Dataset900_Tiny"
        rng, corruption = np.random.default_rng(5), np.random.default_rng(len(name))
        for folder in ("imagesTr", "imagesUn", "imagesTs", "labelsTr", "labelsUn", "labelsTs"):
            (raw / folder).mkdir()
        for folder, case in (("imagesUn", "new_0"), ("imagesUn", "new_1"), ("imagesTs", "test_0")):
            image = rng.integers(0, 255, (40, 40)).astype(np.uint8)
            if name == "other image" and case == "new_1":
                image = 255 - image
            Image.fromarray(image).save(raw / folder / f"{case}_0000.png")
            label = image > 128 if name == "honest" else corruption.integers(0, 3, image.shape)
            for labels in ("labelsTr", "labelsUn", "labelsTs"):
                Image.fromarray(label.astype(np.uint8)).save(raw / labels / f"{case}.png")
        transductive = issubclass(cls, nnUNetTrainerSemiTCPlus)
        words = ["preprocess", "-d", "900", "-c", "2d", "-np", "1", *(["--test-images"] if transductive else [])]
        assert main(words) == 0
        trainer = tiny.trainer(cls, supervised_fraction=0.25)
        weights.append(train(trainer))
        used = {case.identifier for case in trainer.find_unlabeled_cases()}
        assert {"new_0", "new_1", *(["test_0"] if transductive else [])} <= used
    assert_equal_weights(*weights[:2])
    different = [not torch.equal(weights[0][name], weights[2][name]) for name in weights[0]]
    assert any(different), "the images are not used, so the test shows nothing"


def test_of_unlabeled_cases_images_alone_are_opened(tmp_path, trainer_class):
    """Which files of hidden cases a training opens."""
    training = shared_training(trainer_class, Bench(tmp_path / "bench"))
    no_label_is_opened(trainer_class, training)
    of_hidden = {opened.path.name for opened in training.opened if opened.path.name.startswith("hid_")}
    assert of_hidden <= {f"{case}.b2nd" for case in TinyDataset.hidden}
    assert bool(of_hidden) == trainer_class.uses_unlabeled

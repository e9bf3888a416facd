"""Which cases count as unlabeled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json, save_pickle

from nnunet_ssl.data.preprocessing import SETTINGS_FILE, TEST_SUFFIX, UNLABELED_SUFFIX
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerSemiTC, nnUNetTrainerSemiTCPlus, nnUNetTrainerSupTC
from nnunet_ssl.testing.tiny import TinyDataset


def found(trainer) -> dict[str, str]:
    return {case.identifier: case.source for case in trainer.find_unlabeled_cases()}


def change_split(tiny: TinyDataset, **parts) -> None:
    file = str(tiny.base / "splits_final.json")
    (split,) = load_json(file)
    save_json([{k: v for k, v in {**split, **parts}.items() if v is not None}], file)


def remove_unlabeled_images(tiny: TinyDataset) -> None:
    shutil.rmtree(str(tiny.folder) + UNLABELED_SUFFIX)


def test_sources(tiny):
    expected = dict.fromkeys(tiny.hidden, "hidden label") | dict.fromkeys(tiny.unlabeled, "imagesUn")
    assert found(tiny.trainer(nnUNetTrainerSemiTC)) == expected
    test_images = Path(str(tiny.folder) + TEST_SUFFIX)
    shutil.copytree(str(tiny.folder) + UNLABELED_SUFFIX, test_images)
    for case in tiny.unlabeled:
        (test_images / f"{case}.b2nd").rename(test_images / f"test_{case}.b2nd")
    transductive = dict.fromkeys(tiny.validation, "validation image")
    transductive |= {f"test_{case}": "imagesTs" for case in tiny.unlabeled}
    assert found(tiny.trainer(nnUNetTrainerSemiTCPlus)) == expected | transductive
    assert found(tiny.trainer(nnUNetTrainerSemiTC)) == expected
    assert found(tiny.trainer(nnUNetTrainerSemiTC, fold="all")) == dict.fromkeys(tiny.unlabeled, "imagesUn")


def test_the_supervised_trainers_need_none(tiny):
    remove_unlabeled_images(tiny)
    change_split(tiny, unlabeled=None)
    trainer = tiny.trainer(nnUNetTrainerSupTC)
    trainer.on_train_start()
    assert trainer.dataloader_unlabeled is None


def test_no_unlabeled_case_names_three_ways(tiny):
    remove_unlabeled_images(tiny)
    change_split(tiny, unlabeled=None)
    trainer = tiny.trainer(nnUNetTrainerSemiTC)
    with pytest.raises(UserError, match=r"imagesUn/.*nnunet-ssl preprocess.*nnunet-ssl split.*nnUNetTrainerSemiTCPlus"):
        trainer.run_training()


def test_unlabeled_images_not_preprocessed_yet(tiny):
    remove_unlabeled_images(tiny)
    raw = tiny.root / "nnUNet_raw" / "Dataset900_Tiny" / "imagesUn"
    raw.mkdir()
    (raw / "x_0000.png").touch()
    with pytest.raises(UserError, match=r"imagesUn holds 1 images, but none is preprocessed.*nnunet-ssl preprocess"):
        tiny.trainer(nnUNetTrainerSemiTC).find_unlabeled_cases()
    shutil.move(raw, raw.with_name("imagesTs"))
    with pytest.raises(UserError, match=r"imagesTs holds 1 images.*preprocess --test-images"):
        tiny.trainer(nnUNetTrainerSemiTCPlus).find_unlabeled_cases()


def test_images_made_with_other_plans_are_refused(tiny):
    file = Path(str(tiny.folder) + UNLABELED_SUFFIX) / SETTINGS_FILE
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "spacing": [2.0, 2.0]}))
    with pytest.raises(UserError, match=r"other settings than the plans ask for \(different: spacing\).*--overwrite"):
        tiny.trainer(nnUNetTrainerSemiTC).find_unlabeled_cases()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"unlabeled": ["hid_0", "lab_0"]}, r"1 labeled cases of the fold are unlabeled cases too, e.g. lab_0"),
        ({"unlabeled": ["hid_0", "val_1"]}, r"1 validation cases of the fold are unlabeled cases too, e.g. val_1"),
        ({"unlabeled": ["hid_0", "gone"]}, r"1 cases of the fold \(hidden label\) are not preprocessed.*gone"),
        ({"unlabeled": ["hid_0", "hid_0"]}, r"hid_0 counts as unlabeled twice"),
    ],
)
def test_leaks_and_gaps_are_refused(tiny, parts, message):
    change_split(tiny, **parts)
    with pytest.raises(UserError, match=message):
        tiny.trainer(nnUNetTrainerSemiTC).find_unlabeled_cases()


def test_validation_images_without_a_splits_file(tiny):
    """nnU-Net makes the file when it trains first; its folds must count all the same."""
    (tiny.base / "splits_final.json").unlink()
    trainer = tiny.trainer(nnUNetTrainerSemiTCPlus)
    _, val = trainer.do_split()
    assert found(trainer) == dict.fromkeys(val, "validation image") | dict.fromkeys(tiny.unlabeled, "imagesUn")


def test_images_that_left_the_raw_folder_do_not_count(tiny):
    raw = tiny.root / "nnUNet_raw" / "Dataset900_Tiny" / "imagesUn"
    raw.mkdir()
    for case in ("un_0", "new"):
        (raw / f"{case}_0000.png").touch()
    trainer = tiny.trainer(nnUNetTrainerSemiTC)
    assert "un_1" not in found(trainer)
    assert "un_0" in found(trainer)
    text = Path(trainer.log_file).read_text()
    assert "1 of 2 images of imagesUn are not preprocessed and not used, e.g. new" in text
    assert "7 images in" in text


def test_partly_annotated_cases_are_unlabeled_too(tiny):
    """Scribbles: nnU-Net's ignore label marks what nobody annotated."""
    tiny.dataset_json["labels"]["ignore"] = 3
    for case in ("lab_1", "hid_0", "val_0"):
        labels = np.zeros((1, *tiny.shape), np.int16)
        labels[..., -1, -1] = 3
        tiny._write_blosc(tiny.folder / f"{case}_seg.b2nd", labels)
    for case in (*tiny.labeled, *tiny.validation):
        # Where nnU-Net centers patches: on any annotated voxel.
        save_pickle({"class_locations": {(-1, 0, 1, 2): np.array([[0, 0, 5, 5]])}}, str(tiny.folder / f"{case}.pkl"))
    trainer = tiny.initialized(nnUNetTrainerSemiTC, supervised_fraction=0.0, num_epochs=1)
    expected = dict.fromkeys(tiny.hidden, "hidden label") | dict.fromkeys(tiny.unlabeled, "imagesUn")
    assert found(trainer) == expected | {"lab_1": "partly annotated"}
    trainer.run_training()
    # They are enough by themselves.
    remove_unlabeled_images(tiny)
    change_split(tiny, unlabeled=None)
    assert found(tiny.initialized(nnUNetTrainerSemiTC)) == {"lab_1": "partly annotated"}

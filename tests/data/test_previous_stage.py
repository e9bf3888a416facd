"""The second stage of a cascade, on unlabeled cases too."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.cli import main
from nnunet_ssl.data.loader import make_unlabeled_loader
from nnunet_ssl.data.preprocessing import SETTINGS_FILE, TEST_SUFFIX, UNLABELED_SUFFIX, preprocessing_settings
from nnunet_ssl.data.views import VIEWS
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerSemiTC, nnUNetTrainerSupervised
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

SECOND = "3d_cascade_fullres"
SHAPE = (20, 20, 20)


class Cascade(TinyDataset):
    """Both stages' data; the unlabeled images are larger in the second stage."""

    unlabeled = ("un_0", "un_1")

    def __init__(self, root: Path) -> None:
        super().__init__(root, PATCHES["3d"])
        configurations = self.plans["configurations"]
        first = copy.deepcopy(configurations["3d_fullres"])
        configurations["3d_lowres"] = first | {"data_identifier": "nnUNetPlans_3d_lowres", "next_stage": SECOND}
        configurations[SECOND] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        for suffix in ("", UNLABELED_SUFFIX):
            shutil.copytree(f"{self.folder}{suffix}", self.base / f"nnUNetPlans_3d_lowres{suffix}")
        settings = preprocessing_settings(PlansManager(self.plans), "3d_lowres")
        (self.base / f"nnUNetPlans_3d_lowres{UNLABELED_SUFFIX}" / SETTINGS_FILE).write_text(json.dumps(settings))
        self.configuration = SECOND
        self.hide(())
        (self.base / "nnUNetPlans.json").write_text(json.dumps(self.plans))

    def hide(self, cases: tuple[str, ...]) -> None:
        """Whose labels the fold hides."""
        split = {"train": list(self.labeled), "val": list(self.validation), "unlabeled": list(cases)}
        (self.base / "splits_final.json").write_text(json.dumps([split]))

    def segmentations(self, trainer: type, cases: tuple[str, ...]) -> None:
        """What nnU-Net predicts for the next stage while it validates the first."""
        folder = self.model(trainer) / "predicted_next_stage" / SECOND
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for case in cases:
            shape = blosc2.open(str(self.image(case))).shape[1:]
            labels = rng.integers(0, self.num_labels, shape).astype(np.uint8)
            nnUNetDatasetBlosc2.save_seg(labels, str(folder / case), chunks_seg=shape, blocks_seg=shape)

    def image(self, case: str) -> Path:
        return Path(f"{self.folder}{UNLABELED_SUFFIX if case in self.unlabeled else ''}") / f"{case}.b2nd"

    def model(self, trainer: type) -> Path:
        return self.root / "nnUNet_results" / "Dataset900_Tiny" / f"{trainer.__name__}__nnUNetPlans__3d_lowres"


@pytest.fixture
def cascade(tmp_path: Path) -> Cascade:
    return Cascade(tmp_path)


@pytest.mark.draws
def test_every_trainer_trains_the_second_stage(cascade, trainer_class):
    cascade.segmentations(trainer_class, (*cascade.labeled, *cascade.validation, *cascade.hidden))
    options = {"num_epochs": 1, "supervised_fraction": 0.0, "picture_every": 1}
    trainer = cascade.trainer(trainer_class, **options)
    if trainer_class.uses_unlabeled:
        # Of imagesUn there is none yet.
        with pytest.raises(UserError, match=rf"2 of \d unlabeled cases .*e\.g\. un_0.*nnunet-ssl cascade -d .* "
                           rf"-c {SECOND} -p nnUNetPlans -tr {trainer_class.__name__} -f FOLDS"):  # fmt: skip
            trainer.run_training()
        cascade.segmentations(trainer_class, cascade.unlabeled)
        trainer = cascade.trainer(trainer_class, **options)
    trainer.run_training()
    assert trainer.num_input_channels == 3
    logged = [trainer.logger.get_value(f"ssl_{name}", step=-1) for name in trainer.term_names]
    assert np.isfinite(logged).all()


def test_unlabeled_images_keep_their_segmentation_through_augmentation(cascade):
    """An image that shows its own segmentation: both are moved alike, in every view."""
    cascade.segmentations(nnUNetTrainerDualNet, (*cascade.labeled, *cascade.validation, *cascade.hidden))
    cascade.segmentations(nnUNetTrainerDualNet, cascade.unlabeled)
    trainer = cascade.initialized(nnUNetTrainerDualNet, supervised_fraction=0.0)
    stage = trainer.previous_stage
    cases = [case for case in trainer.find_unlabeled_cases() if case.identifier in cascade.unlabeled]
    for case in cases:
        coarse = np.kron(np.random.default_rng(1).integers(0, 3, (4, 4, 4)), np.ones((4, 4, 4))).astype(np.uint8)
        file = Path(stage.folder) / f"{case.identifier}.b2nd"
        file.unlink()
        nnUNetDatasetBlosc2.save_seg(coarse, str(file)[: -len(".b2nd")], chunks_seg=(16,) * 3, blocks_seg=(16,) * 3)
        cascade._write_blosc(Path(case.folder) / f"{case.identifier}.b2nd", coarse[None].astype(np.float32))
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    loader = make_unlabeled_loader(cases, dataclasses.replace(trainer.loader_settings(), views=VIEWS))
    exact = changed = different = 0
    for _ in range(30):
        batch = next(loader)
        assert all(batch[name].shape == (2, 3, *cascade.patch) for name in VIEWS)
        for strong, weak, strong_2 in zip(*(batch[name] for name in VIEWS)):
            labels = weak[1] + 2 * weak[2]
            # Between labels 0 and 2 a moved image shows a 1; labels of other places would agree in a third.
            assert (labels == weak[0].round()).float().mean() > 0.75
            exact += torch.equal(labels, weak[0])
            changed += not torch.equal(strong[1:], weak[1:])
            different += not torch.equal(strong[1:], strong_2[1:])
    assert exact > 10
    # nnU-Net's augmentation of the previous segmentation is the students' alone, and each has its own.
    assert changed > 10
    assert different > 10


@pytest.mark.parametrize("cls", [nnUNetTrainerSemiTC, nnUNetTrainerSupervised], ids=lambda c: c.__name__)
def test_folds_that_hide_labels_are_refused(cascade, cls):
    """The first stage's segmentations lie in one folder for all folds, and some of these have seen the labels."""
    cascade.hide(cascade.hidden)
    cascade.segmentations(cls, (*cascade.labeled, *cascade.validation, *cascade.hidden))
    with pytest.raises(UserError, match="Fold 0 hides the labels of 3 cases"):
        cascade.trainer(cls).run_training()


def test_a_segmentation_of_another_size_is_no_segmentation(cascade):
    cascade.segmentations(nnUNetTrainerSemiTC, (*cascade.labeled, *cascade.validation, *cascade.unlabeled))
    larger = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    cascade._write_blosc(cascade.image("un_1"), larger)
    with pytest.raises(UserError, match=r"1 of 2 unlabeled cases .*e\.g\. un_1"):
        cascade.trainer(nnUNetTrainerSemiTC).run_training()


def test_elastic_transforms_leave_whole_labels(cascade):
    trainer = cascade.initialized(nnUNetTrainerSemiTC)
    data = torch.cat([torch.randn(2, 1, *cascade.patch), torch.randint(0, 2, (2, 2, *cascade.patch)).float()], dim=1)
    displacement = 3 * torch.rand(2, 3, *cascade.patch)
    moved = trainer.warp_input(data, displacement)
    assert set(moved[:, 1:].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(moved[:, 1:], data[:, 1:])
    assert len(moved[:, 0].unique()) > 1000


@pytest.fixture
def first_stage(cascade: Cascade) -> Cascade:
    cascade.configuration = "3d_lowres"
    trainer = cascade.trainer(nnUNetTrainerSupervised, num_epochs=1, mirror_axes=[])
    trainer.run_training()
    cascade.configuration = SECOND
    return cascade


PREDICT = ("cascade", "-d", "900", "-tr", "nnUNetTrainerSupervised", "-f", "0", "-device", "cpu")


def test_the_first_stage_segments_the_unlabeled_images(first_stage, capsys, monkeypatch):
    from nnunet_ssl.nnunet.trainers_folder import trainers_folder

    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    # One image has more voxels in the second stage.
    larger = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    first_stage._write_blosc(first_stage.image("un_1"), larger)
    assert main([*PREDICT]) == 0
    assert "2 images segmented" in capsys.readouterr().out
    folder = first_stage.model(nnUNetTrainerSupervised) / "predicted_next_stage" / SECOND
    assert sorted(p.name for p in folder.iterdir()) == ["un_0.b2nd", "un_1.b2nd"]
    # The image is as large as the patch, and nothing is mirrored: one pass of the network.
    first_stage.configuration = "3d_lowres"
    trainer = first_stage.trainer(nnUNetTrainerSupervised)
    trainer.initialize()
    model = first_stage.model(nnUNetTrainerSupervised)
    trainer.load_checkpoint(str(model / "fold_0" / "checkpoint_final.pth"))
    trainer.set_deep_supervision_enabled(False)
    source = first_stage.base / f"nnUNetPlans_3d_lowres{UNLABELED_SUFFIX}" / "un_0.b2nd"
    with torch.no_grad():
        logits = trainer.network.eval()(torch.from_numpy(blosc2.open(str(source))[:])[None])[0]
    # nnU-Net weighs windows in half precision: in their corners, and near ties, either label may win.
    best, second = logits.topk(2, dim=0).values
    clear = (best - second > 0.02).numpy()
    clear[[0, 1, 2, -1, -2, -3]] = clear[:, [0, 1, 2, -1, -2, -3]] = clear[..., [0, 1, 2, -1, -2, -3]] = False
    assert clear.sum() > 500
    predicted = blosc2.open(str(folder / "un_0.b2nd"))[:]
    np.testing.assert_array_equal(predicted[clear], logits.argmax(0).numpy()[clear])
    assert blosc2.open(str(folder / "un_1.b2nd")).shape == SHAPE
    assert main([*PREDICT]) == 0
    assert "0 images segmented" in capsys.readouterr().out
    later = (folder / "un_0.b2nd").stat().st_mtime + 5
    os.utime(first_stage.image("un_0"), (later, later))
    assert main([*PREDICT]) == 0
    assert "1 images segmented" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "words", "message"), [
    (lambda c: shutil.rmtree(c.base / f"nnUNetPlans_3d_lowres{UNLABELED_SUFFIX}"), (), "'nnunet-ssl preprocess' for"),
    (lambda c: [shutil.copytree(f"{c.base}/nnUNetPlans_{stage}{UNLABELED_SUFFIX}", f"{c.base}/nnUNetPlans_{stage}"
     f"{TEST_SUFFIX}") for stage in ("3d_lowres", "3d_fullres")], (), "imagesUn and imagesTs both hold a case un_0"),
    (lambda c: None, ("-c", "3d_fullres"), "3d_fullres is no second stage"),
    (lambda c: None, ("-f", "3"), "has no checkpoint_final.pth"),
])  # fmt: skip
def test_what_is_missing_is_named(first_stage, capsys, change, words, message):
    change(first_stage)
    assert main([*PREDICT, *words]) == 2
    assert message in capsys.readouterr().err

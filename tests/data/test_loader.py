"""The image-only loader."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import binary_erosion

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset, make_unlabeled_loader, outside_of_mask
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.data.views import VIEWS
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerFDPL, nnUNetTrainerSemiTC, nnUNetTrainerSupTC
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, make_dataset_json, make_plans


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_loader_yields_patches_of_the_images_alone(tmp_path, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch], channels=2)
    cases = [UnlabeledCase(c, str(tiny.folder), "hidden label") for c in tiny.hidden]
    for case in tiny.hidden:
        (tiny.folder / f"{case}_seg.b2nd").unlink()
        (tiny.folder / f"{case}.pkl").unlink()
    labels = tiny.trainer(nnUNetTrainerSupTC).label_manager
    dataset = UnlabeledDataset(cases)
    loader = UnlabeledDataLoader(dataset, 3, tiny.patch, tiny.patch, labels)
    batch = next(loader)
    assert sorted(batch) == ["keys", "strong"]
    assert batch["strong"].shape == (3, 2, *tiny.patch)
    assert batch["strong"].dtype == torch.float32
    assert set(batch["keys"]) <= set(tiny.hidden)
    # The patch is the size of the image, so every example is a whole image.
    for key, patch_data in zip(batch["keys"], batch["strong"]):
        whole = np.asarray(dataset.load_image(key)[:]).reshape(2, *tiny.patch)
        np.testing.assert_array_equal(patch_data.numpy(), whole)


def test_loader_pads_images_smaller_than_the_patch(tiny):
    cases = [UnlabeledCase(c, str(tiny.folder), "hidden label") for c in tiny.hidden]
    labels = tiny.trainer(nnUNetTrainerSupTC).label_manager
    batch = next(UnlabeledDataLoader(UnlabeledDataset(cases), 2, (48, 40), (48, 40), labels))
    assert batch["strong"].shape == (2, 1, 48, 40)
    assert (batch["strong"][:, :, :8] == 0).all()


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_patches_of_air_are_rare(tmp_path, patch):
    """A fifth of the places show something: of four places one does in 60 of 100 patches, not in 20."""
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    shape = (1, 1, 160, 32) if patch == "2d" else (1, 16, 160, 16)
    rng = np.random.default_rng(0)
    image = rng.normal(-1.0, 0.01, shape).astype(np.float32)
    image[:, :, 56:72] = rng.normal(2.0, 1.0, image[:, :, 56:72].shape)
    tiny._write_blosc(tiny.folder / "hid_0.b2nd", image)
    labels = tiny.trainer(nnUNetTrainerSupTC).label_manager
    dataset = UnlabeledDataset([UnlabeledCase("hid_0", str(tiny.folder), "hidden label")])
    side = (16, 32) if patch == "2d" else (16, 16, 16)
    np.random.seed(0)
    batches = [next(UnlabeledDataLoader(dataset, 8, side, side, labels))["strong"] for _ in range(30)]
    shows = (torch.cat(batches).flatten(1).std(1) > 0.2).float().mean().item()
    one = 30 / 145
    assert shows == pytest.approx(1 - (1 - one) ** 4, abs=0.1)


def test_places_are_drawn_once_where_there_is_no_air(tiny):
    """As many random numbers as nnU-Net draws."""
    cases = [UnlabeledCase(c, str(tiny.folder), "hidden label") for c in tiny.hidden]
    labels = tiny.trainer(nnUNetTrainerSupTC).label_manager
    loader = UnlabeledDataLoader(UnlabeledDataset(cases), 4, (8, 8), (8, 8), labels)
    places, original = [], loader.get_bbox
    loader.get_bbox = lambda *arguments: places.append(original(*arguments)) or places[-1]
    next(loader)
    assert len(places) == 4


def test_mask_is_found_from_the_image(tiny):
    seen = {}

    class Spy(BasicTransform):
        def apply(self, data_dict, **_):
            seen.update(data_dict)
            return data_dict

    image = np.zeros((1, *tiny.shape), np.float32)
    image[..., 10:20, 5:12] = np.random.default_rng(0).normal(size=(10, 7))
    # What splines leave in regions of zeros.
    image += np.random.default_rng(1).normal(size=image.shape).astype(np.float32) * 1e-4
    tiny._write_blosc(tiny.folder / "hid_0.b2nd", image)
    labels = tiny.trainer(nnUNetTrainerSupTC).label_manager
    dataset = UnlabeledDataset([UnlabeledCase("hid_0", str(tiny.folder), "hidden label")])
    next(UnlabeledDataLoader(dataset, 1, tiny.patch, tiny.patch, labels, Spy(), masked_channels=[0]))
    assert seen["segmentation"].shape == (1, *tiny.patch)
    expected = torch.full((1, *tiny.patch), -1)
    expected[:, 10:20, 5:12] = 0
    assert torch.equal(seen["segmentation"].int(), expected.int())


def test_mask_equals_nnunets_after_resampling():
    """nnU-Net's own preprocessing of an image with a zero border, resampled; only the border of the mask may differ."""
    patch = (32, 32)
    plans = make_plans(patch)
    configuration = plans["configurations"]["2d"]
    configuration |= {"use_mask_for_norm": [True], "spacing": [0.8, 1.3]}
    configuration["resampling_fn_data_kwargs"]["order"] = 3
    manager = PlansManager(plans)
    image = np.zeros((1, 1, 60, 60), np.float32)
    y, x = np.mgrid[:60, :60]
    inside = (y - 30) ** 2 + (x - 28) ** 2 < 24**2
    image[0, 0][inside] = 100 + 20 * np.random.default_rng(0).normal(size=inside.sum())
    planned = manager.get_configuration("2d")
    dataset_json = make_dataset_json({"background": 0, "a": 1})
    preprocessor = planned.preprocessor_class(verbose=False)
    data, mask, _ = preprocessor.run_case_npy(image, None, {"spacing": [1, 1, 1]}, manager, planned, dataset_json)
    ours = outside_of_mask(torch.from_numpy(data[:, 0])).numpy()
    theirs = mask[:, 0] < 0
    assert 0.1 < theirs.mean() < 0.9
    assert (ours == theirs).mean() > 0.9
    assert not (ours & binary_erosion(~theirs, iterations=3)).any()
    assert not (~ours & binary_erosion(theirs, iterations=3)).any()


def test_unlabeled_images_are_augmented_like_labeled_ones(tiny):
    trainer = tiny.trainer(nnUNetTrainerSemiTC)
    trainer.on_train_start()
    ours = str(trainer.dataloader_unlabeled.data_loader.transforms)
    theirs = str(trainer.dataloader_train.data_loader.transforms)
    assert ours.count("RandomTransform") == theirs.count("RandomTransform") > 0


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_every_view_comes_out_of_nnunets_transforms(tmp_path, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch], channels=2)
    tiny.plans["configurations"][tiny.configuration]["use_mask_for_norm"] = [True, False]
    shutil.rmtree(f"{tiny.folder}{UNLABELED_SUFFIX}")
    trainer = tiny.trainer(nnUNetTrainerDualNet, supervised_fraction=0.0)
    trainer.on_train_start()
    settings = dataclasses.replace(trainer.loader_settings(), views=VIEWS)
    loader = make_unlabeled_loader(trainer.find_unlabeled_cases(), settings)
    for _ in range(30):
        batch = next(loader)
        assert list(batch) == [*VIEWS, "keys"]
        for name in VIEWS:
            assert batch[name].shape == (len(batch["keys"]), 2, *tiny.patch)
            assert batch[name].dtype == torch.float32


@pytest.mark.parametrize("cls", [nnUNetTrainerDualNet, nnUNetTrainerFDPL, nnUNetTrainerSemiTC])
def test_the_weak_view_is_made_for_those_who_ask(tiny, cls):
    trainer = tiny.trainer(cls, supervised_fraction=0.0)
    trainer.on_train_start()
    assert ("weak" in next(trainer.dataloader_unlabeled)) == (cls is not nnUNetTrainerSemiTC)
    trainer = tiny.trainer(cls, supervised_fraction=0.0, weak_teacher=False)
    trainer.on_train_start()
    assert "weak" not in next(trainer.dataloader_unlabeled)


def test_the_mask_is_kept_in_every_view(tmp_path):
    """Zeros outside of a box, as nnU-Net's normalization leaves them, and intensities of which all change zeros."""
    tiny = TinyDataset(tmp_path, (64, 64), channels=2)
    tiny.plans["configurations"]["2d"]["use_mask_for_norm"] = [True, False]
    image = np.zeros((2, 1, 64, 64), np.float32)
    image[:, :, 10:50, 20:55] = np.random.default_rng(0).normal(3, 1, (2, 1, 40, 35))
    tiny._write_blosc(tiny.folder / "hid_0.b2nd", image)
    trainer = tiny.initialized(nnUNetTrainerDualNet)
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    settings = dataclasses.replace(trainer.loader_settings(), views=VIEWS)
    loader = make_unlabeled_loader([UnlabeledCase("hid_0", str(tiny.folder), "hidden label")], settings)
    noise = 0
    for _ in range(40):
        batch = next(loader)
        for number in range(len(batch["keys"])):
            strong, weak, other = (batch[name][number] for name in VIEWS)
            outside = weak[0] == 0
            assert 0.05 < outside.float().mean() < 0.95
            # Mirrored and rotated, the box is the same in every view.
            assert torch.equal(strong[0] == 0, outside)
            assert torch.equal(other[0] == 0, outside)
            noise += int((strong[1][outside] != weak[1][outside]).any())
    assert noise > 20, "the unmasked channel changes outside of the mask"


def test_background_workers(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.0, num_epochs=1)
    trainer.run_training()
    assert len(trainer.logger.get_value("ssl_consistency", step=None)) == 1

"""Which cases count as unlabeled, and the image-only loader."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json, save_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import binary_erosion

from nnunet_ssl.data.batches import LabeledBatches, share_batch
from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset, outside_of_mask
from nnunet_ssl.data.preprocessing import SETTINGS_FILE, TEST_SUFFIX, UNLABELED_SUFFIX
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import (
    nnUNetTrainerDualNet,
    nnUNetTrainerFDPL,
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerSupTC,
)
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, make_dataset_json, make_plans


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
    assert sorted(batch) == ["data", "keys"]
    assert batch["data"].shape == (3, 2, *tiny.patch)
    assert batch["data"].dtype == torch.float32
    assert set(batch["keys"]) <= set(tiny.hidden)
    # The patch is the size of the image, so every example is a whole image.
    for key, patch_data in zip(batch["keys"], batch["data"]):
        whole = np.asarray(dataset.load_image(key)[:]).reshape(2, *tiny.patch)
        np.testing.assert_array_equal(patch_data.numpy(), whole)


def test_loader_pads_images_smaller_than_the_patch(tiny):
    cases = [UnlabeledCase(c, str(tiny.folder), "hidden label") for c in tiny.hidden]
    labels = tiny.trainer(nnUNetTrainerSupTC).label_manager
    batch = next(UnlabeledDataLoader(UnlabeledDataset(cases), 2, (48, 40), (48, 40), labels))
    assert batch["data"].shape == (2, 1, 48, 40)
    assert (batch["data"][:, :, :8] == 0).all()


def test_mask_is_found_from_the_image(tiny):
    seen = {}

    def transforms(**data):
        seen.update(data)
        return data

    image = np.zeros((1, *tiny.shape), np.float32)
    image[..., 10:20, 5:12] = np.random.default_rng(0).normal(size=(10, 7))
    # What splines leave in regions of zeros.
    image += np.random.default_rng(1).normal(size=image.shape).astype(np.float32) * 1e-4
    tiny._write_blosc(tiny.folder / "hid_0.b2nd", image)
    labels = tiny.trainer(nnUNetTrainerSupTC).label_manager
    dataset = UnlabeledDataset([UnlabeledCase("hid_0", str(tiny.folder), "hidden label")])
    next(UnlabeledDataLoader(dataset, 1, tiny.patch, tiny.patch, labels, transforms, masked_channels=[0]))
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


def test_unlabeled_images_are_augmented_like_labeled_ones(tiny):
    trainer = tiny.trainer(nnUNetTrainerSemiTC)
    trainer.on_train_start()
    ours = str(trainer.dataloader_unlabeled.data_loader.transforms)
    theirs = str(trainer.dataloader_train.data_loader.transforms)
    assert ours.count("RandomTransform") == theirs.count("RandomTransform") > 0


def straight(image: torch.Tensor) -> bool:
    """Whether a plane (H, W) has no curvature anywhere, as a ramp that was rotated, scaled or mirrored."""
    return all(torch.diff(image, n=2, dim=axis).abs().max() < 1e-3 for axis in (0, 1))


def test_the_weak_view_is_moved_like_the_image_and_keeps_its_intensities(tmp_path):
    """A ramp stays a ramp under nnU-Net's spatial transforms, and not under those of intensity."""
    tiny = TinyDataset(tmp_path, PATCHES["2d"])
    ramp = torch.linspace(-3, 3, 160) + 0.5 * torch.linspace(-3, 3, 160)[:, None]
    tiny._write_blosc(tiny.folder / "hid_0.b2nd", ramp[None, None].numpy())
    trainer = tiny.initialized(nnUNetTrainerDualNet)
    rotation, _, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.get_training_transforms(tiny.patch, rotation, None, axes, False)
    dataset = UnlabeledDataset([UnlabeledCase("hid_0", str(tiny.folder), "hidden label")])
    loader = UnlabeledDataLoader(dataset, 1, size, tiny.patch, trainer.label_manager, transforms, weak=True)
    batches = [next(loader) for _ in range(80)]
    pairs = [(batch["data"][0, 0], batch["weak"][0, 0]) for batch in batches]
    # Patches at the image's border are padded.
    inside = [(strong, weak) for strong, weak in pairs if (weak != 0).all()]
    assert len(inside) > 20
    assert all(straight(weak) for _, weak in inside)
    assert any(not straight(strong) for strong, _ in inside)
    # Where no intensity was changed both are the same, moved alike.
    assert 5 < sum(torch.equal(strong, weak) for strong, weak in inside) < len(inside)
    # Mirrored along both axes: the ramp rises and falls along each.
    steps = torch.stack([weak[[1, 0], [0, 1]] - weak[0, 0] for _, weak in inside])
    assert all(set(axis.sign().tolist()) == {-1.0, 1.0} for axis in steps.T)


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_every_transform_of_nnunet_carries_the_weak_view(tmp_path, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch], channels=2)
    tiny.plans["configurations"][tiny.configuration]["use_mask_for_norm"] = [True, False]
    shutil.rmtree(f"{tiny.folder}{UNLABELED_SUFFIX}")
    trainer = tiny.trainer(nnUNetTrainerDualNet, supervised_fraction=0.0)
    trainer.on_train_start()
    for _ in range(30):
        batch = next(trainer.dataloader_unlabeled)
        assert batch["weak"].shape == batch["data"].shape
        assert batch["weak"].dtype == torch.float32


@pytest.mark.parametrize("cls", [nnUNetTrainerDualNet, nnUNetTrainerFDPL, nnUNetTrainerSemiTC])
def test_the_weak_view_is_made_for_those_who_ask(tiny, cls):
    trainer = tiny.trainer(cls, supervised_fraction=0.0)
    trainer.on_train_start()
    assert ("weak" in next(trainer.dataloader_unlabeled)) == (cls is not nnUNetTrainerSemiTC)
    trainer = tiny.trainer(cls, supervised_fraction=0.0, weak_teacher=False)
    trainer.on_train_start()
    assert "weak" not in next(trainer.dataloader_unlabeled)


@pytest.mark.parametrize(("planned", "labeled", "unlabeled"), [(1, 1, 1), (2, 1, 1), (5, 3, 2), (8, 4, 4)])
def test_the_batch_is_shared_between_labeled_and_unlabeled(tiny, planned, labeled, unlabeled):
    tiny.plans["configurations"]["2d"]["batch_size"] = planned
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.0, num_epochs=1)
    trainer.run_training()
    assert (trainer.batch_size, trainer.unlabeled_batch_size) == (labeled, unlabeled)
    # nnU-Net centers 1 of 2 examples on a structure; one alone must get its turn too.
    assert trainer.probabilistic_oversampling
    stock_centered = planned - round(planned * 0.67)
    assert trainer.oversample_foreground_percent == pytest.approx(stock_centered / planned)


def test_the_largest_part_of_the_batch_is_a_hyperparameter(tiny):
    tiny.plans["configurations"]["2d"]["batch_size"] = 8
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.5, unlabeled_fraction=0.3)
    trainer.on_train_start()
    assert (trainer.batch_size, trainer.unlabeled_batch_size) == (6, 2)


def test_few_unlabeled_cases_get_their_share_of_the_batch(tiny):
    """They take the place of labeled examples: 3 cases beside 4 labeled ones are 1 of 8 examples, not 4."""
    shutil.rmtree(f"{tiny.folder}{UNLABELED_SUFFIX}")
    tiny.plans["configurations"]["2d"]["batch_size"] = 8
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.5)
    trainer.on_train_start()
    assert len(next(trainer.dataloader_train)["data"]) == trainer.batch_size == 7
    assert len(next(trainer.dataloader_unlabeled)["data"]) == 1
    assert trainer.oversample_foreground_percent == pytest.approx(3 / 8)
    log = Path(trainer.log_file).read_text()
    assert "(3 hidden label), 7 labeled + 1 unlabeled per batch, all 8 labeled in stage 1" in log


def test_stage_1_loads_no_example_in_vain():
    drawn = iter(range(100))

    def draw(size):
        numbers = [next(drawn) for _ in range(size)]
        return {"data": torch.tensor(numbers), "target": -torch.tensor(numbers), "keys": [str(n) for n in numbers]}

    batches, seen = LabeledBatches(), []
    for _ in range(6):
        # nnU-Net draws the first one for every step.
        batch = batches.fill(draw(3), (draw(3) for _ in itertools.count()), 4)
        assert len(batch["data"]) == 4
        assert batch["keys"] == [str(n) for n in batch["data"].tolist()]
        assert torch.equal(batch["target"], -batch["data"])
        seen += batch["data"].tolist()
    assert seen == list(range(24))
    assert next(drawn) == 24


@pytest.mark.parametrize("total", range(2, 9))
def test_a_share_is_the_nearest_possible(total):
    for labeled, unlabeled, tenths in itertools.product(range(1, 9), range(1, 9), range(11)):
        parts = share_batch(total, 0.33, labeled, unlabeled, tenths / 10)
        assert parts[0] + parts[1] == total
        assert min(parts[:2]) >= 1
        most = min(max(1, total * tenths // 10), total - 1)
        assert parts[1] <= most
        part = total * unlabeled * unlabeled / (labeled + unlabeled) ** 2
        assert abs(parts[1] - min(max(part, 1), most)) <= 0.5


@pytest.mark.parametrize(("labeled", "examples"), [(5, 2), (10, 2), (25, 2), (50, 1), (80, 1)])
def test_the_more_labels_the_fewer_unlabeled_examples(labeled, examples):
    """Of 99 cases and a batch of 4: up to 50 as docs/results.md reports them."""
    assert share_batch(4, 0.33, labeled, 99 - labeled)[:2] == (4 - examples, examples)


def test_background_workers(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.0, num_epochs=1)
    trainer.run_training()
    assert len(trainer.logger.get_value("ssl_consistency", step=None)) == 1


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

"""The tiny data set is what nnU-Net's own preprocessing and loaders would give."""

from __future__ import annotations

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_ssl.methods import TRAINERS, nnUNetTrainerFDPL
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.tiny import PATCHES, SCENARIOS, TinyDataset


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_class_locations_are_nnunets(tmp_path, patch, scenario):
    with Bench(tmp_path / "bench").data(patch, scenario) as tiny:
        manager = tiny.trainer(TRAINERS[0]).label_manager
        wanted = [*(manager.foreground_regions if manager.has_regions else manager.foreground_labels)]
        if manager.has_ignore_label:
            wanted.append([-1, *manager.all_labels])
        seg = blosc2.open(str(tiny.folder / "lab_0_seg.b2nd"))[:]
        expected = DefaultPreprocessor._sample_foreground_locations(seg, wanted, min_percent_coverage=1.0)
        found = load_pickle(str(tiny.folder / "lab_0.pkl"))["class_locations"]
    assert set(found) == set(expected)
    for key, where in expected.items():
        np.testing.assert_array_equal(np.unique(found[key], axis=0), np.unique(where, axis=0))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_batches_have_the_form_of_the_loaders(tmp_path, patch, scenario):
    with Bench(tmp_path / "bench").data(patch, scenario) as tiny:
        trainer = tiny.trainer(nnUNetTrainerFDPL, supervised_fraction=0.0)
        trainer.on_train_start()
        loaded = next(trainer.dataloader_train), next(trainer.dataloader_unlabeled)
        made = tiny.batches(trainer)
        trainer.on_train_end()
    for ours, theirs in zip(made, loaded):
        for name in ours.keys() & theirs.keys() - {"keys"}:
            assert ours[name].shape == theirs[name].shape
            assert ours[name].dtype == theirs[name].dtype
    made[0]["target"], loaded[0]["target"] = (batch[0]["target"].int() for batch in (made, loaded))
    assert set(made[0]["target"].unique().tolist()) == set(loaded[0]["target"].unique().tolist())
    if "ignore" in scenario:
        ignored = made[0]["target"][:, -1:] == (1 if "regions" in scenario else tiny.ignore_label)
        assert ignored.any()
        assert not ignored.all()
        assert "regions" not in scenario or not (ignored & (made[0]["target"][:, :-1] > 0)).any()


def test_regions_of_a_target(tmp_path):
    """The first region holds all others; nothing that is ignored is in one."""
    tiny = TinyDataset(tmp_path, PATCHES["2d"], scenario="regions and ignore")
    target = tiny.as_target(torch.tensor([[[[0, 1, 2, 3]]]]))[0, :, 0]
    assert target.tolist() == [[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]

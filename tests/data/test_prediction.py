"""Segmentations of preprocessed images by a trained model; the cascade's are in test_previous_stage."""

from __future__ import annotations

import os
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunet_ssl.data.prediction import ImageFiles, TrainedModel
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.methods import nnUNetTrainerSupervised
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_a_model_segments_images_of_its_own_configuration(tmp_path, monkeypatch, patch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    trainer = tiny.trainer(nnUNetTrainerSupervised, num_epochs=1)
    trainer.run_training()
    model, output = Path(trainer.output_folder_base), tmp_path / "segmentations"
    images = {case: Path(f"{tiny.folder}{UNLABELED_SUFFIX}") / f"{case}.b2nd" for case in tiny.unlabeled[:2]}
    images["hid_0"] = tiny.folder / "hid_0.b2nd"
    cases = {case: ImageFiles(file, file) for case, file in images.items()}

    segmenter = TrainedModel(model, ["0"], torch.device("cpu"))
    total, done = segmenter.segment(cases, output)
    assert total == 3
    assert list(done) == list(cases)
    assert sorted(file.name for file in output.iterdir()) == sorted(f"{case}.b2nd" for case in cases)
    for case in cases:
        labels = blosc2.open(str(output / f"{case}.b2nd"))[:]
        assert labels.shape == tiny.shape
        assert set(np.unique(labels)) <= set(range(tiny.num_labels))

    assert segmenter.segment(cases, output)[0] == 0
    assert segmenter.segment(cases, output, overwrite=True)[0] == 3
    later = (output / "un_0.b2nd").stat().st_mtime + 5
    os.utime(images["un_0"], (later, later))
    total, done = segmenter.segment(cases, output)
    assert (total, list(done)) == (1, ["un_0"])
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    os.utime(checkpoint, (later + 5, later + 5))
    assert segmenter.segment(cases, output)[0] == 3

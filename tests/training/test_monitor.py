"""The look at two fixed unlabeled patches: it changes nothing, is right, and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nnunet_ssl.data.loader import UnlabeledDataset
from nnunet_ssl.methods import TRAINERS, nnUNetTrainerDualNet, nnUNetTrainerFDPL
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset
from nnunet_ssl.training.logger import TermLogger
from nnunet_ssl.training.monitor import Monitor, mean_dice, picture_file

pytestmark = pytest.mark.draws
USERS = [cls for cls in TRAINERS if cls.uses_unlabeled]


def test_mean_dice_by_hand():
    first = torch.tensor([[0, 1, 1, 2]])
    second = torch.tensor([[0, 1, 2, 2]])
    assert mean_dice(first, second) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert mean_dice(first, first) == 1
    assert np.isnan(mean_dice(torch.zeros(1, 4), torch.zeros(1, 4)))


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("cls", USERS, ids=lambda cls: cls.__name__)
def test_every_method_shows_label_maps_and_masks(tmp_path, cls, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch], channels=2)
    trainer = tiny.initialized(cls)
    trainer.set_deep_supervision_enabled(True)
    monitor = Monitor(trainer.find_unlabeled_cases(), trainer.unlabeled_patch_size)
    assert monitor.identifiers == ["hid_0", "hid_1"]
    before = (trainer.generator.get_state(), torch.get_rng_state())
    weights = [p.clone() for network in trainer.predictors for p in network.parameters()]
    for network in trainer.predictors:
        network.train()

    file = tmp_path / "picture.png"
    views = []
    for _ in range(2):
        views.append(trainer.look(monitor))
    assert np.isnan(monitor.stability(views[0]))
    assert monitor.stability(views[1]) == 1.0
    monitor.draw(str(file), views[0])
    assert all(torch.equal(values, views[1].maps[name]) for name, values in views[0].maps.items())

    with Image.open(file) as image:
        assert np.asarray(image.convert("L")).std() > 10
    assert torch.equal(trainer.generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    after = [p for network in trainer.predictors for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after))
    assert all(p.grad is None for p in after)
    assert all(network.training and network.decoder.deep_supervision for network in trainer.predictors)
    view = views[0]
    assert view.image is None or view.image.shape == (2, 2, *PATCHES[patch])
    assert all(values.shape == (2, *PATCHES[patch]) for values in (view.pseudo_labels, *view.maps.values()))
    assert view.pseudo_labels.max() < tiny.num_labels


def test_what_is_shown_as_disagreement_is_where_networks_disagree(tiny):
    trainer = tiny.initialized(nnUNetTrainerDualNet)
    trainer.set_deep_supervision_enabled(False)
    monitor = Monitor(trainer.find_unlabeled_cases(), trainer.unlabeled_patch_size)
    view = trainer.view(monitor.images, torch.Generator())
    with torch.no_grad():
        labels = [network(monitor.images).argmax(1) for network in trainer.predictors]
    assert torch.equal(view.maps["disagree"], labels[0] != labels[1])
    assert view.maps["disagree"].any()
    assert torch.equal(view.pseudo_labels, labels[0])


def test_patches_are_the_middle_of_the_images(tiny):
    trainer = tiny.initialized(nnUNetTrainerDualNet)
    cases = trainer.find_unlabeled_cases()
    image = torch.from_numpy(UnlabeledDataset(cases).load_image("hid_0")[:])
    side = image.shape[2]
    smaller = Monitor(cases, (side - 4, side - 6)).images[0]
    assert torch.equal(smaller, image[:, 0, 2 : side - 2, 3 : side - 3])
    larger = Monitor(cases, (side + 4, side)).images[0]
    assert torch.equal(larger[:, 2:-2], image[:, 0])
    assert not larger[:, :2].any()


@pytest.mark.parametrize(("every", "epochs"), [(0, []), (2, [2, 4]), (3, [3, 4])])
def test_a_training_draws_and_logs(tiny, every, epochs):
    trainer = tiny.trainer(nnUNetTrainerFDPL, picture_every=every, supervised_fraction=0.0)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    expected = [Path(picture_file(str(folder), epoch)).name for epoch in epochs]
    assert sorted(file.name for file in folder.glob("unlabeled_epoch_*.png")) == expected
    logged = trainer.logger.get_checkpoint()
    stability = logged[TermLogger.key("stability")]
    assert len(stability) == 4
    assert np.isnan(stability[0])
    assert all(0 <= s <= 1 for s in stability[1:] if not np.isnan(s))
    weights = logged[TermLogger.key(TermLogger.weight("fixed"))]
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(trainer.hp.fixed_weight)

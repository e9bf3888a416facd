"""UA-MT: uncertainty, threshold and masked distance against scipy, and which voxels count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy
from told_networks import Spy, Told, has_gradient, shake, toward

from nnunet_ssl.data.batches import Unlabeled
from nnunet_ssl.methods import nnUNetTrainerUAMT
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerUAMT:
    """With a teacher that is not the student, and passes that differ."""
    trainer = tiny.initialized(nnUNetTrainerUAMT, **ssl)
    shake(trainer.teacher.module)
    return trainer


def grouped(logits: torch.Tensor, has_regions: bool) -> np.ndarray:
    """Probabilities (B, G, K, *S)."""
    z = logits.detach().numpy()
    return np.stack([expit(-z), expit(z)], 2) if has_regions else softmax(z, 1)[:, None]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("scenario", ["labels", "regions"])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_the_term_equals_scipy(tmp_path, patch, scenario, epoch):
    tiny = TinyDataset(tmp_path, PATCHES[patch], scenario=scenario)
    trainer = initialized(tiny, passes=3, first_threshold=0.6)
    trainer.current_epoch = epoch
    labeled, unlabeled = tiny.batches(trainer)
    seen: list[torch.Tensor] = []
    trainer.teacher.module.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    loss = step_of(trainer, labeled, unlabeled).losses["consistency"]
    target, *passes = (grouped(logits, tiny.has_regions) for logits in seen)
    assert len(passes) == 3
    uncertainty = entropy(np.mean(passes, 0), axis=2).mean(1)
    threshold = (0.6 + 0.4 * np.exp(-5 * (1 - epoch / 4) ** 2)) * np.log(target.shape[2])
    sure = uncertainty < threshold
    p = grouped(trainer.network(unlabeled["strong"])[0], tiny.has_regions)
    distance = ((p - target) ** 2).sum(2).mean(1) / 2
    assert 0.02 < sure.mean() < 0.999, "this tests no mask"
    assert loss.item() == pytest.approx(distance[sure].sum() / sure.sum(), rel=1e-4)
    assert trainer._statistics["sure"].item() == pytest.approx(sure.mean())


def test_every_pass_has_noise_and_dropout_of_its_own_and_the_student_none(tiny):
    trainer = initialized(tiny, passes=4)
    labeled, unlabeled = tiny.batches(trainer)
    student, teacher = Spy(trainer.network), Spy(trainer.teacher.module)
    deepest: list[torch.Tensor] = []
    trainer.teacher.module.decoder.register_forward_pre_hook(lambda m, inputs: deepest.append(inputs[0][-1]))
    step_of(trainer, labeled, unlabeled)
    assert torch.equal(student.passes[1][0], unlabeled["strong"])
    assert teacher.sizes(with_gradient=True) == []
    assert teacher.sizes(with_gradient=False) == [2] * 5
    noises = [images - unlabeled["weak"] for images, _ in teacher.passes]
    assert all(0 < noise.abs().max() <= 0.2 + 1e-5 for noise in noises)
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    dropped = [(features == 0).flatten(2).all(2) for features in deepest]
    assert not dropped[0].any(), "the target is made without dropout"
    assert all(d.any() for d in dropped[1:])
    assert len({tuple(d.flatten().tolist()) for d in dropped[1:]}) > 1


def test_voxels_of_which_the_teacher_is_unsure_teach_nothing(tiny):
    trainer = initialized(tiny, noise_std=0.0)
    _, unlabeled = tiny.batches(trainer)
    unsure = torch.zeros(2, *tiny.patch, dtype=torch.bool)
    unsure[:, :16] = True
    teacher = torch.full((2, 3, *tiny.patch), -4.0)
    teacher[:, 1] = 4.0
    doubtful = torch.where(unsure[:, None], teacher * 0.01, teacher)
    student = torch.zeros_like(teacher, requires_grad=True)
    trainer.network = Told((unlabeled["strong"], student))
    trainer.teacher = Told((unlabeled["weak"], teacher), deep=False)
    # One teacher, which dropout makes doubt.
    trainer.dropout = lambda images, generator: doubtful
    loss = trainer.unlabeled_losses(None, Unlabeled.of(unlabeled), [])["consistency"]
    moved = toward(student, loss)
    assert not moved.movedim(1, -1)[unsure].any()
    assert (moved[:, 1][~unsure] > 0).all()
    assert trainer._statistics["sure"].item() == 0.5


def test_where_the_teacher_is_sure_of_nothing_the_term_is_zero_and_has_a_gradient(tiny):
    trainer = initialized(tiny, first_threshold=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    loss = step_of(trainer, labeled, unlabeled).losses["consistency"]
    assert loss.item() == 0
    loss.backward()
    assert not has_gradient(trainer.teacher.module)
    assert not has_gradient(trainer.network)

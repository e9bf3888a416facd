"""Mean teacher: the distance against scipy, what either network sees, and who learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from told_networks import Spy, Told, has_gradient, shake, toward

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.data.batches import Unlabeled
from nnunet_ssl.methods import nnUNetTrainerMeanTeacher
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerMeanTeacher:
    """With a teacher that is not the student."""
    trainer = tiny.initialized(nnUNetTrainerMeanTeacher, **ssl)
    shake(trainer.teacher.module)
    return trainer


def distance(student: torch.Tensor, teacher: torch.Tensor, has_regions: bool) -> np.ndarray:
    """Half the squared distance of both classes' vectors, or the mean squared one of regions, (B, *S)."""
    p, q = ((expit if has_regions else lambda z: softmax(z, 1))(z.detach().numpy()) for z in (student, teacher))
    return ((p - q) ** 2).mean(1) if has_regions else ((p - q) ** 2).sum(1) / 2


@pytest.mark.parametrize("scenario", ["labels", "regions", "ignore", "regions and ignore"])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_the_term_equals_scipy(tmp_path, patch, scenario):
    tiny = TinyDataset(tmp_path, PATCHES[patch], scenario=scenario)
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    losses = step_of(trainer, labeled, unlabeled).losses
    on_strong, on_weak = trainer.network(unlabeled["strong"])[0], trainer.teacher(unlabeled["weak"])
    expected = distance(on_strong, on_weak, tiny.has_regions).mean()
    assert losses["consistency"].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    assert set(losses) == {"supervised", "consistency"}


def test_the_student_sees_the_strong_view_and_the_teacher_the_weak_one_once(tiny):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    student, teacher = Spy(trainer.network), Spy(trainer.teacher.module)
    step_of(trainer, labeled, unlabeled)
    assert [kept for _, kept in student.passes] == [True, True]
    assert torch.equal(student.passes[1][0], unlabeled["strong"])
    ((images, kept),) = teacher.passes
    assert torch.equal(images, unlabeled["weak"])
    assert not kept


def test_the_teacher_gets_no_gradient_and_follows_the_student(tiny):
    trainer = initialized(tiny, teacher_decay=0.75)
    labeled, unlabeled = tiny.batches(trainer)
    step_of(trainer, labeled, unlabeled).losses["consistency"].backward()
    assert has_gradient(trainer.network)
    assert not has_gradient(trainer.teacher.module)
    trainer.teacher.steps = 50
    trainer.dataloader_unlabeled = iter([unlabeled])
    networks = bare(trainer.teacher.module), bare(trainer.network)
    before = [p.clone() for p in networks[0].parameters()]
    trainer.train_step(labeled)
    for old, mean, new in zip(before, *(n.parameters() for n in networks)):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * new)


def test_a_step_moves_the_student_to_the_teacher_and_not_away(tiny):
    trainer = initialized(tiny)
    _, unlabeled = tiny.batches(trainer)
    student = torch.zeros(2, 3, *tiny.patch)
    student[:, 0] = 1.0
    student.requires_grad_()
    teacher = torch.full_like(student, -4.0).detach()
    teacher[:, 2] = 4.0
    trainer.network = Told((unlabeled["strong"], student))
    trainer.teacher = Told((unlabeled["weak"], teacher), deep=False)
    moved = toward(student, trainer.unlabeled_losses(None, Unlabeled.of(unlabeled), [])["consistency"])
    assert (moved[:, 2] > 0).all()
    assert (moved[:, :2] < 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_added_to_the_teachers_images_alone(tmp_path, monkeypatch, channels):
    tiny = TinyDataset(tmp_path, PATCHES["2d"], channels=channels)
    trainer = initialized(tiny, noise_std=0.1)
    monkeypatch.setattr(nnUNetTrainerMeanTeacher, "num_image_channels", 1)
    labeled, unlabeled = tiny.batches(trainer)
    student, teacher = Spy(trainer.network), Spy(trainer.teacher.module)
    step_of(trainer, labeled, unlabeled)
    assert torch.equal(student.passes[1][0], unlabeled["strong"])
    noise = teacher.passes[0][0] - unlabeled["weak"]
    assert 0.05 < noise[:, :1].std() < 0.12
    assert noise.abs().max() <= 0.2 + 1e-5
    # Further channels are whole labels of a previous stage.
    assert not noise[:, 1:].any()

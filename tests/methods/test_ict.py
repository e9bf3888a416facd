"""ICT: mixtures of images and of predictions against numpy, and who learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from told_networks import Spy, Told, has_gradient, shake, toward

from nnunet_ssl.data.batches import Labeled, Unlabeled
from nnunet_ssl.methods import nnUNetTrainerICT
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of
from nnunet_ssl.transforms import mixing

SHARES = {2: [0.3, 0.9], 3: [0.1, 0.5, 0.8], 1: [0.4]}


def initialized(tiny: TinyDataset, batch_size: int = 4, **ssl) -> nnUNetTrainerICT:
    """With a teacher that is not the student."""
    tiny.plans["configurations"][tiny.configuration]["batch_size"] = batch_size
    trainer = tiny.initialized(nnUNetTrainerICT, **ssl)
    shake(trainer.teacher.module)
    return trainer


def probabilities(logits: torch.Tensor, has_regions: bool) -> np.ndarray:
    return expit(logits.detach().numpy()) if has_regions else softmax(logits.detach().numpy(), 1)


@pytest.mark.parametrize("batch_size", [2, 4, 6])
@pytest.mark.parametrize("scenario", ["labels", "regions"])
@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_the_term_equals_numpy(tmp_path, monkeypatch, patch, scenario, batch_size):
    tiny = TinyDataset(tmp_path, PATCHES[patch], scenario=scenario)
    trainer = initialized(tiny, batch_size, mixing_alpha=0.7)
    labeled, unlabeled = tiny.batches(trainer)
    count = batch_size // 2
    drawn = []
    monkeypatch.setattr(mixing, "draw_beta", lambda *a: drawn.append(a) or torch.tensor(SHARES[count]))
    spy = Spy(trainer.network)
    loss = step_of(trainer, labeled, unlabeled).losses["consistency"]
    assert drawn == [(count, 0.7, trainer.generator)]
    strong, weak = unlabeled["strong"].numpy(), unlabeled["weak"]
    q = probabilities(trainer.teacher(weak), tiny.has_regions)
    mixed, target = [], []
    for i, b in enumerate(SHARES[count]):
        other = strong[i - 1] if count > 1 else labeled["data"][0].numpy()
        q_other = q[i - 1] if count > 1 else probabilities(trainer.teacher(labeled["data"]), tiny.has_regions)[0]
        mixed.append((1 - b) * strong[i] + b * other)
        target.append((1 - b) * q[i] + b * q_other)
    np.testing.assert_allclose(spy.passes[-1][0], np.stack(mixed), atol=1e-5)
    p = probabilities(trainer.network(torch.tensor(np.stack(mixed)))[0], tiny.has_regions)
    squares = (p - np.stack(target)) ** 2
    expected = squares.mean() if tiny.has_regions else squares.sum(1).mean() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_the_student_sees_mixtures_alone_and_only_it_learns(tiny, batch_size):
    trainer = initialized(tiny, batch_size)
    labeled, unlabeled = tiny.batches(trainer)
    student, teacher = Spy(trainer.network), Spy(trainer.teacher.module)
    step_of(trainer, labeled, unlabeled).losses["consistency"].backward()
    count = batch_size // 2
    assert student.sizes(with_gradient=True) == [count, count]
    assert student.sizes(with_gradient=False) == teacher.sizes(with_gradient=True) == []
    assert teacher.sizes(with_gradient=False) == [max(2, count)]
    assert has_gradient(trainer.network)
    assert not has_gradient(trainer.teacher.module)


def test_each_image_is_mixed_in_its_own_proportion(tiny):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    first, second = unlabeled["strong"]
    shares = set()
    for _ in range(20):
        spy = Spy(trainer.network)
        step_of(trainer, labeled, unlabeled)
        for own, other, mixed in ((first, second, spy.passes[-1][0][0]), (second, first, spy.passes[-1][0][1])):
            share = ((mixed - own) * (other - own)).sum() / (other - own).square().sum()
            torch.testing.assert_close(mixed, own + share * (other - own), atol=1e-4, rtol=1e-4)
            shares.add(round(share.item(), 4))
    assert len(shares) > 12


def test_labels_of_a_previous_stage_stay_whole(tiny, monkeypatch):
    trainer = initialized(tiny)
    monkeypatch.setattr(nnUNetTrainerICT, "num_image_channels", 1)
    first, second = torch.randn(2, 3, 1, 8, 8)
    one_hot, other = (torch.randint(0, 2, (3, 2, 8, 8)).float() for _ in range(2))
    share = torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1, 1)
    mixed = trainer.mix(torch.cat([first, one_hot], 1), torch.cat([second, other], 1), share)
    torch.testing.assert_close(mixed[:, :1], (1 - share) * first + share * second)
    assert torch.equal(mixed[:2, 1:], one_hot[:2])
    assert torch.equal(mixed[2:, 1:], other[2:])


def test_a_step_moves_the_student_to_the_mixture_of_predictions(tiny, monkeypatch):
    """Two images of different classes, a quarter and three quarters of either."""
    trainer = initialized(tiny)
    _, unlabeled = tiny.batches(trainer)
    monkeypatch.setattr(mixing, "draw_beta", lambda *a: torch.tensor([0.25, 0.25]))
    teacher = torch.full((2, 3, *tiny.patch), -9.0)
    teacher[0, 1] = teacher[1, 2] = 9.0
    trainer.teacher = Told((unlabeled["weak"], teacher), deep=False)
    batches = Labeled(torch.zeros(2, 1, *tiny.patch), torch.zeros(2, 1, *tiny.patch), []), Unlabeled.of(unlabeled)

    def moved(shares: list[float]) -> tuple[float, torch.Tensor]:
        """The loss of a student that takes image 0 for class 1 with this probability and so on, and its step."""
        p = torch.full((2, 3, *tiny.patch), 1e-6)
        for i, share in enumerate(shares):
            p[i, 1], p[i, 2] = share, 1 - share
        student = p.log().requires_grad_()
        # Not told apart by images: those of the mixture are rounded.
        trainer.network = lambda images: [student]
        loss = trainer.unlabeled_losses(*batches, [])["consistency"]
        return loss.item(), toward(student, loss)

    right, step = moved([0.75, 0.25])
    assert right == pytest.approx(0, abs=1e-5)
    assert step.abs().max() < 1e-6
    unmixed, step = moved([1 - 1e-3, 1e-3])
    assert unmixed > 0.05
    assert (step[0, 1] < 0).all()
    assert (step[0, 2] > 0).all()

"""Entropy minimization: the term against scipy, and what it does to sure, unsure and unknown voxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy
from told_networks import Spy, Told, toward

from nnunet_ssl.data.batches import Unlabeled
from nnunet_ssl.methods import nnUNetTrainerEM
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of


@pytest.mark.parametrize("scenario", ["labels", "regions"])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_the_term_equals_scipy(tmp_path, patch, scenario):
    tiny = TinyDataset(tmp_path, PATCHES[patch], num_labels=4, scenario=scenario)
    trainer = tiny.initialized(nnUNetTrainerEM)
    labeled, unlabeled = tiny.batches(trainer)
    spy = Spy(trainer.network)
    losses = step_of(trainer, labeled, unlabeled).losses
    assert spy.sizes(with_gradient=True) == [2, 2]
    assert spy.sizes(with_gradient=False) == []
    z = trainer.network(unlabeled["strong"])[0].detach().numpy()
    if tiny.has_regions:
        expected = entropy(np.stack([expit(z), expit(-z)]), axis=0).mean() / np.log(2)
    else:
        expected = entropy(softmax(z, 1), axis=1).mean() / np.log(4)
    assert losses["entropy"].item() == pytest.approx(expected, rel=1e-5)
    assert set(losses) == {"supervised", "entropy"}


def entropy_and_step(trainer: nnUNetTrainerEM, unlabeled: dict, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    student = logits.clone().requires_grad_()
    trainer.network = Told((unlabeled["strong"], student))
    loss = trainer.unlabeled_losses(None, Unlabeled.of(unlabeled), [])["entropy"]
    return loss.item(), toward(student, loss)


def test_what_is_believed_most_becomes_surer_whatever_it_is(tiny):
    trainer = tiny.initialized(nnUNetTrainerEM)
    _, unlabeled = tiny.batches(trainer)
    logits = torch.zeros(2, 3, *tiny.patch)
    logits[0, 1] = 1.0
    logits[1, 0] = 1.0
    doubted, moved = entropy_and_step(trainer, unlabeled, logits)
    assert (moved[0, 1] > 0).all()
    assert (moved[0, [0, 2]] < 0).all()
    # A structure that is doubted more than it is believed disappears.
    assert (moved[1, 0] > 0).all()
    assert (moved[1, 1:] < 0).all()
    assert 0 <= entropy_and_step(trainer, unlabeled, 50 * logits)[0] < doubted < 1


def test_a_structure_that_is_waited_for_is_not_driven_out(tiny):
    """Background or this structure: which of them is not asked."""
    trainer = tiny.initialized(nnUNetTrainerEM, learned_dice=0.5)
    trainer.learned.counts[:] = 0.0
    trainer.learned.counts[:, :, 0] = 1.0
    assert trainer.learned.waiting == (1,)
    _, unlabeled = tiny.batches(trainer)
    logits = torch.full((2, 3, *tiny.patch), -9.0)
    logits[:, 0], logits[:, 2] = 1.0, 0.0
    loss, moved = entropy_and_step(trainer, unlabeled, logits)
    assert loss == pytest.approx(0, abs=1e-3)
    assert moved.abs().max() < 1e-6
    trainer.learned.counts[:] = 1.0
    loss, moved = entropy_and_step(trainer, unlabeled, logits)
    assert loss > 0.3
    assert (moved[:, 2] < 0).all()

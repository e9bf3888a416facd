"""FixMatch: masked pseudo-labels against an independent computation, and which voxels teach what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_loss import arrays, reference_loss
from scipy.special import expit, softmax
from told_networks import Spy, Told, has_gradient, shake, toward

from nnunet_ssl.data.batches import Labeled, Unlabeled
from nnunet_ssl.methods import fix_match, nnUNetTrainerFixMatch
from nnunet_ssl.testing.tiny import PATCHES, SCENARIOS, TinyDataset, step_of
from nnunet_ssl.transforms import mixing
from nnunet_ssl.transforms.intensity import strong_intensities


def initialized(tiny: TinyDataset, batch_size: int = 4, **ssl) -> nnUNetTrainerFixMatch:
    tiny.plans["configurations"][tiny.configuration]["batch_size"] = batch_size
    return tiny.initialized(nnUNetTrainerFixMatch, **ssl)


def labels_and_confidence(logits: torch.Tensor, has_regions: bool) -> tuple[np.ndarray, np.ndarray]:
    """What is labeled (B, 1, *S) or (B, 2, *S), and how surely, (B, 1, *S)."""
    z = logits.detach().numpy()
    if not has_regions:
        return z.argmax(1)[:, None], softmax(z, 1).max(1, keepdims=True)
    p, inner = expit(z), z[:, 1] > 0
    return np.stack([(z[:, 0] > 0) | inner, inner], 1), np.maximum(p, 1 - p).min(1, keepdims=True)


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("cutmix_share", [0.0, 0.5])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("patch", ["2d", "3d"])
@torch.no_grad()
def test_the_term_equals_an_independent_computation(tmp_path, monkeypatch, patch, scenario, cutmix_share, batch_size):
    tiny = TinyDataset(tmp_path, PATCHES[patch], scenario=scenario)
    threshold = 0.6 if tiny.has_regions else 0.5
    trainer = initialized(tiny, batch_size, cutmix_share=cutmix_share, sure_from=threshold)
    labeled, unlabeled = tiny.batches(trainer)
    count, regions = batch_size // 2, tiny.has_regions
    boxes = mixing.cutmix_boxes(count, tiny.patch, 0.5, torch.Generator().manual_seed(1))
    monkeypatch.setattr(mixing, "cutmix_boxes", lambda *a: boxes)
    changed = strong_intensities(unlabeled["strong"], 1.0, torch.Generator().manual_seed(2))
    monkeypatch.setattr(fix_match, "strong_intensities", lambda *a, **k: changed)
    loss = step_of(trainer, labeled, unlabeled).losses["pseudo_label"]

    labels, confidence = labels_and_confidence(trainer.network(unlabeled["weak"])[0], regions)
    sure = confidence >= threshold
    assert 0.02 < sure.mean() < 0.98, "this tests no mask"
    assert trainer._statistics["sure"].item() == pytest.approx(sure.mean())
    target = labeled["target"].numpy()
    last = target[:, -1:] > 0 if regions else target == tiny.ignore_label
    annotated = ~last if tiny.ignore_label is not None else np.ones_like(last)
    box = boxes.numpy() if cutmix_share else np.zeros(boxes.shape, bool)
    images, known = changed.numpy(), target[:, : 2 if regions else 1]
    of_others = (images[::-1], labels[::-1], sure[::-1]) if count > 1 else (labeled["data"].numpy(), known, annotated)
    mixed, wanted, counted = (np.where(box, b, a) for a, b in zip((images, labels, sure), of_others))
    expected = reference_loss(arrays(trainer.network(torch.tensor(mixed))), wanted, counted, regions, tiny.ignore_label)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_strong_view_passes_with_gradient_and_then_the_weak_one_without(tiny, monkeypatch):
    trainer = initialized(tiny, cutmix_share=0.0, strength=1.5)
    monkeypatch.setattr(nnUNetTrainerFixMatch, "num_image_channels", 1)
    asked = []
    monkeypatch.setattr(fix_match, "strong_intensities", lambda x, *a, **k: asked.append((a, k)) or x + 1)
    labeled, unlabeled = tiny.batches(trainer)
    spy = Spy(trainer.network)
    step_of(trainer, labeled, unlabeled)
    assert [kept for _, kept in spy.passes] == [True, True, False]
    assert torch.equal(spy.passes[1][0], unlabeled["strong"] + 1)
    assert torch.equal(spy.passes[2][0], unlabeled["weak"])
    # One-hot channels of a cascade are no images.
    assert asked == [((1.5, trainer.generator), {"num_channels": 1})]


def loss_and_step(trainer, tiny, weak: torch.Tensor, student: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Where a student goes, which says the same of every voxel, if weak views are labeled so; nothing is mixed."""
    _, unlabeled = tiny.batches(trainer)
    leaf = student.clone().requires_grad_()
    trainer.network = Told((unlabeled["strong"], leaf), (unlabeled["weak"], weak))
    labeled = Labeled(torch.zeros(2, 1, *tiny.patch), torch.zeros(2, 1, *tiny.patch, dtype=torch.int16), [])
    loss = trainer.unlabeled_losses(labeled, Unlabeled.of(unlabeled), [])["pseudo_label"]
    return loss.item(), toward(leaf, loss)


def test_voxels_that_disagree_with_a_sure_label_move_to_it_and_others_stay(tiny):
    trainer = initialized(tiny, cutmix_share=0.0, strength=0.0)
    weak = torch.full((2, 3, *tiny.patch), -3.0)
    weak[:, 1] = 3.0
    # e^0.5 / (e^0.5 + 2) is 0.45.
    weak[:, :, :16] = torch.tensor([0.0, 0.5, 0.0]).view(1, 3, 1, 1)
    student = torch.zeros_like(weak)
    student[:, 0] = 2.0
    wrong, moved = loss_and_step(trainer, tiny, weak, student)
    assert not moved[:, :, :16].any()
    assert (moved[:, 1, 16:] > 0).all()
    assert (moved[:, 0, 16:] < 0).all()
    right, _ = loss_and_step(trainer, tiny, weak, weak * 10)
    assert right == pytest.approx(-1, abs=1e-2)
    assert wrong > 1


def test_unsure_voxels_are_ignored_and_not_taken_for_background(tiny):
    trainer = initialized(tiny, cutmix_share=0.0, strength=0.0)
    unsure = torch.zeros(2, 3, *tiny.patch)
    loss, moved = loss_and_step(trainer, tiny, unsure, torch.randn(2, 3, *tiny.patch))
    assert loss == 0
    assert not moved.any()


def test_of_regions_all_must_be_sure(tmp_path):
    tiny = TinyDataset(tmp_path, PATCHES["2d"], scenario="regions")
    trainer = initialized(tiny)
    logits = torch.tensor([[5.0, 5.0], [5.0, 1.0], [-5.0, -5.0], [0.0, -5.0]]).view(4, 2, 1, 1)
    found = trainer.confidence([logits])
    expected = np.maximum(expit(logits.numpy()), expit(-logits.numpy())).min(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found >= 0.95).flatten().tolist() == [True, False, True, False]


def test_an_averaged_network_labels_where_asked(tiny):
    assert initialized(tiny).teacher is None
    trainer = initialized(tiny, teacher_decay=0.9, sure_from=0.0, cutmix_share=0.0)
    shake(trainer.teacher.module)
    labeled, unlabeled = tiny.batches(trainer)
    student, teacher = Spy(trainer.network), Spy(trainer.teacher.module)
    step_of(trainer, labeled, unlabeled).losses["pseudo_label"].backward()
    assert student.sizes(with_gradient=False) == []
    ((images, _),) = teacher.passes
    assert torch.equal(images, unlabeled["weak"])
    assert has_gradient(trainer.network)
    assert not has_gradient(trainer.teacher.module)
    labels, sure = trainer.sure_labels(unlabeled["weak"], labeled["target"])
    assert torch.equal(labels[:, 0].long(), trainer.teacher(unlabeled["weak"]).argmax(1))
    assert sure.all()

"""Transformation consistency: alignment, weights, schedule and branches, against what the paper's formula says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunet_ssl.losses.overlap import soft_iou_loss, tanimoto_loss
from nnunet_ssl.losses.predictions import probabilities
from nnunet_ssl.methods import nnUNetTrainerSemiTC, nnUNetTrainerSupTC
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of
from nnunet_ssl.transforms.alignment import align_displacements, inside_mask
from nnunet_ssl.transforms.displacement import warp
from nnunet_ssl.transforms.spatial import SpatialTransforms, Transform


def initialized(tiny, cls=nnUNetTrainerSemiTC, **ssl):
    return tiny.initialized(cls, **{"supervised_fraction": 0.0, "identity_probability": 0.0, **ssl})


def draw(trainer, data):
    """Transforms of a batch, as one branch draws them."""
    return trainer.transforms.draw(data, trainer.generator)


def still(trainer, count, shape):
    """Transforms that move nothing, in one branch."""
    dims, margin = len(shape), trainer.transforms.grid(shape).margin
    elastic = torch.zeros(count, dims, *(side + 2 * m for side, m in zip(shape, margin)))
    return Transform(torch.eye(dims).expand(count, -1, -1), elastic, torch.zeros(count, dims, *shape))


# Large enough that the borders between classes, where interpolation errs, are a small part.
LARGE = {"2d": (128, 128), "3d": (48, 48, 48), "anisotropic": (6, 96, 96)}


def smooth_logits(shape, classes=3):
    noise = np.random.default_rng(0).normal(size=(2, classes, *shape))
    logits = gaussian_filter(noise, (0, 0, *[side / 10 for side in shape]))
    # Nearly one-hot: the soft IoU of a soft map with itself is not 1.
    return torch.from_numpy(logits / logits.std() * 60)


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_an_equivariant_network_is_consistent(tmp_path, patch, interpolation):
    """f(t(x)) = t(f(x)) must cost nothing, which only the right alignment achieves."""
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    trainer = initialized(tiny, interpolation=interpolation)
    logits = smooth_logits(LARGE[patch])
    t1, t2 = draw(trainer, logits), draw(trainer, logits)
    first, second = (warp(logits, t.displacement.double()) for t in (t1, t2))
    right = trainer.consistency(first, second, t1, t2).item()
    swapped = trainer.consistency(first, second, t2, t1).item()
    none = trainer.consistency(first, second, *[still(trainer, 2, LARGE[patch])] * 2).item()
    assert right < 0.25 * min(swapped, none)


@pytest.mark.parametrize(("name", "loss"), [("tanimoto", tanimoto_loss), ("soft_iou", soft_iou_loss)])
@pytest.mark.parametrize("has_regions", [False, True])
def test_a_structure_counts_where_either_branch_finds_it(tiny, monkeypatch, has_regions, name, loss):
    trainer = initialized(tiny, consistency_loss=name)
    monkeypatch.setattr(type(trainer.label_manager), "has_regions", has_regions)
    shape = (16, 16)
    unmoved = still(trainer, 1, shape)
    nowhere = torch.full((1, 3, *shape), -4.0)
    nowhere[:, 0] = 4.0
    somewhere = nowhere.clone()
    somewhere[0, 1, 4:7, 5] = 6.0
    for first, second, classes in ((nowhere, nowhere, [0]), (somewhere, nowhere, [0, 1]), (nowhere, somewhere, [0, 1])):
        p, q = (torch.sigmoid(z) if has_regions else torch.softmax(z, 1) for z in (first, second))
        expected = loss(p[:, classes], q[:, classes]).item()
        assert trainer.consistency(first, second, unmoved, unmoved).item() == pytest.approx(expected, abs=1e-6)


def test_terms_are_the_papers_formula(tiny, monkeypatch):
    """One step, put together anew from the network's outputs."""
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    seen = []
    drawn = trainer.transforms.draw
    monkeypatch.setattr(SpatialTransforms, "draw", lambda self, *data: seen.append(drawn(*data)) or seen[-1])
    terms = step_of(trainer, labeled, unlabeled).losses
    data = torch.cat([labeled["data"], unlabeled["strong"]])
    (both,) = seen
    t1, t2 = both.halves()
    u1, u2 = t1.displacement, t2.displacement
    num = len(labeled["data"])
    supervised, predictions = [], []
    for u in (u1, u2):
        outputs = trainer.network(warp(data, u))
        predictions.append(probabilities(outputs[0], False))
        target = warp(labeled["target"], u[:num], "nearest")
        # Three resolutions, of which nnU-Net weighs the lowest with 0 and the others 2 to 1.
        assert len(outputs) == 3
        full, half = (o[:num] for o in outputs[:2])
        assert half.shape[2:] == tuple(s // 2 for s in tiny.patch)
        smaller = torch.nn.functional.interpolate(target.float(), half.shape[2:], mode="nearest-exact")
        supervised.append((2 * trainer.loss.loss(full, target) + trainer.loss.loss(half, smaller)) / 3)
    assert terms["supervised"].item() == pytest.approx(sum(supervised).item() / 2, abs=1e-5)
    alignment, compared = trainer.transforms.align(t1, t2)
    # Another way to the same alignment: the whole maps, voxel by voxel. Near the border it knows less of them.
    voxel_by_voxel = align_displacements(u1, u2, 100)
    keep = (compared & inside_mask(voxel_by_voxel)).expand_as(alignment)
    assert (alignment - voxel_by_voxel)[keep].abs().max() < 0.05
    assert not compared[~inside_mask(u2)].any()
    expected = soft_iou_loss(warp(predictions[0], alignment), predictions[1], compared)
    assert terms["consistency"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert trainer.weight("consistency") == 1.0


def test_weight_and_ramp(tiny):
    trainer = initialized(tiny, consistency_weight=0.5, unlabeled_ramp=0.5)
    weights = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        weights.append(trainer.weight("consistency"))
    assert weights == pytest.approx([0.5 * np.exp(-5), 0.5 * np.exp(-1.25), 0.5, 0.5])


def test_stage_1_uses_labels_alone(tiny):
    trainer = initialized(tiny, supervised_fraction=0.5)
    labeled, _ = tiny.batches(trainer)
    assert sorted(step_of(trainer, labeled, None).losses) == ["supervised"]


def test_suptc_is_consistent_on_labeled_cases(tiny):
    trainer = initialized(tiny, nnUNetTrainerSupTC)
    labeled, _ = tiny.batches(trainer)
    assert len(labeled["data"]) == 4
    assert sorted(step_of(trainer, labeled, None).losses) == ["consistency", "supervised"]
    assert trainer.dataloader_unlabeled is None


def test_identity_is_drawn_per_example_and_branch(tiny):
    trainer = initialized(tiny, identity_probability=0.5)
    drawn = draw(trainer, torch.zeros(400, 1, *tiny.patch)).displacement
    identity = (drawn == 0).flatten(1).all(1).float()
    assert identity.mean().item() == pytest.approx(0.5, abs=0.1)
    again = (draw(trainer, torch.zeros(400, 1, *tiny.patch)).displacement == 0).flatten(1).all(1)
    assert not torch.equal(identity.bool(), again)


@pytest.mark.parametrize(("patch", "fixed"), [("anisotropic", True), ("3d", False)])
def test_slices_do_not_move_in_anisotropic_patches(tmp_path, patch, fixed):
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    drawn = draw(initialized(tiny), torch.zeros(3, 1, *tiny.patch)).displacement
    assert bool((drawn[:, 0] == 0).all()) == fixed
    assert drawn[:, 1:].abs().max() > 0


def test_the_papers_supervised_loss(tiny):
    trainer = initialized(tiny, supervised_loss="soft_iou")
    labeled, _ = tiny.batches(trainer)
    logits = torch.randn(trainer.batch_size, 3, *tiny.patch)
    half = torch.randn(trainer.batch_size, 3, *(s // 2 for s in tiny.patch))
    one_hot = torch.nn.functional.one_hot(labeled["target"][:, 0].long(), 3).movedim(-1, 1).float()
    half_one_hot = torch.nn.functional.interpolate(one_hot, half.shape[2:], mode="nearest-exact")
    losses = [soft_iou_loss(torch.softmax(z, 1), y).item() for z, y in ((logits, one_hot), (half, half_one_hot))]
    lowest = torch.zeros(trainer.batch_size, 3, *(s // 4 for s in tiny.patch))
    value = trainer.supervised_loss([logits, half, lowest], labeled["target"]).item()
    assert value == pytest.approx((2 * losses[0] + losses[1]) / 3, abs=1e-6)

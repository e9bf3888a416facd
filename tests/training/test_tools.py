"""What methods ask their training for: labels and losses that leave voxels and structures out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from reference_loss import arrays, reference_loss
from scipy.special import expit, softmax

from nnunet_ssl.losses.predictions import consistent_regions, without_structures
from nnunet_ssl.methods import nnUNetTrainerFixMatch
from nnunet_ssl.testing.tiny import PATCHES, SCENARIOS, TinyDataset, step_of


@pytest.fixture(params=SCENARIOS)
def kind(request, tmp_path) -> TinyDataset:
    return TinyDataset(tmp_path, PATCHES["2d"], scenario=request.param)


def outputs_of(tiny: TinyDataset, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = 2 if tiny.has_regions else 3
    return [torch.randn(2, channels, *(s // 2**i for s in tiny.patch), generator=generator) for i in range(3)]


def test_masked_targets_mark_what_is_left_out_and_keep_what_is_ignored(kind):
    trainer = kind.initialized(nnUNetTrainerFixMatch)
    target = kind.batches(trainer)[0]["target"]
    counted = torch.rand(2, 1, *kind.patch) > 0.5
    found = trainer.masked_target(target, counted)
    assert found.dtype == target.dtype
    if kind.has_regions:
        before = target[:, 2:] > 0 if kind.ignore_label is not None else torch.zeros_like(counted)
        assert torch.equal(found[:, :2], target[:, :2])
        assert torch.equal(found[:, 2:] > 0, before | ~counted)
    else:
        assert torch.equal(found, torch.where(counted, target, 3))
    assert trainer.ignore_value == (2 if kind.has_regions else 3)
    assert kind.has_regions or kind.ignore_label in (None, trainer.ignore_value)


def test_masked_losses_count_the_voxels_asked_for_and_no_ignored_ones(kind):
    trainer = kind.initialized(nnUNetTrainerFixMatch)
    target = kind.batches(trainer)[0]["target"]
    outputs = outputs_of(kind)
    ignored = torch.zeros(2, 1, *kind.patch, dtype=torch.bool)
    if kind.ignore_label is not None:
        ignored = target[:, -1:] > 0 if kind.has_regions else target == kind.ignore_label
    known = target[:, :2] if kind.has_regions else target
    for counted in (torch.rand(2, 1, *kind.patch) > 0.5, torch.zeros(2, 1, *kind.patch, dtype=torch.bool)):
        found = trainer.masked_supervised_loss(outputs, target, counted).item()
        counts = (counted & ~ignored).numpy()
        expected = reference_loss(arrays(outputs), known.numpy(), counts, kind.has_regions, kind.ignore_label)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_confidence_is_the_probability_of_what_is_labeled(kind):
    trainer = kind.initialized(nnUNetTrainerFixMatch)
    outputs = outputs_of(kind)
    z = outputs[0].numpy()
    expected = expit(abs(z)).min(1, keepdims=True) if kind.has_regions else softmax(z, 1).max(1, keepdims=True)
    np.testing.assert_allclose(trainer.confidence(outputs), expected, rtol=1e-5)


def test_regions_that_are_waited_for_need_not_be_sure(tmp_path):
    tiny = TinyDataset(tmp_path, PATCHES["2d"], scenario="regions")
    trainer = tiny.initialized(nnUNetTrainerFixMatch)
    outputs = outputs_of(tiny)
    p = expit(abs(outputs[0].numpy()))
    wait_for(trainer, 1)
    np.testing.assert_allclose(trainer.confidence(outputs), p[:, :1], rtol=1e-5)
    trainer.learned.counts[:] = 0.0
    np.testing.assert_allclose(trainer.confidence(outputs), p.min(1, keepdims=True), rtol=1e-5)


def test_hard_labels_fit_one_label_map_and_ignore_nothing(kind):
    trainer = kind.initialized(nnUNetTrainerFixMatch)
    target, outputs = kind.batches(trainer)[0]["target"], outputs_of(kind)
    found = trainer.hard_labels(outputs, target)
    assert (found.dtype, found.shape) == (target.dtype, target.shape)
    z = outputs[0]
    if not kind.has_regions:
        assert torch.equal(found[:, 0].long(), z.argmax(1))
        return
    assert torch.equal(found[:, 1] > 0, z[:, 1] > 0)
    assert torch.equal(found[:, 0] > 0, (z[:, 0] > 0) | (z[:, 1] > 0)), "the inner region lies in the outer one"
    assert not found[:, 2:].any()


def wait_for(trainer, structure: int) -> None:
    trainer.learned.wanted_dice = 0.5
    trainer.learned.counts[:] = 1.0
    trainer.learned.counts[:, 0, structure] = 0.0
    assert trainer.learned.waiting == (structure,)


def test_pseudo_labels_do_not_tell_a_structure_that_is_waited_for_from_the_background(kind):
    trainer = kind.initialized(nnUNetTrainerFixMatch)
    wait_for(trainer, 1)
    outputs = [o.requires_grad_() for o in outputs_of(kind)]
    target = kind.batches(trainer)[0]["target"]
    labels = trainer.hard_labels(outputs, target)
    assert not (labels[:, 1] if kind.has_regions else labels == 2).any()
    if kind.has_regions:
        assert torch.equal(labels[:, 0] > 0, outputs[0][:, 0] > 0), "a region that is waited for paints nothing"
        trainer.pseudo_label_loss(outputs, labels).backward()
        assert not outputs[0].grad[:, 1].any()
        assert outputs[0].grad[:, 0].any()
        return
    z = outputs[0].detach().double().numpy()
    merged = np.exp(z[:, 0]) + np.exp(z[:, 2])
    np.testing.assert_array_equal(labels[:, 0].numpy(), merged < np.exp(z[:, 1]))
    p = trainer.probabilities(outputs).detach().numpy()
    np.testing.assert_allclose(p[:, 0], merged / np.exp(z).sum(1), rtol=1e-5)
    assert not p[:, 2].any()
    # Labels of people, in mixtures, show the structure; they are read in the same way, and ignored voxels stay so.
    shown = torch.where(target == 2, 0, target)
    assert trainer.pseudo_label_loss(outputs, target).item() == trainer.pseudo_label_loss(outputs, shown).item()
    everything = torch.full_like(target, 2)
    for part in (0, 2):
        sure = [torch.full_like(o, -20.0) for o in outputs]
        for o in sure:
            o[:, part] = 20.0
        assert trainer.pseudo_label_loss(sure, everything).item() == pytest.approx(-1, abs=1e-4)
    wrong = [torch.full_like(o, -20.0) for o in outputs]
    for o in wrong:
        o[:, 1] = 20.0
    assert trainer.pseudo_label_loss(wrong, everything).item() > 10


@pytest.mark.parametrize("structures", [(), (0,), (1, 2), (0, 1, 2)])
def test_merged_classes_have_the_sum_of_their_probabilities(structures):
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    merged = torch.softmax(without_structures(logits, structures, False), 1).numpy()
    p = softmax(logits.numpy(), 1)
    expected = p.copy()
    for structure in structures:
        expected[:, 0] += p[:, structure + 1]
        expected[:, structure + 1] = 0
    np.testing.assert_allclose(merged, expected, atol=1e-12)


def test_waiting_regions_keep_their_values_and_get_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    found = without_structures(logits, (1,), True)
    assert torch.equal(found, logits)
    found.square().sum().backward()
    assert [bool(logits.grad[:, i].any()) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize("left_out", [(), (1,), (0, 2)])
def test_consistent_regions_equal_loops_over_voxels(left_out):
    """The whole tumor, its core, and the enhancing part of the core, in every combination."""
    regions, order = [(1, 2, 3), (2, 3), (3,)], (1, 2, 3)
    maps = torch.tensor(list(itertools.product([0, 1], repeat=3))).T[None, :, None]
    found = consistent_regions(maps, regions, order, left_out)
    for voxel in range(8):
        label = 0
        for region, paints in enumerate(order):
            if region not in left_out and maps[0, region, 0, voxel]:
                label = paints
        assert found[0, :, 0, voxel].tolist() == [int(label in labels) for labels in regions]


@pytest.mark.parametrize("scenario", ["regions", "regions and ignore"])
def test_the_last_region_counts_among_what_is_learned(tmp_path, scenario):
    tiny = TinyDataset(tmp_path, PATCHES["2d"], scenario=scenario)
    trainer = tiny.initialized(nnUNetTrainerFixMatch)
    labeled, unlabeled = tiny.batches(trainer)
    ((output,), target) = step_of(trainer, labeled, unlabeled).known
    counts = trainer.overlap_counts([output], target)[0]
    counted = torch.ones_like(target[:, :1]) > 0 if tiny.ignore_label is None else target[:, 2:] == 0
    for region in range(2):
        found, truth = output[0][:, region : region + 1] > 0, target[:, region : region + 1] > 0
        expected = [(part & counted).sum().item() for part in (found & truth, found, truth)]
        assert counts[:, region].tolist() == expected
    assert counts[2].min() > 0

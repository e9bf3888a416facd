"""CPS: terms against an independent computation, who teaches whom, and mixtures of images and labels alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_loss import arrays, reference_loss
from told_networks import Spy, has_gradient

from nnunet_ssl.methods import nnUNetTrainerCPS
from nnunet_ssl.testing.tiny import PATCHES, SCENARIOS, TinyDataset, step_of
from nnunet_ssl.transforms import mixing

TERMS = nnUNetTrainerCPS.unlabeled_terms


def initialized(tiny: TinyDataset, batch_size: int = 4, **ssl) -> nnUNetTrainerCPS:
    tiny.plans["configurations"][tiny.configuration]["batch_size"] = batch_size
    return tiny.initialized(nnUNetTrainerCPS, **ssl)


def found_labels(logits: torch.Tensor, has_regions: bool) -> np.ndarray:
    """Labels (B, 1, *S), or regions (B, 2, *S) of which the second lies inside the first."""
    z = logits.detach().numpy()
    if not has_regions:
        return z.argmax(1)[:, None]
    inner = z[:, 1] > 0
    return np.stack([(z[:, 0] > 0) | inner, inner], 1)


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("cutmix_share", [0.0, 0.5])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("patch", ["2d", "3d"])
@torch.no_grad()
def test_terms_equal_an_independent_computation(tmp_path, monkeypatch, patch, scenario, cutmix_share, batch_size):
    tiny = TinyDataset(tmp_path, PATCHES[patch], scenario=scenario)
    trainer = initialized(tiny, batch_size, cutmix_share=cutmix_share)
    labeled, unlabeled = tiny.batches(trainer)
    count = batch_size // 2
    boxes = mixing.cutmix_boxes(count, tiny.patch, 0.5, torch.Generator().manual_seed(1))
    monkeypatch.setattr(mixing, "cutmix_boxes", lambda *a: boxes)
    losses = step_of(trainer, labeled, unlabeled).losses

    target, regions = labeled["target"].numpy(), tiny.has_regions
    last = target[:, -1:] > 0 if regions else target == tiny.ignore_label
    ignored = last if tiny.ignore_label is not None else np.zeros_like(last)
    strong, box = unlabeled["strong"].numpy(), boxes.numpy() if cutmix_share else np.zeros(boxes.shape, bool)
    # A single unlabeled image is mixed with a labeled one, whose labels then count, but for those that nobody gave.
    other = strong[::-1] if count > 1 else labeled["data"].numpy()
    mixed = torch.tensor(np.where(box, other, strong))
    counted = ~(box & ignored) if count == 1 else np.ones_like(box)
    known = target[:, : 2 if regions else 1]
    # One pass over labeled and unlabeled images; networks with instance normalization keep images apart.
    outputs = [arrays(network(mixed)) for network in trainer.predictors]
    labels = [found_labels(network(unlabeled["weak"])[0], regions) for network in trainer.predictors]
    assert trainer._statistics["agreement"].item() == pytest.approx(
        np.mean(_padded(labels[0], tiny) == _padded(labels[1], tiny))
    )
    for name, mine, theirs in zip(TERMS, outputs, reversed(labels)):
        wanted = np.where(box, theirs[::-1] if count > 1 else known, theirs)
        assert losses[name].item() == pytest.approx(
            reference_loss(mine, wanted, counted, regions, tiny.ignore_label), rel=1e-4
        )
    for name, network in zip(trainer.supervised_terms, trainer.predictors):
        expected = reference_loss(arrays(network(labeled["data"])), known, ~ignored, regions, tiny.ignore_label)
        assert losses[name].item() == pytest.approx(expected, rel=1e-4)


def _padded(labels: np.ndarray, tiny: TinyDataset) -> np.ndarray:
    """With the channel of ignored voxels, where there is one: pseudo-labels ignore none."""
    further = np.zeros_like(labels[:, :1])
    return np.concatenate([labels, further], 1) if tiny.has_regions and tiny.ignore_label is not None else labels


@pytest.mark.parametrize("term", TERMS)
def test_each_network_learns_from_the_others_labels_alone(tiny, term):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    step_of(trainer, labeled, unlabeled).losses[term].backward()
    student = TERMS.index(term)
    assert has_gradient(trainer.predictors[student])
    assert not has_gradient(trainer.predictors[1 - student])
    assert trainer.trains(term) == (("network", "partner")[student],)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_follows_the_other_network_and_not_its_own(tiny, term):
    """Where the other network takes everything for class 1, the term is least for a network that says so too."""
    trainer = initialized(tiny, cutmix_share=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    student = TERMS.index(term)

    def loss(mine: int) -> float:
        for index, network in enumerate(trainer.predictors):
            for head in network.decoder.seg_layers:
                torch.nn.init.zeros_(head.weight)
                head.bias.data = torch.full((3,), -4.0)
                head.bias.data[mine if index == student else 1] = 4.0
        return step_of(trainer, labeled, unlabeled).losses[term].item()

    values = [loss(mine) for mine in range(3)]
    assert int(np.argmin(values)) == 1
    assert values[1] < values[0] - 4


def test_one_pass_each_over_all_images_and_one_for_labels(tiny):
    trainer = initialized(tiny, cutmix_share=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    spies = [Spy(network) for network in trainer.predictors]
    step_of(trainer, labeled, unlabeled)
    for spy in spies:
        assert [kept for _, kept in spy.passes] == [True, False]
        assert torch.equal(spy.passes[0][0], torch.cat([labeled["data"], unlabeled["strong"]]))
        assert torch.equal(spy.passes[1][0], unlabeled["weak"])


def test_without_a_weight_unlabeled_images_pass_no_network(tiny):
    trainer = initialized(tiny, pseudo_label_weight=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    spies = [Spy(network) for network in trainer.predictors]
    assert set(step_of(trainer, labeled, unlabeled).losses) == {"supervised", "supervised_partner"}
    assert [spy.sizes(True) + spy.sizes(False) for spy in spies] == [[2], [2]]


def test_the_networks_start_with_different_weights(tiny):
    trainer = initialized(tiny)
    first, second = (torch.cat([p.flatten() for p in n.parameters() if p.ndim > 1]) for n in trainer.predictors)
    assert first.shape == second.shape
    assert (first != second).float().mean() > 0.99

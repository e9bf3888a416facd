"""Stored pseudo-labels as targets, and voxels of them that do not count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nnunet_ssl.data.pseudo_labels import UNCERTAIN
from nnunet_ssl.methods import nnUNetTrainerSelfTraining, nnUNetTrainerSupervised
from nnunet_ssl.nnunet.loss import as_target
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.tiny import SCENARIOS, TinyDataset


def made(bench: Bench, scenario: str, cls: type = nnUNetTrainerSupervised, **settings):
    """A data set and its trainer."""
    with bench.data("2d", scenario) as tiny:
        return tiny, tiny.initialized(cls, **settings)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path / "bench")


def logits_of(trainer, seed: int = 0) -> list[torch.Tensor]:
    """As a network with deep supervision gives them."""
    rng, heads = torch.Generator().manual_seed(seed), trainer.label_manager.num_segmentation_heads
    patch = trainer.configuration_manager.patch_size
    sizes = [[max(1, side // 2**level) for side in patch] for level in range(len(trainer.loss.weight_factors))]
    return [torch.randn(2, heads, *size, generator=rng, requires_grad=True) for size in sizes]


def labels_of(tiny: TinyDataset, ignored: int | None = None) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(0, tiny.num_labels, (2, 1, *tiny.patch), generator=rng).to(torch.int16)
    if ignored is not None:
        labels[..., : tiny.patch[-1] // 3] = ignored
    return labels


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_label_map_becomes_what_nnunets_loader_makes_of_it(bench, scenario):
    tiny, trainer = made(bench, scenario)
    labels = labels_of(tiny)
    target = as_target(labels, trainer.label_manager)
    if "regions" not in scenario:
        assert target is labels
        return
    assert torch.equal(target, torch.cat([(labels == 1) | (labels == 2), labels == 2], 1))


@pytest.mark.parametrize("everywhere", [False, True], ids=["somewhere", "everywhere"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_uncertain_voxels_have_no_gradient_and_change_nothing(bench, scenario, everywhere):
    """Exactly none, at full resolution and below; whatever the network says there, the loss is the same."""
    tiny, trainer = made(bench, scenario, nnUNetTrainerSelfTraining, strength=0.0)
    outputs = logits_of(trainer)
    labels = labels_of(tiny, UNCERTAIN)
    labels[...] = UNCERTAIN if everywhere else labels
    uncertain = labels == UNCERTAIN

    def loss_of(given: list[torch.Tensor]) -> torch.Tensor:
        trainer.network = lambda images: given
        unlabeled = type("Given", (), {"pseudo_labels": labels, "strong": None})
        return trainer.unlabeled_losses(None, unlabeled, [])["pseudo_label"]

    loss = loss_of(outputs)
    others = []
    # The lowest output has no weight.
    for output, gradient in zip(outputs[:-1], torch.autograd.grad(loss, outputs[:-1])):
        mask = functional.interpolate(uncertain.float(), output.shape[2:], mode="nearest-exact").bool()
        assert not gradient[mask.expand_as(gradient)].any()
        assert everywhere or gradient[~mask.expand_as(gradient)].any()
        others.append(torch.where(mask, 7.0 * output.detach() + 1, output.detach()))
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss_of([*others, outputs[-1]]), loss, rtol=1e-6, atol=1e-6)

"""The invariants that every trainer of the method table must hold: the promises of nnunet_ssl.testing, and more."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.methods import TRAINERS, nnUNetTrainerFDPL, nnUNetTrainerSemiTC, nnUNetTrainerSupTC
from nnunet_ssl.testing import Bench, kinds, leakage, masks, resuming, steps
from nnunet_ssl.testing.gradients import terms_train_their_networks, unlabeled_images_matter, untouched
from nnunet_ssl.testing.tiny import PATCHES, SCENARIOS, step_of
from nnunet_ssl.testing.whole import train

SEMI = [t for t in TRAINERS if t.unlabeled_terms]
SIAMESE = [t for t in TRAINERS if issubclass(t, nnUNetTrainerSupTC)]
# What switches a method's own terms and transforms off.
WEIGHTS = [f.name for t in TRAINERS for f in dataclasses.fields(t.Parameters) if f.name.endswith("_weight")]
NEUTRAL = {"identity_probability": 1.0} | dict.fromkeys(WEIGHTS, 0.0)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bench")


def parameters(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.network.parameters()]


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_1_the_gradient_of_a_term_reaches_its_networks_and_no_other(bench, trainer_class, patch):
    terms_train_their_networks(trainer_class, bench, patch, before_head=("contrastive", "contrastive_partner"))


@pytest.mark.parametrize("cls", SIAMESE, ids=lambda c: c.__name__)
def test_1_gradient_of_nearest_interpolation_reaches_every_parameter(bench, cls):
    terms_train_their_networks(cls, bench, before_head=(), interpolation="nearest")


@pytest.mark.parametrize("term", ["fixed", "fixed_partner", "dynamic", "dynamic_partner"])
def test_1_what_a_term_does_not_reach_is_told(tiny, term):
    """The check itself: a parameter whose gradient is taken away is named."""
    trainer = tiny.initialized(nnUNetTrainerFDPL, supervised_fraction=0.0)
    step_of(trainer, *tiny.batches(trainer)).losses[term].backward()
    (name,) = trainer.trains(term)
    network = trainer.network if name == "network" else trainer.companions[name].module
    assert not untouched(network, past_head=True)
    last = [name for name, _ in network.named_parameters() if "seg_layers" in name][-1]
    network.get_parameter(last).grad = None
    assert untouched(network, past_head=True) == [last]
    assert not untouched(network, past_head=False)
    first = next(name for name, _ in network.named_parameters())
    network.get_parameter(first).grad.zero_()
    assert untouched(network, past_head=False) == [first]


@pytest.mark.parametrize("branch", [0, 1])
def test_1_gradient_flows_through_both_branches(tiny, branch):
    trainer = tiny.initialized(SIAMESE[0], supervised_fraction=0.0, identity_probability=0.0)
    logits = [torch.randn(2, 3, *tiny.patch, requires_grad=True) for _ in range(2)]
    t1, t2 = (trainer.transforms.draw(logits[0], trainer.generator) for _ in range(2))
    trainer.consistency(*logits, t1, t2).backward()
    assert logits[branch].grad.abs().max() > 0


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_1_unlabeled_images_change_the_gradient(bench, trainer_class, patch):
    unlabeled_images_matter(trainer_class, bench, patch)


def test_2_no_network_shares_storage_with_another(tiny, trainer_class):
    trainer = tiny.initialized(trainer_class)
    assert resuming.shared_storages(trainer) == 0
    trainer.companions["second"] = Companion(torch.nn.Sequential(trainer.network.encoder))
    assert resuming.shared_storages(trainer) > 0, "sharing goes unseen"
    trainer.companions["second"] = Companion(copy.deepcopy(trainer.network))
    assert resuming.shared_storages(trainer) == 0
    assert not resuming.unsaved_weights(trainer)


def test_3_labels_of_unlabeled_cases_are_never_read(bench, trainer_class):
    leakage.hidden_labels_change_nothing(trainer_class, bench)


def test_3_hidden_label_files_may_be_missing(tiny, trainer_class):
    for case in tiny.hidden:
        (tiny.folder / f"{case}_seg.b2nd").unlink()
        (tiny.folder / f"{case}.pkl").unlink()
    train(tiny.trainer(trainer_class, supervised_fraction=0.0))


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_4_equals_the_stock_trainer_with_everything_switched_off(bench, trainer_class, patch):
    with bench.data(patch) as tiny:
        trainer = tiny.initialized(trainer_class, supervised_fraction=0.5, **NEUTRAL)
        stock = tiny.trainer(nnUNetTrainer)
        stock.initialize()
        stock.set_deep_supervision_enabled(True)
    stock.network.load_state_dict(trainer.network.state_dict())
    scales = stock._get_deep_supervision_scales()
    labeled, unlabeled = tiny.batches(trainer)
    more, _ = tiny.batches(trainer, seed=1)
    steps.feed(trainer, unlabeled)
    trainer.dataloader_train = iter(lambda: more, None)
    before = parameters(trainer)
    for epoch in range(4):
        learned_from = labeled
        if epoch < 2 and trainer.uses_unlabeled:
            # What is unlabeled in stage 2 is labeled in stage 1.
            learned_from = {name: torch.cat([labeled[name], more[name]]) for name in ("data", "target")}
        if epoch == 2:
            # The learning rate restarts with the second stage; stock nnU-Net knows no stages.
            stock.lr_scheduler.step(0)
        for t in (trainer, stock):
            t.current_epoch = epoch
            t.network.train()
        trainer.lr_scheduler.step(epoch)
        stock.optimizer.param_groups[0]["lr"] = trainer.optimizer.param_groups[0]["lr"]
        targets = [
            torch.nn.functional.interpolate(
                learned_from["target"].float(),
                [round(side * s) for side, s in zip(tiny.patch, scale)],
                mode="nearest-exact",
            ).to(torch.int16)
            for scale in scales
        ]
        ours = trainer.train_step(labeled)["terms"][0]
        theirs = stock.train_step({"data": learned_from["data"], "target": targets})["loss"]
        assert ours == pytest.approx(float(theirs), abs=1e-4)
    after = parameters(trainer)
    assert max((a - b).abs().max() for a, b in zip(before, after)) > 1e-3, "nothing was trained"
    for a, b in zip(after, stock.network.parameters()):
        torch.testing.assert_close(a, b.detach(), atol=2e-4, rtol=1e-3)


def test_5_resumed_trainings_equal_the_uninterrupted_one(bench, trainer_class):
    """After every epoch, with stages as the method has them by default."""
    resuming.resuming_changes_nothing(trainer_class, bench, supervised_fraction=None)


def test_5_resumed_in_stage_1_where_shares_of_the_batch_are_uneven(bench):
    """Labeled batches of 5 fill batches of 8 there: what an epoch leaves over must not outlive it."""
    resuming.resuming_changes_nothing(nnUNetTrainerSemiTC, bench, batch_size=8, unlabeled_fraction=0.4)


def test_5_every_network_is_saved(bench, trainer_class):
    resuming.every_network_is_saved(trainer_class, bench)


@pytest.mark.parametrize("cls", SIAMESE, ids=lambda c: c.__name__)
def test_6_voxels_outside_the_mask_cannot_change_the_loss(tiny, cls):
    trainer = tiny.initialized(cls, supervised_fraction=0.0, identity_probability=0.0, interpolation="nearest")
    logits_1, logits_2 = torch.randn(2, 2, 3, *tiny.patch)
    t1, t2 = (trainer.transforms.draw(logits_1, trainer.generator) for _ in range(2))
    masked = ~trainer.transforms.align(t1, t2)[1]
    assert 0 < masked.float().mean() < 0.5
    plain = trainer.consistency(logits_1, logits_2, t1, t2)
    for value in (100.0, float("nan")):
        changed = torch.where(masked, value, logits_2)
        assert torch.equal(trainer.consistency(logits_1, changed, t1, t2), plain)
    touched = trainer.consistency(logits_1, torch.where(masked, logits_2, 100.0), t1, t2)
    assert not torch.equal(touched, plain), "the mask is the wrong way round"


@pytest.mark.parametrize("scenario", ["ignore", "regions and ignore"])
@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_6_voxels_that_nobody_annotated_teach_nothing(bench, trainer_class, patch, scenario):
    assert masks.ignored_voxels_teach_nothing(trainer_class, bench, patch, scenario) > 0


@pytest.mark.parametrize("situation", [*steps.EXTREMES, steps.CONFIDENT])
@pytest.mark.parametrize("supervised_loss", ["nnunet", "soft_iou"])
def test_7_terms_are_finite_under_autocast(bench, trainer_class, situation, supervised_loss):
    steps.step_is_finite(trainer_class, bench, situation, supervised_loss=supervised_loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls", SIAMESE, ids=lambda c: c.__name__)
def test_7_confident_predictions_have_finite_loss_and_gradient(tiny, cls, dtype):
    trainer = tiny.initialized(cls, supervised_fraction=0.0, identity_probability=0.0)
    one_hot = torch.nn.functional.one_hot(torch.randint(0, 3, (2, *tiny.patch)), 3).movedim(-1, 1)
    for scale in (1.0, 1e4):
        logits = (one_hot * scale).to(dtype).requires_grad_()
        t1, t2 = (trainer.transforms.draw(logits, trainer.generator) for _ in range(2))
        loss = trainer.consistency(logits, logits, t1, t2)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()


def test_7_a_step_that_is_not_finite_changes_nothing(bench, trainer_class):
    steps.skipped_steps_change_nothing(trainer_class, bench)


@pytest.mark.parametrize("num_labels", [2, 7])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_8_dimensions_channels_and_classes(bench, trainer_class, patch, channels, num_labels):
    with bench.data(patch, num_labels=num_labels, channels=channels) as tiny:
        trainer = tiny.trainer(trainer_class, supervised_fraction=0.5, num_epochs=2, num_iterations_per_epoch=1)
        weights = train(trainer)
    assert all(torch.isfinite(w).all() for w in weights.values())
    terms = trainer.logger.get_value("ssl_supervised", step=None)
    assert len(terms) == 2
    assert np.isfinite(terms).all()
    for name in trainer_class.unlabeled_terms:
        first, second = trainer.logger.get_value(f"ssl_{name}", step=None)
        assert np.isnan(first), f"{name} is off in stage 1"
        # Where nothing is sure yet, or the strong view is the weak one, a term is 0.
        assert np.isfinite(second)
        assert trainer.logger.get_value(f"ssl_weight_{name}", step=None)[1] > 0


@pytest.mark.parametrize("scenario", SCENARIOS[1:])
@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_8_regions_and_ignored_voxels(bench, trainer_class, patch, scenario):
    kinds.one_epoch_trains(trainer_class, bench, patch, scenario)

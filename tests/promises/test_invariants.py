"""The invariants that every trainer of the method table must hold."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from trainings import assert_equal_weights, stop_at_epoch, train

from nnunet_ssl.methods import TRAINERS, nnUNetTrainerSemiTC, nnUNetTrainerSupTC
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

SEMI = [t for t in TRAINERS if t.unlabeled_terms]
SIAMESE = [t for t in TRAINERS if issubclass(t, nnUNetTrainerSupTC)]
# What switches a method's own terms and transforms off.
WEIGHTS = [f.name for t in TRAINERS for f in dataclasses.fields(t.Parameters) if f.name.endswith("_weight")]
NEUTRAL = {"identity_probability": 1.0} | dict.fromkeys(WEIGHTS, 0.0)


def feed(trainer: Any, unlabeled: dict[str, Any]) -> None:
    """Give the same unlabeled batch at every step."""
    if trainer.uses_unlabeled:
        trainer.dataloader_unlabeled = iter(lambda: unlabeled, None)


def parameters(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.network.parameters()]


def untouched(network: nn.Module, *, past_head: bool) -> list[str]:
    """Parameters that did not get the gradient of a term on full resolution: predictions, or features before them."""
    heads = len(network.decoder.seg_layers)
    names = []
    for name, parameter in network.named_parameters():
        # The heads of coarser resolutions serve deep supervision alone.
        if "seg_layers" in name and (not past_head or f"seg_layers.{heads - 1}." not in name):
            continue
        # A bias before InstanceNorm has no effect on the output, so its gradient is rounding noise or zero.
        if name.endswith("conv.bias") or ".all_modules.0.bias" in name:
            continue
        if parameter.grad is None or not parameter.grad.abs().max() > 0:
            names.append(name)
    return names


TERMS = [(t, name) for t in SEMI for name in t.unlabeled_terms]


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize(("cls", "term"), TERMS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_1_unlabeled_gradient_reaches_one_network_and_no_other(tmp_path, cls, term, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    trainer = tiny.initialized(cls, supervised_fraction=0.0, identity_probability=0.0)
    for parameter in (p for n in trainer.networks for p in n.parameters()):
        # Residual blocks start with a gain of zero, and so with no gradient before it.
        if not parameter.any():
            torch.nn.init.constant_(parameter, 0.5)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.loss_terms(labeled, unlabeled if cls.uses_unlabeled else None)[term].value.backward()
    learning = [n for n in trainer.networks if any(p.grad is not None and p.grad.any() for p in n.parameters())]
    assert len(learning) == 1
    assert not untouched(learning[0], past_head=term != "contrastive")


@pytest.mark.parametrize("cls", SIAMESE, ids=lambda c: c.__name__)
def test_1_gradient_of_nearest_interpolation_reaches_every_parameter(tiny, cls):
    trainer = tiny.initialized(cls, supervised_fraction=0.0, identity_probability=0.0, interpolation="nearest")
    labeled, unlabeled = tiny.batches(trainer)
    trainer.loss_terms(labeled, unlabeled if cls.uses_unlabeled else None)["consistency"].value.backward()
    assert not untouched(trainer.network, past_head=True)


@pytest.mark.parametrize("branch", [0, 1])
def test_1_gradient_flows_through_both_branches(tiny, branch):
    trainer = tiny.initialized(SIAMESE[0], supervised_fraction=0.0, identity_probability=0.0)
    logits = [torch.randn(2, 3, *tiny.patch, requires_grad=True) for _ in range(2)]
    u1, u2 = (trainer.draw_displacement(logits[0]) for _ in range(2))
    trainer.consistency(*logits, u1, u2).backward()
    assert logits[branch].grad.abs().max() > 0


@pytest.mark.parametrize("cls", [t for t in SEMI if t.uses_unlabeled], ids=lambda c: c.__name__)
def test_1_unlabeled_images_change_the_gradient(tiny, cls):
    gradients = []
    for seed in (1, 2):
        trainer = tiny.initialized(cls, supervised_fraction=0.0)
        labeled, _ = tiny.batches(trainer)
        _, unlabeled = tiny.batches(trainer, seed)
        terms = trainer.loss_terms(labeled, unlabeled)
        sum(terms[name].value for name in cls.unlabeled_terms).backward()
        parameters = [p for network in trainer.networks for p in network.parameters()]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert not torch.allclose(*gradients)


def shared_storages(trainer: Any) -> int:
    """How many tensors belong to more than one network of a trainer."""
    networks = {id(v): v for v in vars(trainer).values() if isinstance(v, nn.Module) and v is not trainer.loss}
    # Within one network nnU-Net registers the encoder twice, so sets are compared between networks.
    storages = [{p.data_ptr() for p in network.state_dict().values()} for network in networks.values()]
    return sum(map(len, storages)) - len(set().union(*storages))


def test_2_no_network_shares_storage_with_another(tiny, trainer_class):
    trainer = tiny.initialized(trainer_class)
    assert shared_storages(trainer) == 0
    trainer.second = nn.Sequential(trainer.network.encoder)
    assert shared_storages(trainer) > 0, "sharing goes unseen"
    trainer.second = copy.deepcopy(trainer.network)
    assert shared_storages(trainer) == 0


def test_3_labels_of_unlabeled_cases_are_never_read(tmp_path: Path, trainer_class):
    weights = []
    for name, scrambled in (("honest", False), ("scrambled", True)):
        tiny = TinyDataset(tmp_path / name, PATCHES["2d"])
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
                patch.setenv(variable, str(tiny.root / variable))
            if scrambled:
                tiny.scramble_labels(tiny.hidden)
            trainer = tiny.trainer(trainer_class, supervised_fraction=0.25)
            if trainer_class.transductive and scrambled:
                # Validation labels are read for the online validation, which must not reach the weights.
                tiny.scramble_labels_keeping_locations(tiny.validation)
            weights.append(train(trainer))
    assert_equal_weights(*weights)


def test_3_hidden_label_files_may_be_missing(tiny, trainer_class):
    for case in tiny.hidden:
        (tiny.folder / f"{case}_seg.b2nd").unlink()
        (tiny.folder / f"{case}.pkl").unlink()
    train(tiny.trainer(trainer_class, supervised_fraction=0.0))


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_4_equals_the_stock_trainer_with_everything_switched_off(tmp_path, trainer_class, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    trainer = tiny.initialized(trainer_class, supervised_fraction=0.5, **NEUTRAL)
    stock = tiny.trainer(nnUNetTrainer)
    stock.initialize()
    stock.set_deep_supervision_enabled(True)
    stock.network.load_state_dict(trainer.network.state_dict())
    scales = stock._get_deep_supervision_scales()
    labeled, unlabeled = tiny.batches(trainer)
    more, _ = tiny.batches(trainer, seed=1)
    feed(trainer, unlabeled)
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


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_5_resumed_training_equals_the_uninterrupted_one(tmp_path: Path, trainer_class, stop_after):
    assert_resuming_changes_nothing(tmp_path, trainer_class, stop_after)


def test_5_resumed_in_stage_1_where_shares_of_the_batch_are_uneven(tmp_path: Path):
    """Labeled batches of 5 fill batches of 8 there: what an epoch leaves over must not outlive it."""
    assert_resuming_changes_nothing(tmp_path, nnUNetTrainerSemiTC, 1, batch_size=8, unlabeled_fraction=0.4)


def assert_resuming_changes_nothing(tmp_path: Path, cls: Any, stop_after: int, batch_size: int = 4, **ssl: Any) -> None:
    weights = []
    for name in ("whole", "resumed"):
        tiny = TinyDataset(tmp_path / name, PATCHES["2d"])
        tiny.plans["configurations"]["2d"]["batch_size"] = batch_size
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
                patch.setenv(variable, str(tiny.root / variable))
            trainer = tiny.trainer(cls, learned_dice=0.5, **ssl)
            if name == "resumed":
                stop_at_epoch(trainer, stop_after)
                with pytest.raises(KeyboardInterrupt):
                    trainer.run_training()
                file = f"{trainer.output_folder}/checkpoint_latest.pth"
                torch.manual_seed(123)
                np.random.seed(123)
                trainer = tiny.trainer(cls, learned_dice=0.5, **ssl)
                trainer.load_checkpoint(file)
                assert trainer.current_epoch == stop_after
            weights.append(train(trainer))
    assert_equal_weights(*weights)


@pytest.mark.parametrize("cls", SIAMESE, ids=lambda c: c.__name__)
def test_6_voxels_outside_the_mask_cannot_change_the_loss(tiny, cls):
    from nnunet_ssl.transforms.alignment import align_displacements, inside_mask

    trainer = tiny.initialized(cls, supervised_fraction=0.0, identity_probability=0.0, interpolation="nearest")
    logits_1, logits_2 = torch.randn(2, 2, 3, *tiny.patch)
    u1, u2 = trainer.draw_displacement(logits_1), trainer.draw_displacement(logits_1)
    masked = ~inside_mask(align_displacements(u1, u2, grid=trainer.grid(tiny.patch)))
    assert 0 < masked.float().mean() < 0.5
    plain = trainer.consistency(logits_1, logits_2, u1, u2)
    for value in (100.0, float("nan")):
        changed = torch.where(masked, value, logits_2)
        assert torch.equal(trainer.consistency(logits_1, changed, u1, u2), plain)
    touched = trainer.consistency(logits_1, torch.where(masked, logits_2, 100.0), u1, u2)
    assert not torch.equal(touched, plain), "the mask is the wrong way round"


EXTREMES = {
    "constant image": lambda data: torch.full_like(data, 3.0),
    "zeros": torch.zeros_like,
    "huge values": lambda data: data * 1e4,
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("supervised_loss", ["nnunet", "soft_iou"])
def test_7_terms_are_finite_under_autocast(tiny, trainer_class, name, supervised_loss):
    trainer = tiny.initialized(
        trainer_class, supervised_fraction=0.0, cpu_bfloat16=True, supervised_loss=supervised_loss
    )
    labeled, unlabeled = tiny.batches(trainer)
    # Only background is there: every structure is absent.
    labeled = {**labeled, "data": EXTREMES[name](labeled["data"]), "target": torch.zeros_like(labeled["target"])}
    feed(trainer, {**unlabeled, **{view: EXTREMES[name](unlabeled[view]) for view in ("strong", "weak")}})
    output = trainer.train_step(labeled)
    assert np.isfinite(output["loss"])
    assert np.isfinite(output["terms"]).all()
    assert all(torch.isfinite(p).all() for network in trainer.networks for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls", SIAMESE, ids=lambda c: c.__name__)
def test_7_confident_predictions_have_finite_loss_and_gradient(tiny, cls, dtype):
    trainer = tiny.initialized(cls, supervised_fraction=0.0, identity_probability=0.0)
    one_hot = torch.nn.functional.one_hot(torch.randint(0, 3, (2, *tiny.patch)), 3).movedim(-1, 1)
    for scale in (1.0, 1e4):
        logits = (one_hot * scale).to(dtype).requires_grad_()
        u1, u2 = trainer.draw_displacement(logits), trainer.draw_displacement(logits)
        loss = trainer.consistency(logits, logits, u1, u2)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("num_labels", [2, 7])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_8_dimensions_channels_and_classes(tmp_path, trainer_class, patch, channels, num_labels):
    tiny = TinyDataset(tmp_path, PATCHES[patch], num_labels, channels)
    trainer = tiny.trainer(trainer_class, supervised_fraction=0.5, num_epochs=2, num_iterations_per_epoch=1)
    weights = train(trainer)
    assert all(torch.isfinite(w).all() for w in weights.values())
    terms = trainer.logger.get_value("ssl_supervised", step=None)
    assert len(terms) == 2
    assert np.isfinite(terms).all()
    for name in trainer_class.unlabeled_terms:
        first, second = trainer.logger.get_value(f"ssl_{name}", step=None)
        assert np.isnan(first), f"{name} is off in stage 1"
        assert np.isfinite(second)
        assert second > 0

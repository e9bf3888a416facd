"""DualNet: roles, terms, gradients, the partner's life in checkpoint and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from nnunet_ssl.losses.overlap import soft_dice_loss
from nnunet_ssl.losses.predictions import log_probabilities
from nnunet_ssl.methods import nnUNetTrainerDualNet
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of

TERMS = nnUNetTrainerDualNet.unlabeled_terms


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerDualNet:
    """In its second stage from the start."""
    return tiny.initialized(nnUNetTrainerDualNet, **{"supervised_fraction": 0.0, **ssl})


def has_gradient(network: torch.nn.Module) -> bool:
    return any(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("teacher", [0, 1])
@pytest.mark.parametrize("weak", [True, False])
def test_terms_equal_an_independent_computation(tiny, teacher, weak):
    trainer = initialized(tiny, contrastive_weight=0.0, weak_teacher=weak)
    trainer.choose_teacher = lambda logits, target: teacher
    labeled, unlabeled = tiny.batches(trainer)
    terms = step_of(trainer, labeled, unlabeled).losses
    student_network, teacher_network = (trainer.predictors[i] for i in (1 - teacher, teacher))
    with torch.no_grad():
        z, w, z_l, w_l = (
            network(images)[0].numpy().astype(np.float64)
            for network, images in (
                (student_network, unlabeled["strong"]),
                (teacher_network, unlabeled["weak" if weak else "strong"]),
                (student_network, labeled["data"]),
                (teacher_network, labeled["data"]),
            )
        )
    p, q, q_sharp, p_l, q_l = (softmax(a, axis=1) for a in (z, w, w / 0.5, z_l, w_l))
    entropies = [-(a * np.log(a)).sum(1) for a in (p, q)]
    reliable = np.logical_and(*[h <= np.quantile(h, 0.8, method="inverted_cdf") for h in entropies])
    labels = q.argmax(1)
    cross_entropy = -np.log(np.take_along_axis(p, labels[:, None], 1)[:, 0])
    divergence = (p * np.log(p / q_sharp)).sum(1)
    cosines = [
        1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1) for a, b in ((p, q), (p_l, q_l))
    ]
    expected = {
        "pseudo_label": cross_entropy[reliable].mean(),
        "consistency": np.concatenate([c.ravel() for c in cosines]).mean(),
        "uncertainty": (np.exp(-divergence) * cross_entropy).mean() + divergence.mean(),
    }
    assert 0.5 < reliable.mean() < 0.8
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    assert trainer._statistics["network_teaches"] == (teacher == 0)
    assert trainer._statistics["reliable"].item() == pytest.approx(reliable.mean(), abs=0.01)


def test_certainty_weighs_the_cross_entropy_but_is_no_way_to_lower_it(tiny):
    """The weights are constants: a student must not gain by getting uncertain."""
    trainer = initialized(tiny, contrastive_weight=0.0)
    z, w = (torch.randn(2, 3, *tiny.patch, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    trainer.student_terms([z, z.detach()], [w, w], None)["uncertainty"].backward()
    log_p, log_sharp = torch.log_softmax(z, 1), torch.log_softmax(2 * w, 1)
    divergence = (log_p.exp() * (log_p - log_sharp)).sum(1)
    weights = torch.exp(-divergence).detach().clone()
    cross_entropy = torch.nn.functional.nll_loss(log_p, w.argmax(1), reduction="none")
    (expected,) = torch.autograd.grad((weights * cross_entropy).mean() + divergence.mean(), z)
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("teacher", [0, 1])
@pytest.mark.parametrize("term", TERMS)
def test_only_the_student_learns_from_the_unlabeled_terms(tiny, teacher, term):
    trainer = initialized(tiny)
    trainer.choose_teacher = lambda logits, target: teacher
    labeled, unlabeled = tiny.batches(trainer)
    step_of(trainer, labeled, unlabeled).losses[term].backward()
    assert has_gradient(trainer.predictors[1 - teacher])
    assert not has_gradient(trainer.predictors[teacher])


def test_both_learn_from_labels(tiny):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    terms = step_of(trainer, labeled, unlabeled).losses
    for name, index in (("supervised", 0), ("supervised_partner", 1)):
        trainer.optimizer.zero_grad()
        terms[name].backward(retain_graph=True)
        assert has_gradient(trainer.predictors[index])
        assert not has_gradient(trainer.predictors[1 - index])


def test_a_step_moves_both_networks(tiny):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter([unlabeled])
    before = [torch.cat([p.detach().flatten().clone() for p in n.parameters()]) for n in trainer.predictors]
    trainer.train_step(labeled)
    after = [torch.cat([p.detach().flatten() for p in n.parameters()]) for n in trainer.predictors]
    assert all((a - b).abs().max() > 0 for a, b in zip(after, before))


@pytest.mark.parametrize("better", [0, 1])
def test_the_network_with_the_lower_dice_loss_teaches(tiny, better):
    trainer = initialized(tiny)
    target = tiny.batches(trainer)[0]["target"]
    truth = torch.nn.functional.one_hot(target[:, 0].long(), 3).movedim(-1, 1).float()
    good, bad = 10 * truth, 10 * truth.roll(1, dims=1)
    assert trainer.choose_teacher([good, bad] if better == 0 else [bad, good], target) == better


def test_the_background_does_not_count(tiny):
    """One network finds all the background but confuses structures, the other finds them and no background."""
    trainer = initialized(tiny)
    target = torch.full((2, 1, *tiny.patch), 2, dtype=torch.int16)
    target[..., :12], target[..., 28:] = 1, 0
    truth = torch.nn.functional.one_hot(target[:, 0].long(), 3).movedim(-1, 1).float()
    swapped = truth[:, [0, 2, 1]]
    careful = 10 * torch.where(torch.arange(32) % 2 == 0, truth, swapped)
    everywhere = 10 * torch.where(target > 0, truth, torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1))
    p, q = (torch.softmax(z, 1) for z in (careful, everywhere))
    assert soft_dice_loss(p, truth) < soft_dice_loss(q, truth)
    assert soft_dice_loss(p[:, 1:], truth[:, 1:]) > soft_dice_loss(q[:, 1:], truth[:, 1:])
    assert trainer.choose_teacher([careful, everywhere], target) == 1
    assert trainer.choose_teacher([everywhere, careful], target) == 0


def test_roles_are_deterministic_with_a_seed(tiny):
    taught = []
    for _ in range(2):
        trainer = initialized(tiny)
        steps = []
        for seed in range(6):
            labeled, unlabeled = tiny.batches(trainer, seed)
            trainer.dataloader_unlabeled = iter([unlabeled])
            steps.append(trainer.train_step(labeled)["terms"].tolist())
        taught.append(steps)
    assert taught[0] == taught[1]


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_weight_zero_is_not_computed(tiny, term):
    trainer = initialized(tiny, **{f"{term}_weight": 0.0})
    labeled, unlabeled = tiny.batches(trainer)
    assert set(step_of(trainer, labeled, unlabeled).losses) == set(trainer.term_names) - {term}


def test_with_all_terms_off_unlabeled_images_are_not_even_looked_at(tiny):
    trainer = initialized(tiny, **{f"{term}_weight": 0.0 for term in TERMS})
    labeled, _ = tiny.batches(trainer)
    terms = step_of(trainer, labeled, {"keys": []}).losses
    assert set(terms) == {"supervised", "supervised_partner"}


def test_weights_follow_the_ramp(tiny):
    trainer = initialized(tiny, unlabeled_ramp=0.5, uncertainty_weight=2.0)
    for epoch, ramp in ((0, np.exp(-5)), (1, np.exp(-1.25)), (3, 1.0)):
        trainer.current_epoch = epoch
        weights = {name: trainer.weight(name) for name in TERMS}
        expected = {"pseudo_label": 1, "consistency": 1, "uncertainty": 2, "contrastive": 0.1}
        assert weights == pytest.approx({name: w * ramp for name, w in expected.items()})


@pytest.mark.parametrize("ignore", [False, True])
def test_regions(tmp_path, ignore):
    tiny = TinyDataset(tmp_path, PATCHES["3d"])
    names = {"background": 0, "whole": [1, 2], "core": 2} | ({"ignore": 3} if ignore else {})
    tiny.dataset_json |= {"labels": names, "regions_class_order": [1, 2]}
    trainer = initialized(tiny)
    assert trainer.label_manager.has_regions
    labeled, unlabeled = tiny.batches(trainer)
    labels = labeled["target"]
    ignored = torch.zeros_like(labels)
    ignored[..., :5] = 1
    labeled["target"] = torch.cat([labels >= 1, labels == 2] + ([ignored.bool()] if ignore else []), 1)
    terms = step_of(trainer, labeled, unlabeled).losses
    assert all(torch.isfinite(term) for term in terms.values())
    assert log_probabilities(trainer.network(unlabeled["strong"])[0], True).shape[1:3] == (2, 2)
    sum(term for term in terms.values()).backward()
    if ignore:
        # Only in ignored voxels is the first one worse.
        truth = torch.cat([labels >= 1, labels == 2], 1).float() * 20 - 10
        wrong = torch.where(ignored.bool(), -truth, truth)
        slightly = torch.where(ignored.bool(), truth, 0.9 * truth)
        assert trainer.choose_teacher([wrong, slightly], labeled["target"]) == 0


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_student_terms_are_finite_for_extreme_logits(tiny, dtype, regions):
    if regions:
        tiny.dataset_json |= {"labels": {"background": 0, "whole": [1, 2], "core": 2, "rim": 1},
                              "regions_class_order": [1, 2, 3]}  # fmt: skip
    trainer = initialized(tiny)
    z, w = (torch.sign(torch.randn(2, 3, *tiny.patch)).mul(1e4).to(dtype) for _ in range(2))
    z.requires_grad_()
    features = torch.randn(2, 4, *tiny.patch).to(dtype).requires_grad_()
    terms = trainer.student_terms([z, z], [w, w], features)
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(features.grad).all()


def test_unreliable_voxels_do_not_touch_the_pseudo_label_term(tiny):
    """An invariant: what a mask excludes cannot change the loss."""
    trainer = initialized(tiny, contrastive_weight=0.0, reliable_fraction=0.5)
    sure = torch.arange(32 * 32).view(1, 1, 32, 32) % 2 == 0
    one_hot = torch.nn.functional.one_hot(torch.randint(0, 3, (2, *tiny.patch)), 3).movedim(-1, 1).float()
    teacher = torch.where(sure, 9 * one_hot, torch.zeros(()))

    def value(unsure):
        student = torch.where(sure, 5 * one_hot.roll(1, 1), unsure)
        return trainer.student_terms([student, student], [teacher, teacher], None)["pseudo_label"]

    plain, other = value(torch.zeros(())), value(torch.tensor([0.0, 0.5, 0.0]).view(1, 3, 1, 1))
    assert torch.equal(plain, other)
    assert plain > 1
    trainer = initialized(tiny, contrastive_weight=0.0, reliable_fraction=1.0)
    assert not torch.equal(value(torch.zeros(())), value(torch.tensor([0.0, 0.5, 0.0]).view(1, 3, 1, 1)))


@pytest.fixture
def trained(tiny):
    trainer = tiny.trainer(nnUNetTrainerDualNet, num_epochs=1, supervised_fraction=0.0)
    trainer.run_training()
    return tiny, trainer


def test_the_log_says_who_taught_and_what_was_reliable(trained):
    _, trainer = trained
    (log,) = Path(trainer.output_folder).glob("training_log*")
    text = log.read_text()
    for name in (*trainer.term_names, *trainer.statistic_names):
        assert f"{name} " in text
    assert 0.5 < trainer.logger.get_value("ssl_reliable", step=-1) <= 1
    assert 0 <= trainer.logger.get_value("ssl_network_teaches", step=-1) <= 1

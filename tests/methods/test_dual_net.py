"""DualNet: roles, terms, gradients, the partner's life in checkpoint and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from nnunet_ssl.losses.contrastive import contrastive_loss
from nnunet_ssl.losses.predictions import log_probabilities
from nnunet_ssl.losses.roles import teaching_shares
from nnunet_ssl.methods import nnUNetTrainerDualNet
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of

TERMS = nnUNetTrainerDualNet.unlabeled_terms
KINDS = [term for term in TERMS if not term.endswith("_partner")]


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerDualNet:
    """In its second stage from the start."""
    return tiny.initialized(nnUNetTrainerDualNet, **{"supervised_fraction": 0.0, **ssl})


def has_gradient(network: torch.nn.Module) -> bool:
    return any(p.grad is not None and p.grad.any() for p in network.parameters())


# Running counts of two structures: the plan's network has Dice 0.8 and 0.6, the partner 0.9 and 0.4.
COUNTS = np.array([[[40, 30], [50, 50], [50, 50]], [[45, 20], [50, 50], [50, 50]]], dtype=float)
# What the partner teaches, and what the network does: others' errors beside one's own, each with 0.01 more.
TAUGHT_BY = np.array([[0.11 / 0.32, 0.61 / 1.02], [0.21 / 0.32, 0.41 / 1.02]])


@pytest.mark.parametrize("weak", [True, False])
def test_terms_equal_an_independent_computation(tiny, weak):
    trainer = initialized(tiny, contrastive_weight=0.0, weak_teacher=weak)
    trainer.learned.counts = COUNTS.copy()
    labeled, unlabeled = tiny.batches(trainer)
    terms = step_of(trainer, labeled, unlabeled).losses
    shown = labeled["data"], unlabeled["strong"], unlabeled["weak" if weak else "strong"]
    with torch.no_grad():
        made = [[softmax(n(x)[0].double().numpy(), axis=1) for x in shown] for n in trainer.predictors]
    found = []
    for student, name in enumerate(("", "_partner")):
        (p_l, p, _), (q_l, _, q) = made[student], made[1 - student]
        taught = TAUGHT_BY[1 - student]
        weight = np.array([taught.mean(), *taught])[q.argmax(1)]
        entropies = [-(a * np.log(a)).sum(1) for a in (p, q)]
        reliable = np.logical_and(*[h <= np.quantile(h, 0.8, method="inverted_cdf") for h in entropies])
        cross_entropy = -np.log(np.take_along_axis(p, q.argmax(1)[:, None], 1)[:, 0])
        divergence = (q * np.log(q / p)).sum(1)
        cosines = [
            np.array([taught.mean(), *taught])[b.argmax(1)]
            * (1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
            for a, b in ((p, q), (p_l, q_l))
        ]
        expected = {
            "pseudo_label": (weight * cross_entropy)[reliable].mean(),
            "consistency": np.concatenate([c.ravel() for c in cosines]).mean(),
            "uncertainty": (weight * (np.exp(-divergence) * cross_entropy + divergence)).mean(),
        }
        assert 0.5 < reliable.mean() < 0.8
        for term, value in expected.items():
            assert terms[f"{term}{name}"].item() == pytest.approx(value, rel=1e-4), term
        found.append(reliable.mean())
    assert trainer._statistics["network_teaches"] == pytest.approx(TAUGHT_BY[0].mean())
    assert trainer._statistics["reliable"].item() == pytest.approx(np.mean(found), abs=0.01)


@pytest.mark.parametrize("scenario", ["labels", "ignore"])
def test_contrast_equals_the_loss_of_what_each_network_sees_in_all_images(tmp_path, scenario):
    """Prototypes come from true labels and from reliable voxels; uncertain voxels are unlabeled ones alone."""
    tiny = TinyDataset(tmp_path, PATCHES["2d"], scenario=scenario)
    trainer = initialized(tiny, contrastive_points=10_000)
    trainer.learned.counts = COUNTS.copy()
    labeled, unlabeled = tiny.batches(trainer)
    terms = step_of(trainer, labeled, unlabeled).losses
    size, images = len(labeled["data"]), torch.cat([labeled["data"], unlabeled["strong"]])
    with torch.no_grad():
        for student, name in enumerate(("", "_partner")):
            outputs, features = trainer._taps[student](images)
            log_q = trainer.log_probabilities(trainer.predictors[1 - student](unlabeled["weak"]))
            reliable = trainer.reliable_voxels(trainer.log_probabilities(outputs[0][size:]), log_q)
            annotated, nowhere = labeled["target"][:, 0] < 3, torch.zeros(size, *tiny.patch) > 0
            assert bool(annotated.all()) == (scenario == "labels")
            labels = torch.cat([labeled["target"].clamp_max(2).long(), log_q.argmax(2)])
            taught = TAUGHT_BY[1 - student]
            expected = contrastive_loss(
                features, labels, torch.cat([annotated, reliable]), torch.cat([nowhere, ~reliable]),
                torch.tensor([[taught.mean(), *taught]]).float(), 10_000, 1.0,
            )  # fmt: skip
            torch.testing.assert_close(terms[f"contrastive{name}"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_only_the_student_learns_from_a_term(tiny, term):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    step_of(trainer, labeled, unlabeled).losses[term].backward()
    student = int(term.endswith("partner"))
    assert has_gradient(trainer.predictors[student])
    assert not has_gradient(trainer.predictors[1 - student])


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


@pytest.mark.parametrize("steps", [1, 3])
def test_roles_follow_the_running_dice_of_labels_and_outlive_a_stop(tiny, steps):
    trainer = initialized(tiny)
    for seed in range(steps):
        labeled, unlabeled = tiny.batches(trainer, seed)
        trainer.dataloader_unlabeled = iter([unlabeled])
        trainer.train_step(labeled)
    shares = teaching_shares(trainer.learned.counts)
    assert not np.allclose(shares, 0.5)
    file = str(tiny.base / "checkpoint.pth")
    trainer.save_checkpoint(file)
    again = tiny.initialized(nnUNetTrainerDualNet, supervised_fraction=0.0)
    again.load_checkpoint(file)
    assert np.array_equal(teaching_shares(again.learned.counts), shares)


def test_steps_are_deterministic_with_a_seed(tiny):
    runs = []
    for _ in range(2):
        trainer = initialized(tiny)
        steps = []
        for seed in range(6):
            labeled, unlabeled = tiny.batches(trainer, seed)
            trainer.dataloader_unlabeled = iter([unlabeled])
            steps.append(trainer.train_step(labeled)["terms"].tolist())
        runs.append(steps)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("term", KINDS)
def test_a_term_of_weight_zero_is_not_computed(tiny, term):
    trainer = initialized(tiny, **{f"{term}_weight": 0.0})
    labeled, unlabeled = tiny.batches(trainer)
    off = {term, f"{term}_partner"}
    assert set(step_of(trainer, labeled, unlabeled).losses) == set(trainer.term_names) - off


def test_with_all_terms_off_unlabeled_images_are_not_even_looked_at(tiny):
    trainer = initialized(tiny, **{f"{term}_weight": 0.0 for term in KINDS})
    labeled, _ = tiny.batches(trainer)
    terms = step_of(trainer, labeled, {"keys": []}).losses
    assert set(terms) == {"supervised", "supervised_partner"}


def test_weights_follow_the_ramp(tiny):
    trainer = initialized(tiny, unlabeled_ramp=0.5, uncertainty_weight=2.0)
    for epoch, ramp in ((0, np.exp(-5)), (1, np.exp(-1.25)), (3, 1.0)):
        trainer.current_epoch = epoch
        expected = {"pseudo_label": 1, "consistency": 1, "uncertainty": 2, "contrastive": 0.1}
        for name, weight in expected.items():
            both = [trainer.weight(term) for term in (name, f"{name}_partner")]
            assert both == pytest.approx([weight * ramp] * 2)


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


@pytest.mark.parametrize("regions", [False, True])
def test_labels_of_ignored_voxels_do_not_matter(tmp_path, regions):
    tiny = TinyDataset(tmp_path, PATCHES["3d"])
    names = {"background": 0, "whole": [1, 2], "core": 2} if regions else {"background": 0, "a": 1, "b": 2}
    tiny.dataset_json |= {"labels": names | {"ignore": 3}} | ({"regions_class_order": [1, 2]} if regions else {})
    values = []
    for there in (0, 1, 2):
        trainer = initialized(tiny)
        labeled, unlabeled = tiny.batches(trainer)
        ignored = torch.zeros_like(labeled["target"], dtype=torch.bool)
        ignored[..., :8] = True
        labels = torch.where(ignored, there, labeled["target"])
        labeled["target"] = (
            torch.cat([labels >= 1, labels == 2, ignored], 1) if regions else torch.where(ignored, 3, labels)
        )
        terms = step_of(trainer, labeled, unlabeled).losses
        values.append([term.item() for term in terms.values()])
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_student_terms_are_finite_for_extreme_logits(tiny, dtype, regions):
    if regions:
        tiny.dataset_json |= {"labels": {"background": 0, "whole": [1, 2], "core": 2, "rim": 1},
                              "regions_class_order": [1, 2, 3]}  # fmt: skip
    trainer = initialized(tiny)
    z, w = (torch.sign(torch.randn(4, 3, *tiny.patch)).mul(1e4).to(dtype) for _ in range(2))
    z.requires_grad_()
    features = torch.randn(4, 4, *tiny.patch).to(dtype).requires_grad_()
    target, table = torch.zeros(2, 3 if regions else 1, *tiny.patch), torch.full((3, 2) if regions else (1, 3), 0.5)
    terms, _ = trainer.student_terms(z, w, features, target, table)
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
        target, table = torch.zeros(0, 1, *tiny.patch), torch.ones(1, 3)
        return trainer.student_terms(student, teacher, None, target, table)[0]["pseudo_label"]

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


def test_the_log_says_who_teaches_how_much_and_what_was_reliable(trained):
    _, trainer = trained
    (log,) = Path(trainer.output_folder).glob("training_log*")
    text = log.read_text()
    for name in (*trainer.term_names, *trainer.statistic_names):
        assert f"{name} " in text
    assert 0.5 < trainer.logger.get_value("ssl_reliable", step=-1) <= 1
    assert 0 <= trainer.logger.get_value("ssl_network_teaches", step=-1) <= 1

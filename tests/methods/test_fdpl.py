"""FDPL: terms against an independent computation, who teaches whom, how many passes, regions, ignored voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerFDPL
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of
from nnunet_ssl.transforms import mixing

TERMS = nnUNetTrainerFDPL.unlabeled_terms


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerFDPL:
    """In its second stage from the start."""
    return tiny.initialized(nnUNetTrainerFDPL, **{"supervised_fraction": 0.0, **ssl})


def has_gradient(network: torch.nn.Module) -> bool:
    return any(p.grad is not None and p.grad.any() for p in network.parameters())


class Spy:
    """Sees every pass of a network: its input, and whether it keeps a graph."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.passes: list[tuple[torch.Tensor, bool]] = []
        network.register_forward_pre_hook(lambda m, inputs: self.passes.append((inputs[0], torch.is_grad_enabled())))


def nnunet_loss(logits: list[np.ndarray], labels: np.ndarray, alpha: float | None = None) -> float:
    """Cross-entropy minus the mean Dice of the structures, over the resolutions of deep supervision."""
    factors = np.array([1 / 2**i for i in range(len(logits))])
    factors[-1] = 0
    total = 0.0
    for factor, z in zip(factors / factors.sum(), logits):
        step = [round(a / b) for a, b in zip(labels.shape[2:], z.shape[2:])]
        # Nearest-exact sampling reads the voxel in the middle.
        index = np.ix_(*[np.arange(n) * s + s // 2 for n, s in zip(z.shape[2:], step)])
        small = labels[:, 0][(slice(None), *index)]
        log_p = log_softmax(z.astype(np.float64), axis=1)
        cross_entropy = -np.take_along_axis(log_p, small[:, None].astype(np.int64), 1).mean()
        axes = (0, *range(1, small.ndim)) if z.ndim == 4 else tuple(range(1, small.ndim))
        dices = []
        for k in range(1, z.shape[1]):
            p, y = np.exp(log_p[:, k]), small == k
            dices.append(np.mean((2 * (p * y).sum(axes) + 1e-5) / (p.sum(axes) + y.sum(axes) + 1e-5)))
        weights = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
        total += factor * (weights[0] * cross_entropy - weights[1] * np.mean(dices))
    return total


def arrays(outputs: list[torch.Tensor]) -> list[np.ndarray]:
    return [o.detach().numpy() for o in outputs]


@pytest.mark.parametrize("cutmix", ["second", "both", "none"])
@pytest.mark.parametrize("weak", [True, False])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
@torch.no_grad()
def test_terms_equal_an_independent_computation(tmp_path, monkeypatch, patch, weak, cutmix):
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    trainer = initialized(tiny, cutmix=cutmix, shift=0.25, weak_teacher=weak)
    labeled, unlabeled = tiny.batches(trainer)
    margin = {"2d": (8, 8), "3d": (4, 4, 4), "anisotropic": (0, 8, 8)}[patch]
    assert trainer.unlabeled_margin == margin
    shift = tuple(m * sign for m, sign in zip(margin, (1, -1, -1)))
    boxes = mixing.cutmix_boxes(2, tiny.patch, 0.5, torch.Generator().manual_seed(1))
    drawn = []
    monkeypatch.setattr(mixing, "draw_shift", lambda margin, _: drawn.append(margin) or shift)
    monkeypatch.setattr(mixing, "cutmix_boxes", lambda *a: drawn.append(a) or boxes)
    terms = step_of(trainer, labeled, unlabeled).losses
    # One shift and one box for images and labels, as the hyper-parameters say.
    expected = [margin, (2, tiny.patch, 0.5, trainer.generator, torch.device("cpu"))]
    assert drawn == expected[: 1 + (cutmix != "none")]

    strong, to_label = (unlabeled[name].numpy() for name in ("strong", "weak" if weak else "strong"))
    at_center = (..., *[slice(m, m + s) for m, s in zip(margin, tiny.patch)])
    center = strong[at_center]
    shifted = to_label[(..., *[slice(m + o, m + o + s) for m, o, s in zip(margin, shift, tiny.patch)])]
    box = boxes.numpy()
    # Two unlabeled images: each is mixed with the other one.
    is_mixed = {"second": (False, True), "both": (True, True), "none": (False, False)}[cutmix]

    def seen_by(network: int, own: np.ndarray) -> np.ndarray:
        return np.where(box, own[::-1], own) if is_mixed[network] else own

    y_f, y_d = [], []
    for network in trainer.predictors:
        labels, moved = (network(torch.tensor(i))[0].numpy().argmax(1)[:, None] for i in (to_label[at_center], shifted))
        dynamic = labels.copy()
        for q in np.ndindex(tiny.patch):
            source = tuple(a - o for a, o in zip(q, shift))
            # From the crop in which the voxel lies farther from the border, of axes that are shifted.
            own, other = (
                min(min(a, side - 1 - a) for a, side, o in zip(place, tiny.patch, shift) if o) for place in (q, source)
            )
            if other > own:
                dynamic[(slice(None), 0, *q)] = moved[(slice(None), 0, *source)]
        y_f.append(labels)
        y_d.append(dynamic)
    outputs = [arrays(network(torch.tensor(seen_by(i, center)))) for i, network in enumerate(trainer.predictors)]
    for name, labels in (("fixed", y_f), ("dynamic", y_d)):
        for student, term in enumerate((name, f"{name}_partner")):
            expected = nnunet_loss(outputs[student], seen_by(student, labels[1 - student]))
            assert terms[term].item() == pytest.approx(expected, rel=1e-4)
    agreement, redecided = (trainer._statistics[name].item() for name in trainer.statistic_names)
    assert agreement == pytest.approx((y_f[0] == y_f[1]).mean())
    assert redecided == pytest.approx(np.mean([f != d for f, d in zip(y_f, y_d)]))
    assert redecided > 0
    supervised = nnunet_loss(arrays(trainer.predictors[0](labeled["data"])), labeled["target"].numpy())
    assert terms["supervised"].item() == pytest.approx(supervised, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_alpha_weighs_the_loss_on_labels_and_not_the_one_on_pseudo_labels(tiny, alpha):
    weighted = initialized(tiny, cross_entropy_share=alpha)
    plain = initialized(tiny)
    labeled, unlabeled = tiny.batches(plain)
    terms, reference = (step_of(t, labeled, unlabeled).losses for t in (weighted, plain))
    for index, name in enumerate(("supervised", "supervised_partner")):
        expected = nnunet_loss(arrays(weighted.predictors[index](labeled["data"])), labeled["target"].numpy(), alpha)
        assert terms[name].item() == pytest.approx(expected, rel=1e-4)
        assert terms[name].item() != pytest.approx(reference[name].item(), rel=1e-2)
    for name in TERMS:
        assert torch.equal(terms[name], reference[name])


def test_cross_entropy_alone_of_a_batch_without_annotated_voxels_can_be_trained(tiny):
    tiny.dataset_json["labels"]["ignore"] = 3
    trainer = initialized(tiny, cross_entropy_share=1.0, fixed_weight=0.0, dynamic_weight=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter([unlabeled])
    output = trainer.train_step({**labeled, "target": torch.full_like(labeled["target"], 3)})
    assert np.isfinite(output["loss"])
    assert all(torch.isfinite(p).all() for network in trainer.predictors for p in network.parameters())


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("term", TERMS)
def test_each_network_learns_from_the_others_labels_alone(tiny, term, batch_size):
    tiny.plans["configurations"]["2d"]["batch_size"] = batch_size
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    step_of(trainer, labeled, unlabeled).losses[term].backward()
    student = 1 if term.endswith("partner") else 0
    assert has_gradient(trainer.predictors[student])
    assert not has_gradient(trainer.predictors[1 - student])


@pytest.mark.parametrize("known", [True, False])
def test_pseudo_labels_have_the_form_of_targets(tiny, known):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    crop = unlabeled["strong"][..., 4:36, 4:36]
    outputs = trainer.network(crop)
    assert outputs[0].requires_grad
    known = outputs if known else None
    for labels in trainer.pseudo_labels(trainer.network, known, (crop, crop), (4, 4), labeled["target"]):
        assert labels.dtype == labeled["target"].dtype
        assert labels.shape == (2, 1, *tiny.patch)


@pytest.mark.parametrize("former", [True, False])
def test_a_former_value_of_cutmix_is_refused_with_those_there_are(former):
    with pytest.raises(UserError, match=r"FDPL\.cutmix must be a text, got .* \(bool\)\. .*: second, both or none"):
        nnUNetTrainerFDPL.read_hyperparameters({"ssl": {"FDPL": {"cutmix": former}}})


def test_the_networks_start_with_different_weights(tiny):
    trainer = initialized(tiny)
    first, second = (torch.cat([p.flatten() for p in n.parameters() if p.ndim > 1]) for n in trainer.predictors)
    assert first.shape == second.shape
    assert (first != second).float().mean() > 0.99


# Passes with and without gradient, as batch sizes, of both networks: 2 labeled and 2 unlabeled images per step.
PASSES = {
    "both": ({}, [4], [4], [4], [4]),
    "both, one view": ({"weak_teacher": False}, [4], [2], [4], [4]),
    "fixed only": ({"dynamic_weight": 0.0}, [4], [2], [4], [2]),
    "fixed only, one view": ({"dynamic_weight": 0.0, "weak_teacher": False}, [4], [], [4], [2]),
    "no shift": ({"shift": 0.0}, [4], [2], [4], [2]),
    "no CutMix": ({"cutmix": "none"}, [4], [4], [4], [4]),
    "no CutMix, one view": ({"cutmix": "none", "weak_teacher": False}, [4], [2], [4], [2]),
    "CutMix for both": ({"cutmix": "both"}, [4], [4], [4], [4]),
    "CutMix for both, one view": ({"cutmix": "both", "weak_teacher": False}, [4], [4], [4], [4]),
    "dynamic only": ({"fixed_weight": 0.0}, [4], [4], [4], [4]),
    "fixed only, no CutMix, one view": (
        {"dynamic_weight": 0.0, "cutmix": "none", "weak_teacher": False},
        [4],
        [],
        [4],
        [],
    ),
    "neither": ({"fixed_weight": 0.0, "dynamic_weight": 0.0}, [2], [], [2], []),
}


@pytest.mark.parametrize("case", PASSES)
def test_no_pass_is_computed_twice(tiny, case):
    settings, *expected = PASSES[case]
    trainer = initialized(tiny, **settings)
    spies = [Spy(network) for network in trainer.predictors]
    step_of(trainer, *tiny.batches(trainer))
    counted = [
        [len(x) for x, gradient in spy.passes if gradient == wanted] for spy in spies for wanted in (True, False)
    ]
    assert counted == expected
    for spy in spies:
        images = [image for batch, _ in spy.passes for image in batch]
        assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i]), "the same image twice"


@pytest.mark.parametrize(("settings", "missing"), [
    ({"fixed_weight": 0.0}, {"fixed", "fixed_partner"}), ({"dynamic_weight": 0.0}, {"dynamic", "dynamic_partner"}),
])  # fmt: skip
def test_a_term_of_weight_zero_is_not_computed(tiny, settings, missing):
    trainer = initialized(tiny, **settings)
    assert set(step_of(trainer, *tiny.batches(trainer)).losses) == set(trainer.term_names) - missing


def test_without_a_shift_dynamic_equals_fixed(tiny):
    trainer = initialized(tiny, shift=0.0)
    assert trainer.unlabeled_patch_size == tiny.patch
    terms = step_of(trainer, *tiny.batches(trainer)).losses
    for student in ("", "_partner"):
        assert torch.equal(terms[f"fixed{student}"], terms[f"dynamic{student}"])
    assert trainer._statistics["redecided"] == 0


def test_weights_follow_the_ramp(tiny):
    trainer = initialized(tiny, unlabeled_ramp=0.5, fixed_weight=1.0, dynamic_weight=2.0)
    for epoch, ramp in ((0, np.exp(-5)), (1, np.exp(-1.25)), (3, 1.0)):
        trainer.current_epoch = epoch
        assert [trainer.weight(name) for name in TERMS] == pytest.approx([ramp, ramp, 2 * ramp, 2 * ramp])


def test_a_single_unlabeled_image_is_mixed_with_a_labeled_one_and_its_labels(tiny, monkeypatch):
    """Inside the box the second network sees the labeled image, and learns its labels, not pseudo-labels."""
    tiny.plans["configurations"]["2d"]["batch_size"] = 2
    trainer = initialized(tiny)
    box = torch.zeros(1, 1, *tiny.patch, dtype=torch.bool)
    box[..., 3:20, 5:30] = True
    monkeypatch.setattr(mixing, "cutmix_boxes", lambda *_: box)
    seen = []
    original = trainer.supervised_loss
    monkeypatch.setattr(trainer, "supervised_loss", lambda o, t, *rest: seen.append(t) or original(o, t, *rest))
    labeled, unlabeled = tiny.batches(trainer)
    assert len(unlabeled["strong"]) == 1
    spy = Spy(trainer.predictors[1])
    step_of(trainer, labeled, unlabeled)
    image = spy.passes[0][0][1:]
    center = unlabeled["strong"][..., 4:36, 4:36]
    assert torch.equal(image, torch.where(box, labeled["data"], center))
    # In the order of the terms: labels twice, then each kind for the first and the second network.
    for for_second in (seen[3], seen[5]):
        assert torch.equal(for_second[box], labeled["target"][box])
        assert not torch.equal(for_second[~box], labeled["target"][~box])


@pytest.mark.parametrize("regions", [False, True])
def test_ignored_voxels_of_a_labeled_partner_do_not_touch_the_loss(tmp_path, monkeypatch, regions):
    tiny = TinyDataset(tmp_path, PATCHES["3d"])
    names = {"background": 0, "whole": [1, 2], "core": 2} if regions else {"background": 0, "a": 1, "b": 2}
    tiny.dataset_json |= {"labels": names | {"ignore": 3}} | ({"regions_class_order": [1, 2]} if regions else {})
    tiny.plans["configurations"]["3d_fullres"]["batch_size"] = 2
    trainer = initialized(tiny)
    assert trainer.label_manager.has_regions == regions
    labeled, unlabeled = tiny.batches(trainer)
    labels = labeled["target"]
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    ignored[..., 4:12] = True

    def targets(labels: torch.Tensor) -> torch.Tensor:
        if regions:
            return torch.cat([labels >= 1, labels == 2, ignored], 1)
        return torch.where(ignored, 3, labels)

    everything = torch.ones(1, 1, *tiny.patch, dtype=torch.bool)
    monkeypatch.setattr(mixing, "cutmix_boxes", lambda *_: everything)
    monkeypatch.setattr(mixing, "draw_shift", lambda *_: (2, 2, 2))
    values = []
    for changed in (labels, torch.where(ignored, 2 - labels, labels), torch.where(ignored, labels, 2 - labels)):
        terms = step_of(trainer, {**labeled, "target": targets(changed)}, unlabeled).losses
        assert all(torch.isfinite(term) for term in terms.values())
        values.append([terms[name].item() for name in ("fixed_partner", "dynamic_partner")])
        sum(term for term in terms.values()).backward()
    assert values[0] == values[1]
    assert values[0][0] != values[2][0]


@torch.no_grad()
def test_regions_are_decided_and_composed_channel_by_channel(tiny):
    tiny.dataset_json |= {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    trainer = initialized(tiny)
    like = torch.zeros(1, 2, *tiny.patch, dtype=torch.bool)
    whole = torch.randn(1, 1, 40, 40)
    center, shifted = whole[..., 4:36, 4:36], whole[..., 8:40, 0:32]
    logits, moved = (trainer.network(crop)[0] for crop in (center, shifted))
    fixed, dynamic = trainer.pseudo_labels(trainer.network, logits, (center, shifted), (4, -4), like)

    def decided(z: torch.Tensor) -> torch.Tensor:
        """The core is part of the whole, found there or not."""
        whole, core = (torch.sigmoid(z) > 0.5).unbind(1)
        return torch.stack([whole | core, core], 1)

    assert torch.equal(fixed, decided(logits))
    expected = decided(logits)
    first, second = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    depths = [torch.stack([r, 31 - r, c, 31 - c]).amin(0) for r, c in ((first, second), (first - 4, second + 4))]
    deeper = depths[1] > depths[0]
    expected[..., deeper] = decided(moved).roll((4, -4), (2, 3))[..., deeper]
    assert torch.equal(dynamic, expected)
    assert (dynamic != fixed).any()


def test_the_log_tells_terms_and_statistics(tiny):
    trainer = tiny.trainer(nnUNetTrainerFDPL, num_epochs=2, supervised_fraction=0.0)
    trainer.run_training()
    (log,) = Path(trainer.output_folder).glob("training_log*")
    text = log.read_text()
    for name in (*trainer.term_names, *trainer.statistic_names):
        assert f"{name} " in text
    assert 0 < trainer.logger.get_value("ssl_agreement", step=-1) < 1

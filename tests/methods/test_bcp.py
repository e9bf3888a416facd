"""BCP: both mixtures, whose labels count where, and the losses against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_loss import arrays, reference_loss
from told_networks import Spy, has_gradient, shake

from nnunet_ssl.methods import nnUNetTrainerBCP
from nnunet_ssl.testing.tiny import PATCHES, SCENARIOS, TinyDataset, step_of
from nnunet_ssl.transforms import mixing


def initialized(tiny: TinyDataset, batch_size: int = 4, **ssl) -> nnUNetTrainerBCP:
    """In stage 2, with a teacher that is not the student."""
    tiny.plans["configurations"][tiny.configuration]["batch_size"] = batch_size
    trainer = tiny.initialized(nnUNetTrainerBCP, **{"supervised_fraction": 0.0, **ssl})
    shake(trainer.teacher.module)
    return trainer


def parts(tiny: TinyDataset, target: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels or regions without ignored voxels, and which voxels are annotated."""
    y = target.numpy()
    last = y[:, -1:] > 0 if tiny.has_regions else y == tiny.ignore_label
    annotated = ~last if tiny.ignore_label is not None else np.ones_like(last)
    return y[:, : 2 if tiny.has_regions else 1], annotated


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("patch", ["2d", "3d"])
@torch.no_grad()
def test_terms_equal_an_independent_computation(tmp_path, monkeypatch, patch, scenario, batch_size):
    tiny = TinyDataset(tmp_path, PATCHES[patch], scenario=scenario)
    trainer = initialized(tiny, batch_size)
    labeled, unlabeled = tiny.batches(trainer)
    boxes = mixing.boxes_of_side(batch_size // 2, tiny.patch, 0.667, torch.Generator().manual_seed(1))
    drawn = []
    monkeypatch.setattr(mixing, "boxes_of_side", lambda *a: drawn.append(a) or boxes)
    spy = Spy(trainer.network)
    step = step_of(trainer, labeled, unlabeled)
    assert drawn == [(batch_size // 2, tiny.patch, 0.667, trainer.generator, torch.device("cpu"))]

    regions, box = tiny.has_regions, boxes.numpy()
    z = trainer.teacher(unlabeled["weak"]).numpy()
    guessed = z > 0 if regions else z.argmax(1)[:, None]
    if regions:
        guessed[:, 0] |= guessed[:, 1]
    known, annotated = parts(tiny, labeled["target"])
    images, strong = labeled["data"].numpy(), unlabeled["strong"].numpy()
    # Labeled inside, then labeled outside.
    mixed = np.concatenate([np.where(box, images, strong), np.where(box, strong, images)])
    assert torch.equal(spy.passes[0][0], torch.tensor(mixed))
    of_people = np.concatenate([box, ~box])
    outputs = arrays(trainer.network(torch.tensor(mixed)))
    twice = [np.concatenate([a, a]) for a in (known, annotated, guessed)]
    for name, labels, counted in (
        ("supervised", twice[0], of_people & twice[1]),
        ("pseudo_label", twice[2], ~of_people),
    ):
        expected = reference_loss(outputs, labels, counted, regions, tiny.ignore_label)
        assert step.losses[name].item() == pytest.approx(expected, rel=1e-4)
    assert set(step.losses) == {"supervised", "pseudo_label"}
    # What is known of the labeled batch: the annotated part of the mixtures.
    outputs, target = step.known
    shown = target[:, -1:] == 0 if regions else target != trainer.ignore_value
    assert torch.equal(shown, torch.tensor(of_people & twice[1]))
    assert torch.equal(outputs[0][0], trainer.network(torch.tensor(mixed))[0])


@pytest.mark.parametrize(("labeled_examples", "unlabeled_examples"), [(2, 2), (3, 1), (1, 3), (3, 2)])
def test_every_voxel_of_both_kinds_is_used(tiny, labeled_examples, unlabeled_examples):
    """Once each, where there are as many of either kind; else those of the fewer serve more than once."""
    trainer = initialized(tiny)
    shape = (1, *tiny.patch)
    labeled, unlabeled = tiny.batches(trainer)
    voxels = torch.arange(float(np.prod(shape))).view(shape)
    labeled["data"] = torch.stack([voxels + 10_000 * i for i in range(labeled_examples)])
    unlabeled |= {v: -1 - torch.stack([voxels + 10_000 * i for i in range(unlabeled_examples)]) for v in
                  ("strong", "weak")}  # fmt: skip
    labeled["target"] = torch.zeros(labeled_examples, *shape, dtype=torch.int16)
    spy = Spy(trainer.network)
    step_of(trainer, labeled, unlabeled)
    ((mixed, _),) = spy.passes
    count = max(labeled_examples, unlabeled_examples)
    assert len(mixed) == 2 * count
    used, times = mixed.unique(return_counts=True)
    assert len(used) == voxels.numel() * (labeled_examples + unlabeled_examples)
    for few, kind in ((labeled_examples, times[used >= 0]), (unlabeled_examples, times[used < 0])):
        assert kind.sum() == count * voxels.numel()
        assert kind.min() >= count // few
        assert kind.max() <= -(-count // few)


def test_what_the_teacher_says_counts_outside_and_what_people_say_inside(tiny):
    """A network that takes everything for class 1: people say 1, the teacher 2, or the other way round."""
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)

    def losses(people: int, teacher: int) -> dict[str, float]:
        labeled["target"] = torch.full_like(labeled["target"], people)
        for network, label in ((trainer.network, 1), (trainer.teacher.module, teacher)):
            for head in network.decoder.seg_layers:
                torch.nn.init.zeros_(head.weight)
                head.bias.data = torch.full((3,), -4.0)
                head.bias.data[label] = 4.0
        return {name: loss.item() for name, loss in step_of(trainer, labeled, unlabeled).losses.items()}

    first, second = losses(people=1, teacher=2), losses(people=2, teacher=1)
    assert first["supervised"] < 0 < 6 < first["pseudo_label"]
    assert second["pseudo_label"] < 0 < 6 < second["supervised"]


@pytest.mark.parametrize("term", ["supervised", "pseudo_label"])
def test_the_student_learns_and_the_teacher_gets_no_gradient(tiny, term):
    trainer = initialized(tiny)
    labeled, unlabeled = tiny.batches(trainer)
    student, teacher = Spy(trainer.network), Spy(trainer.teacher.module)
    step_of(trainer, labeled, unlabeled).losses[term].backward()
    assert has_gradient(trainer.network)
    assert not has_gradient(trainer.teacher.module)
    assert (student.sizes(True), student.sizes(False)) == ([4], [])
    ((images, kept),) = teacher.passes
    assert torch.equal(images, unlabeled["weak"])
    assert not kept


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_stage_1_pastes_labeled_images_into_each_other(tmp_path, monkeypatch, scenario):
    tiny = TinyDataset(tmp_path, PATCHES["2d"], scenario=scenario)
    trainer = initialized(tiny, 4, supervised_fraction=0.5)
    labeled, _ = tiny.batches(trainer)
    boxes = mixing.boxes_of_side(2, tiny.patch, 0.667, torch.Generator().manual_seed(1))
    monkeypatch.setattr(mixing, "boxes_of_side", lambda *a: boxes)
    spy = Spy(trainer.network)
    step = step_of(trainer, labeled, None)
    images, target = (torch.where(boxes, t.flip(0), t) for t in (labeled["data"], labeled["target"]))
    assert torch.equal(spy.passes[0][0], images)
    assert torch.equal(step.known[1], target)
    expected = trainer.supervised_loss(trainer.network(images), target)
    assert list(step.losses) == ["supervised"]
    assert step.losses["supervised"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_boxes_hold_two_thirds_of_every_side(tiny):
    trainer = initialized(tiny)
    boxes = trainer.boxes(torch.zeros(5, 1, *tiny.patch))
    assert boxes.flatten(1).sum(1).tolist() == [21 * 21] * 5
    assert len({tuple(box[0].nonzero()[0].tolist()) for box in boxes}) > 1


def test_without_a_weight_nothing_is_mixed_in_either_stage(tiny):
    trainer = initialized(tiny, pseudo_label_weight=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    spy = Spy(trainer.network)
    for batch in (unlabeled, None):
        assert list(step_of(trainer, labeled, batch).losses) == ["supervised"]
    assert all(torch.equal(images, labeled["data"]) for images, _ in spy.passes)

"""Which structures are learned, against numpy, and what waits for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.testing.tiny import TinyDataset
from nnunet_ssl.training.learned import LearnedStructures, names_of_channels, overlap_counts

SEMI = [t for t in TRAINERS if t.unlabeled_terms]


def brute_force(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> list[int]:
    predicted, truth = predicted & counted, truth & counted
    return [int((predicted & truth).sum()), int(predicted.sum()), int(truth.sum())]


@pytest.mark.parametrize("shape", [(9, 11), (5, 6, 7)], ids=["2d", "3d"])
@pytest.mark.parametrize("ignore", [None, 4], ids=["all voxels", "ignore label"])
def test_counts_of_labels(shape, ignore):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, *shape, generator=generator)
    target = torch.randint(0, 4 if ignore is None else 5, (2, 1, *shape), generator=generator).to(torch.int16)
    found = overlap_counts(logits, target, False, ignore).numpy()
    labels, truth = logits.numpy().argmax(1), target[:, 0].numpy()
    counted = np.ones_like(truth, bool) if ignore is None else truth != ignore
    expected = np.array([brute_force(labels == c, truth == c, counted) for c in (1, 2, 3)]).T
    np.testing.assert_array_equal(found, expected)
    assert expected.all()


@pytest.mark.parametrize("ignore", [None, 3], ids=["all voxels", "ignore label"])
def test_counts_of_regions(ignore):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator)
    target = torch.randint(0, 2, (2, 3 if ignore is None else 4, 6, 5), generator=generator).to(torch.int16)
    found = overlap_counts(logits, target, True, ignore).numpy()
    counted = np.ones((2, 6, 5), bool) if ignore is None else target[:, -1].numpy() == 0
    maps = logits.numpy() > 0, target.numpy() > 0
    expected = np.array([brute_force(maps[0][:, r], maps[1][:, r], counted) for r in range(3)]).T
    np.testing.assert_array_equal(found, expected)


def test_the_share_follows_the_worst_structure_of_the_worst_network():
    learned = LearnedStructures(["heart", "clavicle", "never seen"], 2, 0.5)
    assert learned.share() == 0.0, "before any step nothing is learned"
    steps = np.random.default_rng(0).integers(1, 100, (30, 2, 3, 3)).astype(float)
    steps[..., 2] = 0
    steps[:, 1, 0, 1] *= 0.1
    for counts in steps:
        learned.note(counts)
    decayed = sum(0.05 * 0.95 ** (len(steps) - 1 - i) * counts for i, counts in enumerate(steps))
    dice = 2 * decayed[:, 0, :2] / (decayed[:, 1, :2] + decayed[:, 2, :2])
    np.testing.assert_allclose(learned.dice(), [*dice.min(0), 1.0])
    assert dice.argmin() == 3, "the second network knows the second structure least"
    assert learned.share() == pytest.approx(dice.min() / 0.5)
    assert "'clavicle' has a Dice of" in learned.describe()
    learned.wanted_dice = float(dice.min())
    assert learned.share() == 1.0
    assert learned.describe() is None


def test_nothing_is_waited_for_where_nothing_is_asked_for():
    assert LearnedStructures(["heart"], 1, 0.0).share() == 1.0


def test_a_structure_that_is_not_shown_keeps_its_dice():
    learned = LearnedStructures(["common", "rare"], 1, 0.5)
    learned.note(np.array([[[45.0, 40.0], [50.0, 50.0], [50.0, 50.0]]]))
    for _ in range(100):
        learned.note(np.array([[[45.0, 0.0], [50.0, 5.0], [50.0, 0.0]]]))
    np.testing.assert_allclose(learned.dice(), [0.9, 0.8])


def test_what_is_said_before_any_structure_was_shown():
    learned = LearnedStructures(["heart"], 1, 0.5)
    learned.note(np.zeros((1, 3, 1)))
    assert learned.describe() == "The unlabeled terms do not count yet: no labeled batch has shown a structure"


@pytest.mark.parametrize(("labels", "order", "expected"), [
    ({"background": 0, "b": 2, "a": 1, "ignore": 3}, None, ["a", "b"]),
    ({"background": 0, "a": [1], "b": 2}, None, ["a", "b"]),
    ({"background": 0, "a": 1, "a2": 1, "b": 2}, None, ["a", "b"]),
    ({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2], ["whole", "core"]),
    ({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2], ["whole", "core"]),
])  # fmt: skip
def test_names_of_channels(labels, order, expected):
    manager = LabelManager(labels, order)
    assert names_of_channels(labels, manager) == expected
    assert len(expected) == manager.num_segmentation_heads - (not manager.has_regions)


@pytest.mark.parametrize("cls", SEMI, ids=lambda c: c.__name__)
def test_unlabeled_terms_wait_for_the_structures(tiny: TinyDataset, cls):
    trainer = tiny.initialized(cls, supervised_fraction=0.0, unlabeled_ramp=0.0, learned_dice=0.5)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter([unlabeled] * 9) if trainer.uses_unlabeled else None
    full = {name: trainer.weight(name) for name in cls.unlabeled_terms}

    def weights() -> dict[str, float]:
        names = trainer.logger.local_logger.step_names
        logged = dict(zip(names, trainer.train_step(labeled)["terms"]))
        return {name: logged[f"weight_{name}"] for name in cls.unlabeled_terms}

    assert set(weights().values()) == {0.0}
    share = trainer.learned.share()
    assert 0.0 < share < 1.0, "noise is known by chance"
    assert weights() == pytest.approx({n: share * full[n] for n in cls.unlabeled_terms})
    trainer.learned.counts[:] = 1.0
    assert weights() == pytest.approx({n: full[n] for n in cls.unlabeled_terms})


@pytest.mark.parametrize("cls", SEMI, ids=lambda c: c.__name__)
def test_steps_without_a_share_are_supervised_ones(tiny: TinyDataset, cls):
    """Weights after a step in which nothing is learned yet equal those after one with the terms switched off."""
    found = []
    for settings in ({}, {f"{name}_weight": 0.0 for name in cls.unlabeled_terms if not name.endswith("_partner")}):
        trainer = tiny.initialized(cls, supervised_fraction=0.0, learned_dice=0.5, **settings)
        labeled, unlabeled = tiny.batches(trainer)
        trainer.dataloader_unlabeled = iter([unlabeled]) if trainer.uses_unlabeled else None
        trainer.train_step(labeled)
        found.append(torch.cat([p.detach().flatten() for n in trainer.predictors for p in n.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_log_says_what_is_waited_for(tiny: TinyDataset, weight):
    off = {f"{name}_weight": weight for name in SEMI[-1].unlabeled_terms if not name.endswith("_partner")}
    trainer = tiny.trainer(SEMI[-1], supervised_fraction=0.0, num_epochs=1, learned_dice=0.5, **off)
    trainer.run_training()
    with open(trainer.log_file) as text:
        assert ("The unlabeled terms count by 0." in text.read()) == (weight > 0)

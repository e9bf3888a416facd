"""Which structures are learned, against numpy, and what waits for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.methods import TRAINERS, nnUNetTrainerBCP, nnUNetTrainerFDPL
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset
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


def test_a_structure_waits_until_the_network_that_knows_it_least_has_learned_it():
    learned = LearnedStructures(["heart", "clavicle", "never seen"], 2, 0.5)
    assert learned.all_wait, "before any step nothing is learned"
    steps = np.random.default_rng(0).integers(1, 100, (30, 2, 3, 3)).astype(float)
    steps[..., 2] = 0
    steps[:, 1, 0, 1] *= 0.1
    for counts in steps:
        learned.note(counts)
    decayed = sum(0.05 * 0.95 ** (len(steps) - 1 - i) * counts for i, counts in enumerate(steps))
    dice = 2 * decayed[:, 0, :2] / (decayed[:, 1, :2] + decayed[:, 2, :2])
    np.testing.assert_allclose(learned.dice(), [*dice.min(0), 0.0], rtol=1e-5)
    assert dice.argmin() == 3, "the second network knows the second structure least"
    learned.wanted_dice = float(dice[:, 1].min()) + 0.01
    assert learned.waiting == (1, 2)
    assert not learned.all_wait
    assert f"'clavicle' (Dice {dice[:, 1].min():.2f}), 'never seen' (not shown yet)" in learned.describe()
    learned.wanted_dice -= 0.02
    assert learned.waiting == (2,)
    learned.counts[..., 2] = 1.0
    assert learned.waiting == ()
    assert learned.describe() is None


def test_nothing_is_waited_for_where_nothing_is_asked_for():
    assert LearnedStructures(["heart"], 1, 0.0).waiting == ()


def test_a_structure_that_is_not_shown_keeps_its_dice():
    learned = LearnedStructures(["common", "rare"], 1, 0.5)
    learned.note(np.array([[[45.0, 40.0], [50.0, 50.0], [50.0, 50.0]]]))
    for _ in range(100):
        learned.note(np.array([[[45.0, 0.0], [50.0, 5.0], [50.0, 0.0]]]))
    np.testing.assert_allclose(learned.dice(), [0.9, 0.8])


def test_what_is_said_before_any_structure_was_shown():
    learned = LearnedStructures(["heart"], 1, 0.5)
    learned.note(np.zeros((1, 3, 1)))
    assert learned.describe() == (
        "The unlabeled terms do not count yet, until learned_dice (0.5): 'heart' (not shown yet)"
    )


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


def steps_of(tiny: TinyDataset, cls, count: int, **settings):
    """A trainer in stage 2 with a labeled batch, and one unlabeled batch as often as asked for."""
    trainer = tiny.initialized(cls, supervised_fraction=0.0, unlabeled_ramp=0.0, learned_dice=0.5, **settings)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter([unlabeled] * count) if trainer.uses_unlabeled else None
    return trainer, labeled


@pytest.mark.parametrize("cls", SEMI, ids=lambda c: c.__name__)
def test_unlabeled_terms_wait_for_the_first_structure(tiny: TinyDataset, cls):
    trainer, labeled = steps_of(tiny, cls, 3)
    full = {name: trainer.weight(name) for name in cls.unlabeled_terms}

    def weights() -> dict[str, float]:
        names = trainer.logger.local_logger.step_names
        logged = dict(zip(names, trainer.train_step(labeled)["terms"]))
        return {name: logged[f"weight_{name}"] for name in cls.unlabeled_terms}

    assert set(weights().values()) == {0.0}
    trainer.learned.counts[:] = 0.0
    trainer.learned.counts[..., 0] = 1.0
    assert len(trainer.learned.waiting) == len(trainer.learned.names) - 1
    assert weights() == pytest.approx(full), "one that is learned is enough"


@pytest.mark.parametrize("cls", [t for t in SEMI if t is not nnUNetTrainerBCP], ids=lambda c: c.__name__)
def test_steps_in_which_nothing_is_learned_are_supervised_ones(tiny: TinyDataset, cls):
    """Weights after such a step equal those after one with the terms switched off.

    Not of BCP, whose labeled images lie in mixtures with unlabeled ones all the while.
    """
    found = []
    for settings in ({}, {f"{name}_weight": 0.0 for name in cls.unlabeled_terms if not name.endswith("_partner")}):
        trainer, labeled = steps_of(tiny, cls, 1, **settings)
        trainer.train_step(labeled)
        found.append(torch.cat([p.detach().flatten() for n in trainer.predictors for p in n.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scenario", ["labels", "regions"])
@pytest.mark.parametrize("cls", SEMI, ids=lambda c: c.__name__)
def test_a_structure_that_is_waited_for_gets_no_gradient_of_its_own(tmp_path, cls, scenario):
    """Of classes, only the sum with the background matters to unlabeled terms; of regions, the others alone."""
    trainer, labeled = steps_of(TinyDataset(tmp_path, PATCHES["2d"], num_labels=4, scenario=scenario), cls, 1)
    batch, unlabeled = trainer.batches(labeled)
    trainer.learned.counts[:] = 0.0
    trainer.learned.counts[..., 0] = 1.0
    outputs_of, network = [], trainer.network

    def record(module, inputs, outputs):
        logits = outputs[0] if isinstance(outputs, list) else outputs
        if logits.requires_grad:
            logits.retain_grad()
            outputs_of.append(logits)

    hook = network.register_forward_hook(record)
    made = trainer.step(batch, unlabeled)
    hook.remove()
    total = sum(made.losses[name] for name in trainer.unlabeled_terms if name in made.losses and trainer.trains(name))
    total.backward()
    (waiting, *_) = trainer.learned.waiting
    seen = [logits for logits in outputs_of if logits.grad is not None and logits.grad.abs().sum() > 0]
    for logits in seen:
        if scenario == "regions":
            assert not logits.grad[:, waiting].any()
            continue
        # d/dz_k of a function of logsumexp(z_0, z_k) goes as softmax within the pair.
        pair = logits.detach().float()[:, [0, waiting + 1]]
        share = pair.softmax(1)
        both = logits.grad.float()[:, [0, waiting + 1]]
        torch.testing.assert_close(both, both.sum(1, keepdim=True) * share, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_log_says_what_is_waited_for(tiny: TinyDataset, weight):
    cls = nnUNetTrainerFDPL
    off = {f"{name}_weight": weight for name in cls.unlabeled_terms if not name.endswith("_partner")}
    trainer = tiny.trainer(cls, supervised_fraction=0.0, num_epochs=1, learned_dice=0.5, **off)
    trainer.run_training()
    with open(trainer.log_file) as text:
        assert ("The unlabeled terms do not count yet, until" in text.read()) == (weight > 0)

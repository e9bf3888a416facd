"""What a method gets, how the batch is shared, and how stage 1 fills it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_ssl.data.batches import Labeled, LabeledBatches, Unlabeled, share_batch
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.data.views import VIEWS
from nnunet_ssl.methods import nnUNetTrainerSemiTC


def test_batches_know_what_their_loaders_gave():
    images, target, weak = torch.rand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int16), torch.rand(2, 1, 4, 4)
    labeled = Labeled.of({"data": images, "target": target, "keys": np.array(["a", "b"])})
    assert labeled.images is images
    assert labeled.target is target
    assert labeled.keys == ["a", "b"]
    unlabeled = Unlabeled.of({"strong": images, "weak": weak, "strong_2": images + 1, "keys": np.array(["c", "d"])})
    assert unlabeled.strong is images
    assert unlabeled.weak is weak
    assert torch.equal(unlabeled.strong_2, images + 1)
    assert unlabeled.keys == ["c", "d"]


def test_batches_move_whole():
    meta = torch.device("meta")
    images = torch.rand(2, 1, 4, 4)
    labeled = Labeled(images, images, ["a", "b"]).to(meta)
    assert labeled.images.device == labeled.target.device == meta
    assert labeled.keys == ["a", "b"]
    unlabeled = Unlabeled(["a", "b"], dict.fromkeys(VIEWS, images)).to(meta)
    assert {unlabeled.strong.device, unlabeled.weak.device, unlabeled.strong_2.device} == {meta}
    assert unlabeled.keys == ["a", "b"]


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_was_not_declared_is_refused(name):
    others = [other for other in VIEWS if other != name]
    unlabeled = Unlabeled.of({"keys": ["a"]} | {other: torch.rand(1, 1, 4, 4) for other in others})
    with pytest.raises(AttributeError, match=f"no view '{name}' .* there is {', '.join(others)}.* `views`"):
        getattr(unlabeled, name)
    for other in others:
        assert getattr(unlabeled, other) is unlabeled.views[other]


@pytest.mark.parametrize(("planned", "labeled", "unlabeled"), [(1, 1, 1), (2, 1, 1), (5, 3, 2), (8, 4, 4)])
def test_the_batch_is_shared_between_labeled_and_unlabeled(tiny, planned, labeled, unlabeled):
    tiny.plans["configurations"]["2d"]["batch_size"] = planned
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.0, num_epochs=1)
    trainer.run_training()
    assert (trainer.batch_size, trainer.unlabeled_batch_size) == (labeled, unlabeled)
    # nnU-Net centers 1 of 2 examples on a structure; one alone must get its turn too.
    assert trainer.probabilistic_oversampling
    stock_centered = planned - round(planned * 0.67)
    assert trainer.oversample_foreground_percent == pytest.approx(stock_centered / planned)


def test_the_largest_part_of_the_batch_is_a_hyperparameter(tiny):
    tiny.plans["configurations"]["2d"]["batch_size"] = 8
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.5, unlabeled_fraction=0.3)
    trainer.on_train_start()
    assert (trainer.batch_size, trainer.unlabeled_batch_size) == (6, 2)


def test_few_unlabeled_cases_get_their_share_of_the_batch(tiny):
    """They take the place of labeled examples: 3 cases beside 4 labeled ones are 1 of 8 examples, not 4."""
    shutil.rmtree(f"{tiny.folder}{UNLABELED_SUFFIX}")
    tiny.plans["configurations"]["2d"]["batch_size"] = 8
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.5)
    trainer.on_train_start()
    assert len(next(trainer.dataloader_train)["data"]) == trainer.batch_size == 7
    assert len(next(trainer.dataloader_unlabeled)["strong"]) == 1
    assert trainer.oversample_foreground_percent == pytest.approx(3 / 8)
    log = Path(trainer.log_file).read_text()
    assert "(3 hidden label), 7 labeled + 1 unlabeled per batch, all 8 labeled in stage 1" in log


def test_stage_1_loads_no_example_in_vain():
    drawn = iter(range(100))

    def draw(size):
        numbers = [next(drawn) for _ in range(size)]
        return {"data": torch.tensor(numbers), "target": -torch.tensor(numbers), "keys": [str(n) for n in numbers]}

    batches, seen = LabeledBatches(), []
    for _ in range(6):
        # nnU-Net draws the first one for every step.
        batch = batches.fill(Labeled.of(draw(3)), (draw(3) for _ in itertools.count()), 4)
        assert len(batch.images) == 4
        assert batch.keys == [str(n) for n in batch.images.tolist()]
        assert torch.equal(batch.target, -batch.images)
        seen += batch.images.tolist()
    assert seen == list(range(24))
    assert next(drawn) == 24


@pytest.mark.parametrize("total", range(2, 9))
def test_a_share_is_the_nearest_possible(total):
    for labeled, unlabeled, tenths in itertools.product(range(1, 9), range(1, 9), range(11)):
        parts = share_batch(total, 0.33, labeled, unlabeled, tenths / 10)
        assert parts[0] + parts[1] == total
        assert min(parts[:2]) >= 1
        most = min(max(1, total * tenths // 10), total - 1)
        assert parts[1] <= most
        part = total * unlabeled * unlabeled / (labeled + unlabeled) ** 2
        assert abs(parts[1] - min(max(part, 1), most)) <= 0.5


@pytest.mark.parametrize(("labeled", "examples"), [(5, 2), (10, 2), (25, 2), (50, 1), (80, 1)])
def test_the_more_labels_the_fewer_unlabeled_examples(labeled, examples):
    """Of 99 cases and a batch of 4: up to 50 as docs/results.md reports them."""
    assert share_batch(4, 0.33, labeled, 99 - labeled)[:2] == (4 - examples, examples)


@pytest.mark.parametrize(("total", "largest", "expected"), [
    (4, 0.5, (4, 4)), (4, 0.25, (4, 1)), (2, 0.5, (2, 2)), (1, 0.5, (1, 1)), (12, 0.5, (12, 12)), (9, 0.34, (9, 4)),
])  # fmt: skip
def test_examples_that_are_added_keep_the_proportion(total, largest, expected):
    """Labeled ones fill the plan's batch, of which nnU-Net centers as many on a structure as without the others."""
    shared, added = (share_batch(total, 0.33, 1, 99, largest, added=added) for added in (False, True))
    assert added[:2] == expected
    assert added[2] == shared[2]

"""Steps whose loss is not a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerSupervised
from nnunet_ssl.training.step_guard import LONGEST_RUN, StepGuard


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for network in trainer.predictors for p in network.parameters()])


def break_term(trainer, name: str, when) -> None:
    """Make one loss term not a number at some steps; the others stay."""
    original, count = trainer.step, iter(range(10**6))

    def broken(labeled, unlabeled):
        made = original(labeled, unlabeled)
        if when(next(count)):
            made.losses[name] = made.losses[name] * float("nan")
        return made

    trainer.step = broken


def test_one_bad_step_changes_nothing_and_is_told(tiny):
    trainer = tiny.initialized(nnUNetTrainerDualNet, supervised_fraction=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter(lambda: {**unlabeled, "keys": ["un_7", "un_8"]}, None)
    break_term(trainer, "consistency", lambda i: i == 1)
    finite = []
    for i in range(3):
        before = weights(trainer)
        output = trainer.train_step({**labeled, "keys": ["lab_5"]})
        finite.append(output["finite"])
        assert torch.equal(before, weights(trainer)) == (i == 1)
        assert torch.isfinite(weights(trainer)).all()
    assert finite == [True, False, True]
    log = Path(trainer.log_file).read_text()
    assert "step skipped, the loss term consistency is not finite; cases in the batch: lab_5, un_7, un_8" in log


def test_skipped_steps_do_not_spoil_the_logged_means(tiny):
    trainer = tiny.trainer(nnUNetTrainerSupervised, num_epochs=2, num_iterations_per_epoch=4)
    trainer.initialize()
    break_term(trainer, "supervised", lambda i: i in (1, 2))
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    assert np.isfinite(trainer.logger.get_value("ssl_supervised", step=None)).all()
    log = Path(trainer.log_file).read_text()
    assert log.count("step skipped") == 2
    assert log.count("2 steps of this epoch were skipped") == 1


def test_ten_in_a_row_end_the_training_and_keep_the_checkpoint(tiny):
    trainer = tiny.trainer(nnUNetTrainerSupervised, num_epochs=20, num_iterations_per_epoch=4)
    trainer.initialize()
    break_term(trainer, "supervised", lambda i: i >= 9)
    with pytest.raises(UserError, match=r"10 steps in a row.*term supervised is not finite.*lab_\d.*--c"):
        trainer.run_training()
    assert trainer.current_epoch == 4
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    checkpoint = torch.load(file, weights_only=False)
    assert all(torch.isfinite(v).all() for v in checkpoint["network_weights"].values())
    resumed = tiny.trainer(nnUNetTrainerSupervised, num_epochs=5, num_iterations_per_epoch=4)
    resumed.initialize()
    resumed.load_checkpoint(str(file))
    resumed.run_training()
    assert torch.isfinite(weights(resumed)).all()


def test_a_good_step_between_starts_the_count_anew():
    said = []
    guard = StepGuard(said.append)
    for _ in range(3):
        for _ in range(LONGEST_RUN - 1):
            guard.note(False, {"a": float("inf"), "b": 1.0}, ["x"])
        guard.note(True, {"a": 1.0, "b": 1.0}, ["y"])
    assert guard.skipped_in_epoch == 3 * (LONGEST_RUN - 1)
    assert len(said) == 3 * (LONGEST_RUN - 1)
    guard.note(False, {"a": 1.0}, ["z", "z"])
    assert said[-1] == "WARNING: step skipped, the gradient is not finite; cases in the batch: z"

"""A running average of the weights that predicts: in validation, in checkpoints, and after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from trainings import assert_equal_weights, stop_at_epoch

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerMeanTeacher, nnUNetTrainerSupervised
from nnunet_ssl.testing.whole import train
from nnunet_ssl.training.export import export_network

DECAY = 0.6
METHODS = pytest.mark.parametrize(
    "cls", [nnUNetTrainerSupervised, nnUNetTrainerMeanTeacher], ids=lambda c: c.__name__.removeprefix("nnUNetTrainer")
)


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def checkpoint(trainer, name: str = "checkpoint_final.pth") -> dict:
    return torch.load(Path(trainer.output_folder) / name, weights_only=False)


def watched(trainer) -> list[dict[str, torch.Tensor]]:
    """The weights after every step, filled while it trains."""
    after: list[dict[str, torch.Tensor]] = []
    take = trainer.train_step

    def take_and_note(batch):
        told = take(batch)
        after.append(weights_of(trainer.network))
        return told

    trainer.train_step = take_and_note
    return after


@METHODS
def test_the_final_checkpoint_is_the_average_of_all_steps(tiny, cls):
    trainer = tiny.trainer(cls, averaged_decay=DECAY)
    after = watched(trainer)
    train(trainer)
    expected = {name: value.double() for name, value in after[0].items()}
    for step, weights in enumerate(after[1:], start=2):
        alpha = min(1 - 1 / step, DECAY)
        expected = {n: alpha * expected[n] + (1 - alpha) * weights[n].double() for n in expected}
    found = checkpoint(trainer)
    for name, value in expected.items():
        torch.testing.assert_close(found["network_weights"][name].double(), value, atol=1e-5, rtol=1e-4)
    assert_equal_weights(found["nnunet_ssl"]["companions"]["unaveraged"]["weights"], after[-1])


def test_without_a_decay_nothing_is_averaged(tiny):
    trainer = tiny.trainer(nnUNetTrainerSupervised)
    after = watched(trainer)
    train(trainer)
    assert not trainer.companions
    assert_equal_weights(checkpoint(trainer)["network_weights"], after[-1])


@METHODS
def test_training_is_what_it_is_without_an_average(tiny, cls):
    trained = []
    for decay in (0.0, DECAY):
        trainer = tiny.trainer(cls, averaged_decay=decay)
        after = watched(trainer)
        train(trainer)
        trained.append(after[-1])
        shutil.rmtree(trainer.output_folder)
    assert_equal_weights(*trained)


@METHODS
def test_resuming_changes_nothing(tiny, cls):
    whole = tiny.trainer(cls, averaged_decay=DECAY)
    train(whole)
    expected = checkpoint(whole)
    shutil.rmtree(whole.output_folder)
    stopped = tiny.trainer(cls, averaged_decay=DECAY)
    stop_at_epoch(stopped, 2)
    with pytest.raises(KeyboardInterrupt):
        stopped.run_training()
    resumed = tiny.trainer(cls, averaged_decay=DECAY)
    resumed.load_checkpoint(str(Path(stopped.output_folder) / "checkpoint_latest.pth"))
    train(resumed)
    found = checkpoint(resumed)
    assert_equal_weights(found["network_weights"], expected["network_weights"])
    unaveraged = (made["nnunet_ssl"]["companions"]["unaveraged"]["weights"] for made in (found, expected))
    assert_equal_weights(*unaveraged)


def test_validation_sees_the_average(tiny, monkeypatch):
    seen = {}

    def note(kind: str, original):
        def noted(trainer, *arguments):
            seen[kind] = weights_of(trainer.network)
            return original(trainer, *arguments) if original else None

        return noted

    monkeypatch.setattr(nnUNetTrainer, "validation_step", note("epoch", nnUNetTrainer.validation_step))
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", note("whole", None))
    trainer = tiny.trainer(nnUNetTrainerSupervised, averaged_decay=DECAY)
    after = watched(trainer)
    train(trainer)
    average = checkpoint(trainer)["network_weights"]
    assert_equal_weights(seen["epoch"], average)
    trainer.perform_actual_validation()
    assert_equal_weights(seen["whole"], average)
    assert_equal_weights(weights_of(trainer.network), after[-1])
    # As with --val: from the file, in a training that has taken no step.
    again = tiny.trainer(nnUNetTrainerSupervised, averaged_decay=DECAY)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    again.perform_actual_validation()
    assert_equal_weights(seen["whole"], average)


def test_the_trained_weights_can_be_exported(tiny):
    trainer = tiny.trainer(nnUNetTrainerSupervised, averaged_decay=DECAY)
    after = watched(trainer)
    train(trainer)
    model = Path(trainer.output_folder_base)
    made = export_network(model, [str(trainer.fold)], "checkpoint_final.pth", "unaveraged").folder
    exported = torch.load(made / f"fold_{trainer.fold}" / "checkpoint_final.pth", weights_only=False)
    assert_equal_weights(exported["network_weights"], after[-1])


def test_a_checkpoint_with_other_networks_is_refused(tiny):
    trainer = tiny.trainer(nnUNetTrainerSupervised)
    train(trainer)
    other = tiny.trainer(nnUNetTrainerSupervised, averaged_decay=DECAY)
    with pytest.raises(UserError, match=r"further networks none, this training has \['unaveraged'\]"):
        other.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))

"""Checkpoints: stock-compatible, atomic, resumable, and refused by the wrong trainer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replace_atomically, write_atomically, write_together
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerSemiTC, nnUNetTrainerSupervised
from nnunet_ssl.training.checkpoint import STATE_KEY, random_state, restore_random_state


def trained(tiny, cls, **ssl):
    trainer = tiny.trainer(cls, num_epochs=2, num_iterations_per_epoch=1, **ssl)
    trainer.run_training()
    return trainer


def test_stock_keys_and_ours(tiny, trainer_class):
    trainer = trained(tiny, trainer_class)
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    stock = tiny.trainer(nnUNetTrainer)
    stock.initialize()
    stock.save_checkpoint(f"{tiny.root}/stock.pth")
    expected = torch.load(f"{tiny.root}/stock.pth", weights_only=False)
    assert set(checkpoint) == set(expected) | {STATE_KEY}
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["network_weights"].keys() == expected["network_weights"].keys()
    assert checkpoint[STATE_KEY]["trainer"] == trainer_class.__name__
    assert checkpoint[STATE_KEY]["hyperparameters"]["num_epochs"] == 2


def test_our_state_holds_tensors_and_plain_values_only(tiny, trainer_class):
    trainer = trained(tiny, trainer_class)
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    file = tiny.root / "state.pth"
    torch.save(checkpoint[STATE_KEY], file)
    torch.load(file, weights_only=True)


def test_a_changed_network_keeps_its_trainer_name(tiny):
    class OtherNetwork(nnUNetTrainerSupervised):
        @staticmethod
        def build_network_architecture(plans_manager, *arguments, **keywords):
            return nnUNetTrainer.build_network_architecture(plans_manager, *arguments, **keywords)

    trainer = trained(tiny, OtherNetwork)
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "OtherNetwork"


@pytest.mark.parametrize("cls", [nnUNetTrainerSemiTC, nnUNetTrainerDualNet])
def test_another_trainers_checkpoint_is_refused(tiny, cls):
    file = f"{trained(tiny, nnUNetTrainerSupervised).output_folder}/checkpoint_final.pth"
    other = tiny.trainer(cls)
    with pytest.raises(UserError, match=rf"written by nnUNetTrainerSupervised, not by {cls.__name__}.*-pretrained"):
        other.load_checkpoint(file)
    stock = tiny.trainer(nnUNetTrainer)
    stock.initialize()
    stock.save_checkpoint(f"{tiny.root}/stock.pth")
    with pytest.raises(UserError, match="a trainer of another package"):
        tiny.trainer(cls).load_checkpoint(f"{tiny.root}/stock.pth")


def test_a_finished_training_without_a_second_stage_continues_into_validation(tiny):
    trained(tiny, nnUNetTrainerSemiTC, supervised_fraction=1.0)
    again = tiny.trainer(nnUNetTrainerSemiTC, num_epochs=2, supervised_fraction=1.0)
    again.load_checkpoint(f"{again.output_folder}/checkpoint_final.pth")
    assert again.current_epoch == again.num_epochs == again.switch_epoch
    again.run_training()


def test_changed_plans_are_said_when_continuing(tiny):
    file = f"{trained(tiny, nnUNetTrainerSemiTC).output_folder}/checkpoint_final.pth"
    trainer = tiny.trainer(nnUNetTrainerSemiTC, num_epochs=3, num_iterations_per_epoch=1)
    trainer.load_checkpoint(file)
    assert "hyper-parameters changed since this checkpoint: num_epochs 3 (was 2)" in Path(trainer.log_file).read_text()


def test_changed_examples_are_said_when_continuing(tiny):
    tiny.plans["configurations"]["2d"]["batch_size"] = 8
    file = f"{trained(tiny, nnUNetTrainerSemiTC).output_folder}/checkpoint_final.pth"
    for gone, message in (
        (False, None),
        (True, "3 unlabeled cases: 0 are new, 8 of those it began with are gone"),
    ):
        if gone:
            shutil.rmtree(f"{tiny.folder}{UNLABELED_SUFFIX}")
        trainer = tiny.trainer(nnUNetTrainerSemiTC, num_epochs=3)
        trainer.load_checkpoint(file)
        trainer.on_train_start()
        log = Path(trainer.log_file).read_text()
        assert ("WARNING: this training goes on with" in log) == gone
        if message:
            assert f"goes on with {message}" in log
            assert "goes on with 7 labeled + 1 unlabeled examples per batch, and began with 4 labeled + 4 unl" in log


def test_pretrained_weights_start_the_second_stage(tiny):
    supervised = trained(tiny, nnUNetTrainerSupervised)
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.0)
    trainer.initialize()
    load_pretrained_weights(trainer.network, f"{supervised.output_folder}/checkpoint_final.pth")
    assert torch.equal(
        trainer.network.encoder.stages[0][0].convs[0].conv.weight,
        supervised.network.encoder.stages[0][0].convs[0].conv.weight,
    )
    assert trainer.in_second_stage


def test_checkpointing_can_be_disabled(tiny, trainer_class):
    trainer = tiny.trainer(trainer_class, num_epochs=1)
    trainer.disable_checkpointing = True
    trainer.run_training()
    assert not list(Path(trainer.output_folder).glob("*.pth"))


def test_random_state_round_trip():
    cpu, generator = torch.device("cpu"), torch.Generator()
    state = random_state(cpu, generator)
    first = (torch.rand(3), np.random.rand(3), np.random.normal(), torch.rand(3, generator=generator))
    assert restore_random_state(state, cpu, generator)
    second = (torch.rand(3), np.random.rand(3), np.random.normal(), torch.rand(3, generator=generator))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[3], second[3])
    assert not restore_random_state({**state, "device": "cuda"}, cpu, generator)
    assert np.array_equal(first[1], second[1])
    assert first[2] == second[2]


def test_a_failed_write_leaves_the_previous_version(tmp_path):
    file = tmp_path / "checkpoint.pth"
    write_atomically(str(file), b"old")

    def half(temporary: str) -> None:
        Path(temporary).write_bytes(b"ne")
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="could not be written: No space left on device"):
        replace_atomically(str(file), half)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    write_atomically(str(file), b"new")
    assert file.read_bytes() == b"new"


def test_files_that_belong_together_are_replaced_together(tmp_path, monkeypatch):
    files = [str(tmp_path / name) for name in ("table.csv", "report.html")]
    write_together(dict.fromkeys(files, b"old"))
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        write_together(dict.fromkeys(files, b"new"))
    assert {Path(file).read_bytes() for file in files} == {b"old"}
    assert len(os.listdir(tmp_path)) == 2


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tiny, monkeypatch):
    trainer = trained(tiny, nnUNetTrainerSupervised)
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    before = file.read_bytes()
    real = torch.save

    def killed(obj, name, *arguments, **keywords):
        real(obj, name, *arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before

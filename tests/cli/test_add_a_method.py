"""docs/how-to/add-a-method.md: its file, its commands and its other examples do what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from day import QUICK, Day
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ssl.cli import main
from nnunet_ssl.demo.synthetic import Sizes, write_dataset
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing.tiny import TinyDataset

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(COMMANDS,) = re.findall(r"## The commands\n\n```\n(.*?)```", PAGE, re.DOTALL)
TRAINERS = re.findall(r"^class (nnUNetTrainer\w+)", "\n".join(BLOCKS), re.MULTILINE)


def test_the_page_has_examples():
    assert "class nnUNetTrainerMirror(" in BLOCKS[0]
    assert len(BLOCKS[0].splitlines()) <= 30
    assert len(TRAINERS) == len(BLOCKS) == 9


@pytest.mark.slow
def test_file_and_commands_lead_to_a_comparison(tmp_path, executables, monkeypatch, capsys):
    day = Day(tmp_path, 901, "Dataset901_Chest", executables)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        """Our own commands in this process, which has everything imported."""
        if words[0] != "nnunet-ssl":
            return day.run(*words)
        monkeypatch.setenv("nnUNet_extTrainer", day.environment["nnUNet_extTrainer"])
        capsys.readouterr()
        assert main(list(words[1:])) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    write_dataset(day.raw, Sizes(labeled=10, unlabeled=3, test=2, side=32))
    run("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "2d", "-np", "1", "-npfp", "1")
    small = ("-c", "2d", "--batch-size", "4", "--base-features", "4", "--max-features", "8", "--overwrite")
    run("nnunet-ssl", "configure", "-d", "901", "-o", "nnUNetPlans", *small)
    run("nnunet-ssl", "preprocess", "-d", "901", "-c", "2d", "-np", "1")
    folder = tmp_path / "my_trainers"
    folder.mkdir()
    (folder / "mirror.py").write_text(BLOCKS[0])

    commands = COMMANDS.replace("\\\n", " ").replace("501", "901").replace("~/my_trainers", str(folder))
    first, *others = commands.splitlines()
    exported = run(*shlex.split(first.removeprefix('eval "$(').removesuffix(')"'))).strip()
    day.environment["nnUNet_extTrainer"] = shlex.split(exported)[1].partition("=")[2]
    printed = {}
    for line in others:
        if line.startswith("nnUNetv2_train") and "SemiTC" in line:
            continue  # one baseline is enough, and saves half a minute
        words = shlex.split(line.replace("num_epochs=200", " ".join(QUICK)))
        verb = words[1] if words[0] == "nnunet-ssl" else words[0]
        if verb == "check":
            words += ["--only", "step", "gradients", "signal", "masks"]
        if verb == "nnUNetv2_train":
            words += ["-device", "cpu"]
        if verb == "compare":
            words.remove("nnUNetTrainerSemiTC")
            words += ["-np", "1"]
        printed[verb] = run(*words)

    assert "Mirror.agreement_weight" in printed["trainers"]
    assert "BROKEN" not in printed["check"]
    written = json.loads((day.preprocessed / "nnUNetPlansMine.json").read_text())["ssl"]
    assert written["Mirror"] == {"agreement_weight": 0.3}
    fold = day.results / "nnUNetTrainerMirror__nnUNetPlansMine__2d" / "fold_0"
    assert json.loads((fold / "nnunet_ssl.json").read_text())["hyperparameters"]["agreement_weight"] == 0.3
    assert "agreement" in next(fold.glob("training_log*")).read_text()
    compared = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["results"]
    assert compared
    assert all(set(row["trainers"]) == {"nnUNetTrainerMirror", "nnUNetTrainerSupervised"} for row in compared)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_example_takes_a_step_and_goes_on_from_it(name, tiny: TinyDataset, tmp_path, monkeypatch):
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "examples.py").write_text("\n\n".join(BLOCKS))
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(trainers_folder()), str(folder)]))
    cls = recursive_find_trainer_class_by_name(name)
    trainer = tiny.initialized(cls, supervised_fraction=0.0, unlabeled_ramp=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter([unlabeled])
    before = [[w.detach().clone() for w in network.parameters()] for network in trainer.trained]
    trainer.on_train_epoch_start()
    outcome = trainer.train_step(labeled)
    assert outcome["finite"]
    told = dict(zip(trainer.logger.local_logger.step_names, outcome["terms"].tolist()))
    # Every declared term, weight and statistic was given.
    assert all(value == value for value in told.values()), told
    for weights, network in zip(before, trainer.trained):
        assert not all(torch.equal(old, new) for old, new in zip(weights, network.parameters()))
    with torch.no_grad():
        images = torch.zeros(2, 1, *trainer.unlabeled_patch_size)
        assert trainer.view(images, trainer.generator).pseudo_labels.shape == (2, *tiny.patch)
    other = tiny.initialized(cls)
    other.recall(trainer.memory())
    assert other.memory() == trainer.memory()

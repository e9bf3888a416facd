"""Trainers in folders of the user's own: how commands and nnU-Net find them, and what stands in the plans for them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ssl.cli import main
from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.nnunet.foreign_trainers import load_trainers
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing.tiny import make_plans
from nnunet_ssl.training.hyperparameters import method_name
from nnunet_ssl.training.trainer import SemiSupervisedTrainer

ABSTRACT = """
import abc

from nnunet_ssl.methods import nnUNetTrainerSupervised


class Base(nnUNetTrainerSupervised):
    @abc.abstractmethod
    def missing(self): ...
"""
MIRROR = '''
from __future__ import annotations

import dataclasses
from typing import Optional

from nnunet_ssl.methods import nnUNetTrainerSemiTC, nnUNetTrainerSupervised
from nnunet_ssl.training.hyperparameters import MethodParameters, parameter


@dataclasses.dataclass(frozen=True)
class MirrorParameters(MethodParameters):
    """Hyper-parameters of mirror agreement."""

    supervised_fraction: float = parameter(0.75, "fraction before the agreement", minimum=0.0, maximum=1.0)
    agreement_weight: Optional[float] = parameter(1.0, "weight of the agreement term", "points", minimum=0.0)


class nnUNetTrainerMirror(nnUNetTrainerSupervised):
    """Predictions of an image and of its mirror image agree.

    Not today.
    """

    Parameters = MirrorParameters
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trainer, beside ours in nnUNet_extTrainer."""
    folder = tmp_path / "my trainers"
    folder.mkdir()
    (folder / "mirror.py").write_text(MIRROR)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(trainers_folder()), str(folder)]))
    return folder


# ---- the look-up --------------------------------------------------------------------------------------------------


def test_the_look_up_finds_what_nnunet_finds_in_its_order_and_leaves_nothing_behind(mine, tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / "package" / "inner").mkdir(parents=True)
    for folder in (other / "package", other / "package" / "inner"):
        (folder / "__init__.py").touch()
    (other / "mirror.py").write_text(MIRROR.replace("Mirror", "Second"))
    (other / "base.py").write_text(ABSTRACT)
    (other / "package" / "inner" / "deep.py").write_text(MIRROR.replace("Mirror", "Deep"))
    (other / "package" / "again.py").write_text("from mirror import nnUNetTrainerSecond\n")
    names = [str(trainers_folder()), str(mine), str(tmp_path / "missing"), "", str(other)]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(names))
    modules, paths = set(sys.modules), list(sys.path)
    found = load_trainers(SemiSupervisedTrainer)
    assert [str(trainers_folder()), str(mine), str(other)] == list(found)
    assert set(found[str(trainers_folder())]) == set(TRAINERS)
    own = [[t.__name__ for t in found[str(f)] if t not in (*TRAINERS,)] for f in (mine, other)]
    assert own == [["nnUNetTrainerMirror"], ["nnUNetTrainerSecond", "nnUNetTrainerDeep"]]
    assert not {"mirror", "package"} & (set(sys.modules) - modules)
    assert sys.path == paths
    for name in ("nnUNetTrainerMirror", "nnUNetTrainerSecond", "nnUNetTrainerDeep"):
        assert issubclass(recursive_find_trainer_class_by_name(name), SemiSupervisedTrainer)


def test_a_trainer_from_another_folder_trains_with_plans_that_all_share(mine, tiny):
    tiny.plans["ssl"] |= {"Mirror": {"agreement_weight": 0.3}, "SemiTC": {"consistency_weight": 0.5}}
    cls = recursive_find_trainer_class_by_name("nnUNetTrainerMirror")
    trainer = tiny.trainer(cls, num_epochs=1)
    assert trainer.hp.agreement_weight == 0.3
    assert trainer.hp.supervised_fraction == 0.75
    trainer.run_training()
    record = json.loads((Path(trainer.output_folder) / "nnunet_ssl.json").read_text())
    assert record["hyperparameters"]["agreement_weight"] == 0.3
    assert tiny.trainer(TRAINERS[2]).hp.consistency_weight == 0.5
    # By name alone, as for the trainers of this package.
    assert tiny.trainer(cls, agreement_weight=0.2, cutmix="none").hp.agreement_weight == 0.2


# ---- trainers -----------------------------------------------------------------------------------------------------


def test_trainers_lists_those_in_other_folders_after_ours(mine, capsys):
    assert main(["trainers"]) == 0
    listed = capsys.readouterr().out
    ours, others = listed.split(f"\nIn {mine}:\n")
    assert all(t.__name__ in ours for t in TRAINERS)
    assert "nnUNetTrainerMirror  Predictions of an image and of its mirror image agree.\n" in others
    assert "SemiTC" not in others
    assert "Not today" not in listed


@pytest.mark.parametrize("name", ["Mirror", "nnUNetTrainerMirror"])
def test_trainers_shows_which_parameters_are_shared(mine, capsys, name):
    assert main(["trainers", name]) == 0
    shown = capsys.readouterr().out
    own, shared = shown.split("\nShared by all methods; Mirror.NAME sets one for Mirror alone:\n")
    line = r"Mirror.agreement_weight        a number or null, points; default 1.0"
    assert line in own
    assert own.count("default") == 1
    assert "num_epochs                     a whole number, epochs; default 1000" in shared
    assert "supervised_fraction            a number; default 0.75" in shared
    assert "What is set for Supervised holds for Mirror too, unless Mirror has its own." in shared


def test_a_trainer_that_is_nowhere(mine, capsys):
    assert main(["trainers", "Miror"]) == 2
    told = capsys.readouterr().err
    assert "No trainer 'Miror'; there are nnUNetTrainerSupervised, " in told
    assert "nnUNetTrainerMirror. Trainers of your own" in told


def test_a_file_that_cannot_be_imported_is_named(mine, capsys):
    (mine / "broken.py").write_text("import a_module_that_is_not_there\n")
    assert main(["trainers"]) == 2
    told = capsys.readouterr().err
    assert f"{mine / 'broken.py'} cannot be imported: ModuleNotFoundError: No module named 'a_module" in told
    # What needs no other folder does not look there.
    assert main(["trainers", "SemiTC"]) == 0


# ---- configure ----------------------------------------------------------------------------------------------------


@pytest.fixture
def preprocessed(tmp_path: Path) -> Path:
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset900_Tiny"
    folder.mkdir(parents=True)
    plans = make_plans((32, 32), ssl={"num_epochs": 5, "SupTC": {"smoothness": 0.2}})
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return folder


def configure(*options: str) -> int:
    return main(["configure", "-d", "900", "-o", "Mine", *options])


def test_configure_writes_blocks(mine, preprocessed, capsys):
    several = ("SupTC.interpolation=nearest", "FDPL.cutmix=none", "Mirror.agreement_weight=0.3")
    assert configure("--set", "num_epochs=20", "--set", *several, "--set", "Mirror.seed=4") == 0
    assert json.loads((preprocessed / "Mine.json").read_text())["ssl"] == {
        "num_epochs": 20,
        "SupTC": {"smoothness": 0.2, "interpolation": "nearest"},
        "FDPL": {"cutmix": "none"},
        "Mirror": {"agreement_weight": 0.3, "seed": 4},
    }
    assert not capsys.readouterr().err
    assert configure("--overwrite", "--set", 'DualNet={"contrastive_margin": 0.7}', "DualNet.weak_teacher=false") == 0
    written = json.loads((preprocessed / "Mine.json").read_text())["ssl"]
    assert written["DualNet"] == {"contrastive_margin": 0.7, "weak_teacher": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["Mirror.agreement_wieght=1"], "Mirror.agreement_wieght. Did you mean Mirror.agreement_weight?"),
        (["Mirror.agreement_weight=much"], "Mirror.agreement_weight must be a number or null, got 'much'"),
        (["Mirror.agreement_weight=-1"], "Mirror.agreement_weight must lie between 0.0 and None, got -1"),
        (["Mirror.supervised_fraction=2"], "Mirror.supervised_fraction must lie between 0.0 and 1.0, got 2"),
        (["Mirror.cutmix=1"], "Unknown hyper-parameter Mirror.cutmix. Write FDPL.cutmix."),
        (["agreement_weight=1"], "Unknown hyper-parameter 'agreement_weight'"),
        (["SemiTC=1"], "Block SemiTC must be an object of names and values, found 1"),
        (["SemiTC.smoothness=1", "SemiTC=1"], "Block SemiTC must be an object of names and values, found 1"),
        (["num_epochs.SemiTC=1"], "num_epochs must be a whole number, got {'SemiTC': 1}"),
        (["a.b.c=1"], "--set 'a.b.c=1': expected NAME=VALUE or METHOD.NAME=VALUE"),
        ([".a=1"], "expected NAME=VALUE"),
        (["a.=1"], "expected NAME=VALUE"),
        (["=1"], "expected NAME=VALUE"),
    ],
)
def test_configure_checks_blocks(mine, preprocessed, capsys, settings, message):
    assert configure("--set", *settings) == 2
    assert message in capsys.readouterr().err
    assert not (preprocessed / "Mine.json").exists()


def test_configure_checks_what_was_there_before(preprocessed, capsys):
    file = preprocessed / "nnUNetPlans.json"
    file.write_text(json.dumps(make_plans((32, 32), ssl={"consistency_weight": 0.5})))
    assert configure("--set", "num_epochs=3") == 2
    assert "consistency_weight belongs to a method: write SupTC.consistency_weight" in capsys.readouterr().err


def test_an_unknown_method_is_a_warning(mine, preprocessed, capsys):
    assert configure("--set", "Miror.anything=[1]") == 0
    written = json.loads((preprocessed / "Mine.json").read_text())["ssl"]
    assert written["Miror"] == {"anything": [1]}
    told = capsys.readouterr().err
    assert "WARNING: no method is called Miror. Did you mean Mirror?" in told
    assert f"Known are {', '.join(map(method_name, TRAINERS))}, Mirror;" in told


# ---- env ----------------------------------------------------------------------------------------------------------


def test_env_adds_folders_after_ours(tmp_path, capsys, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second folder"
    for folder in (first, second):
        folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/other", f"{first}/", str(trainers_folder())]))
    words = ["env", "--also", "first", "--also", str(second), "--also", "second folder/../first"]
    assert main(words) == 0
    folders = os.pathsep.join(map(str, (trainers_folder(), first, second, "/other")))
    assert capsys.readouterr().out == f"export nnUNet_extTrainer='{folders}'\n"


@pytest.mark.parametrize("name", ["missing", "file.py", f"a{os.pathsep}b"])
def test_env_refuses_what_is_no_folder(tmp_path, capsys, name):
    (tmp_path / "file.py").touch()
    (tmp_path / f"a{os.pathsep}b").mkdir()
    assert main(["env", "--also", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert str(tmp_path / name) in printed.err
    assert ("separates folders" if os.pathsep in name else "is not a folder") in printed.err

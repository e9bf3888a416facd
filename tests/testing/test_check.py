"""Foreign methods that break one promise each, and that the check names it."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import foreign_methods as foreign
import pytest

from nnunet_ssl.cli import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerSupervised
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing import PROMISES, Outcome, check_method, processes
from nnunet_ssl.testing.check import BROKEN, NOT_TRIED, OK

NAMES = [promise.name for promise in PROMISES]
# Tried beside the one that is to be broken: seconds together.
QUICK = ("step", "gradients", "signal", "masks", "finite", "skipping")
BREAKING = {
    foreign.nnUNetTrainerUnbuilt: ("step", "AttributeError: 'nnUNetTrainerUnbuilt' object has no attribute 'netwrok'"),
    foreign.nnUNetTrainerDetached: ("gradients", "The gradient of 'agreement' reaches no network; it should reach"),
    foreign.nnUNetTrainerCutOff: ("gradients", "does not reach"),
    foreign.nnUNetTrainerSwapped: ("gradients", "The gradient of 'cross' reaches partner; it should reach network"),
    foreign.nnUNetTrainerSilent: ("gradients", "declares the term 'agreement_again' that a step"),
    foreign.nnUNetTrainerWrongImages: ("signal", "the term 'agreement' with the same gradient"),
    foreign.nnUNetTrainerReader: ("leakage", "The training opens hid_"),
    foreign.nnUNetTrainerIgnorant: ("masks", "The term 'extra' takes the ignore label for one of the structures"),
    foreign.nnUNetTrainerGuessing: ("masks", "The term 'agreement' takes the ignore label for one of the structures"),
    foreign.nnUNetTrainerNaive: ("finite", "With networks that are sure of every voxel and bfloat16, agreement is not"),
    foreign.nnUNetTrainerHasty: ("skipping", "A step with losses that are not finite changed"),
    foreign.nnUNetTrainerFlat: ("kinds", "AssertionError: regions were forgotten"),
    foreign.nnUNetTrainerUnsaved: ("companions", "teachers[0].module of nnUNetTrainerUnsaved has weights that no"),
    foreign.nnUNetTrainerHidden: ("companions", "first of nnUNetTrainerHidden has weights that no checkpoint holds"),
    foreign.nnUNetTrainerForgetful: ("resuming", "A training that stops after"),
    foreign.nnUNetTrainerFiltered: ("prediction", "of an image's voxels other labels than the training's network"),
    foreign.nnUNetTrainerDrifting: ("processes", "two processes hold different"),
}  # fmt: skip


def kept(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.promise: outcome.state for outcome in outcomes if outcome.state != OK}


def line_of(cls: type, text: str) -> str:
    """FILE:LINE of the first line of a class that holds a text."""
    lines, first = inspect.getsourcelines(cls)
    return f"{inspect.getsourcefile(cls)}:{first + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize("cls", BREAKING, ids=lambda c: c.__name__.removeprefix("nnUNetTrainer"))
def test_a_broken_promise_is_named_and_no_other(cls):
    promise, found = BREAKING[cls]
    outcomes = check_method(cls, [*QUICK, promise])
    broken = {name: state for name, state in kept(outcomes).items() if state == BROKEN}
    assert broken == {promise: BROKEN}, [o.found for o in outcomes]
    (outcome,) = (o for o in outcomes if o.promise == promise)
    assert found in outcome.found
    assert outcome.look


@pytest.mark.parametrize("cls", [foreign.nnUNetTrainerTeacher, foreign.nnUNetTrainerCross], ids=lambda c: c.__name__)
def test_a_good_method_keeps_every_promise(cls):
    before = dict(os.environ)
    outcomes = check_method(cls)
    assert [o.promise for o in outcomes] == NAMES
    assert not kept(outcomes), [o.found for o in outcomes]
    assert dict(os.environ) == before


def test_a_companion_that_shares_tensors_with_the_network():
    """It breaks a second promise by that: every loss on labels reaches it too."""
    (outcome,) = check_method(foreign.nnUNetTrainerSharing, ["companions"])
    assert "2 tensors belong to two networks of nnUNetTrainerSharing" in outcome.found


def test_processes_that_wait_for_each_other_are_ended(monkeypatch):
    monkeypatch.setattr(processes, "WAIT", 5.0)
    (outcome,) = check_method(foreign.nnUNetTrainerWaiting, ["processes"])
    assert outcome.state == BROKEN
    assert line_of(foreign.nnUNetTrainerWaiting, "dist.recv") in outcome.look


def test_the_line_of_a_method_is_named():
    (leakage,) = check_method(foreign.nnUNetTrainerReader, ["leakage"])
    assert line_of(foreign.nnUNetTrainerReader, "blosc2.open") in leakage.look
    (kinds,) = check_method(foreign.nnUNetTrainerFlat, ["kinds"])
    assert line_of(foreign.nnUNetTrainerFlat, "assert not") in kinds.look
    assert "Epoch 0" in kinds.log


def test_what_says_nothing_after_a_broken_promise_is_not_tried():
    outcomes = check_method(foreign.nnUNetTrainerDetached, ["gradients", "signal"])
    assert kept(outcomes) == {"gradients": BROKEN, "signal": NOT_TRIED}
    assert outcomes[1].found == "because gradients is broken"


# ---- the command --------------------------------------------------------------------------------------------------

HEADER = "from foreign_methods import nnUNetTrainerTeacher, nnUNetTrainerDetached\n\n\n"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two trainers of one's own, beside ours in nnUNet_extTrainer."""
    folder = tmp_path / "my trainers"
    folder.mkdir()
    for name, base in (("Mine", "Teacher"), ("Bad", "Detached")):
        (folder / f"{name.lower()}.py").write_text(
            f"{HEADER}class nnUNetTrainer{name}(nnUNetTrainer{base}):\n    '''One of mine.'''\n"
        )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(trainers_folder()), str(folder)]))
    return folder


def test_the_table_and_the_exit_status(mine, capsys):
    assert main(["check", "Mine", "nnUNetTrainerSupervised", "--only", "gradients", "signal"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "nnUNetTrainerMine", "gradients", "signal", "nnUNetTrainerSupervised", "gradients", "signal",
    ]  # fmt: skip
    assert all(line.split()[-3] == "ok" for line in lines if " " in line)
    assert not printed.err
    assert main(["check", "Mine", "Bad", "--only", "gradients", "signal"]) == 1
    good, bad = capsys.readouterr().out.split("nnUNetTrainerBad\n")
    assert "BROKEN" not in good
    assert "\ngradients: BROKEN\n  The gradient of 'agreement' reaches no network;" in bad
    assert "signal: not tried\n  because gradients is broken" in bad


def test_two_processes_find_a_trainer_that_only_nnunet_finds(mine):
    assert main(["check", "Mine", "--only", "processes"]) == 0


def test_a_trainer_that_another_process_cannot_find():
    class Local(foreign.nnUNetTrainerTeacher):
        """Written inside a function."""

    (outcome,) = check_method(Local, ["processes"])
    assert "Another process does not find" in outcome.found


def test_the_promises_are_listed(capsys):
    assert main(["check", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name a trainer"),
        (("Miror",), "No trainer 'Miror'; there are nnUNetTrainerSupervised, "),
        (("nnUNetTrainer",), "nnUNetTrainer does not derive from nnunet_ssl.training.SemiSupervisedTrainer"),
        (("nnUNetTrainer_5epochs",), "Derive from it to learn from unlabeled images"),
        (("SemiTC", "--device", "cuda"), "PyTorch finds no device 'cuda' here; it finds cpu"),
        (("SemiTC", "--only", "everything"), "There is no promise 'everything'; there are step, "),
    ],
)
def test_wrong_use(mine, monkeypatch, capsys, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["check", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch finds no device 'cuda' here; it finds cpu"):
        check_method(nnUNetTrainerSupervised, device="cuda")

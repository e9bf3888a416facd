"""Pseudo-labels by trained models, from files, in parts; and what they must not know."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunet_ssl.cli import main
from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.prediction import TrainedModel
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.data.pseudo_labels import UNCERTAIN, PseudoLabels, as_learned, as_stored, likeliest
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.agreement import OVERALL, agreement
from nnunet_ssl.evaluation.metrics import structures_of
from nnunet_ssl.methods import nnUNetTrainerSelfTraining, nnUNetTrainerSemiTCPlus, nnUNetTrainerSupervised
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset
from nnunet_ssl.testing.whole import opened_files

MODEL = "nnUNetTrainerSupervised__nnUNetPlans"
ALL = ("--agreement-from", "0", "--certain-from", "0.4")


class Voters:
    """A tiny data set whose fold 0 has two folds inside, with a model of each."""

    def __init__(self, root: Path, patch: str, scenario: str, folds: Sequence[int]) -> None:
        self.tiny = tiny = TinyDataset(root, PATCHES[patch], scenario=scenario)
        (tiny.base / "nnUNetPlans.json").write_text(json.dumps(tiny.plans))
        self.splits = json.loads((tiny.base / "splits_final.json").read_text())
        for part in (tiny.labeled[:2], tiny.labeled[2:]):
            self.splits.append(self.splits[0] | {"train": list(part), "inner_fold_of": 0})
        # Trains on what fold 0 reports on.
        self.splits.append({"train": [*tiny.validation, *tiny.labeled], "val": list(tiny.hidden)})
        (tiny.base / "splits_final.json").write_text(json.dumps(self.splits))
        for fold in folds:
            self.train(fold)

    def train(self, fold: int | str, cls: type = nnUNetTrainerSupervised, **settings: object) -> None:
        self.tiny.trainer(cls, fold, num_epochs=2, **settings).run_training()

    def run(self, *words: str, fold: str = "0") -> int:
        return main(["pseudo-label", "-d", "900", "-c", self.tiny.configuration, "-f", fold, "-device", "cpu", *words])

    def vote(self, *words: str, name: str = "round_1", trainer: str = "nnUNetTrainerSupervised") -> int:
        return self.run("-tr", trainer, "--name", name, *ALL, *words)

    def labels(self, name: str = "round_1") -> PseudoLabels:
        return PseudoLabels.of(str(self.tiny.folder), 0, name)

    def model(self, fold: int) -> TrainedModel:
        results = self.tiny.root / "nnUNet_results" / self.tiny.plans["dataset_name"]
        return TrainedModel(results / f"{MODEL}__{self.tiny.configuration}", [str(fold)], torch.device("cpu"))

    def image(self, case: str) -> torch.Tensor:
        folder = f"{self.tiny.folder}{UNLABELED_SUFFIX}" if case in self.tiny.unlabeled else self.tiny.folder
        return torch.from_numpy(blosc2.open(f"{folder}/{case}.b2nd")[:])


@pytest.fixture
def make_voters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Voters]:
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))

    def make(patch: str = "2d", scenario: str = "labels", folds: Sequence[int] = (1, 2), name: str = "") -> Voters:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(tmp_path / name / variable))
        return Voters(tmp_path / name, patch, scenario, folds)

    return make


def maps(labels: PseudoLabels) -> dict[str, np.ndarray]:
    return {f.stem: labels.load(f.stem)[:] for f in sorted(labels.folder.glob("*.b2nd"))}


# ---- by models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "scenario"), [("2d", "labels"), ("3d", "labels"), ("2d", "regions"), ("2d", "ignore")]
)
def test_labels_are_those_of_the_mean_of_probabilities(make_voters, patch, scenario):
    voters = make_voters(patch, scenario)
    assert voters.vote("--certain-from", "0.55") == 0
    labels, tiny = voters.labels(), voters.tiny
    manifest, models = labels.manifest(), [voters.model(fold) for fold in (1, 2)]
    assert set(maps(labels)) == set(manifest["cases"]) == {*tiny.hidden, *tiny.unlabeled}
    assert set(manifest["learned_from"]) == set(tiny.labeled)
    structures = structures_of(tiny.dataset_json["labels"])
    for case in ("hid_0", "un_3"):
        single = [model.probabilities(voters.image(case)) for model in models]
        mean = (single[0] + single[1]).numpy() / 2
        manager = models[0].labels
        segment = manager.convert_probabilities_to_segmentation
        stored, known = labels.load(case)[:], manifest["cases"][case]
        np.testing.assert_array_equal(likeliest(stored), segment(mean))
        agreed = agreement([np.asarray(segment(p)) for p in single], structures)
        assert known["agreement"] == pytest.approx(
            {name: None if np.isnan(value) else value for name, value in agreed.items()}, abs=1e-5
        )
        surest = np.maximum(mean, 1 - mean).min(0) if tiny.has_regions else mean.max(0)
        clear = np.abs(surest - 0.55) > 1e-4
        np.testing.assert_array_equal((stored < 0)[clear], (surest < 0.55)[clear])
        assert known["uncertain"] == pytest.approx((stored < 0).mean(), abs=1e-5)
        assert (as_learned(stored) == UNCERTAIN).tolist() == (stored < 0).tolist()


def test_what_networks_disagree_on_does_not_count(make_voters):
    voters = make_voters()
    assert voters.run("-tr", "nnUNetTrainerSupervised", "--agreement-from", "0.6", "--certain-from", "0") == 0
    labels, structures = voters.labels(), structures_of(voters.tiny.dataset_json["labels"])
    for case, known in labels.manifest()["cases"].items():
        doubted = [n for n, v in known["agreement"].items() if n != OVERALL and v is not None and v < 0.6]
        segment = voters.model(1).labels.convert_probabilities_to_segmentation
        votes = [np.asarray(segment(voters.model(f).probabilities(voters.image(case)))) for f in (1, 2)]
        mean = likeliest(labels.load(case)[:])
        wanted = np.isin(np.stack([*votes, mean]), [structures[name] for name in doubted]).any(0)
        np.testing.assert_array_equal(labels.load(case)[:] < 0, wanted)
        assert known["kept"] == (known["agreement"][OVERALL] >= 0.6 and len(doubted) < len(structures))


def test_parts_share_the_cases_and_end_alike(make_voters, capsys):
    voters = make_voters()
    assert voters.vote(name="whole") == 0
    whole = voters.labels("whole")
    for part in (2, 0):
        assert voters.vote("--num-parts", "3", "--part-id", str(part), name="parts") == 0
    parts = voters.labels("parts")
    assert "Not all of 11 cases are there yet" in capsys.readouterr().out
    assert len(maps(parts)) == 7
    assert not parts.manifest_file.is_file()
    assert voters.vote("--num-parts", "3", "--part-id", "1", name="parts") == 0
    assert parts.manifest() == whole.manifest() | {"name": "parts"}
    for case, stored in maps(whole).items():
        np.testing.assert_array_equal(maps(parts)[case], stored)
    table = list(csv.DictReader((whole.folder / "cases.csv").open()))
    assert [row["case"] for row in table] == sorted(whole.manifest()["cases"])
    assert all(float(row["agreement all"]) <= 1 for row in table)


def test_finished_cases_are_skipped_and_newer_models_are_not(make_voters, capsys):
    voters = make_voters()
    assert voters.vote() == 0
    labels = voters.labels()
    (labels.folder / "un_1.json").unlink()
    before = {f.name: f.stat().st_mtime_ns for f in labels.folder.glob("*.b2nd")}
    assert voters.vote() == 0
    changed = [f.name for f in labels.folder.glob("*.b2nd") if f.stat().st_mtime_ns != before[f.name]]
    assert changed == ["un_1.b2nd"]
    assert "1 cases labeled by 2 networks, 10 were there already" in capsys.readouterr().out
    later = max(f.stat().st_mtime for f in labels.folder.iterdir()) + 5
    os.utime(voters.model(2).checkpoints[0], (later, later))
    assert voters.vote() == 0
    assert "11 cases labeled by 2 networks" in capsys.readouterr().out


def test_other_settings_are_refused_until_they_may_overwrite(make_voters, capsys):
    voters = make_voters()
    assert voters.vote() == 0
    assert voters.vote("--certain-from", "0.5") == 2
    assert "begun with other settings (different: certain_from)" in capsys.readouterr().err
    assert voters.vote("--certain-from", "0.5", "--overwrite") == 0
    assert voters.labels().manifest()["settings"]["certain_from"] == 0.5


def test_one_network_is_asked_about_mirror_images_and_the_round_before(make_voters):
    voters = make_voters(folds=(1,))
    assert voters.vote(name="first") == 0
    assert voters.vote("--previous", "first", name="second") == 0
    first, second = voters.labels("first").manifest(), voters.labels("second").manifest()
    model, case = voters.model(1), "hid_1"
    views = [p.numpy() for p in model.mirrored_probabilities(voters.image(case))]
    assert len(views) == 3
    flipped = voters.image(case).flip(3)
    model._predictor.use_mirroring = False
    np.testing.assert_allclose(views[2], model.probabilities(flipped).flip(3).numpy())
    segment = model.labels.convert_probabilities_to_segmentation
    agreed = agreement([segment(p) for p in views], structures_of(voters.tiny.dataset_json["labels"]))
    assert first["cases"][case]["agreement"][OVERALL] == pytest.approx(agreed[OVERALL], abs=1e-5)
    assert first["cases"][case]["unchanged"] is None
    # The same network says the same again.
    assert second["cases"][case]["unchanged"][OVERALL] == 1.0


@pytest.mark.parametrize("how", ["by its record", "by the split file"])
def test_models_that_know_validation_cases_are_refused(make_voters, capsys, how):
    voters = make_voters(folds=(3,))
    if how == "by the split file":
        for record in voters.tiny.root.glob("nnUNet_results/*/*/fold_3/nnunet_ssl.json"):
            record.unlink()
    assert voters.vote("--folds", "3") == 2
    said = capsys.readouterr().err
    assert "learned from the labels of 2 validation cases of the fold, e.g. val_0" in said
    assert not voters.labels().folder.exists()
    assert voters.vote("--folds", "3", "--may-know-validation-cases") == 0
    assert set(voters.labels().manifest()["learned_from"]) == {*voters.tiny.validation, *voters.tiny.labeled}


def test_models_that_saw_validation_images_are_refused(make_voters, capsys):
    voters = make_voters(folds=())
    voters.train(0, nnUNetTrainerSemiTCPlus, supervised_fraction=0.5)
    assert voters.vote(trainer="nnUNetTrainerSemiTCPlus") == 2
    assert "learned from the images of 2 validation cases of the fold" in capsys.readouterr().err


def test_knowledge_is_passed_on_from_round_to_round(make_voters, capsys):
    """Who learned from pseudo-labels knows what their makers knew; a split that is changed later is seen, too."""
    voters = make_voters(folds=(1, 2, 3))
    tiny = voters.tiny
    assert voters.vote("--folds", "3", "--may-know-validation-cases", name="leaky") == 0
    voters.train(1, nnUNetTrainerSelfTraining, labels="leaky")
    assert voters.vote("--folds", "1", trainer="nnUNetTrainerSelfTraining") == 2
    assert "labels of 2 validation cases of the fold, e.g. val_0" in capsys.readouterr().err
    assert voters.vote(name="honest") == 0
    voters.splits[0] |= {"train": list(tiny.labeled[1:]), "val": [tiny.labeled[0], *tiny.validation]}
    (tiny.base / "splits_final.json").write_text(json.dumps(voters.splits))
    trainer = tiny.trainer(nnUNetTrainerSelfTraining, 0, num_epochs=1, labels="honest")
    with pytest.raises(UserError, match=r"have learned from 1 validation cases of this fold, e\.g\. lab_0"):
        trainer.run_training()


def test_labels_of_hidden_cases_change_nothing_and_are_not_opened(make_voters):
    """Neither scores nor labels, nor the weights of a training on them; what is reported on has no pseudo-labels."""
    found = []
    for name in ("honest", "scrambled", "deleted"):
        voters = make_voters(name=name)
        tiny = voters.tiny
        if name == "scrambled":
            tiny.scramble_labels((*tiny.hidden, *tiny.validation))
        elif name == "deleted":
            for case in tiny.hidden:
                (tiny.folder / f"{case}_seg.b2nd").unlink()
                (tiny.folder / f"{case}.pkl").unlink()
        with opened_files(nnUNetTrainerSelfTraining) as opened:
            assert voters.vote() == 0
        assert not [o.path for o in opened if o.path.name.endswith(("_seg.b2nd", ".pkl"))]
        labels = voters.labels()
        assert not {*tiny.validation, *tiny.labeled} & set(maps(labels))
        if name == "scrambled":
            # nnU-Net's validation crops by class locations.
            shutil.copytree(found[0][0].base / tiny.folder.name, tiny.folder, dirs_exist_ok=True)
            tiny.scramble_labels(tiny.hidden)
        trainer = tiny.trainer(nnUNetTrainerSelfTraining, 0, num_epochs=1)
        trainer.run_training()
        assert not {*tiny.validation} & {case.identifier for case in trainer.unlabeled_cases}
        found.append((tiny, labels.manifest(), maps(labels), trainer.network.state_dict()))
    for _, manifest, stored, weights in found[1:]:
        assert manifest == found[0][1]
        assert all(np.array_equal(stored[case], found[0][2][case]) for case in stored)
        assert all(torch.equal(weights[key], value) for key, value in found[0][3].items())


@pytest.mark.parametrize(("words", "message"), [
    ((), "Give one of -tr TRAINER, --models DIR"),
    (("-tr", "T", "--from", "."), "Give one of -tr TRAINER, --models DIR"),
    (("-tr", "T", "--num-parts", "2", "--part-id", "2"), "--part-id counts from 0"),
    (("-tr", "T", "--num-parts", "2", "--overwrite"), "--overwrite would remove what other parts have made"),
    (("-tr", "T", "--certain-from", "1.5"), "--certain-from is 1.5; expected a number from 0 to 1"),
    (("-tr", "T"), "has no checkpoint_final.pth; train it first"),
    (("-tr", "T", "--name", "../x"), "expected a name that can be a folder's"),
])  # fmt: skip
def test_wrong_use_is_refused(make_voters, capsys, words, message):
    assert make_voters(folds=()).run(*words) == 2
    assert message in capsys.readouterr().err


def test_a_training_without_pseudo_labels_says_how_to_make_them(make_voters):
    tiny = make_voters(folds=()).tiny
    trainer = tiny.trainer(nnUNetTrainerSelfTraining, 0, labels="other")
    with pytest.raises(UserError, match=r"Run 'nnunet-ssl pseudo-label -d Dataset900_Tiny -c 2d -p nnUNetPlans -f 0 "
                                        r"--name other'"):  # fmt: skip
        trainer.run_training()


@pytest.mark.parametrize(("change", "message"), [
    ("shape", "is missing or does not fit its image of"),
    ("none kept", "none is kept that is unlabeled in this fold"),
    ("plans", "were made for other plans"),
    ("damaged", "lacks one of settings, preprocessing"),
])  # fmt: skip
def test_pseudo_labels_that_do_not_fit_are_refused(make_voters, change, message):
    tiny = make_voters(folds=()).tiny
    trainer = tiny.trainer(nnUNetTrainerSelfTraining, 0)
    labels = PseudoLabels.of(str(tiny.folder), 0, "round_1")
    manifest = labels.manifest()
    if change == "shape":
        labels.write_case("un_0", as_stored(np.ones((1, 5, 5)), np.zeros((1, 5, 5), bool)), {}, tiny.patch)
    elif change == "none kept":
        manifest["cases"] = {case: {"kept": False} for case in manifest["cases"]}
    elif change == "plans":
        manifest["preprocessing"]["spacing"] = [2.0, 2.0]
    else:
        del manifest["preprocessing"]
    labels.manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        trainer.run_training()


def test_cases_that_are_dropped_are_not_learned_from(make_voters):
    tiny = make_voters(folds=()).tiny
    trainer = tiny.trainer(nnUNetTrainerSelfTraining, 0, num_epochs=1)
    trainer.run_training()
    assert {c.identifier for c in trainer.unlabeled_cases} == {*tiny.hidden, *tiny.unlabeled[:-1]}
    assert isinstance(trainer.unlabeled_cases[0], UnlabeledCase)

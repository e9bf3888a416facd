"""Self-training as one command, with nnU-Net's own trainings and tiny networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from in_process import run_in_process
from PIL import Image

from nnunet_ssl.cli import make_parser
from nnunet_ssl.cli.self_train import run
from nnunet_ssl.data.pseudo_labels import PseudoLabels
from nnunet_ssl.data.splits import INNER_FOLD_OF
from nnunet_ssl.demo.synthetic import Sizes, write_dataset
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing.tiny import TinyDataset

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("self-training")]
NAME = "Dataset905_Chest"
SETTINGS = ("num_epochs=1", "num_iterations_per_epoch=2", "num_val_iterations_per_epoch=1", "seed=0", "mirror_axes=[]",
            "picture_every=0")  # fmt: skip
# Two iterations teach little: everything is kept, whatever the networks say.
RULE = ("--agreement-from", "0", "--certain-from", "0.35")


class Site:
    """Folders of nnU-Net with a data set whose fold 5 has 4 labeled, 4 hidden and 2 validation cases; 3 in imagesUn."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        folders = {name: root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for name, folder in folders.items():
            patch.setenv(name, str(folder))
        patch.setenv("nnUNet_extTrainer", str(trainers_folder()))
        patch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.default_num_processes", 1)
        self.raw, self.preprocessed, self.results = (folder / NAME for folder in folders.values())
        self.commands: list[tuple[str, ...]] = []

    def prepare(self) -> None:
        write_dataset(self.raw, Sizes(labeled=10, unlabeled=3, test=1, side=32))
        run_in_process("nnUNetv2_extract_fingerprint", "-d", "905", "-np", "1")
        run_in_process("nnUNetv2_plan_experiment", "-d", "905")
        small = ("-c", "2d", "--batch-size", "4", "--base-features", "4", "--max-features", "8")
        run_in_process("nnunet-ssl", "configure", "-d", "905", "-o", "Tiny", *small, "--set", *SETTINGS)
        run_in_process("nnUNetv2_preprocess", "-d", "905", "-c", "2d", "-plans_name", "Tiny", "-np", "1")
        run_in_process("nnunet-ssl", "preprocess", "-d", "905", "-c", "2d", "-p", "Tiny", "-np", "1")
        run_in_process("nnunet-ssl", "split", "-d", "905", "--labeled", "4", "--folds", "0")

    def self_train(self, *words: str, fold: str = "5", stop_before: int | None = None) -> None:
        """Run the command; as killed before its command of that number."""
        options = ("-d", "905", "-c", "2d", "-p", "Tiny", "-device", "cpu", "-f", fold)
        arguments = make_parser().parse_args(["self-train", *options, *words])

        def run_and_note(*command: str) -> None:
            if len(self.commands) == stop_before:
                raise KeyboardInterrupt
            self.commands.append(command)
            run_in_process(*command)

        run(arguments, run_and_note)

    def labels(self, name: str, fold: str = "5") -> PseudoLabels:
        (folder,) = self.preprocessed.glob(f"pseudo_labels/*/fold_{fold}/{name}")
        return PseudoLabels(folder)

    def weights(self, model: str, fold: int | str = 5) -> dict[str, torch.Tensor]:
        file = self.results / f"{model}__2d" / f"fold_{fold}" / "checkpoint_final.pth"
        return torch.load(file, weights_only=False)["network_weights"]

    def splits(self) -> list[dict]:
        return json.loads((self.preprocessed / "splits_final.json").read_text())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("self_training")


@pytest.fixture
def make_site(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Copies of one prepared data set."""
    if not any(prepared.iterdir()):
        Site(prepared, monkeypatch).prepare()

    def make(name: str) -> Site:
        shutil.copytree(prepared, tmp_path / name)
        return Site(tmp_path / name, monkeypatch)

    return make


def files_of(labels: PseudoLabels) -> dict[str, np.ndarray]:
    return {f.stem: labels.load(f.stem)[:] for f in sorted(labels.folder.glob("*.b2nd"))}


def assert_alike(first: Site, second: Site, names: list[str], models: list[str]) -> None:
    for name in names:
        ours, theirs = first.labels(name), second.labels(name)
        assert ours.manifest() == theirs.manifest()
        for case, stored in files_of(ours).items():
            np.testing.assert_array_equal(stored, theirs.load(case)[:])
    for model in models:
        weights = second.weights(model)
        for key, value in first.weights(model).items():
            assert torch.equal(value, weights[key]), (model, key)


def test_two_rounds_and_a_stop_that_changes_nothing(make_site, capsys):
    site = make_site("whole")
    options = ("--rounds", "2", "--members", "2", *RULE)
    site.self_train(*options)
    splits = site.splits()
    inner = {number: split for number, split in enumerate(splits) if INNER_FOLD_OF in split}
    assert list(inner) == [6, 7]
    trained = [set(split["train"]) for split in inner.values()]
    assert set.union(*trained) == set(splits[5]["train"])
    assert not set.intersection(*trained)
    assert all(s["val"] == splits[5]["val"] and s["unlabeled"] == splits[5]["unlabeled"] for s in inner.values())

    ours, base = "nnUNetTrainerSelfTraining", "nnUNetTrainerSupervised"
    assert trainings_of(site) == [
        ("6", base, "Tiny"), ("7", base, "Tiny"),
        ("6", ours, "Tiny_self_round_2"), ("7", ours, "Tiny_self_round_2"),
        ("5", ours, "Tiny_self"),
    ]  # fmt: skip
    unlabeled = {*splits[5]["unlabeled"], *(p.name[:10] for p in (site.raw / "imagesUn").iterdir())}
    for number in (1, 2):
        labels = site.labels(f"self_round_{number}")
        manifest = labels.manifest()
        assert set(manifest["cases"]) == set(files_of(labels)) == unlabeled
        assert set(manifest["learned_from"]) == set(splits[5]["train"])
        assert all((case["unchanged"] is not None) == (number == 2) for case in manifest["cases"].values())
        assert {"cases.csv", "best.png", "worst.png"} <= {p.name for p in labels.folder.iterdir()}
    model = site.results / f"{ours}__Tiny_self__2d" / "fold_5"
    record = json.loads((model / "nnunet_ssl.json").read_text())
    kept = {c for c, known in site.labels("self_round_2").manifest()["cases"].items() if known["kept"]}
    assert set(record["unlabeled"]) == kept
    assert set(record["pseudo_labels_know"]) == set(splits[5]["train"])
    assert (model / "validation" / "summary.json").is_file()
    table = next(site.results.glob("self_training/*/fold_5/rounds.md")).read_text()
    assert "| self_round_2 |" in table
    said = capsys.readouterr().out
    assert table in said
    assert said.splitlines()[-1] == f"Model: {model}"

    commands = list(site.commands)
    site.self_train(*options)
    assert site.commands == commands, "what is finished is done again"
    assert site.splits() == splits

    stopped = make_site("stopped")
    for number in (1, 2, 4, 6, len(commands) - 1):
        with pytest.raises(KeyboardInterrupt):
            stopped.self_train(*options, stop_before=number)
    stopped.self_train(*options)
    assert stopped.commands == commands
    assert_alike(site, stopped, ["self_round_1", "self_round_2"], [f"{ours}__Tiny_self"])


def trainings_of(site: Site) -> list[tuple[str, ...]]:
    """Fold, trainer and plans of every training."""
    return [(words[3], words[5], words[7]) for words in site.commands if words[0] == "nnUNetv2_train"]


@pytest.mark.parametrize("change", ["scrambled", "deleted"])
def test_hidden_labels_change_nothing(make_site, change):
    """Neither a pseudo-label nor a score nor a weight; wherever they lie."""
    sites, options = [], ("--rounds", "1", "--members", "2", *RULE)
    for name in ("honest", change):
        site = make_site(name)
        folder = next(site.preprocessed.glob("*_2d"))
        for case in site.splits()[5]["unlabeled"]:
            files = [*folder.glob(f"{case}_seg.b2nd"), *folder.glob(f"{case}.pkl"), site.raw / f"labelsTr/{case}.png",
                     site.preprocessed / f"gt_segmentations/{case}.png"]  # fmt: skip
            for file in files if name != "honest" else ():
                assert file.is_file()
                if change == "deleted" and file.parent.name != "labelsTr":
                    file.unlink()
                elif file.suffix == ".png":
                    noise = np.random.default_rng(0).integers(0, 4, (32, 32)).astype(np.uint8)
                    Image.fromarray(noise).save(file)
                elif file.suffix == ".b2nd":
                    noise = np.random.default_rng(1).integers(0, 4, (1, 1, 32, 32)).astype(np.int16)
                    TinyDataset._write_blosc(file, noise)
                else:
                    save_pickle({"class_locations": {1: np.zeros((5, 4), int)}}, str(file))
        site.self_train(*options)
        sites.append(site)
    assert_alike(*sites, ["self_round_1"], ["nnUNetTrainerSelfTraining__Tiny_self"])
    validation = set(sites[0].splits()[5]["val"])
    for model in sites[0].results.glob("nnUNetTrainer*/fold_*"):
        record = json.loads((model / "nnunet_ssl.json").read_text())
        assert not validation & {*record["labeled"], *record["unlabeled"], *record.get("pseudo_labels_know", ())}
        assert set(record["validation"]) == validation


def test_few_labels_make_members_of_seeds_and_the_result_is_tuned(make_site, capsys):
    site = make_site("seeds")
    site.self_train("--rounds", "1", "--members", "3", "--fine-tune", "2", "--name", "few", *RULE)
    base = "nnUNetTrainerSupervised"
    assert trainings_of(site) == [
        *(("5", base, f"Tiny_few_round_1_seed_{seed}") for seed in (1, 2, 3)),
        ("5", "nnUNetTrainerSelfTraining", "Tiny_few"),
        ("5", base, "Tiny_few_tuned"),
    ]
    first, second = (site.weights(f"{base}__Tiny_few_round_1_seed_{seed}") for seed in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(site.splits()) == 6
    plans = json.loads((site.preprocessed / "Tiny_few_tuned.json").read_text())
    assert (plans["ssl"]["num_epochs"], plans["ssl"]["initial_lr"]) == (2, 0.001)
    weights = str(site.results / "nnUNetTrainerSelfTraining__Tiny_few__2d" / "fold_5" / "checkpoint_final.pth")
    assert site.commands[-1][-2:] == ("-pretrained_weights", weights)
    model = site.results / f"{base}__Tiny_few_tuned__2d" / "fold_5"
    assert (model / "validation" / "summary.json").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == f"Model: {model}"


def test_all_labels_are_used_by_default_and_one_member_is_asked_about_mirror_images(make_site):
    site = make_site("all")
    assert make_parser().parse_args(["self-train", "-d", "1", "-c", "2d"]).folds == ["all"]
    site.self_train("--rounds", "1", "--members", "1", *RULE, fold="all")
    assert [fold for fold, *_ in trainings_of(site)] == ["all", "all"]
    assert len(site.labels("self_round_1", "all").manifest()["learned_from"]) == 10
    # The data set allows no mirroring, so nothing is known of the agreement.
    assert all(case["agreement"] is None for case in site.labels("self_round_1", "all").manifest()["cases"].values())


def test_members_of_all_labels_are_folds_too(make_site, capsys):
    site = make_site("all members")
    arguments = ("--rounds", "1", "--members", "3", "--dry-run")
    site.self_train(*arguments, fold="all")
    assert not site.commands
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines if line.startswith("nnUNetv2_train")] == ["6", "7", "8", "all"]
    (label,) = [line.split() for line in lines if line.startswith("nnunet-ssl pseudo-label")]
    parsed = make_parser().parse_args(label[1:])
    assert parsed.models == [f"nnUNetTrainerSupervised__Tiny__2d/fold_{number}" for number in (6, 7, 8)]
    inner = site.splits()[6:]
    assert all(len(split["train"]) + len(split["val"]) == 10 and split["inner_fold_of"] == "all" for split in inner)
    site.self_train(*arguments, fold="all")
    assert len(site.splits()) == 9


@pytest.mark.parametrize(("words", "message"), [
    (("--rounds", "0"), "--rounds must be at least 1, got 0"),
    (("--members", "0"), "--members must be at least 1, got 0"),
    (("--fine-tune", "-1"), "--fine-tune takes a number of epochs"),
    (("--agreement-from", "2"), "--agreement-from is 2.0; expected a number from 0 to 1"),
])  # fmt: skip
def test_wrong_use_is_refused(make_site, words, message):
    site = make_site("wrong")
    with pytest.raises(UserError, match=message):
        site.self_train(*words)
    assert not site.commands


def test_other_thresholds_under_the_same_name_are_not_passed_over(make_site):
    """What is there was made otherwise: the command that makes it says what to do."""
    site = make_site("others")
    site.self_train("--rounds", "1", "--members", "1", *RULE)
    with pytest.raises(AssertionError, match="pseudo-label"):
        site.self_train("--rounds", "1", "--members", "1", "--agreement-from", "0.1")


def test_labels_that_a_cluster_made_in_parts_are_gone_on_with(make_site):
    site = make_site("cluster")
    options = ("--rounds", "1", "--members", "1", *RULE)
    with pytest.raises(KeyboardInterrupt):
        site.self_train(*options, stop_before=1)
    words = ("-d", "905", "-c", "2d", "-p", "Tiny", "-f", "5", "-tr", "nnUNetTrainerSupervised", "-device", "cpu")
    for part in ("1", "0"):
        parts = ("--num-parts", "2", "--part-id", part)
        run_in_process("nnunet-ssl", "pseudo-label", *words, "--name", "self_round_1", *RULE, *parts)
    site.self_train(*options)
    assert [command[0] for command in site.commands] == ["nnUNetv2_train", "nnunet-ssl", "nnUNetv2_train"]
    assert site.commands[1][1] == "configure"


def test_commands_run_where_this_one_does(make_site, monkeypatch):
    """With nnU-Net's folders, and the trainers of this package where nobody has named others."""
    site, seen = make_site("environment"), []

    def note(self, *words: str) -> None:
        seen.append(self.environment)
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_ssl.demo.commands.Commands.run", note)
    parsed = make_parser().parse_args(["self-train", "-d", "905", "-c", "2d", "-p", "Tiny", "-f", "5"])
    for named in (None, "/somewhere/else"):
        monkeypatch.delenv("nnUNet_extTrainer", raising=False)
        if named:
            monkeypatch.setenv("nnUNet_extTrainer", named)
        with pytest.raises(KeyboardInterrupt):
            run(parsed)
        assert seen[-1]["nnUNet_extTrainer"] == (named or str(trainers_folder()))
        assert [seen[-1][v] for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")] == [
            str(folder.parent) for folder in (site.raw, site.preprocessed, site.results)
        ]

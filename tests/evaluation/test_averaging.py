"""Validation cases by the mean of several networks: as nnU-Net's own validation, and scored beside trainings."""

from __future__ import annotations

import csv
import json
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, save_pickle
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from PIL import Image

from nnunet_ssl.cli import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import averaging
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerFDPL, nnUNetTrainerSemiTCPlus, nnUNetTrainerSupervised
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

# Images are cropped, and resampled from these shapes.
CROPPED = {"2d": (1, 40, 38), "3d": (20, 18, 22)}
WHOLE = {"2d": (1, 45, 44), "3d": (24, 20, 26)}


class Files(TinyDataset):
    """With the original images' geometry and true label maps of the validation cases."""

    def __init__(self, root: Path, kind: str) -> None:
        super().__init__(root, PATCHES[kind])
        self.dataset_json["file_ending"] = ".png" if kind == "2d" else ".nii.gz"
        (self.base / "dataset.json").write_text(json.dumps(self.dataset_json))
        (self.base / "gt_segmentations").mkdir()
        geometry = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": np.eye(3).ravel().tolist()}
        for case in self.validation:
            file = str(self.folder / f"{case}.pkl")
            cropped = {
                "spacing": [1.0, 1.0, 1.0],
                "shape_before_cropping": WHOLE[kind],
                "shape_after_cropping_and_before_resampling": CROPPED[kind],
                "bbox_used_for_cropping": [[w - c, w] for w, c in zip(WHOLE[kind], CROPPED[kind])],
                "sitk_stuff": geometry,
            }
            save_pickle(load_pickle(file) | cropped, file)
            labels = np.random.default_rng(1).integers(0, self.num_labels, WHOLE[kind]).astype(np.uint8)
            self.write(self.base / "gt_segmentations" / f"{case}{self.dataset_json['file_ending']}", labels)

    @staticmethod
    def write(file: Path, labels: np.ndarray) -> None:
        if file.suffix == ".png":
            Image.fromarray(labels[0]).save(file)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(labels), str(file))

    def trained(self, cls: type, plans: str = "nnUNetPlans", **ssl: Any) -> Path:
        """The model folder of a training that has also validated."""
        self.plans["plans_name"] = plans
        trainer = self.trainer(cls, num_epochs=1, **ssl)
        trainer.run_training()
        trainer.perform_actual_validation()
        return Path(trainer.output_folder_base)

    def maps(self, folder: Path) -> dict[str, np.ndarray]:
        ending = self.dataset_json["file_ending"]
        files = {file.name.removesuffix(ending): file for file in folder.glob(f"*{ending}")}
        if ending == ".png":
            return {case: np.array(Image.open(file)) for case, file in files.items()}
        return {case: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for case, file in files.items()}


@pytest.fixture(autouse=True)
def _threads_instead_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's validation writes and scores its files in processes that take longer to start than all the rest."""
    threads = SimpleNamespace(get_context=lambda kind: SimpleNamespace(Pool=ThreadPool))
    for module in ("training.nnUNetTrainer.nnUNetTrainer", "evaluation.evaluate_predictions"):
        monkeypatch.setattr(f"nnunetv2.{module}.multiprocessing", threads)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    return Files(tmp_path, "2d")


def validate(files: Files, output: Path, *words: str) -> int:
    base = ("validate", "-d", "900", "-c", files.configuration, "-f", "0", "-device", "cpu", "-o", str(output))
    return main([*base, *words])


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert sorted(first) == sorted(second) == ["val_0", "val_1"]
    for case in first:
        assert np.array_equal(first[case], second[case]), case


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_one_network_gives_what_nnunets_validation_wrote(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    files = Files(tmp_path, kind)
    model = files.trained(nnUNetTrainerSupervised)
    assert validate(files, tmp_path / "out", "-tr", "nnUNetTrainerSupervised") == 0
    made = files.maps(tmp_path / "out")
    assert_same(made, files.maps(model / "fold_0" / "validation"))
    assert all(len(np.unique(labels)) > 1 for labels in made.values())


def logits_of(model: Path, folds: tuple[int, ...], files: Files, case: str) -> tuple[torch.Tensor, nnUNetPredictor]:
    import blosc2

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
    image = torch.from_numpy(blosc2.open(str(files.folder / f"{case}.b2nd"))[:])
    return predictor.predict_logits_from_preprocessed_data(image), predictor


@pytest.mark.parametrize("cls", [nnUNetTrainerFDPL, nnUNetTrainerDualNet])
def test_both_networks_give_what_stock_nnunet_makes_of_their_exports(files, tmp_path, cls):
    """Of two that are alike, nnU-Net averages folds of one folder; of others, what it does with folds is done here."""
    model = files.trained(cls)
    assert validate(files, tmp_path / "out", "-tr", cls.__name__, "--networks", "both") == 0
    words = ["export", "-d", "900", "-c", "2d", "-tr", cls.__name__, "--network", "both"]
    assert main(words) == 0
    exported = {
        name: model.with_name(model.name.replace("__nnUNetPlans", f"{name}__nnUNetPlans"))
        for name in ("Both", "Partner")
    }
    (tmp_path / "stock").mkdir()
    for case in files.validation:
        if exported["Both"].exists():
            mean, predictor = logits_of(exported["Both"], (0, 1), files, case)
        else:
            first, predictor = logits_of(model, (0,), files, case)
            mean = (first + logits_of(exported["Partner"], (0,), files, case)[0]) / 2
        export_prediction_from_logits(
            mean, load_pickle(str(files.folder / f"{case}.pkl")), predictor.configuration_manager,
            predictor.plans_manager, predictor.dataset_json, str(tmp_path / "stock" / case),
        )  # fmt: skip
    made = files.maps(tmp_path / "out")
    assert_same(made, files.maps(tmp_path / "stock"))
    alone = files.maps(model / "fold_0" / "validation")
    assert any((made[case] != alone[case]).any() for case in made)


def test_two_trainings_are_averaged_and_compared_in_one_table(files, tmp_path, capsys):
    for seed in (1, 2):
        files.trained(nnUNetTrainerSupervised, f"Seed{seed}", seed=seed)
    files.trained(nnUNetTrainerFDPL, "Seed1")
    out = tmp_path / "out"
    assert validate(files, out, "-tr", "nnUNetTrainerSupervised", "-p", "Seed1", "Seed2") == 0
    told = capsys.readouterr().out
    assert "compare -d Dataset900_Tiny -c 2d -f 0 -tr nnUNetTrainerSupervised -p Seed1 --predictions mean=" in told
    compare = ["compare", "-d", "900", "-c", "2d", "-f", "0", "-np", "1", "-o", str(tmp_path / "comparison")]
    both = ["-tr", "nnUNetTrainerSupervised", "nnUNetTrainerFDPL", "-p", "Seed1", "--predictions"]
    assert main([*compare, *both, f"two seeds={out}"]) == 0
    rows = list(csv.DictReader((tmp_path / "comparison" / "comparison.csv").open()))
    shown = {(row["trainer"], row["case"], row["fold"], row["checkpoint"]) for row in rows}
    names = ("nnUNetTrainerSupervised", "nnUNetTrainerFDPL", "two seeds")
    assert shown == {(name, case, "0", "final") for name in names for case in files.validation}
    content = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert content["trainers"]["two seeds"]["settings"]["mean of"] == (
        "nnUNetTrainerSupervised__Seed1__2d, network; nnUNetTrainerSupervised__Seed2__2d, network"
    )

    def refused(*words: str) -> str:
        assert main([*compare, *words]) == 2
        return capsys.readouterr().err

    assert "has this name already" in refused(*both, f"nnUNetTrainerFDPL={out}")
    assert "expected NAME=FOLDER" in refused(*both, f"{out}")
    assert "needs no training; leave -d" in refused(*both, f"a={out}", "--labels", str(out))
    record = json.loads((out / "nnunet_ssl_validation.json").read_text())
    (out / "nnunet_ssl_validation.json").write_text(json.dumps({**record, "folds": {"val_0": "0", "val_1": "1"}}))
    assert "val_1 was predicted by networks of fold 1, but of fold 0" in refused(*both, f"a={out}")
    (out / "val_0.png").unlink()
    assert "lacks 1 cases beside nnUNetTrainerSupervised: val_0" in refused(*both, f"a={out}")


def test_hidden_labels_do_not_enter(files, tmp_path):
    """No label of a validation case is opened: their files may be gone, and what is known from them may be wrong."""
    files.trained(nnUNetTrainerFDPL)
    words = ("-tr", "nnUNetTrainerFDPL", "--networks", "both")
    assert validate(files, tmp_path / "before", *words) == 0
    for case in files.validation:
        (files.folder / f"{case}_seg.b2nd").unlink()
        (files.base / "gt_segmentations" / f"{case}.png").unlink()
        file = str(files.folder / f"{case}.pkl")
        save_pickle(load_pickle(file) | {"class_locations": {1: np.zeros((5, 4), int)}}, file)
    assert validate(files, tmp_path / "after", *words) == 0
    assert_same(files.maps(tmp_path / "after"), files.maps(tmp_path / "before"))


def test_images_that_a_network_learned_from_are_told(files, tmp_path, capsys):
    files.trained(nnUNetTrainerSemiTCPlus)
    files.trained(nnUNetTrainerSupervised)
    assert validate(files, tmp_path / "out", "-tr", "nnUNetTrainerSupervised", "nnUNetTrainerSemiTCPlus") == 0
    words = ["-d", "900", "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerSupervised", "-o", str(tmp_path / "comparison")]
    assert main(["compare", *words, "-np", "1", "--predictions", f"mean={tmp_path}/out"]) == 0
    assert "mean learned from the images, not the labels, of 2 of the 2 reported cases" in capsys.readouterr().out


def test_what_cannot_be_averaged_is_refused(files, tmp_path, capsys):
    model = files.trained(nnUNetTrainerSupervised)

    def refused(*words: str) -> str:
        assert validate(files, tmp_path / "out", *words) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    supervised = ("-tr", "nnUNetTrainerSupervised")
    assert "holds one network only" in refused(*supervised, "--networks", "both")
    assert "trained models: nnUNetTrainerSupervised__nnUNetPlans__2d" in refused("-tr", "nnUNetTrainerFDPL")
    assert "has no fold 3" in refused(*supervised, "-f", "3")
    assert "no held-out cases" in refused(*supervised, "-f", "all")
    assert "has no checkpoint_best_of_all.pth" in refused(*supervised, "-chk", "checkpoint_best_of_all.pth")
    assert "val_0 is held out in folds 0 and 0" in refused(*supervised, "-f", "0", "0")
    other = model.with_name("nnUNetTrainerSupervised__Other__2d")
    shutil.copytree(model, other)
    plans = json.loads((other / "plans.json").read_text())
    plans["configurations"]["2d"]["data_identifier"] = "Other_2d"
    (other / "plans.json").write_text(json.dumps(plans))
    assert "Other_2d" in refused(*supervised, "-p", "nnUNetPlans", "Other")
    splits = json.loads((files.base / "splits_final.json").read_text())
    splits[0]["train"].append("hid_0")
    (files.base / "splits_final.json").write_text(json.dumps(splits))
    assert "labeled cases at training lacks 1 cases" in refused(*supervised)


def test_the_second_stage_of_a_cascade_sees_the_first_ones_labels_as_in_nnunets_validation(tmp_path):
    import blosc2
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    second = tmp_path / "Trainer__Plans__3d_cascade_fullres"
    stage = tmp_path / "Trainer__Plans__3d_lowres" / "predicted_next_stage" / "3d_cascade_fullres"
    stage.mkdir(parents=True)
    image = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 4, (3, 4, 5)).astype(np.uint8)
    blosc2.asarray(image, urlpath=str(tmp_path / "case.b2nd"), mode="w")
    predictor = SimpleNamespace(
        configuration_manager=SimpleNamespace(previous_stage_name="3d_lowres"),
        label_manager=SimpleNamespace(foreground_labels=[1, 2, 3]),
    )
    network = averaging._Network(second, "network", predictor)
    with pytest.raises(UserError, match=r"has no segmentation of case\. Validate the folds of 3d_lowres"):
        averaging._input(network, tmp_path, "case")
    blosc2.asarray(labels, urlpath=str(stage / "case.b2nd"), mode="w")
    expected = np.vstack([image, convert_labelmap_to_one_hot(labels, [1, 2, 3], output_dtype=image.dtype)])
    assert np.array_equal(averaging._input(network, tmp_path, "case").numpy(), expected)

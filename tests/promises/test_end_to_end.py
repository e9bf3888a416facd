"""The user's day with nnU-Net's own commands, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from day import QUICK, Day
from PIL import Image

from nnunet_ssl.demo.synthetic import LABELS, Sizes, draw_case, write_dataset
from nnunet_ssl.methods import TRAINERS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
# One process has the data set and what was trained on it.
one_day = pytest.mark.xdist_group("day")


@pytest.fixture(scope="module")
def day_2d(tmp_path_factory: pytest.TempPathFactory, executables: Path) -> Day:
    """2D data, planned and preprocessed, with a split that hides labels and a trained SemiTC."""
    day = Day(tmp_path_factory.mktemp("day2d"), 901, "Dataset901_Chest", executables)
    write_dataset(day.raw, Sizes(labeled=10, unlabeled=3, test=2, side=32))
    day.run("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "2d", "-np", "1", "-npfp", "1")
    options = [w for setting in QUICK for w in ("--set", setting)]
    small = ("-c", "2d", "--batch-size", "4", "--base-features", "4", "--max-features", "8")
    day.run("nnunet-ssl", "configure", "-d", "901", "-o", "Quick", *small, *options)
    day.run("nnunet-ssl", "preprocess", "-d", "901", "-c", "2d", "-p", "Quick", "-np", "1", "--test-images")
    table = day.run("nnunet-ssl", "split", "-d", "901", "--labeled", "2", "4", "--folds", "0")
    assert table.splitlines()[1].split() == ["5", "0", "2", "6", "2"]
    day.run_alone("nnUNetv2_train", "901", "2d", "5", "-p", "Quick", "-tr", "nnUNetTrainerSemiTC", "-device", "cpu")
    return day


def model(day: Day, trainer: str, fold: int = 5) -> Path:
    return day.results / f"{trainer}__Quick__2d" / f"fold_{fold}"


@one_day
def test_training_leaves_what_nnunet_users_expect(day_2d):
    folder = model(day_2d, "nnUNetTrainerSemiTC")
    present = {p.name for p in folder.iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "validation", "debug.json"} <= present
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    plans = json.loads((folder.parent / "plans.json").read_text())
    assert plans["ssl"]["num_epochs"] == 2
    log = next(folder.glob("training_log*")).read_text()
    assert "9 unlabeled cases (6 hidden label, 3 imagesUn)" in log


@one_day
@pytest.mark.parametrize("trainer", [name for name in (t.__name__ for t in TRAINERS) if name != "nnUNetTrainerSemiTC"])
def test_the_other_trainers_and_pretrained_weights(day_2d, trainer):
    weights = str(model(day_2d, "nnUNetTrainerSemiTC") / "checkpoint_final.pth")
    train = ("nnUNetv2_train", "901", "2d", "5", "-p", "Quick", "-tr", trainer, "-device", "cpu")
    if trainer == "nnUNetTrainerSelfTraining":
        words = ("-d", "901", "-c", "2d", "-p", "Quick", "-f", "5", "-tr", "nnUNetTrainerSemiTC", "-device", "cpu")
        said = day_2d.run("nnunet-ssl", "pseudo-label", *words, "--agreement-from", "0", "--certain-from", "0")
        assert "9 cases labeled by 1 networks" in said
    day_2d.run(*train, "-pretrained_weights", weights)
    assert (model(day_2d, trainer) / "checkpoint_final.pth").is_file()
    if trainer == "nnUNetTrainerSemiTCPlus":
        log = next(model(day_2d, trainer).glob("training_log*")).read_text()
        assert "13 unlabeled cases (6 hidden label, 2 imagesTs, 3 imagesUn, 2 validation image)" in log


@one_day
def test_compare_agrees_with_nnunets_evaluation_and_knows_the_checkpoint(day_2d):
    train = ("nnUNetv2_train", "901", "2d", "5", "-p", "Quick", "-device", "cpu", "-tr")
    if not (model(day_2d, "nnUNetTrainerSupervised") / "validation" / "summary.json").is_file():
        day_2d.run(*train, "nnUNetTrainerSupervised")
    trainers = ("nnUNetTrainerSupervised", "nnUNetTrainerSemiTC")
    words = ("nnunet-ssl", "compare", "-d", "901", "-c", "2d", "-f", "5", "-p", "Quick", "-np", "1", "-tr", *trainers)
    output = day_2d.run(*words, "-o", "compared")
    assert "nnUNetTrainerSemiTC, mean of structures Dice (%)" in output
    results = json.loads((day_2d.root / "compared" / "comparison.json").read_text())["results"]
    for trainer in trainers:
        summary = json.loads((model(day_2d, trainer) / "validation" / "summary.json").read_text())
        for metric in ("Dice", "IoU"):
            mean = next(r for r in results if (r["metric"], r["structure"]) == (metric, "mean of structures"))
            assert mean["trainers"][trainer]["mean"] == pytest.approx(summary["foreground_mean"][metric])
    page = (day_2d.root / "compared" / "report.html").read_text()
    assert all(text in page for text in ("stability", "weight_consistency", "supervised_fraction", "nnunetv2"))

    day_2d.run(*train, "nnUNetTrainerSemiTC", "--val", "--val_best")
    refused = day_2d.run(*words, "-o", "best", status=2)
    assert "nnUNetTrainerSemiTC, fold 5 was validated with checkpoint_best.pth" in refused
    assert not (day_2d.root / "best").exists()
    day_2d.run(*train, "nnUNetTrainerSemiTC", "--val")
    day_2d.run(*words, "-o", "again")
    assert (day_2d.root / "again" / "comparison.csv").read_text() == (
        day_2d.root / "compared" / "comparison.csv"
    ).read_text()


@one_day
def test_continue_and_validate_again(day_2d):
    folder = model(day_2d, "nnUNetTrainerSemiTC")
    train = ("nnUNetv2_train", "901", "2d", "5", "-p", "Quick", "-tr", "nnUNetTrainerSemiTC", "-device", "cpu")
    before = (folder / "validation" / "summary.json").read_text()
    (folder / "validation" / "summary.json").unlink()
    day_2d.run(*train, "--val")
    assert json.loads((folder / "validation" / "summary.json").read_text())["mean"] == json.loads(before)["mean"]
    # A finished training continues with nothing to do.
    output = day_2d.run(*train, "--c")
    assert "Epoch 0" not in output
    assert "Training done." in output


def predict(day: Day, output: str, run: Callable[..., str], **environment: str) -> dict[str, np.ndarray]:
    words = ("-i", str(day.raw / "imagesTs"), "-o", str(day.root / output), "-d", day.number, "-c", "2d", "-f", "5")
    device = ("-p", "Quick", "-tr", "nnUNetTrainerSemiTC", "-device", "cpu", "-npp", "1", "-nps", "1")
    run("nnUNetv2_predict", *words, *device, **environment)
    return {p.name: np.asarray(Image.open(p)) for p in (day.root / output).glob("*.png")}


@one_day
def test_stock_nnunet_predicts_without_this_package(day_2d):
    with_package = predict(day_2d, "with", day_2d.run)
    blocked = day_2d.without_this_package()
    check = [sys.executable, "-c", "import nnunet_ssl"]
    failing = subprocess.run(
        check, env={**day_2d.environment, **blocked}, cwd=day_2d.root, capture_output=True, check=False
    )
    assert failing.returncode != 0, "the package is not hidden, so the test shows nothing"
    without = predict(day_2d, "without", day_2d.run_alone, **blocked)
    assert len(with_package) == 2
    for name, labels in with_package.items():
        np.testing.assert_array_equal(labels, without[name])


@one_day
def test_errors_reach_the_user_of_nnunets_command(day_2d):
    # Fold 1 has no hidden labels, and without imagesUn there is nothing to learn from.
    folder = day_2d.preprocessed / "nnUNetPlans_2d_unlabeled"
    folder.rename(folder.with_name("away"))
    (day_2d.raw / "imagesUn").rename(day_2d.raw / "imagesAway")
    try:
        train = ("nnUNetv2_train", "901", "2d", "1", "-p", "Quick", "-tr", "nnUNetTrainerSemiTC", "-device", "cpu")
        output = day_2d.run(*train, status=1)
    finally:
        folder.with_name("away").rename(folder)
        (day_2d.raw / "imagesAway").rename(day_2d.raw / "imagesUn")
    assert "There are three ways to add some" in output
    assert not list(model(day_2d, "nnUNetTrainerSemiTC", 1).glob("*.pth"))


def test_3d_fullres(tmp_path, executables):
    day = Day(tmp_path, 902, "Dataset902_Stack", executables)
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (day.raw / part).mkdir(parents=True)
    for i in range(8):
        slices = [draw_case(rng, 32) for _ in range(24)]
        image, labels = (np.stack([s[k] for s in slices]) for k in range(2))
        part = "Tr" if i < 6 else "Un"
        sitk.WriteImage(sitk.GetImageFromArray(image), str(day.raw / f"images{part}" / f"c{i}_0000.nii.gz"))
        if part == "Tr":
            sitk.WriteImage(sitk.GetImageFromArray(labels), str(day.raw / "labelsTr" / f"c{i}.nii.gz"))
    dataset_json = {"channel_names": {"0": "x"}, "labels": LABELS, "numTraining": 6, "file_ending": ".nii.gz"}
    (day.raw / "dataset.json").write_text(json.dumps(dataset_json))
    day.run("nnUNetv2_plan_and_preprocess", "-d", "902", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    small = ("-c", "3d_fullres", "--patch-size", "16", "32", "32", "--base-features", "4", "--max-features", "8")
    options = [w for setting in QUICK for w in ("--set", setting)]
    day.run("nnunet-ssl", "configure", "-d", "902", "-o", "Quick", *small, "--batch-size", "2", *options)
    day.run("nnunet-ssl", "preprocess", "-d", "902", "-c", "3d_fullres", "-p", "Quick", "-np", "1")
    options = ("-p", "Quick", "-tr", "nnUNetTrainerSemiTC", "-device", "cpu")
    day.run("nnUNetv2_train", "902", "3d_fullres", "0", *options)
    results = day.results / "nnUNetTrainerSemiTC__Quick__3d_fullres" / "fold_0"
    assert (results / "validation" / "summary.json").is_file()
    words = ("-i", str(day.raw / "imagesUn"), "-o", str(tmp_path / "out"), "-d", "902", "-c", "3d_fullres", "-f", "0")
    day.run_alone("nnUNetv2_predict", *words, *options, "-npp", "0", "-nps", "0", **day.without_this_package())
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_a_wheel_carries_the_trainers_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "from nnunet_ssl.cli import main; import sys; sys.exit(main(['env']))"
    environment = {**os.environ, "PYTHONPATH": str(site), "nnUNet_extTrainer": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert result.stdout.strip() == f"export nnUNet_extTrainer={site / 'nnunet_ssl' / 'trainers'}"
    find = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "import pickle; cls = find('nnUNetTrainerSemiTC'); assert pickle.loads(pickle.dumps(cls)) is cls\n"
        "import nnunet_ssl; print(nnunet_ssl.__file__)"
    )
    environment["nnUNet_extTrainer"] = str(site / "nnunet_ssl" / "trainers")
    result = subprocess.run([sys.executable, "-c", find], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout.splitlines()[-1]

"""The scripts of the accuracy tables, from raw data to tables and report pages, on data made here."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnunet_ssl.demo.synthetic import draw_case

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LABELS = {"background": 0, "right lung": 1, "left lung": 2, "heart": 3}
NUM_CASES = 10


def write_dataset(folder: Path, dims: int) -> None:
    """A raw data set of synthetic chests, in 2D or as stacks of slices, and two test cases."""
    ending = ".png" if dims == 2 else ".nii.gz"
    for part in ("imagesTr", "labelsTr", "imagesTest", "labelsTest"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(NUM_CASES + 2):
        part, case = ("Tr", f"case{i}") if i < NUM_CASES else ("Test", f"test{i}")
        image, label = draw_case(rng, 256 if dims == 2 else 64)
        label = np.where(label > 3, 0, label)
        if dims == 3:
            image = np.stack([image] * 16) + rng.normal(0, 5, (16, *image.shape))
            label = np.stack([label] * 16)
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(pixels), str(folder / f"images{part}" / f"{case}_0000{ending}"))
        labels = sitk.GetImageFromArray(label.astype(np.uint8))
        sitk.WriteImage(labels, str(folder / f"labels{part}" / f"{case}{ending}"))
    content = {"channel_names": {"0": "x-ray"}, "labels": LABELS, "numTraining": NUM_CASES, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(content))


def start(python: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script; its commands are those beside the interpreter."""
    environment = os.environ | {"nnUNet_n_proc_DA": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(python), str(SCRIPTS / script), *words], env=environment, capture_output=True, text=True, timeout=600
    )


def run(python: Path, script: str, *words: str) -> str:
    done = start(python, script, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check_teachers(python: Path, out: Path) -> None:
    """Who could teach DualNet's network: each row counts voxels, and a network teaches itself nothing."""
    (model,) = out.rglob("nnUNetTrainerDualNet__*__3d_fullres")
    (supervised,) = out.rglob("nnUNetTrainerSupervised__*__3d_fullres")
    (fold,) = [folder.name.removeprefix("fold_") for folder in model.glob("fold_*")]
    (preprocessed,) = (out / "nnUNet_preprocessed").iterdir()
    target = ("--preprocessed", str(preprocessed), "--model", str(model), "--fold", fold, "--cases", "1")
    others = ("--others", f"other={supervised}", "--patches", "1", "--out", str(out / "teachers.csv"))
    printed = run(python, "accuracy/teachers.py", *target, *others)
    teachers = [line.split(" | ")[0] for line in printed.splitlines() if " | all | any | " in line]
    assert teachers == ["weak view", "partner", "other", "whole image"]
    assert len((out / "teachers.csv").read_text().splitlines()) == 1 + 4 * (1 + 3 * len(LABELS))


@pytest.mark.slow
@pytest.mark.parametrize(("script", "dims", "rows"), [
    ("accuracy/jsrt.py", 2, ["Supervised", "SemiTC"]),
    ("accuracy/left_atrium.py", 3, ["Supervised", "DualNet", "FDPL"]),
])  # fmt: skip
def test_smoke(tmp_path, executables, script, dims, rows):
    python = executables / "python"
    data = tmp_path / "Dataset951_Chests"
    write_dataset(data, dims)
    for other in ("imagesUn", "imagesTs"):
        # Others' images in the raw data set play no part.
        (data / other).mkdir()
        (data / other / f"other_0000{'.png' if dims == 2 else '.nii.gz'}").write_text("no image")
    test = ("--test-images", str(data / "imagesTest"), "--test-labels", str(data / "labelsTest")) if dims == 2 else ()
    words = ("--data", str(data), "--out", str(tmp_path / "out"), "--scale", "smoke", "--devices", "cpu", "cpu", *test)
    printed = run(python, script, *words)
    for metric in ("IoU in percent", "Dice in percent", "HD95 in " + ("px" if dims == 2 else "mm")):
        (table,) = re.findall(rf"validation cases, {metric}\n\n((?:\|.*\n)+)", printed)
        assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == rows
        assert all(name in table.splitlines()[0] for name in list(LABELS)[1:])
    if test:
        assert "2 labeled, test cases, Dice in percent" in printed
    (written,) = (tmp_path / "out" / "reports").rglob("tables.md")
    told = written.read_text() + (tmp_path / "out" / "reports" / "summary.md").read_text()
    assert printed.endswith(told)
    (records,) = json.loads((tmp_path / "out" / "reports" / "summary.json").read_text()).values()
    assert [record["row"] for record in records] == 3 * rows
    assert all(record["minutes"] > 0 and record["memory_mib"] > 50 for record in records)
    assert len((tmp_path / "out" / "reports" / "summary.csv").read_text().splitlines()) == 1 + len(records)
    reports = list((tmp_path / "out" / "reports").rglob("report.html"))
    assert len(reports) == (2 if test else 1)

    # The mean over cases that nnU-Net itself has written.
    (summary,) = (tmp_path / "out").rglob("nnUNetTrainerSupervised__*/fold_*/validation/summary.json")
    means = json.loads(summary.read_text())["mean"]
    expected = 100 * np.mean([means[str(v)]["Dice"] for name, v in LABELS.items() if v])
    (row,) = re.findall(r"validation cases, Dice in percent\n(?:.*\n){3}\| Supervised \| ([\d.]+)", printed)
    assert float(row) == pytest.approx(expected, abs=0.051)

    if dims == 3:
        check_teachers(python, tmp_path / "out")
    trained = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("checkpoint_final.pth")}
    assert len(trained) == len(rows)
    for log in (tmp_path / "out").rglob("training_log*.txt"):
        assert "skipped" not in log.read_text()
    unfinished = list((tmp_path / "out" / "test_predictions").glob("*/fold_*"))[:1]
    for folder in unfinished:
        # As a prediction leaves it that was killed before its last case.
        folder.rename(f"{folder}.part")
        next(Path(f"{folder}.part").glob("*.png")).unlink()
    again = run(python, script, *words)
    assert "nnUNetv2_train" not in again
    assert again.count("$ nnUNetv2_predict") == len(unfinished) == bool(test)
    assert again.endswith(told)
    assert again[again.index("\n2 labeled, validation") :].count("|") > 20
    assert trained == {p: p.stat().st_mtime_ns for p in trained}
    for other, message in (
        (("--set", "learned_dice=0"), "learned_dice 0.5 and not 0"),
        (("--base-features", "8"), "8"),
    ):
        refused = start(python, script, *words, *other)
        assert refused.returncode == 1
        assert "use another --out" in refused.stderr
        assert message in refused.stderr


def test_options_that_do_not_fit_are_refused(tmp_path, executables):
    data = tmp_path / "Dataset951_Chests"
    write_dataset(data, 2)
    for words, message in (
        (("--folds", "0", "1"), "--draws 1"),
        (("--test-images", "x"), "go together"),
        (("--labeled", "2", "all", "--rows", "SemiTC", "FDPL"), "all leaves nothing without a label for SemiTC, FDPL"),
    ):
        out = ("--data", str(data), "--out", str(tmp_path / "out"), "--scale", "smoke")
        done = start(executables / "python", "accuracy/jsrt.py", *out, *words)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "accuracy"))
    return importlib.import_module("runs")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "accuracy"))
    return importlib.import_module("tables")


def test_splits_come_draw_by_draw_and_count_once_where_every_case_keeps_its_label(accuracy):
    asked = argparse.Namespace(arguments=argparse.Namespace(folds=[0, 1, 0, 2], draws=[0, 0, 1, 0]))
    names = ["fold 0", "fold 1", "fold 2", "fold 0, draw 1"]
    assert [s.name for s in accuracy.Experiment.splits(asked, "5")] == names
    assert [s.name for s in accuracy.Experiment.splits(asked, "all")] == names[:3]


@pytest.mark.parametrize(("trainer", "saw", "sees", "message"), [
    ("SemiTCPlus", False, True, "without test images"), ("SemiTCPlus", True, False, "with test images"),
    ("SemiTCPlus", True, True, None), ("SemiTCPlus", False, False, None), ("SemiTC", False, True, None),
])  # fmt: skip
def test_transductive_trainings_belong_to_their_test_images(accuracy, tmp_path, trainer, saw, sees, message):
    training = accuracy.Training(accuracy.Variant(trainer, trainer), "Plans", 0)
    model = tmp_path / "model"
    (model / "fold_0").mkdir(parents=True)
    used = training.variant.trainer_class.Parameters().as_dict()
    unlabeled = {"case": "hidden label"} | ({"other": "imagesTs"} if saw else {})
    (model / "fold_0" / "nnunet_ssl.json").write_text(json.dumps({"hyperparameters": used, "unlabeled": unlabeled}))
    for folder in (model / "plans.json", tmp_path / "Plans.json"):
        folder.write_text("{}")
    arguments = argparse.Namespace(test_images=tmp_path if sees else None)
    asked = argparse.Namespace(preprocessed=tmp_path, arguments=arguments, model=lambda training: model)
    if message is None:
        accuracy.Experiment._refuse_other_settings(asked, training)
    else:
        with pytest.raises(SystemExit, match=f"was trained {message}; use another --out"):
            accuracy.Experiment._refuse_other_settings(asked, training)


def made_up(folder, tables):
    rows = [("A", 0, "x", 0.5, 2.0), ("A", 0, "x", 0.7, ""), ("A", 0, "y", 0.9, 4.0), ("A", 0, "y", 0.7, 6.0)]
    rows += [("A", 1, "x", 0.4, 2.0), ("A", 1, "y", 0.6, 3.0), ("B", 0, "x", 1.0, 1.0), ("B", 0, "y", 0.5, 1.0)]
    rows += [("B", 1, "x", 0.6, 1.0), ("B", 1, "y", 0.5, 5.0)]
    lines = ["trainer,fold,structure,Dice,IoU,HD95_mm", *(f"{t},{f},{s},{d},{d},{h}" for t, f, s, d, h in rows)]
    (folder / "comparison.csv").write_text("\n".join(lines))
    values = {}
    tables.collect(folder / "comparison.csv", ["first", "second"], ["0", "1"], values)
    return values


def test_tables_are_means_and_say_what_has_no_distance(tables, tmp_path):
    text = tables.tables("title", made_up(tmp_path, tables), ["fold 0", "fold 1"])
    # (70 + 50) / 2; folds of (60 + 80) / 2 and (40 + 60) / 2, structures of (60 + 40) / 2 and (80 + 60) / 2.
    assert "title, Dice in percent\n" in text
    assert "| first | 60.0 ± 14.1 | 70.0 | 50.0 | 50.0 | 70.0 |\n" in text
    # (75 - 70 + 55 - 50) / 2, and (1 - 3.5 + 3 - 2.5) / 2.
    assert text.count("Beside first: second +5.0 (+5.0, +5.0)\n") == 2
    assert "| first | 3.0 ± 0.7 | 3.5 | 2.5 | 2.0 | 4.0 |\n| second | 2.0 ± 1.4 | 1.0 | 3.0 | 1.0 | 3.0 |\n" in text
    assert "Beside first: second -1.0 (-2.5, +0.5)\n" in text
    assert text.endswith("\nLeft out, because a structure is missing there: first 1 structures of cases\n")
    assert text.count("Left out") == 1


def test_no_mean_praises_a_structure_that_was_never_found(tables):
    found, missed = np.array([[10.0, 40.0], [0, 0]]), np.array([[10.0, np.nan], [0, 1]])
    values = {"HD95 in mm": {"": [np.array(["a", "b"])], "first": [missed], "second": [found]}}
    text = tables.tables("title", values, ["fold 0"])
    assert "| first | nan | nan | 10.0 | nan |\n| second | 25.0 | 25.0 | 10.0 | 40.0 |\n" in text
    assert "second +nan (+nan)" in text


@pytest.mark.parametrize(("labeled", "rows"), [
    ("5", ["Supervised", "SupTC", "SemiTC", "SemiTCPlus", "DualNet", "FDPL", "FDPL-cutmix"]),
    ("all", ["Supervised", "SupTC", "SemiTCPlus"]),
])  # fmt: skip
def test_rows_that_have_something_to_learn(accuracy, labeled, rows):
    known = importlib.import_module("left_atrium").ROWS
    asked = ["Supervised", "SupTC", "SemiTC", "SemiTCPlus", "DualNet", "FDPL", "FDPL-cutmix"]
    assert [row for row in asked if known[row].has_something_to_learn(labeled)] == rows


def test_the_overview_has_a_column_per_comparison(tables, tmp_path):
    values = made_up(tmp_path, tables)
    fewer = {metric: {row: of for row, of in by_row.items() if row != "second"} for metric, by_row in values.items()}
    text = tables.overview("test cases", {"5 labeled": values, "all labeled": fewer})
    assert "\nTest cases, Dice in percent\n\n| | 5 labeled | all labeled |\n|---|---|---|\n" in text
    assert "\n| first | 60.0 ± 14.1 | 60.0 ± 14.1 |\n| second | 65.0 ± 14.1 (+5.0) |  |\n" in text
    assert "\n| second | 2.0 ± 1.4 (-1.0) |  |\n" in text


def test_the_summary_pairs_splits_and_measures_the_gap_to_all_labels(tables, tmp_path):
    values = made_up(tmp_path, tables)
    dice = {metric: by_row for metric, by_row in values.items() if metric.startswith("Dice")}
    (metric,) = dice
    costs = {row: [tables.Costs(60.0, 100.0), tables.Costs(120.0, np.nan)] for row in ("first", "second")}
    # Splits: 70 and 50 beside 75 and 55; all labels reach 80 and 65 there.
    first, second = tables.summary(dice, {metric: np.array([80.0, 65.0])}, costs)
    assert second["gain"] == pytest.approx(5.0)
    assert second["standard_error"] == pytest.approx(0.0)
    assert second["closed_gap"] == pytest.approx(5.0 / 12.5)
    assert second["minutes"] == 1.5
    assert first["gain"] == first["closed_gap"] == 0.0
    text = tables.summary_table("5 labeled", [first, second])
    assert (
        "| first | 60.0 ± 14.1 | +0.0 ± 0.0 | 0% | 2 |  |\n| second | 65.0 ± 14.1 | +5.0 ± 0.0 | 40% | 2 |  |\n" in text
    )
    # Distances fall where a row gains.
    distance = {metric: by_row for metric, by_row in values.items() if metric.startswith("HD95")}
    (metric,) = distance
    _, second = tables.summary(distance, {metric: np.array([1.5, 0.5])}, costs)
    gains = np.array([1.0 - 3.5, 3.0 - 2.5])
    assert second["closed_gap"] == pytest.approx(gains.mean() / (1.0 - 3.0))
    assert second["standard_error"] == pytest.approx(gains.std(ddof=1) / 2**0.5)
    assert tables.summary(distance, {}, costs)[1]["closed_gap"] != 0

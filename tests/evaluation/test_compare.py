"""The compare verb on small made-up results: values, refusals, files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from made_up_results import Results, compare, log_text
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from nnunet_ssl.cli import main
from nnunet_ssl.evaluation.comparison import MEAN
from nnunet_ssl.training.run_record import RECORD_FILE


def test_values_are_those_of_the_shifts(results: Results, capsys: pytest.CaptureFixture[str]):
    assert compare(results) == 0
    rows = list(csv.DictReader((results.root / "out" / "comparison.csv").open()))
    assert len(rows) == 6 * 2 * 2
    for row in rows:
        shift = Results.shifts[row["trainer"]]
        if row["structure"] == "square":
            # A square of side 8 shifted by s: 8 (8 - s) voxels in common of 64.
            assert float(row["Dice"]) == pytest.approx((8 - shift) / 8)
            assert float(row["HD95_px"]) == shift
        assert row["fold"] == ("0" if row["case"] in "abc" else "1")
        assert row["checkpoint"] == ("final (not recorded)" if row["trainer"] == "nnUNetTrainer" else "final")
    content = json.loads((results.root / "out" / "comparison.json").read_text())
    found = {(r["metric"], r["structure"]): r for r in content["results"]}
    square = found["Dice", "square"]
    assert square["trainers"]["nnUNetTrainer"]["mean"] == pytest.approx(7 / 8)
    difference = square["differences"]["nnUNetTrainerSemiTC"]
    assert difference["mean"] == pytest.approx(-1 / 8)
    assert (difference["wins"], difference["losses"]) == (0, 6)
    assert found["HD95", "square"]["differences"]["nnUNetTrainerSemiTC"]["losses"] == 6
    mean = np.mean([found["Dice", s]["trainers"]["nnUNetTrainer"]["mean"] for s in ("disk", "square")])
    assert found["Dice", MEAN]["trainers"]["nnUNetTrainer"]["mean"] == pytest.approx(mean)
    printed = capsys.readouterr().out
    assert "87.5 ± 0.0" in printed
    assert "report.html" in printed


def test_an_empty_prediction_is_missing_for_distances_and_counted(results: Results):
    file = results.folder("nnUNetTrainerSemiTC", 0) / "validation" / "a.png"
    labels = np.array(Image.open(file))
    results.save(file, np.where(labels == 2, 0, labels))
    assert compare(results) == 0
    content = json.loads((results.root / "out" / "comparison.json").read_text())
    found = {(r["metric"], r["structure"]): r for r in content["results"]}
    distance, dice = found["HD95", "square"], found["Dice", "square"]
    assert distance["trainers"]["nnUNetTrainerSemiTC"] == {"mean": 2, "sd": 0, "median": 2, "missing": 1}
    assert distance["differences"]["nnUNetTrainerSemiTC"]["missing"] == 1
    assert dice["trainers"]["nnUNetTrainerSemiTC"]["missing"] == 0
    assert dice["trainers"]["nnUNetTrainerSemiTC"]["mean"] == pytest.approx(5 / 6 * 0.75)
    # The mean over structures pairs only what both have: the disk alone in case a.
    mean = found["HD95", MEAN]["differences"]["nnUNetTrainerSemiTC"]
    assert mean["missing"] == 0
    assert found["HD95", MEAN]["trainers"]["nnUNetTrainerSemiTC"]["missing"] == 1
    worst = content["trainers"]["nnUNetTrainerSemiTC"]["worst_cases"]
    assert worst[0][0] == "a"


def refused(results: Results, capsys: pytest.CaptureFixture[str], *words: str, **keywords) -> str:
    assert compare(results, *words, **keywords) == 2
    assert not (results.root / "out").exists()
    return capsys.readouterr().err


def test_different_cases_are_refused_and_named(results, capsys):
    (results.folder("nnUNetTrainer", 1) / "validation" / "e.png").unlink()
    assert "nnUNetTrainer, fold 1 lacks 1 cases beside fold 1 of splits_final.json: e" in refused(results, capsys)


def test_other_labeled_cases_are_refused_and_named(results, capsys):
    file = results.folder("nnUNetTrainerSemiTC", 0) / RECORD_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "labeled": ["t0", "t9"]}))
    assert "labeled cases at training lacks 1 cases" in refused(results, capsys)


def test_pseudo_labels_that_know_reported_labels_are_refused(results, capsys):
    file = results.folder("nnUNetTrainerSemiTC", 1) / "nnunet_ssl.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"pseudo_labels_know": ["t0", "a"]}))
    assert compare(results) == 0
    file.write_text(json.dumps(record | {"pseudo_labels_know": ["t0", "a", "d"]}))
    assert compare(results) == 2
    assert "that knew the labels of 1 reported cases, e.g. d: scores on them mean nothing" in capsys.readouterr().err


def test_another_number_of_labels_in_nnunets_log_is_refused(results, capsys):
    folder = results.folder("nnUNetTrainer", 0)
    # An older training, and a later validation alone, say nothing of the last training.
    (folder / "training_log_2025_10_1_1.txt").write_text(log_text(64))
    (folder / "training_log_2026_11_1_1.txt").write_text(log_text(64).replace("Epoch", ""))
    assert compare(results) == 0
    shutil.rmtree(results.root / "out")
    (folder / "training_log_2026_10_1_1.txt").write_text(log_text(64))
    assert "was trained on 64 and validated on 3 cases; splits_final.json now has 2 and 3" in refused(results, capsys)


def test_best_checkpoints_must_be_asked_for_and_are_marked(results, capsys):
    for fold in range(2):
        file = results.folder("nnUNetTrainerSemiTC", fold) / RECORD_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), "validated_with": "checkpoint_best.pth"}))
    assert "was validated with checkpoint_best.pth, expected checkpoint_final.pth" in refused(results, capsys)
    assert compare(results, "--best") == 0
    assert "chosen on these cases" in capsys.readouterr().out
    assert "these values are too good" in (results.root / "out" / "report.html").read_text()
    assert ",best," in (results.root / "out" / "comparison.csv").read_text()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "checkpoint_final.pth").unlink(), "only finished trainings are compared"),
        (lambda f: (f / "validation" / "summary.json").unlink(), "has no finished validation"),
        (lambda f: shutil.rmtree(f.parent), "trained models: nnUNetTrainer__nnUNetPlans__2d"),
        (lambda f: (f / "validation" / "a.png").write_bytes(b"no image"), "cannot be read as a label map"),
        (lambda f: Results.save(f / "validation" / "a.png", np.zeros((3, 3))), "has shape"),
    ],
)
def test_what_is_missing_or_broken_is_named(results, capsys, break_it, message):
    break_it(results.folder("nnUNetTrainerSemiTC", 0))
    assert message in refused(results, capsys)


def test_a_training_that_was_begun_again_is_refused(results, capsys):
    file = results.folder("nnUNetTrainerSemiTC", 0) / RECORD_FILE
    record = json.loads(file.read_text())
    del record["validated_with"]
    file.write_text(json.dumps(record))
    assert "has not been validated since its last training began" in refused(results, capsys)


def test_a_broken_image_costs_its_picture_alone(results, capsys):
    for case in "abcdef":
        (results.raw / "imagesTr" / f"{case}_0000.png").write_bytes(b"no image")
    assert compare(results) == 0
    assert "No picture of" in capsys.readouterr().out
    assert "<img" not in (results.root / "out" / "report.html").read_text()
    shutil.rmtree(results.raw / "imagesTr")
    assert compare(results) == 0


def test_a_structure_that_a_trainer_never_finds_leaves_no_mean_distance(results):
    for fold in range(2):
        for file in (results.folder("nnUNetTrainerSemiTC", fold) / "validation").glob("*.png"):
            labels = np.array(Image.open(file))
            results.save(file, np.where(labels == 2, 0, labels))
    assert compare(results) == 0
    content = json.loads((results.root / "out" / "comparison.json").read_text())
    mean = next(r for r in content["results"] if (r["metric"], r["structure"]) == ("HD95", MEAN))
    assert mean["trainers"]["nnUNetTrainerSemiTC"]["mean"] is None
    assert mean["trainers"]["nnUNetTrainerSemiTC"]["missing"] == 6


def test_folds_that_ran_differently_are_shown_so(results):
    file = results.folder("nnUNetTrainerSemiTC", 1) / RECORD_FILE
    record = json.loads(file.read_text())
    record["hyperparameters"]["num_epochs"] = 7
    file.write_text(json.dumps(record))
    assert compare(results) == 0
    content = json.loads((results.root / "out" / "comparison.json").read_text())
    assert content["trainers"]["nnUNetTrainerSemiTC"]["settings"]["num_epochs"] == "2 / 7"


def test_other_bad_requests(results, capsys):
    assert "no fold 7" in refused(results, capsys, "-f", "7")
    assert "no held-out cases" in refused(results, capsys, "-f", "all")
    assert "given twice" in refused(results, capsys, trainers=("nnUNetTrainer", "nnUNetTrainer"))
    assert "-p has 3 names for 2 trainers" in refused(results, capsys, "-p", "a", "b", "c")
    assert "no fold ²" in refused(results, capsys, "-f", "²")
    assert "--labels goes with --predictions" in refused(results, capsys, "--labels", "x")
    (results.root / "file").touch()
    assert compare(results, "-o", str(results.root / "file")) == 2
    assert "is a file" in capsys.readouterr().err
    (results.folder("nnUNetTrainer", 0) / "checkpoint_final.pth").write_bytes(b"broken")
    assert "cannot be read as nnU-Net's checkpoint" in refused(results, capsys)
    (results.folder("nnUNetTrainer", 0).parent / "dataset.json").write_text("{}")
    assert "lacks 'labels'; expected labels by name" in refused(results, capsys)
    assert main(["compare", "-d", "902"]) == 2
    assert "-c and -f and -tr is missing" in capsys.readouterr().err


def test_folders_of_a_test_set(tmp_path: Path, capsys):
    """3D, anisotropic: distances in mm, pictures in three planes."""
    labels, generator = np.zeros((10, 24, 20), np.uint8), np.random.default_rng(0)
    labels[3:7, 6:14, 5:12] = 1
    shifted = np.roll(labels, 1, axis=0)
    for folder, values in (("labelsTs", labels), ("good", labels), ("bad", shifted)):
        (tmp_path / folder).mkdir()
        write_volume(tmp_path / folder / "case.nii.gz", values)
    (tmp_path / "imagesTs").mkdir()
    write_volume(tmp_path / "imagesTs" / "case_0000.nii.gz", labels + generator.normal(size=labels.shape))
    dataset_json = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "box": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_json))
    words = ["--predictions", f"A={tmp_path}/good", f"B={tmp_path}/bad", "--labels", f"{tmp_path}/labelsTs"]
    assert main(["compare", *words, "-o", str(tmp_path / "out"), "-np", "1"]) == 0
    row = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))[1]
    assert float(row["HD95_mm"]) == 3.0
    assert row["checkpoint"] == "given"
    assert (tmp_path / "out" / "report.html").read_text().count("<img ") == 3
    (tmp_path / "bad" / "case.nii.gz").unlink()
    assert main(["compare", *words, "-o", str(tmp_path / "out2")]) == 2
    assert "lacks 1 cases" in capsys.readouterr().err
    assert main(["compare", "--predictions", "A", "--labels", "x"]) == 2
    assert "expected NAME=FOLDER" in capsys.readouterr().err


def test_tiff_predictions_lend_their_spacing_to_labels_without_one(tmp_path: Path):
    """nnU-Net copies label maps without the file beside them that holds the spacing."""
    labels = np.zeros((8, 12, 10), np.uint8)
    labels[2:5, 3:8, 3:8] = 1
    content = {"channel_names": {"0": "x"}, "labels": {"background": 0, "box": 1}, "file_ending": ".tif"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for folder, values in (("labels", labels), ("moved", np.roll(labels, 1, axis=0))):
        (tmp_path / folder).mkdir()
        Tiff3DIO().write_seg(values, str(tmp_path / folder / "case.tif"), {"spacing": [4.0, 1.0, 1.0]})
    (tmp_path / "labels" / "case.json").unlink()
    words = ["compare", "--predictions", f"A={tmp_path}/moved", "--labels", f"{tmp_path}/labels"]
    assert main([*words, "-o", str(tmp_path / "out"), "-np", "1"]) == 0
    (row,) = csv.DictReader((tmp_path / "out" / "comparison.csv").open())
    assert float(row["HD95_mm"]) == 4.0
    (tmp_path / "moved" / "case.json").unlink()
    assert main([*words, "-o", str(tmp_path / "out"), "-np", "1"]) == 0
    (row,) = csv.DictReader((tmp_path / "out" / "comparison.csv").open())
    assert float(row["HD95_px"]) == 1.0


def write_volume(file: Path, values: np.ndarray) -> None:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.0, 1.0, 3.0))
    sitk.WriteImage(image, str(file))


def test_post_processing_is_scored_and_said(results: Results, capsys: pytest.CaptureFixture[str]):
    file = results.folder("nnUNetTrainer", 0) / "validation" / "a.png"
    labels = np.array(Image.open(file))
    labels[0, 0] = 2
    results.save(file, labels)
    compare(results)
    plain = json.loads((results.root / "out" / "comparison.json").read_text())
    assert compare(results, "--remove-below", "square=2") == 0
    cleaned = json.loads((results.root / "out" / "comparison.json").read_text())
    values = [
        next(r for r in content["results"] if (r["metric"], r["structure"]) == ("ASD", "square"))
        for content in (plain, cleaned)
    ]
    means = [value["trainers"]["nnUNetTrainer"]["mean"] for value in values]
    assert means[0] > means[1] + 0.05
    assert "objects removed below square 2" in (results.root / "out" / "report.html").read_text()
    assert cleaned["post_processing"] == "objects removed below square 2"
    assert plain["post_processing"] is None
    assert compare(results, "--keep-largest", "square") == 0
    largest = json.loads((results.root / "out" / "comparison.json").read_text())
    assert largest["post_processing"] == "the largest object kept of square"
    assert largest["results"] == cleaned["results"]


def test_several_processes_give_the_same(results: Results):
    assert compare(results) == 0
    alone = (results.root / "out" / "comparison.csv").read_bytes()
    assert compare(results, "-np", "2") == 0
    assert (results.root / "out" / "comparison.csv").read_bytes() == alone


LEARNED = r"nnUNetTrainerSemiTC learned from the images, not the labels, of"


@pytest.mark.parametrize(("sources", "remark"), [
    ({"t9": "imagesUn"}, ""),
    ({"a": "validation image", "b": "validation image"}, f"^{LEARNED} 2 of the 6 reported cases, on purpose"),
    ({"t9": "imagesUn", "a": "imagesUn"}, f"^WARNING: {LEARNED} 1 of the 6 reported cases"),
])  # fmt: skip
def test_images_that_were_learned_from_are_told(results, capsys, sources, remark):
    file = results.folder("nnUNetTrainerSemiTC", 0) / RECORD_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "unlabeled": sources}))
    assert compare(results) == 0
    out = capsys.readouterr().out
    assert re.search(remark, out, re.MULTILINE)
    assert ("learned from" in out) == bool(remark)


@pytest.mark.parametrize(("name", "first"), [("a", "a"), ("a" * 60, "disk")])
def test_the_terminal_table_lies_where_it_is_narrower(results, capsys, name, first):
    folders = [results.folder(trainer, 0) / "validation" for trainer in Results.shifts]
    labels = results.root / "labels"
    labels.mkdir()
    for case in "abc":
        shutil.copy(results.raw / "labelsTr" / f"{case}.png", labels)
    given = [f"{n}={folder}" for n, folder in zip((name, f"{name}b"), folders)]
    words = (
        "--labels",
        str(labels),
        "--dataset-json",
        str(results.raw / "dataset.json"),
        "-o",
        str(results.root / "o"),
    )
    assert main(["compare", "--predictions", *given, *words, "-np", "1"]) == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Dice"))
    assert header.split()[2] == first

"""Preprocessing of unlabeled images: equal to nnU-Net's, resumable, robust against broken cases."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from raw_dataset import RawDataset

from nnunet_ssl.cli import main
from nnunet_ssl.data.preprocessing import SETTINGS_FILE


@pytest.fixture
def raw(tmp_path: Path) -> RawDataset:
    return RawDataset(tmp_path)


def test_voxels_equal_nnunets_own_preprocessing(raw):
    file = raw.write("imagesUn/a_0000.png")
    assert raw.run() == 0
    plans = PlansManager(raw.plans)
    configuration = plans.get_configuration("2d")
    data, _, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(file)], None, plans, configuration, raw.dataset_json
    )
    np.testing.assert_array_equal(raw.load("a"), data)
    assert sorted(p.name for p in raw.output.iterdir()) == ["a.b2nd", SETTINGS_FILE]


def test_parallel_processes_and_a_progress_bar(raw, capfd):
    for i in range(3):
        raw.write(f"imagesUn/c{i}_0000.png")
    assert raw.run(processes=2) == 0
    out, err = capfd.readouterr()
    assert "3 preprocessed, 0 were there already, 0 failed" in out
    assert "3/3" in err


def test_finished_cases_are_skipped_and_half_written_ones_redone(raw, capsys):
    raw.write("imagesUn/a_0000.png")
    raw.write("imagesUn/b_0000.png")
    assert raw.run() == 0
    stamp = (raw.output / "a.b2nd").stat().st_mtime_ns
    (raw.output / "b.b2nd").rename(raw.output / "b.b2nd.part")
    assert raw.run() == 0
    assert "1 preprocessed, 1 were there already" in capsys.readouterr().out
    assert (raw.output / "a.b2nd").stat().st_mtime_ns == stamp
    assert (raw.output / "b.b2nd").exists()
    assert not (raw.output / "b.b2nd.part").exists()
    assert raw.run("--overwrite") == 0
    assert (raw.output / "a.b2nd").stat().st_mtime_ns != stamp


def test_parts_share_the_cases(raw, capsys):
    for i in range(5):
        raw.write(f"imagesUn/c{i}_0000.png")
    made = []
    for part in range(2):
        assert raw.run("--num-parts", "2", "--part-id", str(part)) == 0
        made.append({p.name for p in raw.output.glob("*.b2nd")} - set().union(*made))
    assert [len(names) for names in made] == [3, 2]
    assert raw.run() == 0
    assert "0 preprocessed, 5 were there already" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--part-id", "1"), ("--num-parts", "0"), ("--num-parts", "2", "--part-id", "-1"),
                                   ("--num-parts", "2", "--overwrite")])  # fmt: skip
def test_parts_that_do_not_exist_are_refused(raw, capsys, words):
    raw.write("imagesUn/a_0000.png")
    assert raw.run(*words) == 2
    assert "--" in capsys.readouterr().err
    assert not raw.output.exists()


BAD = {
    "rgb_0000.png": (lambda raw: raw.rng.integers(0, 255, (9, 9, 3)).astype(np.uint8), r"has 3 channels, .* names 1"),
    "flat_0000.png": (lambda raw: np.full((9, 9), 7, np.uint8), r"channel 0 is constant \(all voxels are 7"),
    "ending.png": (lambda raw: raw.rng.integers(0, 255, (9, 9)).astype(np.uint8), r"expected CASE_0000.png"),
    "second_0001.png": (lambda raw: raw.rng.integers(0, 255, (9, 9)).astype(np.uint8), r"asks for 1 from 0000 on"),
    "labeled_0000.png": (lambda raw: raw.rng.integers(0, 255, (9, 9)).astype(np.uint8), r"labeled case has the same"),
}


def test_broken_cases_do_not_stop_the_others(raw, capsys):
    raw.write("imagesUn/good_0000.png")
    for name, (make, _) in BAD.items():
        raw.write(f"imagesUn/{name}", array=make(raw))
    (raw.images / "broken_0000.png").write_bytes(b"not a picture")
    (raw.images / "other_0000.nii.gz").write_bytes(b"")
    assert raw.run() == 1
    out = capsys.readouterr().out
    assert f"{len(BAD) + 2} failed:" in out
    lines = {line.split(":")[0].strip(): line for line in out.split("failed:")[1].splitlines() if ":" in line}
    for name, (_, message) in BAD.items():
        case = name if name == "ending.png" else name.split("_")[0]
        assert re.search(message, lines[case]), lines[case]
    assert "broken" in lines
    assert "expected CASE_0000.png" in lines["other_0000.nii.gz"]
    assert [p.name for p in raw.output.glob("*.b2nd*")] == ["good.b2nd"]


def test_non_finite_voxels_are_refused(tmp_path, capsys):
    raw = RawDataset(tmp_path)
    for name, content in (("plans", "nnUNetPlans.json"), ("dataset_json", "dataset.json")):
        value = getattr(raw, name) | ({"image_reader_writer": "SimpleITKIO"} if name == "plans" else {})
        value |= {"file_ending": ".nrrd"} if name == "dataset_json" else {}
        (raw.preprocessed / content).write_text(json.dumps(value))
    image = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
    image[0, 3, 3] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(image), str(raw.images / "nan_0000.nrrd"))
    assert raw.run() == 1
    assert "NaN or infinite" in capsys.readouterr().out


def test_images_smaller_than_the_patch_are_named(raw, capsys):
    raw.write("imagesUn/small_0000.png", size=(20, 24))
    assert raw.run() == 0
    assert "small: smaller than the patch ([20, 24] < [32, 32] voxels): padded" in capsys.readouterr().out


def test_other_plans_need_overwrite(raw, capsys):
    raw.write("imagesUn/a_0000.png")
    assert raw.run() == 0
    raw.plans["configurations"]["2d"]["spacing"] = [2.0, 2.0]
    (raw.preprocessed / "nnUNetPlans.json").write_text(json.dumps(raw.plans))
    assert raw.run() == 2
    assert "different: spacing" in capsys.readouterr().err
    assert raw.run("--overwrite") == 0
    assert raw.load("a").shape == (1, 1, 20, 18)


def test_a_dying_worker_is_reported():
    from nnunet_ssl.data.preprocessing import _in_processes
    from nnunet_ssl.data.raw_images import RawCase

    reports = list(_in_processes(_die, [RawCase("a", ()), RawCase("b", ())], (os.getpid(),), 2))
    assert {r.identifier for r in reports} == {"a", "b"}
    assert all("a worker process died" in r.error for r in reports)


def _die(case, parent):
    assert os.getpid() != parent
    os._exit(1)


def test_a_replaced_image_is_redone(raw):
    file = raw.write("imagesUn/a_0000.png")
    assert raw.run() == 0
    before = raw.load("a")
    raw.write("imagesUn/a_0000.png")
    later = (raw.output / "a.b2nd").stat().st_mtime + 10
    os.utime(file, (later, later))
    assert raw.run() == 0
    assert not np.array_equal(raw.load("a"), before)


def test_test_images_alone(raw):
    raw.images.rename(raw.raw / "imagesTs")
    raw.write("imagesTs/t_0000.png")
    assert raw.run("--test-images") == 0
    assert (raw.preprocessed / "nnUNetPlans_2d_test_images" / "t.b2nd").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw, patch: patch.delenv("nnUNet_raw"), "nnUNet_raw is not set"),
        (lambda raw, patch: (raw.preprocessed / "nnUNetPlans.json").unlink(), "Run nnUNetv2_plan_and_preprocess first"),
        (lambda raw, patch: (raw.preprocessed / "dataset.json").write_text("{"), "is not valid JSON"),
        (lambda raw, patch: raw.images.rmdir(), "imagesUn is missing"),
    ],
)
def test_errors_before_anything_is_written(raw, monkeypatch, capsys, change, message):
    change(raw, monkeypatch)
    assert raw.run() == 2
    assert message in capsys.readouterr().err
    assert not raw.output.exists()


def test_unknown_configuration(raw, capsys):
    assert main(["preprocess", "-d", "900", "-c", "3d_fullres"]) == 2
    assert "nnUNetPlans.json has no configuration 3d_fullres; it has 2d." in capsys.readouterr().err


def test_unknown_dataset(raw, capsys):
    assert main(["preprocess", "-d", "123", "-c", "2d"]) == 2
    assert "Could not find a dataset with the ID 123" in capsys.readouterr().err

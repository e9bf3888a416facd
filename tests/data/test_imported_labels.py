"""Label files that somebody else has made, as pseudo-labels."""

from __future__ import annotations

import json
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnunet_ssl.cli import main
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.data.pseudo_labels import PseudoLabels, likeliest
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

SHAPE = (14, 22, 18)
SPACING, ORIGIN = (1.0, 1.0, 1.0), (5.0, -3.0, 2.0)


class Imports:
    """A tiny 3D data set with images in imagesUn, whose axes the plans swap, and a folder of label files."""

    def __init__(self, root: Path, scenario: str = "labels", spacing: tuple[float, ...] = SPACING) -> None:
        self.tiny = tiny = TinyDataset(root, PATCHES["3d"], scenario=scenario)
        tiny.plans |= {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
        tiny.dataset_json["file_ending"] = ".nii.gz"
        (tiny.base / "nnUNetPlans.json").write_text(json.dumps(tiny.plans))
        self.raw = root / "nnUNet_raw" / "Dataset900_Tiny"
        for file in (tiny.base / "dataset.json", self.raw / "dataset.json"):
            file.write_text(json.dumps(tiny.dataset_json))
        self.unlabeled = Path(f"{tiny.folder}{UNLABELED_SUFFIX}")
        for file in self.unlabeled.iterdir():
            file.unlink()
        self.files = root / "files"
        for folder in (self.raw / "imagesTr", self.raw / "imagesUn", self.files):
            folder.mkdir()
        self.spacing, rng = spacing, np.random.default_rng(0)
        self.labels: dict[str, np.ndarray] = {}
        split = json.loads((tiny.base / "splits_final.json").read_text())
        (tiny.base / "splits_final.json").write_text(json.dumps([split[0] | {"unlabeled": []}]))
        for case in ("new_0", "new_1"):
            image = np.zeros(SHAPE, np.float32)
            image[2:12, 3:, :16] = rng.uniform(1, 2, (10, 19, 16))
            self.labels[case] = np.zeros(SHAPE, np.uint8)
            self.labels[case][4:9, 6:15, 4:12] = 1
            self.labels[case][6:9, 9:15, 4:8] = 2
            image[self.labels[case] > 0] += 10
            self.write(self.raw / "imagesUn" / f"{case}_0000.nii.gz", image)
            self.write(self.files / f"{case}.nii.gz", self.labels[case])
        assert main(["preprocess", "-d", "900", "-c", "3d_fullres", "-np", "1"]) == 0

    def write(self, file: Path, array: np.ndarray, **geometry: tuple[float, ...]) -> None:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(geometry.get("spacing", self.spacing))
        image.SetOrigin(geometry.get("origin", ORIGIN))
        image.SetDirection(geometry.get("direction", image.GetDirection()))
        sitk.WriteImage(image, str(file))

    def run(self, *words: str) -> int:
        options = ("-d", "900", "-c", "3d_fullres", "-f", "0", "--from", str(self.files))
        return main(["pseudo-label", *options, *words])

    @property
    def made(self) -> PseudoLabels:
        return PseudoLabels.of(str(self.tiny.folder), 0, "round_1")


@pytest.fixture
def make_imports(tmp_path):
    return lambda *arguments, **keywords: Imports(tmp_path, *arguments, **keywords)


@pytest.fixture
def imports(make_imports) -> Imports:
    return make_imports()


def cropped(labels: np.ndarray) -> np.ndarray:
    """As the plans swap axes, and as the image's zeros are cut off."""
    return labels[2:12, 3:, :16].transpose(1, 0, 2)


def test_labels_lie_where_the_preprocessed_image_shows_them(imports):
    assert imports.run() == 0
    for case, labels in imports.labels.items():
        stored = imports.made.load(case)[:]
        np.testing.assert_array_equal(stored, cropped(labels))
        image = blosc2.open(str(imports.unlabeled / f"{case}.b2nd"))[0]
        assert image[stored > 0].min() > image[stored == 0].max()
    manifest = imports.made.manifest()
    assert manifest["learned_from"] == []
    assert all(case["kept"] and case["agreement"] is None for case in manifest["cases"].values())


def test_labels_are_resampled_with_the_image(make_imports):
    imports = make_imports(spacing=(1.0, 2.0, 1.5))
    assert imports.run() == 0
    image = blosc2.open(str(imports.unlabeled / "new_0.b2nd"))[0]
    stored = imports.made.load("new_0")[:]
    assert stored.shape == image.shape == (38, 15, 16)
    assert set(np.unique(stored)) == {0, 1, 2}
    seen = image > (image.max() + image.min()) / 2
    assert 2 * (seen & (stored > 0)).sum() / (seen.sum() + (stored > 0).sum()) > 0.9


@pytest.mark.parametrize(("scenario", "value", "words"), [
    ("labels", 9, ("--uncertain-value", "9")),
    ("ignore", 3, ()),
    ("regions", 9, ("--uncertain-value", "9")),
    ("regions and ignore", 3, ()),
])  # fmt: skip
def test_uncertain_voxels_of_a_file_do_not_count(make_imports, scenario, value, words):
    imports = make_imports(scenario)
    labels = imports.labels["new_0"].copy()
    labels[5:7, 7:11, :10] = value
    imports.write(imports.files / "new_0.nii.gz", labels)
    assert imports.run(*words) == 0
    stored = imports.made.load("new_0")[:]
    np.testing.assert_array_equal(stored < 0, cropped(labels) == value)
    np.testing.assert_array_equal(likeliest(stored), np.where(cropped(labels) == value, 0, cropped(labels)))


TURNED = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("geometry", "message"), [
    ({"spacing": (1.0, 1.0, 1.1)}, "has spacing [1.1, 1.0, 1.0]; its image has [1.0, 1.0, 1.0]"),
    ({"origin": (5.0, -3.0, 3.0)}, "has origin [5.0, -3.0, 3.0]; its image has [5.0, -3.0, 2.0]"),
    ({"direction": TURNED}, "has direction [0.0, 1.0,"),
])  # fmt: skip
def test_another_geometry_is_refused_and_the_others_are_taken(imports, capsys, geometry, message):
    imports.write(imports.files / "new_1.nii.gz", imports.labels["new_1"], **geometry)
    assert imports.run() == 1
    said = capsys.readouterr().out
    assert message in said
    assert "Resample it to the image's grid" in said
    assert not imports.made.manifest_file.exists()
    imports.write(imports.files / "new_1.nii.gz", imports.labels["new_1"])
    assert imports.run() == 0
    assert imports.made.manifest()["cases"]["new_1"]["kept"]


@pytest.mark.parametrize(("array", "message"), [
    (np.ones((14, 22, 17), np.uint8), "has shape [14, 22, 17]; its image has [14, 22, 18]"),
    (np.full(SHAPE, 7, np.uint8), "has voxels of label 7; dataset.json lists 0, 1, 2"),
])  # fmt: skip
def test_another_shape_and_unknown_labels_are_refused(imports, capsys, array, message):
    imports.write(imports.files / "new_0.nii.gz", array)
    assert imports.run() == 1
    assert message in capsys.readouterr().out


def test_a_file_that_is_no_image_is_refused(imports, capsys):
    (imports.files / "new_0.nii.gz").write_text("nothing")
    assert imports.run() == 1
    assert "new_0.nii.gz or its image cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(("case", "kind"), [
    ("lab_0", "a labeled"), ("val_1", "a validation"), ("elsewhere", "no unlabeled")
])  # fmt: skip
def test_files_of_other_cases_are_refused_before_anything_is_written(imports, capsys, case, kind):
    imports.write(imports.files / f"{case}.nii.gz", imports.labels["new_0"])
    assert imports.run() == 2
    assert f"{case} is {kind} case of this fold" in capsys.readouterr().err
    assert not imports.made.folder.exists()


def test_cases_without_a_file_or_a_structure_are_dropped(imports):
    (imports.files / "new_0.nii.gz").unlink()
    imports.write(imports.files / "new_1.nii.gz", np.zeros(SHAPE, np.uint8))
    assert imports.run() == 0
    cases = imports.made.manifest()["cases"]
    assert {case: (known["kept"], known["why"]) for case, known in cases.items()} == {
        "new_0": (False, "no file"), "new_1": (False, "the file shows no structure")
    }  # fmt: skip


def test_an_empty_folder_is_refused(imports, capsys):
    for file in imports.files.iterdir():
        file.unlink()
    assert imports.run() == 2
    assert "holds no file with the ending .nii.gz" in capsys.readouterr().err


def test_finished_files_are_skipped_and_changed_ones_are_not(imports):
    assert imports.run() == 0
    before = {case: imports.made.file(case).stat().st_mtime_ns for case in imports.labels}
    imports.write(imports.files / "new_1.nii.gz", np.minimum(imports.labels["new_1"], 1))
    assert imports.run() == 0
    now = {case: imports.made.file(case).stat().st_mtime_ns for case in imports.labels}
    assert [case for case in now if now[case] != before[case]] == ["new_1"]
    assert imports.made.load("new_1")[:].max() == 1
    (imports.files / "new_0.nii.gz").unlink()
    assert imports.run() == 0
    assert imports.made.manifest()["cases"]["new_0"]["why"] == "no file"

"""Unlabeled images that dataset.json lists, beside those of imagesUn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from raw_dataset import RawDataset

from nnunet_ssl.data.raw_images import raw_identifiers
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerSemiTC
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset


@pytest.fixture
def raw(tmp_path: Path) -> RawDataset:
    return RawDataset(tmp_path)


def listing(raw: RawDataset, unlabeled: object) -> None:
    """What the raw data set's dataset.json lists; nnU-Net's copy from the day of planning stays as it is."""
    (raw.raw / "dataset.json").write_text(json.dumps(raw.dataset_json | {"unlabeled": unlabeled}))


def archive(raw: RawDataset, name: str) -> Path:
    folder = raw.raw.parent.parent / "archive"
    folder.mkdir(exist_ok=True)
    return raw.write("x.png").rename(folder / name)


@pytest.mark.parametrize("folder_too", [True, False])
def test_listed_images_are_preprocessed_like_those_of_the_folder(raw, folder_too, monkeypatch, capsys):
    far, near = archive(raw, "scan 7.png"), raw.write("near.png")
    monkeypatch.setenv("ARCHIVE", str(far.parent))
    listing(raw, {"far": {"images": ["$ARCHIVE/scan 7.png"]}, "near": {"images": ["near.png"]}})
    copies = {"near_copy": near, "far_copy": far}
    if folder_too:
        for case, file in copies.items():
            shutil.copy(file, raw.images / f"{case}_0000.png")
    else:
        raw.images.rmdir()
    assert raw.run() == 0
    assert f"{4 if folder_too else 2} preprocessed, 0 were there" in capsys.readouterr().out
    if folder_too:
        for case in ("near", "far"):
            np.testing.assert_array_equal(raw.load(case), raw.load(f"{case}_copy"))
    expected = sorted(["far", "near", *(copies if folder_too else [])])
    assert raw_identifiers(str(raw.raw), "imagesUn") == expected
    assert raw_identifiers(str(raw.raw), "imagesTs") is None


ENTRIES = {
    "gone": ({"images": ["nowhere.png"]}, "nowhere.png is missing"),
    "two": ({"images": ["near.png", "near.png"]}, r"expected {\"images\": \[one file per channel, 1\]}"),
    "bare": (["near.png"], r"found \['near.png'\]"),
    "number": ({"images": [7]}, "expected"),
    "../out": ({"images": ["near.png"]}, "neither slashes"),
    ".hidden": ({"images": ["near.png"]}, "neither slashes"),
    "labeled": ({"images": ["near.png"]}, "a labeled case has the same name"),
    "both": ({"images": ["near.png"]}, "imagesUn/ holds a case of the same name"),
}


def test_entries_that_cannot_be_used_do_not_stop_the_others(raw, capsys):
    raw.write("near.png")
    raw.write("imagesUn/both_0000.png")
    listing(raw, {name: entry for name, (entry, _) in ENTRIES.items()} | {"good": {"images": ["near.png"]}})
    assert raw.run() == 1
    failed = capsys.readouterr().out.split("failed:")[1]
    assert f"{len(ENTRIES)} failed" not in failed
    lines = {line.split(":")[0].strip(): line for line in failed.splitlines()[1:]}
    for name, (_, message) in ENTRIES.items():
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(lines[name])
    assert sorted(p.name for p in raw.output.glob("*.b2nd")) == ["both.b2nd", "good.b2nd"]


def test_a_list_that_is_none(raw, capsys):
    listing(raw, ["near.png"])
    assert raw.run() == 2
    assert "dataset.json: 'unlabeled' is a list; expected {CASE:" in capsys.readouterr().err
    assert not raw.output.exists()


def test_a_training_uses_listed_images_while_they_are_listed(tmp_path):
    tiny = TinyDataset(tmp_path, PATCHES["2d"])
    file = tmp_path / "nnUNet_raw" / "Dataset900_Tiny" / "dataset.json"
    file.write_text(json.dumps({"unlabeled": {"un_0": {}, "later": {}}}))
    trainer = tiny.trainer(nnUNetTrainerSemiTC)
    used = {case.identifier for case in trainer.find_unlabeled_cases()}
    assert "un_0" in used
    assert "un_1" not in used
    file.write_text(json.dumps({"unlabeled": "un_0"}))
    with pytest.raises(UserError, match="'unlabeled' is a str"):
        trainer.find_unlabeled_cases()

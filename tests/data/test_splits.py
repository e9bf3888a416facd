"""Folds with hidden labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.cli import main
from nnunet_ssl.data.splits import (
    cases_to_report,
    hide_labels,
    inner_folds,
    load_or_make_splits,
    outer_fold,
    write_splits,
)
from nnunet_ssl.errors import UserError
from nnunet_ssl.testing.tiny import make_dataset_json

CASES = [f"case_{i:02d}" for i in range(20)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """20 labeled cases in the raw folder; returns the splits file (not there yet)."""
    raw = tmp_path / "nnUNet_raw" / "Dataset900_Tiny"
    preprocessed = tmp_path / "nnUNet_preprocessed" / "Dataset900_Tiny"
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    for case in CASES:
        (raw / "imagesTr" / f"{case}_0000.png").touch()
    (preprocessed / "dataset.json").write_text(json.dumps(make_dataset_json({"background": 0, "a": 1})))
    return preprocessed / "splits_final.json"


def split(*options: str) -> int:
    return main(["split", "-d", "900", *options])


def test_unlabeled_images_of_labeled_cases_are_told(dataset, tmp_path, capsys):
    unlabeled = tmp_path / "nnUNet_raw" / "Dataset900_Tiny" / "imagesUn"
    unlabeled.mkdir()
    (unlabeled / "new_0000.png").touch()
    assert split("--labeled", "2") == 0
    assert "WARNING" not in capsys.readouterr().out
    (unlabeled / "case_03_0000.png").touch()
    assert split("--labeled", "3") == 0
    assert "WARNING: 1 images of imagesUn are labeled cases too, e.g. case_03" in capsys.readouterr().out


def test_default_folds_are_nnunets(dataset):
    expected = generate_crossval_split(CASES, seed=12345, n_splits=5)
    assert load_or_make_splits(str(dataset), CASES) == expected
    assert split("--labeled", "4") == 0
    written = json.loads(dataset.read_text())
    assert written[:5] == expected
    assert len(written) == 10


def test_subsets_are_nested_and_complete(dataset, capsys):
    assert split("--labeled", "8", "2", "4", "--folds", "0", "3") == 0
    splits = json.loads(dataset.read_text())
    for base, numbers in ((0, (5, 6, 7)), (3, (8, 9, 10))):
        labeled = [set(splits[n]["train"]) for n in numbers]
        assert [len(s) for s in labeled] == [2, 4, 8]
        assert labeled[0] < labeled[1] < labeled[2]
        for n in numbers:
            assert splits[n]["val"] == splits[base]["val"]
            assert sorted(splits[n]["train"] + splits[n]["unlabeled"]) == sorted(splits[base]["train"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["fold", "from", "fold", "labeled", "unlabeled", "validation"]
    assert rows[1] == ["5", "0", "2", "14", "4"]


def test_existing_folds_are_never_rewritten(dataset, capsys):
    assert split("--labeled", "4") == 0
    before = dataset.read_text()
    assert split("--labeled", "4") == 2
    assert (
        "Fold 5 is this split already (4 labeled cases, same seed); existing folds are never" in capsys.readouterr().err
    )
    assert dataset.read_text() == before
    assert split("--labeled", "4", "--seed", "1") == 0
    after = json.loads(dataset.read_text())
    assert after[:10] == json.loads(before)
    assert after[10]["train"] != after[5]["train"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labeled", "16"), "--labeled 16: fold 0 has 16 training cases; give a number from 1 to 15"),
        (("--labeled", "0"), "--labeled 0: fold 0"),
        (("--labeled", "3", "--folds", "7"), "There is no fold 7; the file has the folds 0 to 4"),
    ],
)
def test_errors_write_nothing(dataset, capsys, options, message):
    assert split(*options) == 2
    assert message in capsys.readouterr().err
    assert not dataset.exists()


def test_a_splits_file_with_fewer_folds(dataset):
    dataset.write_text(json.dumps([{"train": CASES[:10], "val": CASES[10:]}]))
    assert split("--labeled", "4") == 0
    assert len(json.loads(dataset.read_text())) == 2


def test_a_fold_named_twice_is_one_fold(dataset):
    assert split("--labeled", "4", "--folds", "0", "0") == 0
    assert len(json.loads(dataset.read_text())) == 6


def test_hidden_folds_are_not_drawn_from_again(dataset):
    splits = load_or_make_splits(str(dataset), CASES)
    new = hide_labels(splits, [0], [4], 0)
    with pytest.raises(UserError, match="Fold 5 has hidden labels already"):
        hide_labels([*splits, new[0].split], [5], [2], 0)


@pytest.mark.parametrize("content", ["{", "{}", '[{"train": []}]', "[3]"])
def test_broken_splits_file(dataset, capsys, content):
    dataset.write_text(content)
    assert split("--labeled", "4") == 2
    assert "splits_final.json" in capsys.readouterr().err
    assert dataset.read_text() == content


def test_too_few_cases(tmp_path):
    with pytest.raises(UserError, match=r"has 3 labeled cases; .* need at least 5\. Train fold 'all'"):
        load_or_make_splits(str(tmp_path / "splits_final.json"), CASES[:3])


# ---- folds inside a fold --------------------------------------------------------------------------------------------


def with_hidden() -> list[dict]:
    """nnU-Net's five folds, and fold 5 with 7 labeled cases of fold 0."""
    splits = load_or_make_splits("nowhere", CASES)
    return [*splits, hide_labels(splits, [0], [7], 0)[0].split]


def test_inner_folds_leave_out_every_case_once_and_never_train_on_validation_cases():
    splits = with_hidden()
    made = inner_folds(splits, 5, CASES, 3)
    assert [number for number, _ in made] == [6, 7, 8]
    left_out = [set(splits[5]["train"]) - set(fold["train"]) for _, fold in made]
    assert sorted(case for part in left_out for case in part) == splits[5]["train"]
    assert sorted(map(len, left_out)) == [2, 2, 3]
    for _, fold in made:
        assert fold["val"] == sorted(splits[5]["val"])
        assert fold["unlabeled"] == splits[5]["unlabeled"]
        assert not set(fold["train"]) & {*fold["val"], *fold["unlabeled"]}
        assert fold["inner_fold_of"] == 5


def test_inner_folds_of_all_cases_validate_on_what_they_leave_out():
    splits = with_hidden()
    for _, fold in inner_folds(splits, "all", CASES, 4):
        assert sorted([*fold["train"], *fold["val"]]) == sorted(CASES)
        assert "unlabeled" not in fold


def test_inner_folds_that_are_there_are_found_again(tmp_path):
    splits = with_hidden()
    made = inner_folds(splits, 5, CASES, 3)
    file = tmp_path / "splits_final.json"
    write_splits(str(file), [*splits, made[0][1], made[2][1]])
    again = inner_folds(json.loads(file.read_text()), 5, CASES, 3)
    assert [number for number, _ in again] == [6, 8, 7]
    assert [fold for _, fold in again] == [fold for _, fold in made]
    assert [outer_fold(file, fold) for fold in ("all", 0, 5, 6, "7", 99)] == ["all", 0, 5, 5, 5, 99]
    assert cases_to_report(file, 7) == splits[5]["val"]
    assert cases_to_report(file, "all") == []


def test_inner_folds_of_a_fold_that_is_not_there():
    with pytest.raises(UserError, match="There is no fold 9; the file has the folds 0 to 5"):
        inner_folds(with_hidden(), 9, CASES, 3)


def test_split_draws_from_no_inner_fold(dataset):
    splits = [{"train": CASES[:10], "val": CASES[10:]}]
    made = inner_folds(splits, 0, CASES, 2)
    dataset.write_text(json.dumps([*splits, *(fold for _, fold in made)]))
    assert split("--labeled", "4") == 0
    assert len(json.loads(dataset.read_text())) == 4

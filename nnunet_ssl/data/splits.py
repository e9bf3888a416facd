"""Folds with hidden labels, appended to nnU-Net's splits_final.json."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_atomically
from nnunet_ssl.nnunet.checks import check_splits
from nnunet_ssl.nnunet.folders import read_json

# nnU-Net's own, so that the default folds made here are the ones it would have made.
NNUNET_SPLIT_SEED = 12345
NNUNET_NUM_FOLDS = 5
# In a fold of the file: the fold that it was made in.
INNER_FOLD_OF = "inner_fold_of"


@dataclasses.dataclass(frozen=True)
class NewFold:
    """A fold with hidden labels: its number in the file, where its cases come from, and the split itself."""

    number: int
    base_fold: int
    split: dict[str, list[str]]


def load_or_make_splits(splits_file: str, identifiers: Sequence[str]) -> list[dict[str, Any]]:
    """The folds of the file; nnU-Net's default five where there is none yet.

    Raises:
        UserError: For a broken file or too few cases for nnU-Net's default folds.
    """
    if not os.path.isfile(splits_file):
        if len(identifiers) < NNUNET_NUM_FOLDS:
            raise UserError(
                f"The data set has {len(identifiers)} labeled cases; nnU-Net's default folds need at least "
                f"{NNUNET_NUM_FOLDS}. Train fold 'all' instead, or write {splits_file} yourself."
            )
        ordered = [str(i) for i in np.sort(list(identifiers))]
        return generate_crossval_split(ordered, seed=NNUNET_SPLIT_SEED, n_splits=NNUNET_NUM_FOLDS)
    return read_splits(splits_file)


def read_splits(splits_file: str) -> list[dict[str, Any]]:
    """The folds of an existing file.

    Raises:
        UserError: Naming the fold that is wrong.
    """
    return check_splits(read_json(Path(splits_file), "nnU-Net makes it when it trains first."), splits_file)


def check_preprocessed(
    cases: Iterable[str], preprocessed: Iterable[str], folder: str, fold: int | str, splits_file: str
) -> None:
    """Refuse a fold with cases that are not preprocessed.

    Args:
        cases: Training and validation cases of the fold.
        preprocessed: Those in the folder.
        folder: The configuration's folder of preprocessed cases.
        fold: As the error names it.
        splits_file: The same.

    Raises:
        UserError: Naming one of them.
    """
    missing = set(cases) - set(preprocessed)
    if missing:
        raise UserError(
            f"{len(missing)} cases of fold {fold} are not preprocessed in {folder}, e.g. {min(missing)!r}. Run "
            f"nnUNetv2_preprocess for this configuration, or correct {splits_file}."
        )


def hide_labels(
    splits: Sequence[dict[str, Any]], base_folds: Sequence[int], labeled_counts: Sequence[int], seed: int
) -> list[NewFold]:
    """Split the training cases of existing folds into labeled and unlabeled ones.

    Larger labeled subsets contain the smaller ones of the same base fold; the validation cases stay the fold's.

    Args:
        splits: The folds there are.
        base_folds: Which of them to draw from.
        labeled_counts: How many cases keep their labels.
        seed: Of the draw.

    Returns:
        The new folds, numbered as they will stand in the file.

    Raises:
        UserError: For a fold that does not exist, more labels than cases, or a fold that exists already.
    """
    new: list[NewFold] = []
    for base in base_folds:
        if base not in range(len(splits)):
            raise UserError(f"There is no fold {base}; the file has the folds 0 to {len(splits) - 1}.")
        if "unlabeled" in splits[base]:
            raise UserError(f"Fold {base} has hidden labels already; draw from one of nnU-Net's own folds.")
        pool = sorted(splits[base]["train"])
        order = np.random.default_rng([seed, base]).permutation(len(pool))
        for count in labeled_counts:
            if not 0 < count < len(pool):
                raise UserError(
                    f"--labeled {count}: fold {base} has {len(pool)} training cases; give a number from 1 to "
                    f"{len(pool) - 1}, so that at least one case is left unlabeled."
                )
            split = {
                "train": sorted(pool[i] for i in order[:count]),
                "val": list(splits[base]["val"]),
                "unlabeled": sorted(pool[i] for i in order[count:]),
            }
            _refuse_existing(splits, split, count)
            new.append(NewFold(len(splits) + len(new), base, split))
    return new


def outer_fold(splits_file: Path, fold: int | str) -> int | str:
    """The fold that an inner one was made in; any other fold itself."""
    if fold == "all" or not splits_file.is_file():
        return fold
    splits = read_splits(str(splits_file))
    outer: int | str = splits[int(fold)].get(INNER_FOLD_OF, fold) if int(fold) < len(splits) else fold
    return outer


def cases_to_report(splits_file: Path, fold: int | str) -> list[str]:
    """The validation cases of a fold or, for an inner one, of the fold it was made in; none of fold "all"."""
    outer = outer_fold(splits_file, fold)
    if outer == "all" or not splits_file.is_file():
        return []
    splits = read_splits(str(splits_file))
    return list(splits[int(outer)]["val"]) if int(outer) < len(splits) else []


def inner_folds(
    splits: Sequence[dict[str, Any]], outer: int | str, identifiers: Sequence[str], members: int
) -> list[tuple[int, dict[str, Any]]]:
    """Folds inside a fold, for the members of an ensemble: each leaves out another part of its labeled cases.

    None of them trains on a validation case of the outer fold, and nnU-Net validates them on these cases; inside fold
    "all", which has none, on the part that is left out. Cases whose labels the outer fold hides stay hidden.

    Args:
        splits: The folds there are.
        outer: Number of one of them, or "all".
        identifiers: All labeled cases, for "all".
        members: How many.

    Returns:
        Numbers and folds: those that are in the file already, and new ones, numbered as they will stand there.

    Raises:
        UserError: For a fold that does not exist.
    """
    if outer != "all" and int(outer) not in range(len(splits)):
        raise UserError(f"There is no fold {outer}; the file has the folds 0 to {len(splits) - 1}.")
    fold = {"train": list(identifiers), "val": []} if outer == "all" else splits[int(outer)]
    order = [str(c) for c in np.random.default_rng(NNUNET_SPLIT_SEED).permutation(sorted(fold["train"]))]
    made: list[tuple[int, dict[str, Any]]] = []
    new = 0
    for member in range(members):
        left_out = order[member::members]
        split: dict[str, Any] = {
            "train": sorted(set(order) - set(left_out)),
            "val": sorted(fold["val"] or left_out),
            INNER_FOLD_OF: outer if outer == "all" else int(outer),
        }
        if "unlabeled" in fold:
            split["unlabeled"] = list(fold["unlabeled"])
        number = next((i for i, existing in enumerate(splits) if existing == split), None)
        if number is None:
            number, new = len(splits) + new, new + 1
        made.append((number, split))
    return made


def write_splits(splits_file: str, splits: Sequence[dict[str, Any]]) -> None:
    """Replace the file at once; a kill leaves the old one."""
    write_atomically(splits_file, json.dumps(list(splits), indent=4).encode())


def _refuse_existing(splits: Sequence[dict[str, Any]], split: dict[str, list[str]], count: int) -> None:
    for number, existing in enumerate(splits):
        if all(sorted(existing.get(key, [])) == sorted(split[key]) for key in split):
            raise UserError(
                f"Fold {number} is this split already ({count} labeled cases, same seed); existing folds are never "
                f"rewritten. Train fold {number}, or draw another split with --seed."
            )

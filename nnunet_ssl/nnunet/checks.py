"""What nnU-Net's JSON files must say before anything is built on them, with errors that name the entry.

People edit these files. nnU-Net takes them as they are, and fails far from the mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.plans import PLANS_KEY

_Check = Callable[[Any], bool]
# nnU-Net makes folder names of three of them; file systems allow 255 characters.
_LONGEST_NAME = 128


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_name(value: Any) -> bool:
    return _is_text(value) and len(value) <= _LONGEST_NAME and not {"/", "\\"} & set(value) and value not in (".", "..")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_list_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, (list, tuple)) and all(map(check, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_PLANS: dict[str, tuple[_Check, str]] = {
    "dataset_name": (_is_name, "the name of a data set"),
    "plans_name": (_is_name, "a name that can be a folder's"),
    "image_reader_writer": (_is_text, "the name of a class"),
    "transpose_forward": (lambda v: sorted(v) == [0, 1, 2] if _is_list_of(_is_label)(v) else False, "the axes 0, 1, 2"),
    "configurations": (_is_table, "configurations by name"),
    "foreground_intensity_properties_per_channel": (lambda v: isinstance(v, dict), "a table by channel"),
}
_CONFIGURATION: dict[str, tuple[_Check, str]] = {
    "data_identifier": (_is_name, "the name of a folder"),
    "preprocessor_name": (_is_text, "the name of a class"),
    "batch_size": (_is_count, "a positive number"),
    "patch_size": (_is_list_of(_is_count), "positive numbers of voxels"),
    "median_image_size_in_voxels": (_is_list_of(_is_length), "positive numbers of voxels"),
    "spacing": (_is_list_of(_is_length), "positive lengths"),
    "normalization_schemes": (_is_list_of(_is_text), "a name per channel"),
    "use_mask_for_norm": (_is_list_of(lambda v: isinstance(v, bool)), "true or false per channel"),
    "resampling_fn_data": (_is_text, "the name of a function"),
    "resampling_fn_data_kwargs": (lambda v: isinstance(v, dict), "a table"),
    "architecture": (_is_table, "the network's description"),
}


def check_plans(plans: Any, source: str) -> dict[str, Any]:
    """Plans that can be worked with, returned as they are.

    Args:
        plans: The content of a plans file.
        source: Its name, for the message.

    Raises:
        UserError: Naming the entry that is missing or wrong.
    """
    _check_entries(plans, _PLANS, source)
    if not isinstance(plans.get(PLANS_KEY, {}), dict):
        _refuse(source, PLANS_KEY, plans[PLANS_KEY], "a table of hyper-parameters")
    for name, entries in plans["configurations"].items():
        if not isinstance(entries, dict):
            _refuse(source, f"configurations: {name}", entries, "a table")
    return plans


def check_configuration(plans: dict[str, Any], configuration: str, source: str) -> None:
    """A configuration of the plans that can be worked with, with what it inherits.

    Raises:
        UserError: Naming the entry that is missing or wrong, or the configurations there are.
    """
    check_plans(plans, source)
    tables, chain = plans["configurations"], [configuration]
    entries: dict[str, Any] = {}
    while chain[-1] is not None:
        name = chain[-1]
        if name not in tables:
            raise UserError(f"{source} has no configuration {name}; it has {', '.join(tables)}.")
        if name in chain[:-1]:
            raise UserError(f"{source}: configuration {name} inherits from itself.")
        entries = {**tables[name], **entries}
        chain.append(tables[name].get("inherits_from"))
    place = f"{source}, configuration {configuration}"
    # Plans of older versions describe the network otherwise; nnU-Net translates them.
    former = {"architecture"} if "UNet_class_name" in entries else set()
    _check_entries(entries, {k: v for k, v in _CONFIGURATION.items() if k not in former}, place)
    sides = [len(entries[key]) for key in ("patch_size", "spacing", "median_image_size_in_voxels")]
    if sides not in ([2] * 3, [3] * 3):
        raise UserError(f"{place}: patch_size, spacing and median image have {sides} entries; expected 2 each, or 3.")


@contextmanager
def using(source: str) -> Iterator[None]:
    """Errors of code that takes nnU-Net's files as they are become errors of the files.

    Args:
        source: Which file, for the message.

    Raises:
        UserError: Saying so.
    """
    try:
        yield
    except (AssertionError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source} cannot be used as it stands: {type(error).__name__}: {error}. Compare it with one that nnU-Net "
            f"has written."
        ) from error


def check_dataset_json(content: Any, source: str) -> dict[str, Any]:
    """A dataset.json that can be worked with, returned as it is.

    Raises:
        UserError: Naming the entry that is missing or wrong.
    """
    channels = "modality" if isinstance(content, dict) and "channel_names" not in content else "channel_names"
    _check_entries(
        content,
        {
            "labels": (_is_table, "labels by name"),
            "file_ending": (lambda v: _is_text(v) and v.startswith("."), "an ending such as .nii.gz"),
            channels: (_is_table, "channels by number"),
        },
        source,
    )
    if content["labels"].get("background") != 0:
        _refuse(source, "labels: background", content["labels"].get("background"), "0")
    for name, value in content["labels"].items():
        if not _is_label(value) and not (_is_list_of(_is_label)(value) and value):
            _refuse(source, f"labels: {name}", value, "a number from 0 on, or several for a region")
    return content


def check_splits(content: Any, source: str) -> list[dict[str, list[str]]]:
    """A list of folds, returned as it is: cases under ``train`` and ``val``, and maybe ``unlabeled``.

    Raises:
        UserError: Naming the fold that is wrong.
    """
    if not isinstance(content, list):
        raise UserError(f"{source} holds a {type(content).__name__}; expected a list of folds with 'train' and 'val'.")
    names = (_is_list_of(_is_text), "a list of cases")
    for number, fold in enumerate(content):
        keys = ["train", "val", *(["unlabeled"] if isinstance(fold, dict) and "unlabeled" in fold else [])]
        _check_entries(fold, dict.fromkeys(keys, names), f"{source}, fold {number}")
    return content


def check_labels_of_cases(properties: Iterable[tuple[str, dict[str, Any]]], label_manager: LabelManager) -> None:
    """Preprocessed cases have no labels but those of dataset.json: nnU-Net's loss would fail on others.

    Args:
        properties: Cases with what nnU-Net noted when it preprocessed them.
        label_manager: Of plans and dataset.json.

    Raises:
        UserError: Naming the first case with others.
    """
    known = {-1, 0, *label_manager.all_labels}
    for case, noted in properties:
        # By label, by region, and for data with an ignore label by all annotated ones together, -1 among them.
        places = noted.get("class_locations", {})
        sampled = {key if isinstance(key, tuple) else (key,): len(found) for key, found in places.items()}
        unknown = {int(label) for key, found in sampled.items() if found for label in key} - known
        if unknown:
            raise UserError(
                f"{case} has voxels of label {', '.join(map(str, sorted(unknown)))}, which dataset.json does not list "
                f"(it has {', '.join(map(str, sorted(known - {-1})))}). If dataset.json was changed, preprocess again."
            )
        if not label_manager.has_ignore_label and any(-1 in key for key in sampled):
            raise UserError(
                f"{case} was preprocessed with an ignore label, which dataset.json does not list. If dataset.json was "
                f"changed, preprocess again."
            )


def _check_entries(table: Any, entries: dict[str, tuple[_Check, str]], source: str) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{source} is {table!r:.60}; expected a table with {', '.join(map(repr, entries))}.")
    for name, (check, expected) in entries.items():
        if name not in table:
            raise UserError(f"{source} lacks {name!r}; expected {expected}, as nnU-Net writes it.")
        if not check(table[name]):
            _refuse(source, name, table[name], expected)


def _refuse(source: str, entry: str, found: Any, expected: str) -> None:
    raise UserError(f"{source}: {entry} is {found!r:.60}; expected {expected}.")

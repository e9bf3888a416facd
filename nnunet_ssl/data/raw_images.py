"""Images without labels in a raw data set: in folders of their own, or listed in dataset.json.

nnU-Net's dataset.json may list the labeled cases, ``"dataset": {CASE: {"images": [...], "label": ...}}``, whose files
then lie anywhere. Unlabeled images are listed alike, ``"unlabeled": {CASE: {"images": [...]}}``, with paths absolute or
relative to the raw data set; nnU-Net does not look at that key.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.folders import read_json

UNLABELED_FOLDER = "imagesUn"
TEST_FOLDER = "imagesTs"
_LIST = "unlabeled"


@dataclasses.dataclass(frozen=True)
class RawCase:
    """Channel files of one image, in channel order."""

    identifier: str
    images: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """How the preprocessing of one case ended; ``error`` is empty where it went well."""

    identifier: str
    error: str = ""
    note: str = ""


def raw_identifiers(raw_folder: str | None, name: str) -> list[str] | None:
    """Identifiers of the images in a folder of the raw data set, listed ones included; None where there are neither."""
    if raw_folder is None:
        return None
    folder = os.path.join(raw_folder, name)
    listed = _listed(raw_folder) if name == UNLABELED_FOLDER else {}
    if not os.path.isdir(folder):
        return sorted(listed) if listed else None
    files = _visible_files(folder)
    return sorted({match[1] for f in files if (match := re.fullmatch(r"(.+)_\d{4}(\..+)?", f))} | set(listed))


def number_of_channels(dataset_json: dict[str, Any]) -> int:
    """As dataset.json says, in its present or its former way."""
    return len(dataset_json["channel_names" if "channel_names" in dataset_json else "modality"])


def find_raw_cases(
    raw_folder: str, name: str, dataset_json: dict[str, Any], labeled: Iterable[str]
) -> tuple[list[RawCase], list[CaseReport]]:
    """Find the images of a folder, named as nnU-Net names them: ``CASE_0000.ending`` and so on; and listed ones.

    Args:
        raw_folder: The raw data set.
        name: imagesUn or imagesTs; lists belong to imagesUn.
        dataset_json: nnU-Net's dataset.json.
        labeled: Identifiers of the labeled cases, which must not occur here.

    Returns:
        The usable cases, and a report for every file or case that is not.

    Raises:
        UserError: Where there is neither the folder nor a list, or the list is none.
    """
    folder = os.path.join(raw_folder, name)
    listed = _listed(raw_folder) if name == UNLABELED_FOLDER else {}
    if not os.path.isdir(folder) and not listed:
        raise UserError(
            f"{folder} is missing. Put the images there, named like those of imagesTr"
            + (", or list their files under 'unlabeled' in dataset.json." if name == UNLABELED_FOLDER else ".")
        )
    num_channels = number_of_channels(dataset_json)
    found, reports = _in_folder(folder, dataset_json["file_ending"], num_channels)
    names = {case.identifier for case in found}
    for identifier, entry in listed.items():
        try:
            if identifier in names:
                raise UserError(f"{name}/ holds a case of the same name; rename or remove one of them")
            found.append(RawCase(identifier, _listed_files(raw_folder, identifier, entry, num_channels)))
        except UserError as error:
            reports.append(CaseReport(identifier, str(error)))
    known = set(labeled)
    for case in found:
        if case.identifier in known:
            reason = "a labeled case has the same name; rename or remove one of them"
            reports.append(CaseReport(case.identifier, reason))
    return sorted((c for c in found if c.identifier not in known), key=lambda case: case.identifier), reports


def _in_folder(folder: str, file_ending: str, num_channels: int) -> tuple[list[RawCase], list[CaseReport]]:
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending))
    channels: dict[str, dict[int, str]] = {}
    cases, reports = [], []
    for name in _visible_files(folder):
        match = pattern.fullmatch(name)
        if match is None:
            expected = f"CASE_0000{file_ending}"
            reports.append(CaseReport(name, f"the name does not fit: expected {expected} as dataset.json says"))
        else:
            channels.setdefault(match[1], {})[int(match[2])] = os.path.join(folder, name)
    for identifier, files in channels.items():
        if sorted(files) == list(range(num_channels)):
            cases.append(RawCase(identifier, tuple(files[i] for i in range(num_channels))))
        else:
            have = ", ".join(f"{i:04d}" for i in sorted(files))
            error = f"channel files {have} found, dataset.json asks for {num_channels} from 0000 on"
            reports.append(CaseReport(identifier, error))
    return cases, reports


def _listed(raw_folder: str) -> Mapping[str, Any]:
    file = Path(raw_folder) / "dataset.json"
    content = read_json(file, "") if file.is_file() else {}
    listed = content.get(_LIST, {}) if isinstance(content, dict) else {}
    if not isinstance(listed, dict):
        raise UserError(
            f'{file}: {_LIST!r} is a {type(listed).__name__}; expected {{CASE: {{"images": [one file per channel]}}}}.'
        )
    return listed


def _listed_files(raw_folder: str, identifier: str, entry: Any, num_channels: int) -> tuple[str, ...]:
    if not identifier or identifier.startswith(".") or any(c in identifier for c in "/\\\0"):
        raise UserError("the name becomes a file's name; expected neither slashes nor a dot in front")
    files = entry.get("images") if isinstance(entry, dict) else None
    if not isinstance(files, list) or len(files) != num_channels or not all(isinstance(f, str) for f in files):
        raise UserError(f'expected {{"images": [one file per channel, {num_channels}]}}, found {entry!r:.80}')
    paths = tuple(os.path.abspath(os.path.join(raw_folder, os.path.expandvars(f))) for f in files)
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing")
    return paths


def _visible_files(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    return sorted(f.name for f in Path(folder).iterdir() if f.is_file() and not f.name.startswith("."))

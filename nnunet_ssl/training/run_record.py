"""A small file beside nnU-Net's checkpoints that says what a training learned from and ran with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_ssl import __version__
from nnunet_ssl.files import write_atomically

RECORD_FILE = "nnunet_ssl.json"


def write_record(
    folder: str, record: Mapping[str, Any], goes_on: bool = False, say: Callable[[str], object] = print
) -> None:
    """Write the record when a training starts, with the versions it runs with.

    Args:
        folder: nnU-Net's output folder of the fold.
        record: "trainer", "device", "hyperparameters", "batch" ({"labeled": n, "unlabeled": n}), "labeled" and
            "validation" (identifiers), and "unlabeled" (why each case counts as unlabeled, by identifier).
        goes_on: Whether the training goes on from a checkpoint: then what differs from before is said.
        say: Takes a warning.
    """
    file = os.path.join(folder, RECORD_FILE)
    costs = {}
    if goes_on and os.path.isfile(file):
        before = load_json(file)
        # Of a training that had ended, and takes no further step.
        costs = {"costs": before["costs"]} if "costs" in before else {}
        for change in _changes(before, record):
            say(f"WARNING: this training goes on with {change}")
    versions = {"nnunet_ssl": __version__, "nnunetv2": version("nnunetv2"), "torch": torch.__version__}
    _write(file, {**record, "versions": versions, **costs})


def note_validation(folder: str, checkpoint: str | None) -> None:
    """Add which checkpoint the predictions in validation/ come from.

    Args:
        folder: nnU-Net's output folder of the fold.
        checkpoint: File name; None while a validation runs.
    """
    file = os.path.join(folder, RECORD_FILE)
    if os.path.isfile(file):
        _write(file, {**load_json(file), "validated_with": checkpoint})


def note_costs(folder: str, epoch_seconds: Sequence[float], memory: float | None) -> None:
    """Add what a training has taken.

    Args:
        folder: nnU-Net's output folder of the fold.
        epoch_seconds: Of every epoch, validation batches and checkpoints included.
        memory: The most that was in use, in MiB; None where it is not known.
    """
    file = os.path.join(folder, RECORD_FILE)
    if os.path.isfile(file):
        costs = {"seconds": round(sum(epoch_seconds), 1), "peak_memory_mib": memory}
        _write(file, {**load_json(file), "costs": costs})


def _write(file: str, record: Mapping[str, Any]) -> None:
    write_atomically(file, json.dumps(record, indent=2).encode())


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("labeled", "unlabeled"):
        old, new = set(before[kind]), set(now[kind])
        if old != new:
            yield f"{len(new)} {kind} cases: {len(new - old)} are new, {len(old - new)} of those it began with are gone"
    if before["batch"] != now["batch"]:
        parts = [f"{b['labeled']} labeled + {b['unlabeled']} unlabeled" for b in (now["batch"], before["batch"])]
        yield f"{parts[0]} examples per batch, and began with {parts[1]}"

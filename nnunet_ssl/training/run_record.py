"""A small file beside nnU-Net's checkpoints that says what a training learned from and ran with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_ssl import __version__
from nnunet_ssl.files import write_atomically

if TYPE_CHECKING:
    from nnunet_ssl.data.cases import UnlabeledCase
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer

RECORD_FILE = "nnunet_ssl.json"


def write_record(trainer: SemiSupervisedTrainer, unlabeled: list[UnlabeledCase]) -> None:
    """Write the record when a training starts; the log says what differs from before where it goes on.

    Args:
        trainer: Initialized.
        unlabeled: The unlabeled cases it uses.
    """
    labeled, validation = trainer.do_split()
    record = {
        "trainer": type(trainer).__name__,
        "versions": {"nnunet_ssl": __version__, "nnunetv2": version("nnunetv2"), "torch": torch.__version__},
        "device": trainer.device.type,
        "hyperparameters": trainer.hp.as_dict(),
        "batch": {"labeled": trainer.batch_size, "unlabeled": trainer.unlabeled_batch_size},
        "labeled": sorted(labeled),
        "validation": sorted(validation),
        "unlabeled": {case.identifier: case.source for case in unlabeled},
    }
    file = os.path.join(trainer.output_folder, RECORD_FILE)
    if trainer.current_epoch > 0 and os.path.isfile(file):
        for change in _changes(load_json(file), record):
            trainer.print_to_log_file(f"WARNING: this training goes on with {change}")
    _write(trainer, record)


def note_validation(trainer: SemiSupervisedTrainer, checkpoint: str | None) -> None:
    """Add which checkpoint the predictions in validation/ come from.

    Args:
        trainer: Whose validation has just ended.
        checkpoint: File name; None while a validation runs.
    """
    file = os.path.join(trainer.output_folder, RECORD_FILE)
    if os.path.isfile(file):
        _write(trainer, {**load_json(file), "validated_with": checkpoint})


def _write(trainer: SemiSupervisedTrainer, record: dict[str, Any]) -> None:
    write_atomically(os.path.join(trainer.output_folder, RECORD_FILE), json.dumps(record, indent=2).encode())


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for kind in ("labeled", "unlabeled"):
        old, new = set(before[kind]), set(now[kind])
        if old != new:
            yield f"{len(new)} {kind} cases: {len(new - old)} are new, {len(old - new)} of those it began with are gone"
    if before["batch"] != now["batch"]:
        parts = [f"{b['labeled']} labeled + {b['unlabeled']} unlabeled" for b in (now["batch"], before["batch"])]
        yield f"{parts[0]} examples per batch, and began with {parts[1]}"

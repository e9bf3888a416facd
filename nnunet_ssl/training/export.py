"""The second network of a training as a model folder of its own, which stock nnU-Net predicts with."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_atomically
from nnunet_ssl.nnunet.folders import read_json
from nnunet_ssl.training.checkpoint import STATE_KEY

PARTNER_SUFFIX = "Partner"


def export_partner(model: Path, folds: Sequence[str], checkpoint_name: str, overwrite: bool = False) -> Path:
    """Write the partner network of a trained model beside it, under the trainer's name with "Partner" appended.

    Args:
        model: nnU-Net's result folder TRAINER__PLANS__CONFIGURATION.
        folds: Which to export.
        checkpoint_name: File name of the checkpoint in each fold's folder.
        overwrite: Replace checkpoints that are there already.

    Returns:
        The new folder.

    Raises:
        UserError: Where there is no such model or checkpoint, where it has no second network, or where something is
            there already.
    """
    trainer, _, rest = model.name.partition("__")
    target = model.with_name(f"{trainer}{PARTNER_SUFFIX}__{rest}")
    sources = [model / f"fold_{fold}" / checkpoint_name for fold in folds]
    targets = [target / f"fold_{fold}" / checkpoint_name for fold in folds]
    for source, file in zip(sources, targets):
        if not source.is_file():
            raise UserError(f"{source} is missing. Train the fold first, or name another checkpoint with -chk.")
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists already. Add --overwrite to replace it.")
    # Everything is read and checked before anything is written.
    plans = read_json(model / "plans.json", "It is part of every model that nnU-Net trains.")
    checkpoints = [_partner_checkpoint(source, plans) for source in sources]
    for file, checkpoint in zip(targets, checkpoints):
        file.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(str(file), buffer.getvalue())
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if (model / name).is_file():
            shutil.copy(model / name, target / name)
    write_atomically(str(target / "plans.json"), json.dumps(plans, indent=4).encode())
    return target


def _partner_checkpoint(file: Path, plans: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the second network alone; the plans get its architecture."""
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    partner = checkpoint.get(STATE_KEY, {}).get("partner")
    if partner is None:
        raise UserError(f"{file} holds one network only; there is nothing to export. Predict with it as it is.")
    plans["configurations"][checkpoint["init_args"]["configuration"]]["architecture"] = partner["architecture"]
    return {
        "network_weights": partner["weights"],
        "init_args": {**checkpoint["init_args"], "plans": plans},
        **{key: checkpoint[key] for key in ("current_epoch", "inference_allowed_mirroring_axes", "trainer_name")},
    }

"""A further network of a training as a model folder of its own, which stock nnU-Net predicts with."""

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
from nnunet_ssl.training.checkpoint import COMPANIONS, STATE_KEY, check_layout


def export_network(
    model: Path, folds: Sequence[str], checkpoint_name: str, network: str | None = None, overwrite: bool = False
) -> Path:
    """Write a further network of a trained model beside it, under the trainer's name with its own name appended.

    Args:
        model: nnU-Net's result folder TRAINER__PLANS__CONFIGURATION.
        folds: Which to export.
        checkpoint_name: File name of the checkpoint in each fold's folder.
        network: Its name, e.g. "partner"; may be left out where there is one only.
        overwrite: Replace checkpoints that are there already.

    Returns:
        The new folder.

    Raises:
        UserError: Where there is no such model, checkpoint or network, or where something is there already.
    """
    sources = [model / f"fold_{fold}" / checkpoint_name for fold in folds]
    for source in sources:
        if not source.is_file():
            raise UserError(f"{source} is missing. Train the fold first, or name another checkpoint with -chk.")
    # Everything is read and checked before anything is written.
    plans = read_json(model / "plans.json", "It is part of every model that nnU-Net trains.")
    found = [torch.load(source, map_location="cpu", weights_only=False) for source in sources]
    names = {_name_of_network(source, checkpoint, network) for source, checkpoint in zip(sources, found)}
    if len(names) > 1:
        raise UserError(f"The folds hold different networks: {', '.join(sorted(names))}. Name one with --network.")
    (name,) = names
    trainer, _, rest = model.name.partition("__")
    target = model.with_name(f"{trainer}{name[0].upper()}{name[1:]}__{rest}")
    targets = [target / f"fold_{fold}" / checkpoint_name for fold in folds]
    for file in targets:
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists already. Add --overwrite to replace it.")
    checkpoints = [_checkpoint_of(checkpoint, name, plans) for checkpoint in found]
    for file, checkpoint in zip(targets, checkpoints):
        file.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(str(file), buffer.getvalue())
    for file_name in ("dataset.json", "dataset_fingerprint.json"):
        if (model / file_name).is_file():
            shutil.copy(model / file_name, target / file_name)
    write_atomically(str(target / "plans.json"), json.dumps(plans, indent=4).encode())
    return target


def _name_of_network(file: Path, checkpoint: dict[str, Any], wanted: str | None) -> str:
    state = checkpoint.get(STATE_KEY)
    if state is not None:
        check_layout(str(file), state)
    companions = {} if state is None else state[COMPANIONS]
    # Those that can stand for the plan's network: heads and discriminators cannot.
    names = [name for name, companion in companions.items() if companion["architecture"] is not None]
    if not names:
        raise UserError(f"{file} holds one network only; there is nothing to export. Predict with it as it is.")
    if wanted is None and len(names) > 1:
        raise UserError(f"{file} holds the further networks {', '.join(names)}. Name one with --network.")
    if wanted is not None and wanted not in names:
        raise UserError(f"{file} holds no network {wanted!r} that can be exported; it holds {', '.join(names)}.")
    return wanted or names[0]


def _checkpoint_of(checkpoint: dict[str, Any], name: str, plans: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of one further network alone; the plans get its architecture."""
    companion = checkpoint[STATE_KEY][COMPANIONS][name]
    plans["configurations"][checkpoint["init_args"]["configuration"]]["architecture"] = companion["architecture"]
    return {
        "network_weights": companion["weights"],
        "init_args": {**checkpoint["init_args"], "plans": plans},
        **{key: checkpoint[key] for key in ("current_epoch", "inference_allowed_mirroring_axes", "trainer_name")},
    }

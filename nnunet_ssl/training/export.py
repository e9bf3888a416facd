"""Further networks of a training as model folders, which stock nnU-Net predicts with."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_atomically
from nnunet_ssl.nnunet.folders import read_json
from nnunet_ssl.training.averaged import UNAVERAGED
from nnunet_ssl.training.checkpoint import COMPANIONS, STATE_KEY, check_layout

BOTH = "both"


class Export(NamedTuple):
    """What was written.

    folder: the new model folder; folds: those of it, by which nnUNetv2_predict finds its networks; both: whether the
    plan's network is among them, so that their mean is that of both.
    """

    folder: Path
    folds: list[str]
    both: bool


def export_network(
    model: Path, folds: Sequence[str], checkpoint_name: str, network: str | None = None, overwrite: bool = False
) -> Export:
    """Write a further network of a trained model beside it, under the trainer's name with its own name appended.

    With ``BOTH``, the plan's network and the further one of each fold become two folds of one folder, which nnU-Net
    averages; one that has another architecture than the plan's network needs a folder of its own, as ever.

    Args:
        model: nnU-Net's result folder TRAINER__PLANS__CONFIGURATION.
        folds: Which to export.
        checkpoint_name: File name of the checkpoint in each fold's folder.
        network: Its name, e.g. "partner", or ``BOTH``; may be left out where there is one only.
        overwrite: Replace checkpoints that are there already.

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
    names = {name_of_network(source, checkpoint, network) for source, checkpoint in zip(sources, found)}
    if len(names) > 1:
        raise UserError(f"The folds hold different networks: {', '.join(sorted(names))}. Name one with --network.")
    (name,) = names
    both = network == BOTH and all(_is_alike(checkpoint, name, plans) for checkpoint in found)
    if both:
        pairs = [(checkpoint, further) for checkpoint in found for further in (None, name)]
        checkpoints = {str(fold): _checkpoint_of(*pair, plans) for fold, pair in enumerate(pairs)}
    else:
        checkpoints = {fold: _checkpoint_of(checkpoint, name, plans) for fold, checkpoint in zip(folds, found)}
    trainer, _, rest = model.name.partition("__")
    appended = BOTH if both else name
    target = model.with_name(f"{trainer}{appended[0].upper()}{appended[1:]}__{rest}")
    targets = {target / f"fold_{fold}" / checkpoint_name: checkpoint for fold, checkpoint in checkpoints.items()}
    for file in targets:
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists already. Add --overwrite to replace it.")
    for file, checkpoint in targets.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(str(file), buffer.getvalue())
    for file_name in ("dataset.json", "dataset_fingerprint.json"):
        if (model / file_name).is_file():
            shutil.copy(model / file_name, target / file_name)
    write_atomically(str(target / "plans.json"), json.dumps(plans, indent=4).encode())
    return Export(target, list(checkpoints), both)


def name_of_network(file: Path, checkpoint: Mapping[str, Any], wanted: str | None) -> str:
    """Which further network of a checkpoint can stand for the plan's.

    Args:
        file: The checkpoint's, for the messages.
        checkpoint: Its content.
        wanted: A name; None for the only one, ``BOTH`` for the only one that was trained beside the plan's, rather
            than to be averaged into it.

    Raises:
        UserError: Where there is none, no such one, or several.
    """
    state = checkpoint.get(STATE_KEY)
    if state is not None:
        check_layout(str(file), state)
    companions = {} if state is None else state[COMPANIONS]
    # Those that can stand for the plan's network: heads and discriminators cannot.
    names = [name for name, companion in companions.items() if companion["architecture"] is not None]
    if wanted == BOTH:
        names, wanted = [name for name in names if name != UNAVERAGED], None
    if not names:
        raise UserError(f"{file} holds one network only, the plan's: predict with it as it is.")
    if wanted is None and len(names) > 1:
        raise UserError(f"{file} holds the further networks {', '.join(names)}. Name one with --network.")
    if wanted is not None and wanted not in names:
        raise UserError(f"{file} holds no network {wanted!r} that can be exported; it holds {', '.join(names)}.")
    return wanted or names[0]


def _is_alike(checkpoint: Mapping[str, Any], name: str, plans: dict[str, Any]) -> bool:
    """Whether a further network has the architecture of the plan's."""
    configuration = PlansManager(plans).get_configuration(checkpoint["init_args"]["configuration"])
    return bool(checkpoint[STATE_KEY][COMPANIONS][name]["architecture"] == configuration.configuration["architecture"])


def _checkpoint_of(checkpoint: dict[str, Any], name: str | None, plans: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of one network alone, None for the plan's; the plans get a further one's architecture."""
    weights = checkpoint["network_weights"]
    if name is not None:
        companion = checkpoint[STATE_KEY][COMPANIONS][name]
        weights = companion["weights"]
        plans["configurations"][checkpoint["init_args"]["configuration"]]["architecture"] = companion["architecture"]
    return {
        "network_weights": weights,
        "init_args": {**checkpoint["init_args"], "plans": plans},
        **{key: checkpoint[key] for key in ("current_epoch", "inference_allowed_mirroring_axes", "trainer_name")},
    }

"""The semi-supervised state inside nnU-Net's own checkpoint file, written atomically.

nnU-Net's keys keep nnU-Net's meaning, so that stock nnU-Net predicts with the file. What a stock checkpoint lacks
stands under one further key and holds tensors and plain values only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nnunet_ssl import __version__
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replace_atomically

STATE_KEY = "nnunet_ssl"
COMPANIONS = "companions"


def write_checkpoint(filename: str, stock: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Write a checkpoint; a kill or a full disk on the way leaves the previous file intact.

    Args:
        filename: Where to.
        stock: What nnU-Net reads, by its keys.
        ours: What stands under ``STATE_KEY``: "trainer", "companions" and what else resuming needs.
    """
    checkpoint = {**stock, STATE_KEY: {"version": __version__, **ours}}
    replace_atomically(filename, lambda temporary: torch.save(checkpoint, temporary))


def read_state(filename: str, trainer_name: str) -> dict[str, Any]:
    """What ``write_checkpoint`` put under ``STATE_KEY``.

    Raises:
        UserError: If another trainer wrote the file, or a version that saved its networks otherwise.
    """
    state = torch.load(filename, map_location="cpu", weights_only=False).get(STATE_KEY)
    if state is None or state["trainer"] != trainer_name:
        writer = "a trainer of another package" if state is None else state["trainer"]
        raise UserError(
            f"{filename} was written by {writer}, not by {trainer_name}; it cannot be continued or validated by it. "
            f"To start from its weights use -pretrained_weights (of the first network, where it has two)."
        )
    check_layout(filename, state)
    return state


def check_layout(filename: str, state: Mapping[str, Any]) -> None:
    """Refuse what a former version wrote.

    Raises:
        UserError: Naming the version that reads it.
    """
    if COMPANIONS not in state:
        raise UserError(
            f"{filename} was written by nnunet-ssl {state['version']}, which saved second networks otherwise. "
            f"Continue, validate and export it with that version (pip install nnunet-ssl=={state['version']}). "
            f"nnUNetv2_predict uses the model as it is, with any version and with none."
        )


def random_state(device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """The state of every generator that a training with single-process loading draws from."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "device": device.type,
        "python": [version, list(internal), next_gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "transforms": generator.get_state(),
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device, generator: torch.Generator) -> bool:
    """Undo everything drawn since ``random_state``; False where it was taken on another kind of device."""
    if state["device"] != device.type:
        return False
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    generator.set_state(state["transforms"].cpu())
    return True

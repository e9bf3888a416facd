"""The semi-supervised state inside nnU-Net's own checkpoint file, written atomically.

nnU-Net's keys keep nnU-Net's meaning, so that stock nnU-Net predicts with the file. What a stock checkpoint lacks
stands under one further key and holds tensors and plain values only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl import __version__
from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replace_atomically

if TYPE_CHECKING:
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer

STATE_KEY = "nnunet_ssl"


def write_checkpoint(trainer: SemiSupervisedTrainer, filename: str) -> None:
    """Write a trainer's checkpoint; a kill or a full disk on the way leaves the previous file intact.

    ``trainer_name`` says nnUNetTrainer where the network is the plan's own: such a file predicts on stock nnU-Net
    without this package. Who trained it stands under ``STATE_KEY``.
    """
    stock_network = type(trainer).build_network_architecture is nnUNetTrainer.build_network_architecture
    checkpoint = {
        "network_weights": bare(trainer.network).state_dict(),
        "optimizer_state": trainer.optimizer.state_dict(),
        "grad_scaler_state": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": trainer.current_epoch + 1,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": nnUNetTrainer.__name__ if stock_network else type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        STATE_KEY: {
            "trainer": type(trainer).__name__,
            "version": __version__,
            "hyperparameters": trainer.hp.as_dict(),
            "partner": partner_state(trainer),
            "learned": trainer.learned.state(),
            "random_state": random_state(trainer.device, trainer.generator),
        },
    }
    replace_atomically(filename, lambda temporary: torch.save(checkpoint, temporary))


def partner_state(trainer: SemiSupervisedTrainer) -> dict[str, Any] | None:
    """Weights of the second network, and its architecture as plans describe it; None without one."""
    plans = trainer.partner_plans()
    if plans is None or trainer.partner is None:
        return None
    configuration = PlansManager(plans).get_configuration(trainer.configuration_name).configuration
    return {"weights": bare(trainer.partner).state_dict(), "architecture": configuration["architecture"]}


def read_state(filename: str, trainer_name: str) -> dict[str, Any]:
    """What ``write_checkpoint`` put under ``STATE_KEY``.

    Raises:
        UserError: If another trainer wrote the file.
    """
    state = torch.load(filename, map_location="cpu", weights_only=False).get(STATE_KEY)
    if state is None or state["trainer"] != trainer_name:
        writer = "a trainer of another package" if state is None else state["trainer"]
        raise UserError(
            f"{filename} was written by {writer}, not by {trainer_name}; it cannot be continued or validated by it. "
            f"To start from its weights use -pretrained_weights (of the first network, where it has two)."
        )
    return state


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

"""A second network of a plan's architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_ssl.runtime.distributed import data_parallel

if TYPE_CHECKING:
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer


def build_partner(trainer: SemiSupervisedTrainer, plans: dict[str, Any]) -> nn.Module:
    """A second network on the trainer's device, built, compiled and wrapped as nnU-Net does with the first.

    Args:
        trainer: Already initialized by nnU-Net.
        plans: Whose network it is, in the trainer's configuration.
    """
    manager = PlansManager(plans)
    partner = trainer.build_network_architecture(
        manager,
        manager.get_configuration(trainer.configuration_name),
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    ).to(trainer.device)
    if trainer._do_i_compile():
        partner = torch.compile(partner)
    return data_parallel(partner) if trainer.is_ddp else partner

"""Where nnU-Net finds the trainers of nnunet-ssl: the folder of this file is what nnUNet_extTrainer names."""

from nnunet_ssl.methods.dual_net import nnUNetTrainerDualNet
from nnunet_ssl.methods.fdpl import nnUNetTrainerFDPL
from nnunet_ssl.methods.semi_tc import (
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerSupTC,
)
from nnunet_ssl.methods.supervised import nnUNetTrainerSupervised

__all__ = [
    "nnUNetTrainerDualNet",
    "nnUNetTrainerFDPL",
    "nnUNetTrainerSemiTC",
    "nnUNetTrainerSemiTCPlus",
    "nnUNetTrainerSupTC",
    "nnUNetTrainerSupervised",
]

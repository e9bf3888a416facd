"""Where nnU-Net finds the trainers of nnunet-ssl: the folder of this file is what nnUNet_extTrainer names."""

from nnunet_ssl.methods.dual_network import nnUNetTrainerDualNet
from nnunet_ssl.methods.fixed_dynamic import nnUNetTrainerFDPL
from nnunet_ssl.methods.supervised import nnUNetTrainerSupervised
from nnunet_ssl.methods.transformation_consistency import (
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerSupTC,
)

__all__ = [
    "nnUNetTrainerDualNet",
    "nnUNetTrainerFDPL",
    "nnUNetTrainerSemiTC",
    "nnUNetTrainerSemiTCPlus",
    "nnUNetTrainerSupTC",
    "nnUNetTrainerSupervised",
]

"""One method, one file; this is the table of them."""

from nnunet_ssl.methods.dual_network import nnUNetTrainerDualNet
from nnunet_ssl.methods.fixed_dynamic import nnUNetTrainerFDPL
from nnunet_ssl.methods.supervised import nnUNetTrainerSupervised
from nnunet_ssl.methods.transformation_consistency import (
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerSupTC,
)
from nnunet_ssl.trainer import SemiSupervisedTrainer

TRAINERS: tuple[type[SemiSupervisedTrainer], ...] = (
    nnUNetTrainerSupervised,
    nnUNetTrainerSupTC,
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerDualNet,
    nnUNetTrainerFDPL,
)

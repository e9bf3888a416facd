"""One method, one file; this is the table of them, and the one place where a method is registered."""

from nnunet_ssl.methods.dual_net import nnUNetTrainerDualNet
from nnunet_ssl.methods.fdpl import nnUNetTrainerFDPL
from nnunet_ssl.methods.self_training import nnUNetTrainerSelfTraining
from nnunet_ssl.methods.semi_tc import nnUNetTrainerSemiTC, nnUNetTrainerSemiTCPlus, nnUNetTrainerSupTC
from nnunet_ssl.methods.supervised import nnUNetTrainerSupervised
from nnunet_ssl.training.trainer import SemiSupervisedTrainer

TRAINERS: tuple[type[SemiSupervisedTrainer], ...] = (
    nnUNetTrainerSupervised,
    nnUNetTrainerSupTC,
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerDualNet,
    nnUNetTrainerFDPL,
    nnUNetTrainerSelfTraining,
)

# What the folder trainers/ exports to nnU-Net: the trainers of the table and nothing else.
__all__ = [trainer.__name__ for trainer in TRAINERS]

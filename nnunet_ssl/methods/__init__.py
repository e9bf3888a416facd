"""One method, one file; this is the table of them, and the one place where a method is registered."""

from nnunet_ssl.methods.bcp import nnUNetTrainerBCP
from nnunet_ssl.methods.cps import nnUNetTrainerCPS
from nnunet_ssl.methods.dual_net import nnUNetTrainerDualNet
from nnunet_ssl.methods.em import nnUNetTrainerEM
from nnunet_ssl.methods.fdpl import nnUNetTrainerFDPL
from nnunet_ssl.methods.fix_match import nnUNetTrainerFixMatch
from nnunet_ssl.methods.ict import nnUNetTrainerICT
from nnunet_ssl.methods.mean_teacher import nnUNetTrainerMeanTeacher
from nnunet_ssl.methods.self_training import nnUNetTrainerSelfTraining
from nnunet_ssl.methods.semi_tc import nnUNetTrainerSemiTC, nnUNetTrainerSemiTCPlus, nnUNetTrainerSupTC
from nnunet_ssl.methods.supervised import nnUNetTrainerSupervised
from nnunet_ssl.methods.ua_mt import nnUNetTrainerUAMT
from nnunet_ssl.methods.uni_match import nnUNetTrainerUniMatch
from nnunet_ssl.training.trainer import SemiSupervisedTrainer

TRAINERS: tuple[type[SemiSupervisedTrainer], ...] = (
    nnUNetTrainerSupervised,
    nnUNetTrainerSupTC,
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerDualNet,
    nnUNetTrainerFDPL,
    nnUNetTrainerMeanTeacher,
    nnUNetTrainerUAMT,
    nnUNetTrainerICT,
    nnUNetTrainerEM,
    nnUNetTrainerCPS,
    nnUNetTrainerFixMatch,
    nnUNetTrainerUniMatch,
    nnUNetTrainerBCP,
    nnUNetTrainerSelfTraining,
)

# What the folder trainers/ exports to nnU-Net: the trainers of the table and nothing else.
__all__ = [trainer.__name__ for trainer in TRAINERS]

"""The supervised baseline: nnU-Net's own training through our base class."""

from nnunet_ssl.training import HyperParameters, SemiSupervisedTrainer


class nnUNetTrainerSupervised(SemiSupervisedTrainer[HyperParameters]):
    """Labels alone; equals nnUNetTrainer step for step, but reads the block "ssl" of the plans file.

    So that the budget, augmentation and seed of a comparison are written in one place for all its trainers.
    """

    Parameters = HyperParameters
    views = ()

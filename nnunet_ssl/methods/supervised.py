"""The supervised baseline: nnU-Net's own training through our base class."""

from __future__ import annotations

from typing import Any

from nnunet_ssl.training.step import LossTerm
from nnunet_ssl.training.trainer import SemiSupervisedTrainer


class nnUNetTrainerSupervised(SemiSupervisedTrainer):
    """Labels alone; equals nnUNetTrainer step for step, but reads the block "ssl" of the plans file.

    So that the budget, augmentation and seed of a comparison are written in one place for all its trainers.
    """

    def loss_terms(self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> dict[str, LossTerm]:
        """nnU-Net's loss with deep supervision."""
        return {"supervised": LossTerm(self.supervised_loss(self.network(labeled["data"]), labeled["target"]), 1.0)}

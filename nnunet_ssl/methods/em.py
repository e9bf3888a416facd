"""Predictions on unlabeled images are to be sure: EM, entropy minimization.

Grandvalet, Bengio: "Semi-supervised learning by entropy minimization", NeurIPS 2004; for segmentation Vu et al.,
"ADVENT", CVPR 2019.

    L_e = mean over voxels of -sum_k p_k ln p_k / ln K

Departures: nnU-Net's loss, optimizer and augmentation; unlabeled images alone, where published codes add labeled ones,
whose entropy the loss on labels lowers anyway. Nothing in the term tells right from wrong: a structure that is doubted
more than it is believed disappears. It is the simplest baseline, and waiting for the structures matters most here.
"""

from __future__ import annotations

import dataclasses

from nnunet_ssl.losses.agreement import normalized_entropy
from nnunet_ssl.training import Labeled, Losses, MethodParameters, Outputs, SemiSupervisedTrainer, Unlabeled
from nnunet_ssl.training.hyperparameters import other_default, parameter


@dataclasses.dataclass(frozen=True)
class EMParameters(MethodParameters):
    """Hyper-parameters of entropy minimization."""

    unlabeled_ramp: float = other_default("unlabeled_ramp", 1.0)
    entropy_weight: float = parameter(0.1, "weight of the entropy", minimum=0.0)


class nnUNetTrainerEM(SemiSupervisedTrainer[EMParameters]):
    """The entropy of predictions on unlabeled images is a loss."""

    Parameters = EMParameters
    unlabeled_terms = ("entropy",)

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """The mean entropy, as a share of the largest."""
        return {"entropy": normalized_entropy(self.log_probabilities(self.network(unlabeled.strong))).mean()}

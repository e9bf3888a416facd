"""Consistency where the averaged teacher is sure: UAMT.

Yu, Wang, Li, Fu, Heng: "Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation",
MICCAI 2019.

    p = mean over T passes of the teacher, each with its own noise and dropout;   u = -sum_k p_k ln p_k
    L_c = sum over voxels with u < H(t) of the squared distance / their number,   H = (3/4 + ramp / 4) ln K

Departures: as MeanTeacher; ln K and the number of classes stand where the published code keeps the two classes of its
data set; channels are dropped at the bottleneck, since nnU-Net's networks have no dropout.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from nnunet_ssl.blocks.perturbation import FeatureDropout
from nnunet_ssl.losses.agreement import entropy, masked_mean, squared_distance
from nnunet_ssl.methods.mean_teacher import MeanTeacherParameters, nnUNetTrainerMeanTeacher
from nnunet_ssl.training import Labeled, Losses, Outputs, Unlabeled
from nnunet_ssl.training.hyperparameters import parameter
from nnunet_ssl.training.schedules import gaussian_ramp


@dataclasses.dataclass(frozen=True)
class UAMTParameters(MeanTeacherParameters):
    """Hyper-parameters of uncertainty-aware mean teachers."""

    noise_std: float = parameter(
        0.1, "Gaussian noise on the teacher's images, cut off at twice that", "standard deviations", minimum=0.0
    )
    passes: int = parameter(8, "passes of the teacher by which its uncertainty is judged", minimum=1)
    dropout: float = parameter(
        0.5, "part of the bottleneck's channels left out in these passes", minimum=0.0, maximum=0.99
    )
    first_threshold: float = parameter(
        0.75, "entropy below which a voxel counts at first; rises to 1", "of the largest", minimum=0.0, maximum=1.0
    )


class nnUNetTrainerUAMT(nnUNetTrainerMeanTeacher):
    """Reads what is set for MeanTeacher, then what is set for UAMT."""

    Parameters = UAMTParameters
    statistic_names = ("sure",)
    hp: UAMTParameters  # type: ignore[assignment]

    def build(self) -> None:
        """The averaged network, and its dropout."""
        super().build()
        self.dropout = FeatureDropout(self.teacher.module, self.hp.dropout, bottleneck_alone=True)

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """The distance from the teacher's probabilities, over the voxels where it is sure."""
        log_p = self.log_probabilities(self.network(unlabeled.strong))
        log_q, uncertainty = self.judge(unlabeled)
        share = self.hp.first_threshold + (1 - self.hp.first_threshold) * gaussian_ramp(self.stage_progress, 1.0)
        sure = uncertainty < share * math.log(log_p.shape[2])
        self.note("sure", sure.float().mean())
        return {"consistency": masked_mean(squared_distance(log_p, log_q), sure)}

    @torch.no_grad()
    def judge(self, unlabeled: Unlabeled) -> tuple[Tensor, Tensor]:
        """The teacher's log-probabilities of one pass (B, G, K, *S), and the entropy (B, *S) of the mean of several."""
        log_q = self.log_probabilities(self.teacher(self.for_teacher(unlabeled)))
        # Not one batch of all passes: probabilities of many classes would fill the memory.
        p = torch.zeros_like(log_q)
        for _ in range(self.hp.passes):
            outputs = self.dropout(self.for_teacher(unlabeled), self.generator)
            p += self.log_probabilities(outputs).exp() / self.hp.passes
        return log_q, entropy(p.clamp_min(1e-12).log())

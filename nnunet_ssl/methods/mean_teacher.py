"""Consistency with a network of averaged weights: MeanTeacher.

Tarvainen, Valpola: "Mean teachers are better role models: weight-averaged consistency targets improve semi-supervised
deep learning results", NeurIPS 2017; for segmentation as in Yu et al. (MICCAI 2019) without the uncertainty.

    theta' <- alpha theta' + (1 - alpha) theta after every step,   L_c = mean 1/2 sum_k (p_k(x) - p'_k(x'))^2

Departures: nnU-Net's loss, optimizer and augmentation; the student sees all of nnU-Net's augmentation and the teacher
the same patch without changes of intensity, where the codes add noise to equal images (an option here); the mean over
classes is half a sum, so that the term does not fade with many classes; no dropout, which nnU-Net's networks lack. The
student predicts, as in the codes for segmentation; the paper's choice is `nnunet-ssl export --network teacher`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nnunet_ssl.blocks.teacher import EMATeacher
from nnunet_ssl.losses.agreement import squared_distance
from nnunet_ssl.training import Labeled, Losses, MethodParameters, Outputs, SemiSupervisedTrainer, Unlabeled
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms.intensity import with_noise


@dataclasses.dataclass(frozen=True)
class MeanTeacherParameters(MethodParameters):
    """Hyper-parameters of mean teachers."""

    unlabeled_ramp: float = other_default("unlabeled_ramp", 0.4)
    consistency_weight: float = parameter(1.0, "weight of the consistency with the teacher", minimum=0.0)
    teacher_decay: float = parameter(0.99, "decay per step of the teacher's weights", minimum=0.0, maximum=0.9999)
    noise_std: float = parameter(
        0.0, "Gaussian noise on the teacher's images, cut off at twice that", "standard deviations", minimum=0.0
    )


class nnUNetTrainerMeanTeacher(SemiSupervisedTrainer[MeanTeacherParameters]):
    """The plan's network agrees with the running average of its own weights."""

    Parameters = MeanTeacherParameters
    unlabeled_terms = ("consistency",)
    views = ("strong", "weak")

    def build(self) -> None:
        """The averaged network."""
        self.teacher = self.add("teacher", EMATeacher(self.network, self.architecture, self.hp.teacher_decay))

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """The distance of the student's probabilities from the teacher's."""
        log_p = self.log_probabilities(self.network(unlabeled.strong))
        with torch.no_grad():
            log_q = self.log_probabilities(self.teacher(self.for_teacher(unlabeled)))
        return {"consistency": squared_distance(log_p, log_q).mean()}

    def for_teacher(self, unlabeled: Unlabeled) -> Tensor:
        """What the teacher sees."""
        return with_noise(unlabeled.weak, self.hp.noise_std, self.generator, self.num_image_channels)

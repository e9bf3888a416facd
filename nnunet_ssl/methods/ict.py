"""Predictions of a mixture are the mixture of predictions: ICT.

Verma, Lamb, Kannala, Bengio, Lopez-Paz: "Interpolation consistency training for semi-supervised learning", IJCAI 2019.

    x_m = (1 - b) x_0 + b x_1,   L_c = squared distance of p(x_m) from (1 - b) p'(x_0) + b p'(x_1),   b ~ Beta(a, a)

p' is the averaged teacher's. Departures: as MeanTeacher, without noise; b is drawn for every image (published codes:
once per batch); a single unlabeled image is mixed with a labeled one, of which the teacher's prediction is taken as
well; in a cascade the previous stage's segmentation is that of the image that weighs more.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nnunet_ssl.blocks.teacher import EMATeacher
from nnunet_ssl.losses.agreement import squared_distance
from nnunet_ssl.training import Labeled, Losses, MethodParameters, Outputs, SemiSupervisedTrainer, Unlabeled
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms import mixing


@dataclasses.dataclass(frozen=True)
class ICTParameters(MethodParameters):
    """Hyper-parameters of interpolation consistency."""

    unlabeled_ramp: float = other_default("unlabeled_ramp", 0.4)
    consistency_weight: float = parameter(1.0, "weight of the consistency of mixtures", minimum=0.0)
    teacher_decay: float = parameter(0.99, "decay per step of the teacher's weights", minimum=0.0, maximum=0.9999)
    mixing_alpha: float = parameter(
        0.2, "a in Beta(a, a): below 1 mostly one image, 1 any mixture alike", minimum=0.01, maximum=1.0
    )


class nnUNetTrainerICT(SemiSupervisedTrainer[ICTParameters]):
    """The plan's network agrees on mixtures with its averaged teacher on the images they are made of."""

    Parameters = ICTParameters
    unlabeled_terms = ("consistency",)
    views = ("strong", "weak")

    def build(self) -> None:
        """The averaged network."""
        self.teacher = self.add("teacher", EMATeacher(self.network, self.architecture, self.hp.teacher_decay))

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """The distance of the student's probabilities of the mixture from the mixed ones of the teacher."""
        images = unlabeled.strong
        share = mixing.draw_beta(len(images), self.hp.mixing_alpha, self.generator).to(images.device)
        share = share.view(-1, *[1] * (images.ndim - 1))
        log_p = self.log_probabilities(self.network(self.mix(images, mixing.others(images, labeled.images), share)))
        with torch.no_grad():
            seen = torch.cat([unlabeled.weak, labeled.images[:1]]) if len(images) == 1 else unlabeled.weak
            q = self.log_probabilities(self.teacher(seen)).exp()
            own, other = (q[:1], q[1:]) if len(images) == 1 else (q, q.roll(1, 0))
            mixed = own.lerp(other, share[:, None]).clamp_min(1e-12).log()
        return {"consistency": squared_distance(log_p, mixed).mean()}

    def mix(self, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        """(1 - share) first + share second; whole labels of a previous stage stay whole."""
        count = self.num_image_channels
        mixed = first[:, :count].lerp(second[:, :count], share)
        return torch.cat([mixed, torch.where(share > 0.5, second[:, count:], first[:, count:])], 1)

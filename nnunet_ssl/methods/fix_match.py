"""Sure labels of a weak view teach the network on a strong one: FixMatch.

Sohn et al.: "FixMatch: simplifying semi-supervised learning with consistency and confidence", NeurIPS 2020; for
segmentation, with CutMix, as in Yang et al. (CVPR 2023).

    y = argmax p(weak),   L_s = loss(p(strong), y) over voxels with max p(weak) >= tau

Departures: nnU-Net's loss (cross-entropy and Dice, deep supervision) over the sure voxels, divided by their number; the
strong view is nnU-Net's with further changes of intensity; of regions, all must be sure; a single unlabeled image is
mixed with a labeled one and its labels; an averaged network may label (`teacher_decay`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_ssl.blocks.teacher import EMATeacher
from nnunet_ssl.training import Labeled, Losses, MethodParameters, Output, Outputs, SemiSupervisedTrainer, Unlabeled
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms import mixing
from nnunet_ssl.transforms.intensity import strong_intensities


@dataclasses.dataclass(frozen=True)
class FixMatchParameters(MethodParameters):
    """Hyper-parameters of FixMatch."""

    unlabeled_ramp: float = other_default("unlabeled_ramp", 0.4)
    pseudo_label_weight: float = parameter(0.5, "weight of the sure labels", minimum=0.0)
    sure_from: float = parameter(0.95, "probability from which a voxel counts", minimum=0.0, maximum=1.0)
    strength: float = parameter(1.0, "of further changes of intensity on strong views", minimum=0.0, maximum=2.0)
    cutmix_share: float = parameter(0.5, "part of the strong view from another image", minimum=0.0, maximum=1.0)
    teacher_decay: float = parameter(0.0, "of an averaged network that labels; 0: none", minimum=0.0, maximum=0.9999)


class nnUNetTrainerFixMatch(SemiSupervisedTrainer[FixMatchParameters]):
    """The network's sure labels of weak views, learned on strong views."""

    Parameters = FixMatchParameters
    unlabeled_terms: ClassVar[tuple[str, ...]] = ("pseudo_label",)
    statistic_names = ("sure",)
    views: ClassVar[tuple[str, ...]] = ("strong", "weak")

    def build(self) -> None:
        """The averaged network, where one labels."""
        decay, network = self.hp.teacher_decay, self.network
        self.teacher = self.add("teacher", EMATeacher(network, self.architecture, decay)) if decay else None

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """The loss on the strong view against the sure labels of the weak one."""
        images, boxes = self.strong_view(unlabeled.strong, labeled.images)
        outputs, made = self.network(images), self.sure_labels(unlabeled.weak, labeled.target)
        return {"pseudo_label": self.loss_of_mixtures(outputs, *made, labeled.target, boxes)}

    def strong_view(self, images: Tensor, further: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images with further changes of intensity, mixed with others, and the boxes of the latter."""
        images = strong_intensities(images, self.hp.strength, self.generator, num_channels=self.num_image_channels)
        size, share = (len(images), images.shape[2:]), self.hp.cutmix_share
        boxes = mixing.cutmix_boxes(*size, share, self.generator, images.device) if share else None
        return mixing.mixed_with_others(images, further, boxes), boxes

    @torch.no_grad()
    def sure_labels(self, weak: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Labels as ``like``, and where the one who labels is sure, (B, 1, *S)."""
        outputs = self.network(weak) if self.teacher is None else self.teacher(weak)
        sure = self.confidence(outputs) >= self.hp.sure_from
        self.note("sure", sure.float().mean())
        return self.hard_labels(outputs, like), sure

    def loss_of_mixtures(
        self, outputs: Output, labels: Tensor, sure: Tensor, target: Tensor, boxes: Tensor | None
    ) -> Tensor:
        """The loss over sure voxels; those of ``target``, in a mixture with a labeled image, are sure."""
        pairs = (labels, target), (sure, torch.ones_like(sure))
        return self.pseudo_label_loss(outputs, *(mixing.mixed_with_others(*pair, boxes) for pair in pairs))

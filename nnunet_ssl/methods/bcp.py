"""Copy-paste between labeled and unlabeled images, in both directions: BCP.

Bai, Chen, Li, Shen, Wang: "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023.

    x_1 = labeled inside a box, unlabeled outside;   x_2 = unlabeled inside, labeled outside
    L = loss over annotated voxels + w loss over the others, against the averaged teacher's labels of the whole patch

Departures: nnU-Net's loss with deep supervision, over either part; each pair of images gives both mixtures, with the
same box, so that every voxel of a pair is learned from once; no largest component of pseudo-labels, which is wrong for
parts of organs in a patch; the teacher sees the patch without changes of intensity. In stage 1 labeled images are
pasted into each other, as in the paper's pre-training. The published code chose its checkpoints on test cases.
"""

from __future__ import annotations

import dataclasses

import torch

from nnunet_ssl.blocks.teacher import EMATeacher
from nnunet_ssl.training import Labeled, MethodParameters, SemiSupervisedTrainer, Step, Unlabeled
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms import mixing


@dataclasses.dataclass(frozen=True)
class BCPParameters(MethodParameters):
    """Hyper-parameters of bidirectional copy-paste."""

    supervised_fraction: float = other_default("supervised_fraction", 0.25)
    pseudo_label_weight: float = parameter(
        0.5, "weight w of the teacher's labels; 0 for nnU-Net's training", minimum=0.0
    )
    teacher_decay: float = parameter(0.99, "decay per step of the teacher's weights", minimum=0.0, maximum=0.9999)
    box_side: float = parameter(0.667, "side of the box", "of the patch side", minimum=0.01, maximum=1.0)


class nnUNetTrainerBCP(SemiSupervisedTrainer[BCPParameters]):
    """Mixtures of labeled and unlabeled images, with the labels of people and of an averaged teacher."""

    Parameters = BCPParameters
    unlabeled_terms = ("pseudo_label",)
    views = ("strong", "weak")

    def build(self) -> None:
        """The averaged network."""
        self.teacher = self.add("teacher", EMATeacher(self.network, self.architecture, self.hp.teacher_decay))

    def step(self, labeled: Labeled, unlabeled: Unlabeled | None) -> Step:
        """One pass over all mixtures."""
        if not self.hp.pseudo_label_weight:
            return super().step(labeled, None)
        images, target = labeled.images, labeled.target
        if unlabeled is None:
            boxes = self.boxes(images)
            images, target = (mixing.mix(t, t.roll(1, 0), boxes) for t in (images, target))
            outputs = self.network(images)
            return Step({"supervised": self.supervised_loss(outputs, target)}, ([outputs], target))
        count = max(len(images), len(unlabeled.strong))
        known, guessed = (torch.arange(count, device=images.device) % len(part) for part in (images, unlabeled.strong))
        boxes = self.boxes(images[known])
        annotated = torch.cat([boxes, ~boxes])
        pictures, others = (
            part.repeat(2, *[1] * (images.ndim - 1)) for part in (images[known], unlabeled.strong[guessed])
        )
        outputs = self.network(mixing.mix(others, pictures, annotated))
        twice = target[known].repeat(2, *[1] * (images.ndim - 1))
        losses = {"supervised": self.masked_supervised_loss(outputs, twice, annotated)}
        if self.weight("pseudo_label"):
            labels = self.hard_labels(self.teacher(unlabeled.weak), target)[guessed]
            labels = labels.repeat(2, *[1] * (images.ndim - 1))
            losses["pseudo_label"] = self.pseudo_label_loss(outputs, labels, ~annotated)
        return Step(losses, ([outputs], self.masked_target(twice, annotated)))

    def boxes(self, images: torch.Tensor) -> torch.Tensor:
        """Where each image is pasted into another, (B, 1, *S)."""
        size = len(images), images.shape[2:], self.hp.box_side
        return mixing.boxes_of_side(*size, self.generator, images.device)

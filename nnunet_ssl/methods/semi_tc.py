"""Consistency under elastic transformations: SupTC, SemiTC and SemiTC+.

Bortsova, Dubost, Hogeweg, Katramados, de Bruijne: "Semi-supervised medical image segmentation via learning
consistency under transformations", MICCAI 2019.

Departures from the paper: nnU-Net's loss, optimizer and augmentation instead of soft IoU, Adadelta and none (the
paper's loss is an option); linear instead of nearest interpolation of predictions (an option too); the field is
declared relative to the patch and made so that it cannot fold; voxels whose counterpart lies outside the patch do not
count, nor does a structure that neither branch finds in an image: the paper's images show all structures, patches do
not; both stages of the paper's schedule run in one training; the consistency term waits until every structure is
learned.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor

from nnunet_ssl.blocks.networks import full_resolution, quiet_pass, split_outputs
from nnunet_ssl.losses.overlap import SoftIoULoss, found_classes, soft_iou_loss
from nnunet_ssl.training import Labeled, MethodParameters, SemiSupervisedTrainer, Step, Unlabeled, View
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms.alignment import inside_mask, without_margin
from nnunet_ssl.transforms.displacement import Interpolation, warp
from nnunet_ssl.transforms.elastic import ElasticTransforms


@dataclasses.dataclass(frozen=True)
class SemiTCParameters(MethodParameters):
    """Hyper-parameters of the elastic-equivariance Siamese network."""

    supervised_fraction: float = other_default("supervised_fraction", 0.5)
    consistency_weight: float = parameter(1.0, "weight lambda of the consistency term", minimum=0.0)
    smoothness: float = parameter(
        0.1, "sigma of the Gaussian that smooths the displacement", "fraction of the patch side", minimum=0.01
    )
    displacement_std: float = parameter(
        0.02, "standard deviation of the displacement, per axis", "fraction of the patch side", minimum=0.0
    )
    identity_probability: float = parameter(
        0.5, "how often a transform is the identity, per example and branch", minimum=0.0, maximum=1.0
    )
    interpolation: str = parameter(
        "linear", "how predictions are aligned; nearest is the paper's layer", choices=("linear", "nearest")
    )
    supervised_loss: str = parameter(
        "nnunet", "nnunet: cross-entropy and Dice; soft_iou: the paper's", choices=("nnunet", "soft_iou")
    )


class nnUNetTrainerSupTC(SemiSupervisedTrainer[SemiTCParameters]):
    """Supervised training with the consistency term on the labeled cases."""

    Parameters = SemiTCParameters
    unlabeled_terms = ("consistency",)
    views: ClassVar[tuple[str, ...]] = ()

    def build(self) -> None:
        """The transforms of both branches."""
        hp, fixed_axes = self.hp, (0,) if self.augments_slice_by_slice else ()
        self.fields = ElasticTransforms(hp.smoothness, hp.displacement_std, hp.identity_probability, fixed_axes)

    def on_train_start(self) -> None:
        """Start, and say what the transforms are in voxels."""
        super().on_train_start()
        self.print_to_log_file(self.fields.describe(tuple(self.configuration_manager.patch_size)))

    def step(self, labeled: Labeled, unlabeled: Unlabeled | None) -> Step:
        """S on both branches, and in stage 2 lambda C over labeled and unlabeled examples alike."""
        num_labeled = len(labeled.images)
        data = labeled.images if unlabeled is None else torch.cat([labeled.images, unlabeled.strong])
        u1, u2 = self.fields.draw(data, self.generator), self.fields.draw(data, self.generator)
        margin = self.fields.grid(tuple(data.shape[2:])).margin
        t1, t2 = without_margin(u1, margin), without_margin(u2, margin)
        outputs = self.network(torch.cat([self.warp_input(data, t1), self.warp_input(data, t2)]))
        branch_1, branch_2 = split_outputs(outputs, len(data))

        on_labels = [split_outputs(branch, num_labeled)[0] for branch in (branch_1, branch_2)]
        targets = [warp(labeled.target, t[:num_labeled], "nearest") for t in (t1, t2)]
        first, second = (self.supervised_loss(outputs, moved) for outputs, moved in zip(on_labels, targets))
        losses = {"supervised": (first + second) / 2}
        if self.in_second_stage:
            losses["consistency"] = self.consistency(full_resolution(branch_1), full_resolution(branch_2), u1, u2)
        return Step(losses, (on_labels[:1], targets[0]))

    def view(self, images: Tensor, generator: torch.Generator) -> View:
        """Both branches' labels in the frame of branch 2, where they disagree, and where they can be compared."""
        shape = tuple(images.shape[2:])
        u1, u2 = (self.fields.sample(len(images), shape, generator).to(images.device) for _ in range(2))
        margin = self.fields.grid(shape).margin
        warped = [self.warp_input(images, without_margin(u, margin)) for u in (u1, u2)]
        labels_1, branch_2 = (self.label_map(quiet_pass(self.network, image)) for image in warped)
        alignment = self.fields.align(u1, u2, shape)
        aligned, compared = warp(labels_1[:, None], alignment, "nearest")[:, 0], inside_mask(alignment)[:, 0]
        maps = {
            "branch 1, aligned": aligned,
            "branch 2": branch_2,
            "disagree": (aligned != branch_2) & compared,
            "compared": compared,
        }
        return View(self.label_map(quiet_pass(self.network, images)), maps, warped[1])

    def warp_input(self, data: Tensor, displacement: Tensor) -> Tensor:
        """What the network sees, moved: the previous stage's segmentation of a cascade stays one of whole labels."""
        if not self.is_cascaded:
            return warp(data, displacement)
        num_labels = len(self.label_manager.foreground_labels)
        image, labels = data.tensor_split([data.shape[1] - num_labels], dim=1)
        return torch.cat([warp(image, displacement), warp(labels, displacement, "nearest")], dim=1)

    def consistency(self, logits_1: Tensor, logits_2: Tensor, u1: Tensor, u2: Tensor) -> Tensor:
        """C: soft IoU loss between prediction 1, brought into the frame of branch 2, and prediction 2.

        A structure that neither branch predicts in an image does not count there. A soft IoU is 1 only where both are
        sure of a voxel, so it would grow such a structure out of the voxels where it is least improbable.

        Args:
            logits_1: (B, K, *S), of the images warped by u1.
            logits_2: (B, K, *S), of the images warped by u2.
            u1: (B, D, *(S + 2 margin)), in voxels, with the margin of ``fields.grid``.
            u2: Of the same shape.
        """
        regions = self.has_regions
        p1, p2 = self.probabilities(logits_1), self.probabilities(logits_2)
        alignment = self.fields.align(u1, u2, tuple(logits_1.shape[2:]))
        aligned, mask = warp(p1, alignment, cast(Interpolation, self.hp.interpolation)), inside_mask(alignment)
        found = found_classes(aligned, regions, mask) | found_classes(p2, regions, mask)
        return soft_iou_loss(aligned, p2, mask, found)

    def _build_loss(self) -> torch.nn.Module:
        loss = super()._build_loss()
        if self.hp.supervised_loss == "nnunet":
            return loss
        soft_iou = SoftIoULoss(self.has_regions, self.label_manager.ignore_label)
        return DeepSupervisionWrapper(soft_iou, loss.weight_factors) if self.enable_deep_supervision else soft_iou


class nnUNetTrainerSemiTC(nnUNetTrainerSupTC):
    """Labels alone in stage 1, then batches that are partly unlabeled, with the consistency term on all of them."""

    views = ("strong",)


class nnUNetTrainerSemiTCPlus(nnUNetTrainerSemiTC):
    """SemiTC+, transductive: the images of the fold's validation cases and of imagesTs are unlabeled cases too."""

    transductive = True

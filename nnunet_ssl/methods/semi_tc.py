"""Consistency under spatial transformations: SupTC, SemiTC and SemiTC+.

Bortsova, Dubost, Hogeweg, Katramados, de Bruijne: "Semi-supervised medical image segmentation via learning
consistency under transformations", MICCAI 2019.

Departures from the paper: nnU-Net's loss, optimizer and augmentation instead of soft IoU, Adadelta and none (the
paper's loss is an option). The transform is a rotation and a change of size with the paper's elastic field on top: on
small patches, and in 3D, a field that cannot fold moves voxels by a fraction of one (rotation and scaling 0 leave the
field alone). The field is declared relative to the patch, the same for all axes, and made so that it cannot fold. A
transform is the identity in 20 %, not 50 % of draws: pairs of two teach nothing. Images are interpolated linearly, not
by splines; predictions linearly, not by nearest neighbor (an option). The paper's soft IoU is 0 only where predictions
are equal and sure: most of it is entropy. A Tanimoto distance, 0 for all equal ones, is an option; it gave up small
structures where both were tried (docs/tuning.md). Voxels whose counterpart lies outside the patch do not count, nor
does a structure that neither branch finds in an image: the paper's images show all structures, patches do not. Both
stages of the paper's schedule run in one training; the consistency term waits for each structure until it is learned.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor

from nnunet_ssl.blocks.networks import full_resolution, quiet_pass, split_outputs
from nnunet_ssl.losses.overlap import SoftIoULoss, found_classes, soft_iou_loss, tanimoto_loss
from nnunet_ssl.training import Labeled, MethodParameters, SemiSupervisedTrainer, Step, Unlabeled, View
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms.displacement import Interpolation, warp
from nnunet_ssl.transforms.spatial import SpatialTransforms, Transform


@dataclasses.dataclass(frozen=True)
class SemiTCParameters(MethodParameters):
    """Hyper-parameters of the Siamese network that follows transforms."""

    supervised_fraction: float = other_default("supervised_fraction", 0.5)
    consistency_weight: float = parameter(1.0, "weight lambda of the consistency term", minimum=0.0)
    rotation: float = parameter(
        15.0, "largest rotation of a transform, in 3D about each axis", "degrees", minimum=0.0, maximum=180.0
    )
    scaling: float = parameter(
        0.15, "sizes change by factors between 1 / (1 + scaling) and 1 + scaling", minimum=0.0, maximum=1.0
    )
    smoothness: float = parameter(
        0.1,
        "sigma of the Gaussian that smooths the elastic displacement, the same for all axes",
        "fraction of the geometric mean of the patch's sides",
        minimum=0.01,
        maximum=1.0,
    )
    displacement_std: float = parameter(
        0.02,
        "standard deviation of each component of the elastic displacement",
        "fraction of the geometric mean of the patch's sides",
        minimum=0.0,
    )
    identity_probability: float = parameter(
        0.2, "how often a transform is the identity, per example and branch", minimum=0.0, maximum=1.0
    )
    consistency_loss: str = parameter(
        "soft_iou", "soft_iou: the paper's; tanimoto: 0 for equal predictions", choices=("soft_iou", "tanimoto")
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
        self.transforms = SpatialTransforms(
            hp.rotation, hp.scaling, hp.smoothness, hp.displacement_std, hp.identity_probability, fixed_axes
        )

    def on_train_start(self) -> None:
        """Start, and say what the transforms are in voxels."""
        super().on_train_start()
        self.print_to_log_file(self.transforms.describe(tuple(self.configuration_manager.patch_size)))

    def step(self, labeled: Labeled, unlabeled: Unlabeled | None) -> Step:
        """S on both branches, and in stage 2 lambda C over labeled and unlabeled examples alike."""
        num_labeled = len(labeled.images)
        data = labeled.images if unlabeled is None else torch.cat([labeled.images, unlabeled.strong])
        twice = torch.cat([data, data])
        transform = self.transforms.draw(twice, self.generator)
        outputs = self.network(self.warp_input(twice, transform.displacement))
        branch_1, branch_2 = split_outputs(outputs, len(data))
        t1, t2 = transform.halves()

        on_labels = [split_outputs(branch, num_labeled)[0] for branch in (branch_1, branch_2)]
        moves = torch.cat([t.displacement[:num_labeled] for t in (t1, t2)])
        targets = warp(torch.cat([labeled.target, labeled.target]), moves, "nearest").split(num_labeled)
        first, second = (self.supervised_loss(outputs, moved) for outputs, moved in zip(on_labels, targets))
        losses = {"supervised": (first + second) / 2}
        if self.in_second_stage:
            losses["consistency"] = self.consistency(full_resolution(branch_1), full_resolution(branch_2), t1, t2)
        return Step(losses, (on_labels[:1], targets[0]))

    def view(self, images: Tensor, generator: torch.Generator) -> View:
        """Both branches' labels in the frame of branch 2, where they disagree, and where they can be compared."""
        t1, t2 = self.transforms.draw(torch.cat([images, images]), generator, identity_probability=0.0).halves()
        warped = [self.warp_input(images, t.displacement) for t in (t1, t2)]
        labels_1, branch_2 = (self.label_map(quiet_pass(self.network, image)) for image in warped)
        alignment, compared = self.transforms.align(t1, t2)
        aligned, compared = warp(labels_1[:, None], alignment, "nearest")[:, 0], compared[:, 0]
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

    def consistency(self, logits_1: Tensor, logits_2: Tensor, t1: Transform, t2: Transform) -> Tensor:
        """C: how prediction 1, brought into the frame of branch 2, differs from prediction 2.

        A structure that neither branch predicts in an image does not count there: what is improbable everywhere would
        else weigh as much as what is found.

        Args:
            logits_1: (B, K, *S), of the images warped by t1.
            logits_2: (B, K, *S), of the images warped by t2.
            t1: As drawn for B examples.
            t2: Likewise.
        """
        regions = self.has_regions
        p1, p2 = self.probabilities(logits_1), self.probabilities(logits_2)
        alignment, compared = self.transforms.align(t1, t2)
        aligned = warp(p1, alignment, cast(Interpolation, self.hp.interpolation))
        found = found_classes(aligned, regions, compared) | found_classes(p2, regions, compared)
        loss = soft_iou_loss if self.hp.consistency_loss == "soft_iou" else tanimoto_loss
        return loss(aligned, p2, compared, found)

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

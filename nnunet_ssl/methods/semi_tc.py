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
from typing import Any, ClassVar

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor

from nnunet_ssl.blocks.networks import full_resolution, quiet_pass, split_outputs
from nnunet_ssl.losses.overlap import SoftIoULoss, found_classes, soft_iou_loss
from nnunet_ssl.losses.predictions import label_map, probabilities
from nnunet_ssl.training.hyperparameters import HyperParameters, SemiSupervisedParameters, parameter
from nnunet_ssl.training.monitor import IMAGE, PSEUDO_LABELS
from nnunet_ssl.training.schedules import gaussian_ramp
from nnunet_ssl.training.step import LossTerm
from nnunet_ssl.training.trainer import SemiSupervisedTrainer
from nnunet_ssl.transforms.alignment import SolverGrid, align_displacements, inside_mask, solver_grid, without_margin
from nnunet_ssl.transforms.displacement import sample_displacement, warp

# Enough fields to say their strength to a few percent, few enough to cost nothing.
_NUM_FIELDS_SAID = 16


@dataclasses.dataclass(frozen=True)
class TransformationConsistencyParameters(SemiSupervisedParameters):
    """Hyper-parameters of the elastic-equivariance Siamese network."""

    supervised_fraction: float = parameter(
        0.5, "fraction of the epochs trained on labels alone, before the consistency term", minimum=0.0, maximum=1.0
    )
    consistency_weight: float = parameter(1.0, "weight lambda of the consistency term", minimum=0.0)
    consistency_ramp: float = parameter(
        0.0, "fraction of stage 2 over which the weight rises from 0; 0 for at once", minimum=0.0, maximum=1.0
    )
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


class nnUNetTrainerSupTC(SemiSupervisedTrainer):
    """Supervised training with the consistency term on the labeled cases."""

    hyperparameters_class: ClassVar[type[HyperParameters]] = TransformationConsistencyParameters
    unlabeled_terms: ClassVar[tuple[str, ...]] = ("consistency",)
    term_names: ClassVar[tuple[str, ...]] = ("supervised", *unlabeled_terms)

    def on_train_start(self) -> None:
        """Start, and say what the transforms are in voxels: fields that could fold are scaled down."""
        super().on_train_start()
        asked = [self.hp.displacement_std * side for side in self.configuration_manager.patch_size]
        # A generator of its own, so that a resumed training draws what the interrupted one would have drawn.
        sample = self._sample(_NUM_FIELDS_SAID, tuple(self.configuration_manager.patch_size), torch.Generator())
        reached = sample.std(dim=[0, *range(2, sample.ndim)]).tolist()
        moved = [axis for axis in range(len(asked)) if reached[axis] > 0]
        self.print_to_log_file(
            f"Elastic transforms: displacement of {', '.join(f'{reached[a]:.2f}' for a in moved) or '0'} voxels "
            f"(standard deviation per axis; {', '.join(f'{asked[a]:.2f}' for a in moved) or '0'} asked for, less where "
            f"fields are scaled down so that they cannot fold)"
        )

    def loss_terms(self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> dict[str, LossTerm]:
        """S on both branches, and in stage 2 lambda C over labeled and unlabeled examples alike."""
        data, target = labeled["data"], labeled["target"]
        num_labeled = len(data)
        if unlabeled is not None:
            data = torch.cat([data, unlabeled["strong"]])
        u1, u2 = self.draw_displacement(data), self.draw_displacement(data)
        margin = self.grid(tuple(data.shape[2:])).margin
        t1, t2 = without_margin(u1, margin), without_margin(u2, margin)
        outputs = self.network(torch.cat([self.warp_input(data, t1), self.warp_input(data, t2)]))
        branch_1, branch_2 = split_outputs(outputs, len(data))

        on_labels = [split_outputs(branch, num_labeled)[0] for branch in (branch_1, branch_2)]
        targets = [warp(target, t[:num_labeled], "nearest") for t in (t1, t2)]
        losses = [self.supervised_loss(outputs, moved) for outputs, moved in zip(on_labels, targets)]
        self.note_learned(on_labels[:1], targets[0])
        terms = {"supervised": LossTerm((losses[0] + losses[1]) / 2, 1.0)}
        if self.in_second_stage:
            weight = self.hp.consistency_weight * gaussian_ramp(self.stage_progress, self.hp.consistency_ramp)
            consistency = self.consistency(full_resolution(branch_1), full_resolution(branch_2), u1, u2)
            terms["consistency"] = LossTerm(consistency, weight)
        return terms

    def view(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Both branches' labels in the frame of branch 2, where they disagree, and where they can be compared."""
        shape = tuple(images.shape[2:])
        u1, u2 = (self._sample(len(images), shape, generator).to(images.device) for _ in range(2))
        margin = self.grid(shape).margin
        warped = [self.warp_input(images, without_margin(u, margin)) for u in (u1, u2)]
        regions = self.label_manager.has_regions
        logits = [quiet_pass(self.network, image) for image in warped]
        alignment = align_displacements(u1, u2, grid=self.grid(shape))
        aligned = warp(label_map(logits[0], regions)[:, None], alignment, "nearest")[:, 0]
        branch_2, compared = label_map(logits[1], regions), inside_mask(alignment)[:, 0]
        return {
            IMAGE: warped[1],
            "branch 1, aligned": aligned,
            "branch 2": branch_2,
            "disagree": (aligned != branch_2) & compared,
            "compared": compared,
            PSEUDO_LABELS: label_map(quiet_pass(self.network, images), regions),
        }

    def warp_input(self, data: Tensor, displacement: Tensor) -> Tensor:
        """What the network sees, moved: the previous stage's segmentation of a cascade stays one of whole labels."""
        if not self.is_cascaded:
            return warp(data, displacement)
        num_labels = len(self.label_manager.foreground_labels)
        image, labels = data.tensor_split([data.shape[1] - num_labels], dim=1)
        return torch.cat([warp(image, displacement), warp(labels, displacement, "nearest")], dim=1)

    def draw_displacement(self, data: Tensor) -> Tensor:
        """One branch's transforms of a batch (B, C, *S): displacements in voxels, with the margin of ``grid``."""
        displacement = self._sample(len(data), tuple(data.shape[2:]), self.generator).to(data.device)
        moved = torch.rand(len(data), generator=self.generator, device=self.generator.device)
        moved = (moved >= self.hp.identity_probability).to(data.device)
        return displacement * moved.view(-1, *[1] * (displacement.ndim - 1))

    def consistency(self, logits_1: Tensor, logits_2: Tensor, u1: Tensor, u2: Tensor) -> Tensor:
        """C: soft IoU loss between prediction 1, brought into the frame of branch 2, and prediction 2.

        A structure that neither branch predicts in an image does not count there. A soft IoU is 1 only where both are
        sure of a voxel, so it would grow such a structure out of the voxels where it is least improbable.

        Args:
            logits_1: (B, K, *S), of the images warped by u1.
            logits_2: (B, K, *S), of the images warped by u2.
            u1: (B, D, *(S + 2 margin)), in voxels, with the margin of ``grid``.
            u2: Of the same shape.
        """
        regions = self.label_manager.has_regions
        p1, p2 = probabilities(logits_1, regions), probabilities(logits_2, regions)
        alignment = align_displacements(u1, u2, grid=self.grid(tuple(logits_1.shape[2:])))
        aligned, mask = warp(p1, alignment, self.hp.interpolation), inside_mask(alignment)
        found = found_classes(aligned, regions, mask) | found_classes(p2, regions, mask)
        return soft_iou_loss(aligned, p2, mask, found)

    def grid(self, spatial_shape: tuple[int, ...]) -> SolverGrid:
        """How far fields reach beyond a patch, and where their alignment is solved."""
        return solver_grid(spatial_shape, self.hp.smoothness, self._fixed_axes)

    @property
    def _fixed_axes(self) -> tuple[int, ...]:
        return (0,) if self.augments_slice_by_slice else ()

    def _sample(self, batch_size: int, spatial_shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return sample_displacement(
            batch_size,
            spatial_shape,
            smoothness=self.hp.smoothness,
            displacement_std=self.hp.displacement_std,
            generator=generator,
            fixed_axes=self._fixed_axes,
            margin=self.grid(spatial_shape).margin,
        )

    def _build_loss(self) -> torch.nn.Module:
        loss = super()._build_loss()
        if self.hp.supervised_loss == "nnunet":
            return loss
        soft_iou = SoftIoULoss(self.label_manager.has_regions, self.label_manager.ignore_label)
        return DeepSupervisionWrapper(soft_iou, loss.weight_factors) if self.enable_deep_supervision else soft_iou


class nnUNetTrainerSemiTC(nnUNetTrainerSupTC):
    """Labels alone in stage 1, then batches that are partly unlabeled, with the consistency term on all of them."""

    uses_unlabeled: ClassVar[bool] = True


class nnUNetTrainerSemiTCPlus(nnUNetTrainerSemiTC):
    """SemiTC+, transductive: the images of the fold's validation cases and of imagesTs are unlabeled cases too."""

    transductive: ClassVar[bool] = True

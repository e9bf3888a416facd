"""Co-training with fixed and dynamic pseudo-labels: FDPL.

Kumari, Singh: "Leveraging fixed and dynamic pseudo-labels for semi-supervised medical image segmentation",
arXiv:2405.07256 (2024).

Departures from the paper: nnU-Net's loss with deep supervision on pseudo-labels too, optimizer and augmentation; any
number of classes, and regions; crops in 3D are shifted in a random direction per axis, by less where images are hardly
larger than the patch, and show zeros where they leave the image; a single unlabeled image per batch is mixed with a
labeled one, whose labels then count inside the box. The summary at hand names neither weight, ramp nor shift: weights
of 0.2 with a Gaussian ramp (tuned, docs/tuning.md), an eighth of the side. The networks label images before nnU-Net's
changes of intensity, which the paper does not make (weak and strong views as in FixMatch, Sohn et al. 2020). A first
quarter of the epochs, on labels alone, goes before (tuned as well), and pseudo-labels count once every structure is
learned.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import full_resolution, quiet_pass, split_outputs
from nnunet_ssl.losses.predictions import hard_labels, label_map
from nnunet_ssl.training.hyperparameters import HyperParameters, SemiSupervisedParameters, parameter
from nnunet_ssl.training.monitor import IMAGE, PSEUDO_LABELS
from nnunet_ssl.training.schedules import gaussian_ramp
from nnunet_ssl.training.step import LossTerm
from nnunet_ssl.training.trainer import SemiSupervisedTrainer
from nnunet_ssl.transforms.mixing import compose_pseudo_labels, cutmix_boxes, draw_shift, mix, shifted_crop

_SMALLEST_WEIGHT = 1e-9


@dataclasses.dataclass(frozen=True)
class FixedDynamicParameters(SemiSupervisedParameters):
    """Hyper-parameters of co-training with fixed and dynamic pseudo-labels."""

    supervised_fraction: float = parameter(
        0.25, "fraction of the epochs trained on labels alone, before the pseudo-labels", minimum=0.0, maximum=1.0
    )
    unlabeled_ramp: float = parameter(
        0.4, "fraction of stage 2 over which the weights of the pseudo-labels rise", minimum=0.0, maximum=1.0
    )
    fixed_weight: float = parameter(0.2, "weight of the fixed pseudo-labels; 0 for dynamic ones alone", minimum=0.0)
    dynamic_weight: float = parameter(
        0.2,
        "weight of the dynamic pseudo-labels; 0 for fixed ones alone: cross pseudo supervision, if cutmix is off too",
        minimum=0.0,
    )
    shift: float = parameter(
        0.125,
        "how far the shifted crop lies off the center; less along axes where the plan's median image has no room",
        "fraction of the patch side",
        minimum=0.0,
        maximum=1.0,
    )
    weak_teacher: bool = parameter(
        True, "whether images are labeled without intensity augmentation; else as the networks learn from them"
    )
    cutmix: bool = parameter(True, "whether the second network learns from mixtures of two images")
    cutmix_share: float = parameter(0.5, "part of the patch that comes from the other image", minimum=0.01, maximum=1.0)
    cross_entropy_share: float | None = parameter(
        None,
        "alpha in alpha CE + (1 - alpha) Dice, the loss on labels; nnU-Net's own (CE + Dice) if null",
        minimum=0.0,
        maximum=1.0,
    )


class nnUNetTrainerFDPL(SemiSupervisedTrainer):
    """Two networks of the plan's architecture, each taught by the other's pseudo-labels of two crops."""

    hyperparameters_class: ClassVar[type[HyperParameters]] = FixedDynamicParameters
    unlabeled_terms: ClassVar[tuple[str, ...]] = ("fixed", "fixed_partner", "dynamic", "dynamic_partner")
    term_names: ClassVar[tuple[str, ...]] = ("supervised", "supervised_partner", *unlabeled_terms)
    statistic_names: ClassVar[tuple[str, ...]] = ("agreement", "redecided")
    uses_unlabeled: ClassVar[bool] = True
    pseudo_label_loss: nn.Module

    def initialize(self) -> None:
        """Build both networks, and say where images leave no room for the shift."""
        super().initialize()
        if self.hp.shift > 0 and self.hp.dynamic_weight > 0 and not any(self.unlabeled_margin):
            self.print_to_log_file(
                "WARNING: images are hardly larger than the patch, so there is no shifted crop to look at: dynamic "
                "pseudo-labels equal the fixed ones. A smaller patch (nnunet-ssl configure --patch-size) makes room."
            )

    def partner_plans(self) -> dict[str, Any]:
        """The plans themselves: the second network differs by its initial weights and by what it sees."""
        return copy.deepcopy(self.plans_manager.plans)

    @property
    def unlabeled_margin(self) -> tuple[int, ...]:
        """What the shifted crops need beyond the patch; nothing across the slices of anisotropic patches.

        No more than the median image has beyond the patch: crops that hang over the border lose what they show there,
        and networks that learn from such labels shrink structures.
        """
        plan = self.configuration_manager
        shift = self.hp.shift if self.hp.dynamic_weight > 0 else 0.0
        fixed_axes = (0,) if self.augments_slice_by_slice else ()
        room = [
            max(0, int(whole - side) // 2) for whole, side in zip(plan.median_image_size_in_voxels, plan.patch_size)
        ]
        wanted = [0 if axis in fixed_axes else round(shift * side) for axis, side in enumerate(plan.patch_size)]
        return tuple(map(min, wanted, room))

    def loss_terms(self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> dict[str, LossTerm]:
        """Both networks learn from labels, and each from the other's pseudo-labels."""
        data, target = labeled["data"], labeled["target"]
        if unlabeled is None or not (self.hp.fixed_weight or self.hp.dynamic_weight):
            outputs = [network(data) for network in self.networks]
            self.note_learned(outputs, target)
            return self._supervised_terms(outputs, target)

        margin = self.unlabeled_margin
        shift = draw_shift(margin, self.generator)
        no_shift = [0] * len(margin)
        center = shifted_crop(unlabeled["strong"], margin, no_shift)
        weak = unlabeled["weak" if self.wants_weak_view else "strong"]
        to_label = shifted_crop(weak, margin, no_shift), shifted_crop(weak, margin, shift)
        boxes = None
        if self.hp.cutmix:
            boxes = cutmix_boxes(len(center), center.shape[2:], self.hp.cutmix_share, self.generator, center.device)
        mixed = center if boxes is None else mix(center, self._partners(center, data), boxes)

        # The passes with gradient, the labeled batch and the unlabeled one together. They come before those without:
        # autocast would keep the copies of weights that the latter make, and these lead to no gradient.
        passes = [network(torch.cat([data, images])) for network, images in zip(self.networks, (center, mixed))]
        on_labels, on_images = zip(*(split_outputs(outputs, len(data)) for outputs in passes))
        self.note_learned(on_labels, target)
        # A network that has seen the very crop to label already needs no further pass of it.
        known = [None if self.wants_weak_view else outputs for outputs in on_images]
        if boxes is not None:
            known[1] = None
        fixed, dynamic = zip(
            *(self.pseudo_labels(n, k, *to_label, shift, target) for n, k in zip(self.networks, known))
        )
        self.statistics["agreement"] = (fixed[0] == fixed[1]).float().mean()
        self.statistics["redecided"] = torch.stack([(d != f).float().mean() for d, f in zip(dynamic, fixed)]).mean()

        terms = self._supervised_terms(on_labels, target)
        ramp = gaussian_ramp(self.stage_progress, self.hp.unlabeled_ramp)
        for name, labels, weight in (
            ("fixed", fixed, self.hp.fixed_weight),
            ("dynamic", dynamic, self.hp.dynamic_weight),
        ):
            if weight == 0:
                continue
            for_second = labels[0] if boxes is None else mix(labels[0], self._partners(labels[0], target), boxes)
            for student, teaching in (("", labels[1]), ("_partner", for_second)):
                outputs = on_images[1 if student else 0]
                value = self.supervised_loss(outputs, teaching, self.pseudo_label_loss)
                terms[name + student] = LossTerm(value, weight * ramp)
        return terms

    def view(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Both networks' labels of the center crop, where they disagree, and the first one's dynamic labels."""
        margin, regions = self.unlabeled_margin, self.label_manager.has_regions
        shift = draw_shift(margin, generator)
        center = shifted_crop(images, margin, [0] * len(margin))
        first, second = (label_map(quiet_pass(network, center), regions) for network in self.networks)
        temporary = label_map(quiet_pass(self.networks[0], shifted_crop(images, margin, shift)), regions)
        dynamic = compose_pseudo_labels(first[:, None], temporary[:, None], shift)[:, 0]
        return {
            IMAGE: center,
            "network 2": second,
            "disagree": first != second,
            PSEUDO_LABELS: first,
            "dynamic": dynamic,
            "redecided": dynamic != first,
        }

    @torch.no_grad()
    def pseudo_labels(
        self,
        teacher: nn.Module,
        known: Any | None,
        center: Tensor,
        shifted: Tensor,
        shift: tuple[int, ...],
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A network's fixed and dynamic pseudo-labels of the center crop, without gradient.

        Args:
            teacher: The network.
            known: Its outputs for the center crop, where they are at hand already.
            center: The center crop (B, C, *S).
            shifted: The crop that lies off the center by ``shift``.
            shift: In voxels per axis. At zero, both crops are one.
            like: nnU-Net's target, whose type and channels the labels get.

        Returns:
            Two label maps (B, 1, *S), or region channels (B, R, *S).
        """
        wanted = ([center] if known is None else []) + ([shifted] if any(shift) else [])
        logits = list(full_resolution(teacher(torch.cat(wanted))).split(len(shifted))) if wanted else []
        if known is not None:
            logits.insert(0, full_resolution(known))
        labels = [hard_labels(z, like, self.label_manager.has_regions) for z in logits]
        return labels[0], compose_pseudo_labels(labels[0], labels[-1], shift)

    def _supervised_terms(self, outputs: Any, target: Tensor) -> dict[str, LossTerm]:
        names = ("supervised", "supervised_partner")
        return {name: LossTerm(self.supervised_loss(o, target), 1.0) for name, o in zip(names, outputs)}

    @staticmethod
    def _partners(unlabeled: Tensor, labeled: Tensor) -> Tensor:
        """What each unlabeled image or label map is mixed with: another one; a single one with a labeled one."""
        return unlabeled.roll(1, 0) if len(unlabeled) > 1 else labeled[:1]

    def _build_loss(self) -> nn.Module:
        loss: nn.Module = super()._build_loss()
        self.pseudo_label_loss = loss
        if self.hp.cross_entropy_share is None:
            return loss
        weighted: Any = super()._build_loss()
        parts = weighted.loss if isinstance(weighted, DeepSupervisionWrapper) else weighted
        alpha = self.hp.cross_entropy_share
        # Not 0: nnU-Net leaves a part of weight 0 out, and where no voxel is annotated the cross-entropy too; a loss
        # without any part has no gradient.
        parts.weight_ce, parts.weight_dice = alpha, max(1.0 - alpha, _SMALLEST_WEIGHT)
        return weighted

"""Co-training with fixed and dynamic pseudo-labels: FDPL.

Kumari, Singh: "Leveraging fixed and dynamic pseudo-labels for semi-supervised medical image segmentation",
arXiv:2405.07256 (2024).

Departures from the paper: nnU-Net's loss with deep supervision on pseudo-labels too, optimizer and augmentation; any
number of classes, and regions; of two crops that show a voxel, the dynamic label comes from the one in which it lies
farther from the border, where the paper takes the shifted crop's; crops in 3D are shifted in a random direction per
axis, by less where images are hardly larger than the patch, and show zeros where they leave the image; a single
unlabeled image per batch is mixed with a labeled one, whose labels then count inside the box. The summary at hand names
neither weight, ramp nor shift: weights of 0.2 with a Gaussian ramp (tuned, docs/tuning.md), an eighth of the side. The
networks label images before nnU-Net's changes of intensity, which the paper does not make (weak and strong views as in
FixMatch, Sohn et al. 2020). A first quarter of the epochs, on labels alone, goes before (tuned as well), and
each structure counts in pseudo-labels once it is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import full_resolution, quiet_pass, split_outputs
from nnunet_ssl.nnunet.loss import with_cross_entropy_share
from nnunet_ssl.training import Labeled, MethodParameters, SemiSupervisedTrainer, Step, Unlabeled, View
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms import mixing


@dataclasses.dataclass(frozen=True)
class FDPLParameters(MethodParameters):
    """Hyper-parameters of co-training with fixed and dynamic pseudo-labels."""

    supervised_fraction: float = other_default("supervised_fraction", 0.25)
    unlabeled_ramp: float = other_default("unlabeled_ramp", 0.4)
    fixed_weight: float = parameter(0.2, "weight of the fixed pseudo-labels; 0 for dynamic ones alone", minimum=0.0)
    dynamic_weight: float = parameter(
        0.2, "weight of the dynamic pseudo-labels; 0 for fixed ones alone (without cutmix: CPS)", minimum=0.0
    )
    shift: float = parameter(
        0.125, "distance of the shifted crop; less without room", "fraction of the patch side", minimum=0.0, maximum=1.0
    )
    weak_teacher: bool = parameter(True, "whether images are labeled without intensity augmentation")
    cutmix: str = parameter(
        "second",
        "which networks learn from mixtures of two images: second, both or none",
        choices=("second", "both", "none"),
    )
    cutmix_share: float = parameter(0.5, "part of the patch that comes from the other image", minimum=0.01, maximum=1.0)
    cross_entropy_share: float | None = parameter(
        None, "alpha in alpha CE + (1 - alpha) Dice, the loss on labels; CE + Dice if null", minimum=0.0, maximum=1.0
    )


class nnUNetTrainerFDPL(SemiSupervisedTrainer[FDPLParameters]):
    """Two networks of the plan's architecture, each taught by the other's pseudo-labels of two crops."""

    Parameters = FDPLParameters
    unlabeled_terms = ("fixed", "fixed_partner", "dynamic", "dynamic_partner")
    statistic_names = ("agreement", "redecided")
    views = ("strong", "weak")

    def build(self) -> None:
        """The partner, which differs by its initial weights and by what it sees."""
        self.add("partner", self.build_partner())
        if self.hp.shift > 0 and self.hp.dynamic_weight > 0 and not any(self.unlabeled_margin):
            self.print_to_log_file(
                "WARNING: images are hardly larger than the patch, so there is no shifted crop to look at: dynamic "
                "pseudo-labels equal the fixed ones. A smaller patch (nnunet-ssl configure --patch-size) makes room."
            )

    def wanted_views(self) -> tuple[str, ...]:
        """The networks' view when they label, and when they learn where it is another."""
        return self.views if self.hp.weak_teacher else ("strong",)

    @property
    def unlabeled_margin(self) -> tuple[int, ...]:
        """What the shifted crops need beyond the patch; nothing across the slices of anisotropic patches."""
        plan = self.configuration_manager
        shift = self.hp.shift if self.hp.dynamic_weight > 0 else 0.0
        fixed_axes = (0,) if self.augments_slice_by_slice else ()
        return mixing.room_for_shift(shift, plan.patch_size, plan.median_image_size_in_voxels, fixed_axes)

    def step(self, labeled: Labeled, unlabeled: Unlabeled | None) -> Step:
        """Both networks learn from labels, and each from the other's pseudo-labels."""
        if unlabeled is None or not (self.hp.fixed_weight or self.hp.dynamic_weight):
            return super().step(labeled, None)
        data, target = labeled.images, labeled.target
        margin = self.unlabeled_margin
        # From the number of the step alone: nothing must be saved, and no draw on the device is waited for.
        place = self.generator.initial_seed(), self.current_epoch, self._iterations_done_in_epoch
        shift = mixing.draw_shift(margin, np.random.default_rng(place))
        no_shift = [0] * len(margin)
        center = mixing.shifted_crop(unlabeled.strong, margin, no_shift)
        weak = unlabeled.weak if self.hp.weak_teacher else unlabeled.strong
        to_label = mixing.shifted_crop(weak, margin, no_shift), mixing.shifted_crop(weak, margin, shift)
        boxes, size = None, center.shape[2:]
        if self.hp.cutmix != "none":
            boxes = mixing.cutmix_boxes(len(center), size, self.hp.cutmix_share, self.generator, center.device)
        # What each network learns from; where both learn from mixtures, it is the same one.
        boxes_of = (boxes if self.hp.cutmix == "both" else None, boxes)
        seen = [mixing.mixed_with_others(center, data, box) for box in boxes_of]

        # The passes with gradient, the labeled batch and the unlabeled one together. They come before those without:
        # autocast would keep the copies of weights that the latter make, and these lead to no gradient.
        passes = [network(torch.cat([data, images])) for network, images in zip(self.predictors, seen)]
        on_labels, on_images = zip(*(split_outputs(outputs, len(data)) for outputs in passes))
        # A network that has seen the very crop to label already needs no further pass of it.
        is_known = [box is None and not self.hp.weak_teacher for box in boxes_of]
        known = [outputs if there else None for outputs, there in zip(on_images, is_known)]
        made = [self.pseudo_labels(n, k, to_label, shift, target) for n, k in zip(self.predictors, known)]
        fixed, dynamic = zip(*made)
        self.note("agreement", (fixed[0] == fixed[1]).float().mean())
        self.note("redecided", torch.stack([(d != f).float().mean() for d, f in zip(dynamic, fixed)]).mean())

        losses = {name: self.supervised_loss(o, target) for name, o in zip(self.supervised_terms, on_labels)}
        for name, labels in (("fixed", fixed), ("dynamic", dynamic)):
            if self.weight(name) == 0:
                continue
            for student, term in enumerate((name, f"{name}_partner")):
                pseudo = mixing.mixed_with_others(labels[1 - student], target, boxes_of[student])
                losses[term] = self.pseudo_label_loss(on_images[student], pseudo)
        return Step(losses, (on_labels, target))

    def view(self, images: Tensor, generator: torch.Generator) -> View:
        """Both networks' labels of the center crop, where they disagree, and the first one's dynamic labels."""
        margin = self.unlabeled_margin
        shift = mixing.draw_shift(margin, np.random.default_rng(generator.initial_seed()))
        center = mixing.shifted_crop(images, margin, [0] * len(margin))
        first, second = (self.label_map(quiet_pass(network, center)) for network in self.predictors)
        temporary = self.label_map(quiet_pass(self.network, mixing.shifted_crop(images, margin, shift)))
        dynamic = mixing.compose_pseudo_labels(first[:, None], temporary[:, None], shift)[:, 0]
        maps = {"network 2": second, "disagree": first != second, "dynamic": dynamic, "redecided": dynamic != first}
        return View(first, maps, center)

    @torch.no_grad()
    def pseudo_labels(
        self, teacher: nn.Module, known: Any, crops: Sequence[Tensor], shift: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A network's fixed and dynamic pseudo-labels of the center crop: targets, without gradient.

        Args:
            teacher: The network.
            known: Its outputs for the center crop, where they are at hand already.
            crops: The center crop (B, C, *S), and the one that lies off it by ``shift`` voxels per axis; at zero, both
                are one.
            shift: In voxels per axis.
            like: nnU-Net's target, whose type and channels the labels get.
        """
        wanted = [*crops[:1]] * (known is None) + [*crops[1:]] * any(shift)
        logits = list(full_resolution(teacher(torch.cat(wanted))).split(len(crops[0]))) if wanted else []
        if known is not None:
            logits.insert(0, full_resolution(known))
        labels = [self.hard_labels(z, like) for z in logits]
        return labels[0], mixing.compose_pseudo_labels(labels[0], labels[-1], shift)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        share = self.hp.cross_entropy_share
        return loss if share is None else with_cross_entropy_share(loss, share)

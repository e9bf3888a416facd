"""Dual networks with uncertainty and contrastive losses: DualNet.

Lu, Wu, Kateb, Chaddad: "Semi-supervised medical image segmentation via dual networks", arXiv:2505.17690 (2025).

Departures from the paper: nnU-Net's loss, optimizer and augmentation; a residual-encoder U-Net beside the plan's own
instead of a 3D ResNet beside a V-Net; any number of classes, and regions; a reliable voxel is one where both networks
are sure; the paper names no weights but the contrastive one, here all are 1 but that, with a common ramp; the teacher
sees unlabeled images before nnU-Net's changes of intensity, which the paper does not make (weak and strong views as in
FixMatch, Sohn et al. 2020); a first quarter of the epochs is spent on labels alone (tuned, docs/results.md), and all
terms but the supervised wait until every structure is learned. On several devices, entropies are compared and
prototypes made on each for itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from nnunet_ssl.blocks.features import FeatureTap
from nnunet_ssl.blocks.networks import full_resolution, quiet_pass
from nnunet_ssl.losses.agreement import (
    cosine_distance,
    entropy,
    kl_divergence,
    masked_mean,
    pseudo_label_cross_entropy,
    upper_threshold,
)
from nnunet_ssl.losses.contrastive import contrastive_loss
from nnunet_ssl.losses.overlap import soft_dice_loss
from nnunet_ssl.losses.predictions import label_map, likeliest, log_probabilities, probabilities, target_maps
from nnunet_ssl.nnunet.plans import with_partner_network
from nnunet_ssl.runtime.distributed import mean_over_ranks
from nnunet_ssl.training.hyperparameters import HyperParameters, SemiSupervisedParameters, parameter
from nnunet_ssl.training.monitor import PSEUDO_LABELS
from nnunet_ssl.training.schedules import gaussian_ramp
from nnunet_ssl.training.step import LossTerm
from nnunet_ssl.training.trainer import SemiSupervisedTrainer


@dataclasses.dataclass(frozen=True)
class DualNetworkParameters(SemiSupervisedParameters):
    """Hyper-parameters of the dual networks."""

    supervised_fraction: float = parameter(
        0.25, "fraction of the epochs trained on labels alone, before the other terms", minimum=0.0, maximum=1.0
    )
    unlabeled_ramp: float = parameter(
        0.4, "fraction of stage 2 over which the weights of all terms but the supervised rise", minimum=0.0, maximum=1.0
    )
    pseudo_label_weight: float = parameter(1.0, "weight of the pseudo-label term; 0 switches it off", minimum=0.0)
    consistency_weight: float = parameter(1.0, "weight of the consistency term; 0 switches it off", minimum=0.0)
    uncertainty_weight: float = parameter(1.0, "weight of the uncertainty term; 0 switches it off", minimum=0.0)
    contrastive_weight: float = parameter(0.1, "weight of the contrastive term; 0 switches it off", minimum=0.0)
    weak_teacher: bool = parameter(
        True, "whether the teacher sees unlabeled images without intensity augmentation; else as the student sees them"
    )
    reliable_fraction: float = parameter(
        0.8, "a voxel is reliable where both entropies are among this fraction of the lowest", minimum=0.0, maximum=1.0
    )
    temperature: float = parameter(0.5, "sharpens the teacher in the uncertainty term", minimum=0.01)
    contrastive_points: int = parameter(4096, "uncertain voxels drawn per step", "voxels", minimum=1)
    contrastive_margin: float = parameter(
        1.0, "distance to which prototypes are pushed apart", "radius of the unit sphere", minimum=0.0, maximum=2.0
    )


class nnUNetTrainerDualNet(SemiSupervisedTrainer):
    """The plan's network and its residual partner; at each step, the better one teaches the other."""

    hyperparameters_class: ClassVar[type[HyperParameters]] = DualNetworkParameters
    unlabeled_terms: ClassVar[tuple[str, ...]] = ("pseudo_label", "consistency", "uncertainty", "contrastive")
    term_names: ClassVar[tuple[str, ...]] = ("supervised", "supervised_partner", *unlabeled_terms)
    statistic_names: ClassVar[tuple[str, ...]] = ("network_teaches", "reliable")
    uses_unlabeled: ClassVar[bool] = True

    def initialize(self) -> None:
        """Build both networks; their features are kept where the contrastive term needs them."""
        super().initialize()
        self._teacher = 0
        wanted = self.hp.contrastive_weight > 0
        self._taps = [FeatureTap(network) for network in self.networks] if wanted else []

    def partner_plans(self) -> dict[str, Any]:
        """The plans with the partner's network."""
        plans = self.plans_manager
        return with_partner_network(plans.plans, f"{plans.plans_name}_partner", self.configuration_name)

    def loss_terms(self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> dict[str, LossTerm]:
        """Both networks learn from labels, and the student from the teacher."""
        outputs = [network(labeled["data"]) for network in self.networks]
        terms = {
            name: LossTerm(self.supervised_loss(output, labeled["target"]), 1.0)
            for name, output in zip(("supervised", "supervised_partner"), outputs)
        }
        self.note_learned(outputs, labeled["target"])
        weights = {name: getattr(self.hp, f"{name}_weight") for name in self.unlabeled_terms}
        if unlabeled is None or not any(weights.values()):
            return terms
        logits = [full_resolution(output) for output in outputs]
        teacher = self.choose_teacher(logits, labeled["target"])
        student = 1 - teacher
        self._teacher = teacher
        if self._taps:
            student_outputs, features = self._taps[student](unlabeled["strong"])
        else:
            student_outputs, features = self.networks[student](unlabeled["strong"]), None
        with torch.no_grad():
            seen = unlabeled["weak" if self.wants_weak_view else "strong"]
            teacher_logits = full_resolution(self.networks[teacher](seen))
        values = self.student_terms(
            [full_resolution(student_outputs), logits[student]], [teacher_logits, logits[teacher].detach()], features
        )
        ramp = gaussian_ramp(self.stage_progress, self.hp.unlabeled_ramp)
        self.statistics["network_teaches"] = float(teacher == 0)
        return terms | {name: LossTerm(value, weights[name] * ramp) for name, value in values.items()}

    def view(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Both networks' labels, where they disagree, the last teacher's pseudo-labels and where they count.

        The plan's network stands for the teacher in stage 1.
        """
        regions = self.label_manager.has_regions
        logits = [quiet_pass(network, images) for network in self.networks]
        labels = [label_map(z, regions) for z in logits]
        log_p = [log_probabilities(z, regions) for z in logits]
        reliable = self.reliable_voxels(log_p[0], log_p[1])
        return {
            "network": labels[0],
            "partner": labels[1],
            "disagree": labels[0] != labels[1],
            "reliable": reliable,
            PSEUDO_LABELS: labels[self._teacher],
        }

    @torch.no_grad()
    def choose_teacher(self, logits: list[Tensor], target: Tensor) -> int:
        """Which network has the lower Dice loss on the labeled batch, over all ranks: 0 is the plan's network.

        The one answer that a step needs from the device before it ends: it saves the teacher's backward pass on the
        unlabeled batch, a sixth of the step.

        Args:
            logits: Of both networks, (B_l, K, *S).
            target: At full resolution.
        """
        regions = self.label_manager.has_regions
        truth, mask = target_maps(target, logits[0].shape[1], regions, self.label_manager.ignore_label)
        # Without the background, as in nnU-Net's Dice loss.
        first = 0 if regions else min(1, truth.shape[1] - 1)
        losses = [soft_dice_loss(probabilities(z, regions)[:, first:], truth[:, first:], mask) for z in logits]
        return int(mean_over_ranks(torch.stack(losses)).argmin().item())

    @torch.no_grad()
    def reliable_voxels(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Where both networks' entropies are among the lowest of the batch: boolean (B, *S)."""
        sure = [h <= upper_threshold(h, self.hp.reliable_fraction) for h in (entropy(log_p), entropy(log_q))]
        return sure[0] & sure[1]

    def student_terms(self, student: list[Tensor], teacher: list[Tensor], features: Tensor | None) -> dict[str, Tensor]:
        """What the student learns from the teacher.

        Args:
            student: Its logits (B, K, *S) of the unlabeled batch, then of the labeled one.
            teacher: Likewise; without gradient.
            features: The student's features (B_u, C, *S) of the unlabeled batch; needed by the contrastive term.
        """
        hp, regions = self.hp, self.label_manager.has_regions
        log_p, log_q = log_probabilities(student[0], regions), log_probabilities(teacher[0], regions)
        labels = likeliest(log_q, 2)
        reliable = self.reliable_voxels(log_p, log_q)
        self.statistics["reliable"] = reliable.float().mean()
        terms = {}
        cross_entropy = pseudo_label_cross_entropy(log_p, labels)
        if hp.pseudo_label_weight > 0:
            terms["pseudo_label"] = masked_mean(cross_entropy, reliable)
        if hp.consistency_weight > 0:
            on_labeled = cosine_distance(log_probabilities(student[1], regions), log_probabilities(teacher[1], regions))
            distances = [cosine_distance(log_p, log_q).flatten(), on_labeled.flatten()]
            terms["consistency"] = torch.cat(distances).mean()
        if hp.uncertainty_weight > 0:
            divergence = kl_divergence(log_p, log_probabilities(teacher[0], regions, hp.temperature))
            certainty = torch.exp(-divergence.detach())
            terms["uncertainty"] = (certainty * cross_entropy).mean() + divergence.mean()
        if features is not None:
            terms["contrastive"] = contrastive_loss(
                features,
                labels,
                reliable,
                log_p.shape[2],
                hp.contrastive_points,
                hp.contrastive_margin,
                self.generator,
            )
        return terms

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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.blocks.features import FeatureTap
from nnunet_ssl.blocks.networks import full_resolution, quiet_pass
from nnunet_ssl.losses import agreement
from nnunet_ssl.losses.contrastive import contrastive_loss
from nnunet_ssl.losses.overlap import foreground_dice_loss
from nnunet_ssl.losses.predictions import likeliest
from nnunet_ssl.nnunet.plans import with_partner_network
from nnunet_ssl.runtime.distributed import mean_over_ranks
from nnunet_ssl.training import Labeled, Losses, MethodParameters, Outputs, SemiSupervisedTrainer, Unlabeled, View
from nnunet_ssl.training.hyperparameters import other_default, parameter


@dataclasses.dataclass(frozen=True)
class DualNetParameters(MethodParameters):
    """Hyper-parameters of the dual networks."""

    supervised_fraction: float = other_default("supervised_fraction", 0.25)
    unlabeled_ramp: float = other_default("unlabeled_ramp", 0.4)
    pseudo_label_weight: float = parameter(1.0, "weight of the pseudo-label term; 0 switches it off", minimum=0.0)
    consistency_weight: float = parameter(1.0, "weight of the consistency term; 0 switches it off", minimum=0.0)
    uncertainty_weight: float = parameter(1.0, "weight of the uncertainty term; 0 switches it off", minimum=0.0)
    contrastive_weight: float = parameter(0.1, "weight of the contrastive term; 0 switches it off", minimum=0.0)
    weak_teacher: bool = parameter(True, "whether the teacher sees unlabeled images without intensity augmentation")
    reliable_fraction: float = parameter(
        0.8, "a voxel is reliable where both entropies are among this fraction of the lowest", minimum=0.0, maximum=1.0
    )
    temperature: float = parameter(0.5, "sharpens the teacher in the uncertainty term", minimum=0.01)
    contrastive_points: int = parameter(4096, "uncertain voxels drawn per step", "voxels", minimum=1)
    contrastive_margin: float = parameter(
        1.0, "distance to which prototypes are pushed apart", "radius of the unit sphere", minimum=0.0, maximum=2.0
    )


class nnUNetTrainerDualNet(SemiSupervisedTrainer[DualNetParameters]):
    """The plan's network and its residual partner; at each step, the better one teaches the other."""

    Parameters = DualNetParameters
    unlabeled_terms = ("pseudo_label", "consistency", "uncertainty", "contrastive")
    statistic_names = ("network_teaches", "reliable")
    views = ("strong", "weak")

    def build(self) -> None:
        """The partner; the features of both are kept where the contrastive term needs them."""
        plans = self.plans_manager
        plans = with_partner_network(plans.plans, f"{plans.plans_name}_partner", self.configuration_name)
        self.add("partner", self.build_partner(plans))
        # The last teacher, 0 for the plan's network.
        self.teacher = 0
        wanted = self.hp.contrastive_weight > 0
        self._taps = [FeatureTap(network) for network in self.predictors] if wanted else []

    def wanted_views(self) -> tuple[str, ...]:
        """The student's view, and the teacher's where it is another."""
        return self.views if self.hp.weak_teacher else ("strong",)

    def trains(self, term: str) -> tuple[str, ...]:
        """The last student."""
        return ("partner",) if self.teacher == 0 else ("network",)

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """What the student learns from the teacher."""
        logits = [full_resolution(output) for output in outputs]
        self.teacher = teacher = self.choose_teacher(logits, labeled.target)
        student = 1 - teacher
        if self._taps:
            student_outputs, features = self._taps[student](unlabeled.strong)
        else:
            student_outputs, features = self.predictors[student](unlabeled.strong), None
        with torch.no_grad():
            seen = unlabeled.weak if self.hp.weak_teacher else unlabeled.strong
            teacher_logits = full_resolution(self.predictors[teacher](seen))
        self.note("network_teaches", float(teacher == 0))
        return self.student_terms(
            [full_resolution(student_outputs), logits[student]], [teacher_logits, logits[teacher].detach()], features
        )

    def view(self, images: Tensor, generator: torch.Generator) -> View:
        """Both networks' labels, where they disagree, the last teacher's pseudo-labels and where they count."""
        logits = [quiet_pass(network, images) for network in self.predictors]
        labels = [self.label_map(z) for z in logits]
        reliable = self.reliable_voxels(*(self.log_probabilities(z) for z in logits))
        maps = {"network": labels[0], "partner": labels[1], "disagree": labels[0] != labels[1], "reliable": reliable}
        return View(labels[self.teacher], maps)

    def memory(self) -> dict[str, Any]:
        """The last teacher, whose pseudo-labels the pictures show."""
        return {"teacher": self.teacher}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on with it."""
        self.teacher = memory["teacher"]

    @torch.no_grad()
    def choose_teacher(self, logits: list[Tensor], target: Tensor) -> int:
        """Which network has the lower Dice loss on the labeled batch, over all ranks: 0 is the plan's network.

        The one answer that a step needs from the device before it ends: it saves the teacher's backward pass on the
        unlabeled batch, a sixth of the step.
        """
        ignore = self.label_manager.ignore_label
        losses = [foreground_dice_loss(z, target, self.has_regions, ignore) for z in logits]
        return int(mean_over_ranks(torch.stack(losses)).argmin().item())

    @torch.no_grad()
    def reliable_voxels(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Where both networks' entropies are among the lowest of the batch: boolean (B, *S)."""
        entropies, fraction = [agreement.entropy(log) for log in (log_p, log_q)], self.hp.reliable_fraction
        sure = [h <= agreement.upper_threshold(h, fraction) for h in entropies]
        return sure[0] & sure[1]

    def student_terms(self, student: list[Tensor], teacher: list[Tensor], features: Tensor | None) -> Losses:
        """The unlabeled terms that have a weight.

        Args:
            student: Its logits (B, K, *S) of the unlabeled batch, then of the labeled one.
            teacher: Likewise; without gradient.
            features: The student's features (B_u, C, *S) of the unlabeled batch; needed by the contrastive term.
        """
        hp = self.hp
        (log_p, log_p_l), (log_q, log_q_l) = ([self.log_probabilities(z) for z in zs] for zs in (student, teacher))
        labels = likeliest(log_q, 2)
        reliable = self.reliable_voxels(log_p, log_q)
        self.note("reliable", reliable.float().mean())
        terms = {}
        cross_entropy = agreement.pseudo_label_cross_entropy(log_p, labels)
        if hp.pseudo_label_weight > 0:
            terms["pseudo_label"] = agreement.masked_mean(cross_entropy, reliable)
        if hp.consistency_weight > 0:
            distances = agreement.cosine_distance(log_p, log_q), agreement.cosine_distance(log_p_l, log_q_l)
            terms["consistency"] = torch.cat([distance.flatten() for distance in distances]).mean()
        if hp.uncertainty_weight > 0:
            divergence = agreement.kl_divergence(log_p, self.log_probabilities(teacher[0], hp.temperature))
            terms["uncertainty"] = (torch.exp(-divergence.detach()) * cross_entropy).mean() + divergence.mean()
        if features is not None:
            sizes = log_p.shape[2], hp.contrastive_points, hp.contrastive_margin
            terms["contrastive"] = contrastive_loss(features, labels, reliable, *sizes, self.generator)
        return terms

"""Dual networks with uncertainty and contrastive losses: DualNet.

Lu, Wu, Kateb, Chaddad: "Semi-supervised medical image segmentation via dual networks", arXiv:2505.17690 (2025).

Departures from the paper: nnU-Net's loss, optimizer and augmentation; a residual-encoder U-Net beside the plan's own
instead of a 3D ResNet beside a V-Net; any number of classes, and regions; both networks learn from each other in every
step, each structure by as much as the other knows it better, where the paper has one teacher and one student per step;
a reliable voxel is one where both networks are sure; true labels form prototypes too; the paper names no weights but
the contrastive one, here all are 1 but that, with a common ramp; teachers see unlabeled images before nnU-Net's changes
of intensity, which the paper does not make (weak and strong views as in FixMatch, Sohn et al. 2020); a first quarter of
the epochs is spent on labels alone (tuned, docs/results.md), and all terms but the supervised wait for each structure
until it is learned. On several devices, entropies are compared and prototypes made on each for itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.blocks.features import FeatureTap
from nnunet_ssl.blocks.networks import full_resolution, quiet_pass, split_outputs
from nnunet_ssl.losses import agreement, roles
from nnunet_ssl.losses.contrastive import contrastive_loss
from nnunet_ssl.losses.predictions import grouped_labels, likeliest
from nnunet_ssl.nnunet.plans import with_partner_network
from nnunet_ssl.training import Labeled, Losses, MethodParameters, SemiSupervisedTrainer, Step, Unlabeled, View
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
    weak_teacher: bool = parameter(True, "whether teachers see unlabeled images without intensity augmentation")
    reliable_fraction: float = parameter(
        0.8, "a voxel is reliable where both entropies are among this fraction of the lowest", minimum=0.0, maximum=1.0
    )
    contrastive_points: int = parameter(4096, "uncertain voxels drawn per step", "voxels", minimum=1)
    contrastive_margin: float = parameter(
        1.0, "distance to which prototypes are pushed apart", "radius of the unit sphere", minimum=0.0, maximum=2.0
    )


class nnUNetTrainerDualNet(SemiSupervisedTrainer[DualNetParameters]):
    """The plan's network and its residual partner teach each other what each of them knows better."""

    Parameters = DualNetParameters
    unlabeled_terms = (
        *("pseudo_label", "pseudo_label_partner", "consistency", "consistency_partner"),
        *("uncertainty", "uncertainty_partner", "contrastive", "contrastive_partner"),
    )
    statistic_names = ("network_teaches", "reliable")
    views = ("strong", "weak")

    def build(self) -> None:
        """The partner; the features of both are kept where the contrastive term needs them."""
        plans = self.plans_manager
        plans = with_partner_network(plans.plans, f"{plans.plans_name}_partner", self.configuration_name)
        self.add("partner", self.build_partner(plans))
        wanted = self.hp.contrastive_weight > 0
        self._taps = [FeatureTap(network) for network in self.predictors] if wanted else []

    def wanted_views(self) -> tuple[str, ...]:
        """The networks' view when they learn, and when they teach where that is another."""
        return self.views if self.hp.weak_teacher else ("strong",)

    def step(self, labeled: Labeled, unlabeled: Unlabeled | None) -> Step:
        """Both networks learn from labels, and each from what the other makes of all images."""
        if unlabeled is None or not any(self.weight(term) for term in self.unlabeled_terms):
            return super().step(labeled, None)
        images, size = torch.cat([labeled.images, unlabeled.strong]), len(labeled.images)
        # One pass of each network for both batches, before those without gradient: autocast would keep the copies of
        # weights that the latter make, and these lead to no gradient.
        passes: Any = [tap(images) for tap in self._taps] or [(network(images), None) for network in self.predictors]
        on_labels = [split_outputs(outputs, size)[0] for outputs, _ in passes]
        learning = [full_resolution(outputs) for outputs, _ in passes]
        teaching = [logits.detach() for logits in learning]
        if self.hp.weak_teacher:
            with torch.no_grad():
                weak = [full_resolution(network(unlabeled.weak)) for network in self.predictors]
            teaching = [torch.cat([logits[:size], on_weak]) for logits, on_weak in zip(teaching, weak)]
        shares = roles.teaching_shares(self.learned.counts)
        self.note("network_teaches", float(shares[0].mean()))
        losses = {name: self.supervised_loss(o, labeled.target) for name, o in zip(self.supervised_terms, on_labels)}
        reliable = []
        for student, name in enumerate(("", "_partner")):
            # Without waiting for the device.
            table = roles.weights_by_label(shares[1 - student], self.has_regions).to(self.device, non_blocking=True)
            seen = learning[student], teaching[1 - student], passes[student][1]
            terms, sure = self.student_terms(*seen, labeled.target, table)
            losses |= {f"{term}{name}": value for term, value in terms.items()}
            reliable.append(sure.float().mean())
        self.note("reliable", torch.stack(reliable).mean())
        return Step(losses, (on_labels, labeled.target))

    def view(self, images: Tensor, generator: torch.Generator) -> View:
        """Both networks' labels, where they disagree, and where both are sure."""
        logits = [quiet_pass(network, images) for network in self.predictors]
        first, second = (self.label_map(z) for z in logits)
        reliable = self.reliable_voxels(*(self.log_probabilities(z) for z in logits))
        return View(first, {"partner": second, "disagree": first != second, "reliable": reliable})

    @torch.no_grad()
    def reliable_voxels(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Where both networks' entropies are among the lowest of the batch: boolean (B, *S)."""
        entropies, fraction = [agreement.entropy(log) for log in (log_p, log_q)], self.hp.reliable_fraction
        sure = [h <= agreement.upper_threshold(h, fraction) for h in entropies]
        return sure[0] & sure[1]

    def student_terms(
        self, student: Tensor, teacher: Tensor, features: Tensor | None, target: Tensor, table: Tensor
    ) -> tuple[Losses, Tensor]:
        """The unlabeled terms of one network that have a weight, and which unlabeled voxels are reliable (B_u, *S).

        Args:
            student: Its logits (B, K, *S) of the labeled batch and the unlabeled one.
            teacher: Likewise; without gradient.
            features: The student's, (B, C, *S); needed by the contrastive term.
            target: Of the labeled batch.
            table: How much each label of the teacher counts, (G, K).
        """
        hp, size = self.hp, len(target)
        log_p, log_q = self.log_probabilities(student), self.log_probabilities(teacher)
        labels = likeliest(log_q, 2)
        weights = roles.weights_of_labels(labels, table)
        terms = {}
        if hp.consistency_weight > 0:
            terms["consistency"] = (weights * agreement.cosine_distance(log_p, log_q)).mean()
        log_p, log_q, weights, labels = log_p[size:], log_q[size:], weights[size:], labels[size:]
        reliable = self.reliable_voxels(log_p, log_q)
        cross_entropy = agreement.pseudo_label_cross_entropy(log_p, labels)
        if hp.pseudo_label_weight > 0:
            terms["pseudo_label"] = agreement.masked_mean(weights * cross_entropy, reliable)
        if hp.uncertainty_weight > 0:
            doubt = agreement.kl_divergence(log_q, log_p)
            terms["uncertainty"] = (weights * agreement.tempered_by_doubt(cross_entropy, doubt)).mean()
        if features is not None:
            truth, annotated = grouped_labels(target, self.has_regions, self.label_manager.ignore_label)
            members = torch.cat([truth, labels]), torch.cat([annotated, reliable])
            uncertain = torch.cat([torch.zeros_like(annotated), ~reliable])
            sizes = hp.contrastive_points, hp.contrastive_margin
            terms["contrastive"] = contrastive_loss(features, *members, uncertain, table, *sizes, self.generator)
        return terms, reliable

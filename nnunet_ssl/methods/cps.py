"""Two networks, each taught by the other's labels: CPS, cross pseudo supervision.

Chen, Yuan, Zeng, Wang: "Semi-supervised semantic segmentation with cross pseudo supervision", CVPR 2021.

    L = L_sup(1) + L_sup(2) + w [CE(p_1, argmax p_2) + CE(p_2, argmax p_1)]

Both networks are the plan's, with other initial weights. Departures: nnU-Net's loss, cross-entropy and Dice with deep
supervision, for pseudo-labels too; unlabeled images alone (the paper's code takes labeled ones as well); labels are
made from the patch without changes of intensity, and with CutMix (the paper's variant) from the unmixed ones; a ramp,
and waiting for the structures, which the paper has not. The first network predicts; both: `nnunet-ssl export`.
"""

from __future__ import annotations

import dataclasses

import torch

from nnunet_ssl.blocks.networks import split_outputs
from nnunet_ssl.training import Labeled, MethodParameters, SemiSupervisedTrainer, Step, Unlabeled
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms import mixing


@dataclasses.dataclass(frozen=True)
class CPSParameters(MethodParameters):
    """Hyper-parameters of cross pseudo supervision."""

    unlabeled_ramp: float = other_default("unlabeled_ramp", 0.4)
    pseudo_label_weight: float = parameter(0.5, "weight of the other network's labels", minimum=0.0)
    cutmix_share: float = parameter(
        0.5, "part of the patch that comes from another image; 0: no mixtures", minimum=0.0, maximum=1.0
    )


class nnUNetTrainerCPS(SemiSupervisedTrainer[CPSParameters]):
    """Two networks of the plan's architecture label unlabeled images for each other."""

    Parameters = CPSParameters
    unlabeled_terms = ("pseudo_label", "pseudo_label_partner")
    statistic_names = ("agreement",)
    views = ("strong", "weak")

    def build(self) -> None:
        """The second network."""
        self.add("partner", self.build_partner())

    def step(self, labeled: Labeled, unlabeled: Unlabeled | None) -> Step:
        """One pass of each network over labeled and unlabeled images together."""
        if unlabeled is None or not self.hp.pseudo_label_weight:
            return super().step(labeled, None)
        images, target, boxes = unlabeled.strong, labeled.target, None
        if share := self.hp.cutmix_share:
            boxes = mixing.cutmix_boxes(len(images), images.shape[2:], share, self.generator, images.device)
            images = mixing.mixed_with_others(images, labeled.images, boxes)
        passes = [network(torch.cat([labeled.images, images])) for network in self.predictors]
        on_labels, on_images = zip(*(split_outputs(outputs, len(target)) for outputs in passes))
        with torch.no_grad():
            labels = [self.hard_labels(network(unlabeled.weak), target) for network in self.predictors]
        self.note("agreement", (labels[0] == labels[1]).float().mean())
        labels = [mixing.mixed_with_others(own, target, boxes) for own in labels]
        losses = {name: self.supervised_loss(o, target) for name, o in zip(self.supervised_terms, on_labels)}
        for name, outputs, other in zip(self.unlabeled_terms, on_images, reversed(labels)):
            losses[name] = self.pseudo_label_loss(outputs, other)
        return Step(losses, (on_labels, target))

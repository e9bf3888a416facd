"""Two strong views and one with dropped features, taught by the weak view: UniMatch.

Yang, Qi, Feng, Zhang, Shi: "Revisiting weak-to-strong consistency in semi-supervised semantic segmentation", CVPR 2023.

    L_u = 1/4 [L_s(strong 1) + L_s(strong 2)] + 1/2 L_s(weak, half of the channels of every skip dropped)

L_s as in FixMatch. Departures: as FixMatch; the weights are those of the paper over 1/2, which the paper gives the loss
on labels. The published medical code takes Dice alone for L_s, and the best epoch on test cases.
"""

from __future__ import annotations

import dataclasses

from nnunet_ssl.blocks.perturbation import FeatureDropout
from nnunet_ssl.methods.fix_match import FixMatchParameters, nnUNetTrainerFixMatch
from nnunet_ssl.training import Labeled, Losses, Outputs, Unlabeled
from nnunet_ssl.training.hyperparameters import parameter


@dataclasses.dataclass(frozen=True)
class UniMatchParameters(FixMatchParameters):
    """Hyper-parameters of UniMatch."""

    pseudo_label_weight: float = parameter(0.25, "weight of the sure labels on each strong view", minimum=0.0)
    feature_weight: float = parameter(0.5, "weight of the sure labels where features are dropped", minimum=0.0)
    dropout: float = parameter(0.5, "part of the channels left out of every skip", minimum=0.0, maximum=0.99)


class nnUNetTrainerUniMatch(nnUNetTrainerFixMatch):
    """Reads what is set for FixMatch, then what is set for UniMatch."""

    Parameters = UniMatchParameters
    unlabeled_terms = ("pseudo_label", "feature")
    views = ("strong", "weak", "strong_2")
    hp: UniMatchParameters  # type: ignore[assignment]

    def build(self) -> None:
        """The averaged network, where one labels, and the dropout of features."""
        super().build()
        self.dropout = FeatureDropout(self.network, self.hp.dropout)

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """The losses of both strong views, together, and of the weak view with dropped features."""
        target = labeled.target
        strong = [self.strong_view(view, labeled.images) for view in (unlabeled.strong, unlabeled.strong_2)]
        on_strong = [self.network(images) for images, _ in strong]
        on_dropped = self.dropout(unlabeled.weak, self.generator)
        labels, sure = self.sure_labels(unlabeled.weak, target)
        losses = [
            self.loss_of_mixtures(outputs, labels, sure, target, boxes)
            for outputs, (_, boxes) in zip(on_strong, strong)
        ]
        return {"pseudo_label": losses[0] + losses[1], "feature": self.pseudo_label_loss(on_dropped, labels, sure)}

"""Iterated self-training: pseudo-labels that are made between trainings, and learned from like labels.

Yang, Zhuo, Qi, Shi, Gao: "ST++: Make self-training work better for semi-supervised semantic segmentation", CVPR 2022;
Xie, Luong, Hovy, Le: "Self-training with noisy student improves ImageNet classification", CVPR 2020; Huang et al.:
"Revisiting nnU-Net for iterative pseudo labeling and efficient sliding window inference", FLARE 2022.

Departures: nnU-Net's augmentation, and further changes of intensity on pseudo-labeled images alone; cases are chosen by
the agreement of networks and by the change between rounds, not by earlier checkpoints; uncertain voxels and structures
count as ignored; labels fill their part of every batch instead of being repeated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.loader import LoaderSettings
from nnunet_ssl.data.preprocessing import preprocessing_settings
from nnunet_ssl.data.pseudo_labels import UNCERTAIN, PseudoLabels, reported_cases
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.loss import as_target
from nnunet_ssl.training import Labeled, Losses, MethodParameters, Outputs, SemiSupervisedTrainer, Unlabeled
from nnunet_ssl.training.hyperparameters import other_default, parameter
from nnunet_ssl.transforms.intensity import strong_intensities


@dataclasses.dataclass(frozen=True)
class SelfTrainingParameters(MethodParameters):
    """Hyper-parameters of self-training."""

    learned_dice: float = other_default("learned_dice", 0.0)
    pseudo_label_weight: float = parameter(1.0, "weight of the loss against pseudo-labels", minimum=0.0)
    strength: float = parameter(
        1.0, "of further changes of intensity on pseudo-labeled images", minimum=0.0, maximum=2.0
    )
    labels: str = parameter("round_1", "which pseudo-labels, by the name that nnunet-ssl pseudo-label gave them")


class nnUNetTrainerSelfTraining(SemiSupervisedTrainer[SelfTrainingParameters]):
    """Labels, and stored pseudo-labels of the unlabeled cases that were kept."""

    Parameters = SelfTrainingParameters
    unlabeled_terms = ("pseudo_label",)
    statistic_names = ("certain",)
    views = ("strong", "pseudo_labels")

    def find_unlabeled_cases(self) -> list[UnlabeledCase]:
        """Those that were kept."""
        folder, (train, _) = self.preprocessed_dataset_folder, self.do_split()
        self.pseudo_labels = PseudoLabels.of(folder, self.fold, self.hp.labels)
        if not self.pseudo_labels.manifest_file.is_file():
            plans = self.plans_manager
            raise UserError(
                f"{self.pseudo_labels.manifest_file} is missing. Run 'nnunet-ssl pseudo-label -d {plans.dataset_name} "
                f"-c {self.configuration_name} -p {plans.plans_name} -f {self.fold} --name {self.hp.labels}' with the "
                f"trainer of a model (-tr) or with label files (--from), or name others in SelfTraining.labels."
            )
        settings = preprocessing_settings(self.plans_manager, self.configuration_name)
        reported = reported_cases(folder, self.fold, train)
        return self.pseudo_labels.kept(super().find_unlabeled_cases(), train, reported, settings)

    def loader_settings(self) -> LoaderSettings:
        """With the pseudo-labels."""
        return dataclasses.replace(super().loader_settings(), pseudo_labels=self.pseudo_labels)

    def record(self) -> dict[str, Any]:
        """With the cases whose labels have had a part in the pseudo-labels."""
        return super().record() | {"pseudo_labels_know": self.pseudo_labels.manifest()["learned_from"]}

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """nnU-Net's loss of the strong view against the pseudo-labels, over the voxels that are certain."""
        certain = unlabeled.pseudo_labels != UNCERTAIN
        self.note("certain", certain.float().mean())
        labels = as_target(torch.where(certain, unlabeled.pseudo_labels, 0), self.label_manager)
        channels = self.num_image_channels
        images = strong_intensities(unlabeled.strong, self.hp.strength, self.generator, num_channels=channels)
        return {"pseudo_label": self.pseudo_label_loss(self.network(images), labels, certain)}

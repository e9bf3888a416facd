"""The second stage of nnU-Net's cascade: it sees the first stage's segmentation of every case, unlabeled ones too.

nnU-Net predicts that of each labeled case when the first stage of the fold that holds it out is validated. Here is what
the loader makes of them; ``prediction`` makes those of images that belong to no fold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import blosc2
import torch
from torch import Tensor

from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.data.cases import UnlabeledCase
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer


class PreviousStage(NamedTuple):
    """Where the first stage's segmentations lie, and the labels that become input channels, in their order."""

    folder: str
    labels: tuple[int, ...]

    def load(self, identifier: str) -> blosc2.NDArray:
        """A segmentation (*S) in the voxels of the second stage; read as it is sliced."""
        return blosc2.open(urlpath=os.path.join(self.folder, f"{identifier}.b2nd"), mode="r", dparams={"nthreads": 1})

    def one_hot(self, segmentation: Tensor) -> Tensor:
        """(*S) to a channel per label, (L, *S) in float32, as the network's further input channels."""
        return torch.stack([segmentation == label for label in self.labels]).float()


def previous_stage(trainer: SemiSupervisedTrainer) -> PreviousStage | None:
    """What a trainer of a second stage reads; None for other configurations."""
    folder = trainer.folder_with_segs_from_previous_stage
    return None if folder is None else PreviousStage(folder, tuple(trainer.label_manager.foreground_labels))


def check_no_hidden_labels(trainer: SemiSupervisedTrainer, hidden: Sequence[str]) -> None:
    """Refuse second stages on folds that hide labels.

    Raises:
        UserError: All folds of the first stage write their segmentations into one folder, and some of them have
            learned from labels that this fold hides.
    """
    if hidden and previous_stage(trainer) is not None:
        raise UserError(
            f"Fold {trainer.fold} hides the labels of {len(hidden)} cases, but the previous stage's segmentations come "
            f"from folds that have learned from them. Train {trainer.configuration_name} with images in imagesUn and "
            f"nnU-Net's own folds; for experiments with hidden labels use 3d_fullres."
        )


def check_complete(stage: PreviousStage, cases: Sequence[UnlabeledCase], trainer: SemiSupervisedTrainer) -> None:
    """Refuse to train where segmentations of unlabeled cases are missing, or of another size than the image.

    Raises:
        UserError: Naming the command that makes them.
    """

    def fits(case: UnlabeledCase) -> bool:
        if not os.path.isfile(os.path.join(stage.folder, f"{case.identifier}.b2nd")):
            return False
        image = blosc2.open(urlpath=os.path.join(case.folder, f"{case.identifier}.b2nd"), mode="r")
        return tuple(stage.load(case.identifier).shape) == tuple(image.shape[1:])

    missing = [case.identifier for case in cases if not fits(case)]
    if missing:
        plans = trainer.plans_manager
        raise UserError(
            f"{len(missing)} of {len(cases)} unlabeled cases have no segmentation of the previous stage that fits them "
            f"in {stage.folder}, e.g. {missing[0]}. For images of imagesUn and imagesTs run 'nnunet-ssl cascade -d "
            f"{plans.dataset_name} -c {trainer.configuration_name} -p {plans.plans_name} -tr {type(trainer).__name__} "
            f"-f FOLDS' with the folds of the previous stage; for cases of the data set train the folds of the "
            f"previous stage that hold them out."
        )

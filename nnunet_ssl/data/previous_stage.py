"""The second stage of nnU-Net's cascade: it sees the first stage's segmentation of every case, unlabeled ones too.

nnU-Net predicts that of each labeled case when the first stage of the fold that holds it out is validated. Here is what
the loader makes of them; ``prediction`` makes those of images that belong to no fold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import blosc2
import torch
from torch import Tensor

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.errors import UserError


class PreviousStage(NamedTuple):
    """Where the first stage's segmentations lie, and the labels that become input channels, in their order."""

    folder: str
    labels: tuple[int, ...]

    @classmethod
    def of(cls, folder: str | None, labels: Iterable[int]) -> PreviousStage | None:
        """What the second stage reads; None for other configurations, for which nnU-Net names no folder."""
        return None if folder is None else cls(folder, tuple(labels))

    def load(self, identifier: str) -> blosc2.NDArray:
        """A segmentation (*S) in the voxels of the second stage; read as it is sliced."""
        return blosc2.open(urlpath=os.path.join(self.folder, f"{identifier}.b2nd"), mode="r", dparams={"nthreads": 1})

    def one_hot(self, segmentation: Tensor) -> Tensor:
        """(*S) to a channel per label, (L, *S) in float32, as the network's further input channels."""
        return torch.stack([segmentation == label for label in self.labels]).float()


def check_no_hidden_labels(
    stage: PreviousStage | None, hidden: Sequence[str], fold: int | str, configuration: str
) -> None:
    """Refuse second stages on folds that hide labels.

    Args:
        stage: None for other configurations, which may hide what they like.
        hidden: Cases whose labels the fold hides.
        fold: That is trained.
        configuration: That is trained.

    Raises:
        UserError: All folds of the first stage write their segmentations into one folder, and some of them have
            learned from labels that this fold hides.
    """
    if hidden and stage is not None:
        raise UserError(
            f"Fold {fold} hides the labels of {len(hidden)} cases, but the previous stage's segmentations come from "
            f"folds that have learned from them. Train {configuration} with images in imagesUn and nnU-Net's own "
            f"folds; for experiments with hidden labels use 3d_fullres."
        )


def check_complete(
    stage: PreviousStage | None,
    cases: Sequence[UnlabeledCase],
    dataset: str,
    configuration: str,
    plans: str,
    trainer: str,
) -> None:
    """Refuse to train where segmentations of unlabeled cases are missing, or of another size than the image.

    Args:
        stage: Where they lie; None for other configurations, which need none.
        cases: Those that need one.
        dataset: Name of the data set; this and the following are the options of the command that makes them.
        configuration: Of the second stage.
        plans: Name of the plans.
        trainer: Name of the trainer of both stages.

    Raises:
        UserError: Naming the command that makes them.
    """
    if stage is None:
        return

    def fits(case: UnlabeledCase) -> bool:
        if not os.path.isfile(os.path.join(stage.folder, f"{case.identifier}.b2nd")):
            return False
        image = blosc2.open(urlpath=os.path.join(case.folder, f"{case.identifier}.b2nd"), mode="r")
        return tuple(stage.load(case.identifier).shape) == tuple(image.shape[1:])

    missing = [case.identifier for case in cases if not fits(case)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(cases)} unlabeled cases have no segmentation of the previous stage that fits them "
            f"in {stage.folder}, e.g. {missing[0]}. For images of imagesUn and imagesTs run 'nnunet-ssl cascade -d "
            f"{dataset} -c {configuration} -p {plans} -tr {trainer} -f FOLDS' with the folds of the previous stage; "
            f"for cases of the data set train the folds of the previous stage that hold them out."
        )

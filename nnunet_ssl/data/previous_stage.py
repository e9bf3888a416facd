"""The second stage of nnU-Net's cascade: it sees the first stage's segmentation of every case, unlabeled ones too.

nnU-Net predicts that of each labeled case when the first stage of the fold that holds it out is validated. Here are the
images that belong to no fold, and what the loader makes of either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import blosc2
import torch
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_ssl.data.preprocessing import TEST_SUFFIX, UNLABELED_SUFFIX, preprocessed_cases
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


def predict_previous_stage(
    preprocessed: Path,
    model: Path,
    folds: Sequence[str],
    configuration: str,
    device: torch.device,
    overwrite: bool = False,
) -> tuple[int, Iterator[str]]:
    """Segment the unlabeled images with the first stage, for the second.

    Finished ones are skipped, unless an image or a model is newer.

    Args:
        preprocessed: The data set's folder in nnUNet_preprocessed; holds the images of both stages.
        model: The first stage's model folder, TRAINER__PLANS__CONFIGURATION.
        folds: Whose networks are averaged.
        configuration: The second stage's.
        device: To predict on.
        overwrite: Redo finished cases.

    Returns:
        How many cases there are to do, and their identifiers as they end.

    Raises:
        UserError: Where images of a stage are not preprocessed, or one name stands for two images.
    """
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), tuple(folds), "checkpoint_final.pth")
    plans = predictor.plans_manager
    stages = predictor.configuration_manager, plans.get_configuration(configuration)
    output = model / "predicted_next_stage" / configuration
    pairs: dict[str, tuple[Path, Path]] = {}
    for suffix, option in ((UNLABELED_SUFFIX, ""), (TEST_SUFFIX, " --test-images")):
        folders = [preprocessed / f"{stage.data_identifier}{suffix}" for stage in stages]
        cases = [set(preprocessed_cases(str(folder))) for folder in folders]
        if cases[1] - cases[0]:
            raise UserError(
                f"{len(cases[1] - cases[0])} images of {folders[1]} are missing in {folders[0]}, e.g. "
                f"{min(cases[1] - cases[0])}. Run 'nnunet-ssl preprocess{option}' for the previous stage too."
            )
        if cases[1] & set(pairs):
            raise UserError(f"imagesUn and imagesTs both hold a case {min(cases[1] & set(pairs))}; rename one of them.")
        for case in sorted(cases[1]):
            pairs[case] = folders[0] / f"{case}.b2nd", folders[1] / f"{case}.b2nd"
    models = [model / f"fold_{fold}" / "checkpoint_final.pth" for fold in folds]

    def is_done(case: str, files: tuple[Path, Path]) -> bool:
        made = output / f"{case}.b2nd"
        return made.is_file() and made.stat().st_mtime >= max(f.stat().st_mtime for f in (*files, *models))

    todo = {case: files for case, files in pairs.items() if overwrite or not is_done(case, files)}
    output.mkdir(parents=True, exist_ok=True)
    return len(todo), (_predict(predictor, plans, case, *files, output) for case, files in todo.items())


def _predict(predictor: nnUNetPredictor, plans: PlansManager, case: str, image: Path, like: Path, output: Path) -> str:
    data = torch.from_numpy(blosc2.open(urlpath=str(image), mode="r")[:]).float()
    logits = predictor.predict_logits_from_preprocessed_data(data).cpu()
    shape = list(blosc2.open(urlpath=str(like), mode="r").shape[1:])
    # Both are in the transposed axes of preprocessing; nnU-Net needs the spacing where a 2D stage has one axis less.
    properties = {"spacing": [1.0] * 3, "shape_after_cropping_and_before_resampling": shape}
    part = output / f"{case}.part"
    resample_and_save(
        logits, shape, str(part), plans, predictor.configuration_manager, properties, predictor.dataset_json,
        torch.get_num_threads(), nnUNetDatasetBlosc2,
    )  # fmt: skip
    os.replace(f"{part}.b2nd", output / f"{case}.b2nd")
    return case

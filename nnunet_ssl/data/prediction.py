"""Segmentations of preprocessed images that belong to no fold, by a trained model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import blosc2
import torch
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.preprocessing import TEST_SUFFIX, UNLABELED_SUFFIX, preprocessed_cases
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    pass


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

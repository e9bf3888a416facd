"""Segmentations of preprocessed images by a trained model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import blosc2
import torch
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_ssl.data.preprocessing import TEST_SUFFIX, UNLABELED_SUFFIX, preprocessed_cases
from nnunet_ssl.errors import UserError


class ImageFiles(NamedTuple):
    """A preprocessed image, and one of the same case whose voxels its segmentation gets; often the same file."""

    image: Path
    like: Path


class TrainedModel:
    """The networks of a model folder, averaged.

    Args:
        folder: TRAINER__PLANS__CONFIGURATION.
        folds: Whose networks are averaged.
        device: To predict on.
    """

    def __init__(self, folder: Path, folds: Sequence[str], device: torch.device) -> None:
        self.folder = folder
        self.checkpoints = [folder / f"fold_{fold}" / "checkpoint_final.pth" for fold in folds]
        on_device = device.type == "cuda"
        self._predictor = nnUNetPredictor(device=device, perform_everything_on_device=on_device, allow_tqdm=False)
        self._predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), "checkpoint_final.pth")
        self.plans = self._predictor.plans_manager
        self.configuration_name = folder.name.rpartition("__")[2]
        self.configuration = self._predictor.configuration_manager

    def segment(
        self, cases: Mapping[str, ImageFiles], output: Path, overwrite: bool = False
    ) -> tuple[int, Iterator[str]]:
        """Segment preprocessed images, each into a file as nnU-Net passes it to the second stage of a cascade.

        Finished ones are skipped, unless an image or a model is newer.

        Args:
            cases: By identifier; preprocessed with the model's plans.
            output: Made if missing.
            overwrite: Redo finished cases.

        Returns:
            How many cases there are to do, and their identifiers as they end.
        """

        def is_done(case: str, files: ImageFiles) -> bool:
            made = output / f"{case}.b2nd"
            sources = (*files, *self.checkpoints)
            return made.is_file() and made.stat().st_mtime >= max(file.stat().st_mtime for file in sources)

        todo = {case: files for case, files in cases.items() if overwrite or not is_done(case, files)}
        output.mkdir(parents=True, exist_ok=True)
        return len(todo), (self._segment(case, files, output) for case, files in todo.items())

    @property
    def labels(self) -> LabelManager:
        """What its channels mean."""
        return self.plans.get_label_manager(self._predictor.dataset_json)

    def probabilities(self, image: Tensor) -> Tensor:
        """Of classes or regions, (K, *S) in float32; sliding windows and mirroring as nnU-Net predicts.

        Args:
            image: (C, *S), preprocessed with the model's plans.
        """
        logits = self._predictor.predict_logits_from_preprocessed_data(image)
        return cast(Tensor, self.labels.apply_inference_nonlin(logits.cpu()))

    def mirrored_probabilities(self, image: Tensor) -> Iterator[Tensor]:
        """Of the image, and of its mirror image along each axis that the model may be mirrored along, mirrored back.

        Each by itself: nnU-Net's prediction is the mean of all.

        Args:
            image: (C, *S), preprocessed with the model's plans.
        """
        predictor, first = self._predictor, image.ndim - len(self.configuration.patch_size)
        axes = [[], *([first + axis] for axis in predictor.allowed_mirroring_axes or ())]
        before, predictor.use_mirroring = predictor.use_mirroring, False
        try:
            for turned in axes:
                found = self.probabilities(image.flip(turned) if turned else image)
                yield found.flip(turned) if turned else found
        finally:
            predictor.use_mirroring = before

    def _segment(self, case: str, files: ImageFiles, output: Path) -> str:
        data = torch.from_numpy(blosc2.open(urlpath=str(files.image), mode="r")[:]).float()
        logits = self._predictor.predict_logits_from_preprocessed_data(data).cpu()
        shape = list(blosc2.open(urlpath=str(files.like), mode="r").shape[1:])
        # In the transposed axes of preprocessing; nnU-Net needs the spacing where a 2D stage has one axis less.
        properties = {"spacing": [1.0] * 3, "shape_after_cropping_and_before_resampling": shape}
        part = output / f"{case}.part"
        resample_and_save(
            logits, shape, str(part), self.plans, self.configuration, properties, self._predictor.dataset_json,
            torch.get_num_threads(), nnUNetDatasetBlosc2,
        )  # fmt: skip
        os.replace(f"{part}.b2nd", output / f"{case}.b2nd")
        return case


def predict_previous_stage(
    preprocessed: Path,
    model: Path,
    folds: Sequence[str],
    configuration: str,
    device: torch.device,
    overwrite: bool = False,
) -> tuple[int, Iterator[str]]:
    """Segment the unlabeled images with the first stage, for the second.

    Args:
        preprocessed: The data set's folder in nnUNet_preprocessed; holds the images of both stages.
        model: The first stage's model folder, TRAINER__PLANS__CONFIGURATION.
        folds: Whose networks are averaged.
        configuration: The second stage's.
        device: To predict on.
        overwrite: Redo finished cases.

    Returns:
        As ``TrainedModel.segment``.

    Raises:
        UserError: Where images of a stage are not preprocessed, or one name stands for two images.
    """
    first_stage = TrainedModel(model, folds, device)
    stages = first_stage.configuration, first_stage.plans.get_configuration(configuration)
    cases = _images_of_both_stages(preprocessed, [stage.data_identifier for stage in stages])
    return first_stage.segment(cases, model / "predicted_next_stage" / configuration, overwrite)


def _images_of_both_stages(preprocessed: Path, stages: Sequence[str]) -> dict[str, ImageFiles]:
    """The unlabeled images by identifier, in the folders of the first and the second stage."""
    found: dict[str, ImageFiles] = {}
    for suffix, option in ((UNLABELED_SUFFIX, ""), (TEST_SUFFIX, " --test-images")):
        folders = [preprocessed / f"{stage}{suffix}" for stage in stages]
        cases = [set(preprocessed_cases(str(folder))) for folder in folders]
        if cases[1] - cases[0]:
            raise UserError(
                f"{len(cases[1] - cases[0])} images of {folders[1]} are missing in {folders[0]}, e.g. "
                f"{min(cases[1] - cases[0])}. Run 'nnunet-ssl preprocess{option}' for the previous stage too."
            )
        if cases[1] & set(found):
            raise UserError(f"imagesUn and imagesTs both hold a case {min(cases[1] & set(found))}; rename one of them.")
        for case in sorted(cases[1]):
            found[case] = ImageFiles(folders[0] / f"{case}.b2nd", folders[1] / f"{case}.b2nd")
    return found

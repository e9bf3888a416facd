"""What pseudo-labels need to know of a fold: its cases and where its images lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ssl.data.cases import UnlabeledCase


@dataclasses.dataclass(frozen=True)
class FoldData:
    """A fold of a data set in one configuration.

    Attributes:
        dataset: Its name.
        raw: The raw data set's folder.
        folder: nnU-Net's folder of the configuration, <dataset>/<data_identifier>.
        results: Where the data set's models lie.
        fold: Number, or "all".
        identifiers: All labeled cases, hidden ones included.
        train: Those that the fold trains on.
        reported: Its validation cases; none with fold "all".
        cases: Its unlabeled cases, by their identifiers.
        dataset_json: nnU-Net's.
        plans_manager: nnU-Net's.
        configuration: nnU-Net's manager of the configuration.
        preprocessing: What decides preprocessed voxels.
    """

    dataset: str
    raw: Path
    folder: Path
    results: Path
    fold: int | str
    identifiers: tuple[str, ...]
    train: tuple[str, ...]
    reported: tuple[str, ...]
    cases: tuple[UnlabeledCase, ...]
    dataset_json: dict[str, Any]
    plans_manager: Any
    configuration: Any
    preprocessing: dict[str, Any]

    @classmethod
    def of(cls, dataset: str, configuration: str, plans_name: str, fold: str) -> FoldData:
        """Find all of that.

        Raises:
            UserError: Where something is missing, or there is no unlabeled case.
        """
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        from nnunet_ssl.data.cases import find_unlabeled_cases, hidden_cases
        from nnunet_ssl.data.preprocessing import preprocessing_settings
        from nnunet_ssl.data.pseudo_labels import reported_cases
        from nnunet_ssl.data.splits import load_or_make_splits
        from nnunet_ssl.errors import UserError
        from nnunet_ssl.nnunet.folders import (
            dataset_name,
            read_dataset_json,
            read_plans,
            require_configurations,
            require_variables,
        )

        raw, preprocessed, results = require_variables("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        name = dataset_name(dataset)
        plans = read_plans(preprocessed / name, plans_name)
        require_configurations(plans, [configuration])
        dataset_json = read_dataset_json(preprocessed / name / "dataset.json")
        manager = PlansManager(plans)
        of_configuration = manager.get_configuration(configuration)
        folder = preprocessed / name / of_configuration.data_identifier
        if not folder.is_dir():
            raise UserError(f"{folder} is missing. Run nnUNetv2_preprocess for this configuration.")
        identifiers = sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
        if fold == "all":
            number: int | str = fold
            split: dict[str, Any] = {"train": identifiers, "val": []}
        else:
            splits = load_or_make_splits(str(preprocessed / name / "splits_final.json"), identifiers)
            if not fold.isdecimal() or int(fold) >= len(splits):
                raise UserError(f"There is no fold {fold}; the file has the folds 0 to {len(splits) - 1}, and all.")
            number, split = int(fold), splits[int(fold)]
        settings = preprocessing_settings(manager, configuration)
        parts = {"train": split["train"], "val": split["val"], "unlabeled": hidden_cases(str(folder), number)}
        cases, _ = find_unlabeled_cases(str(folder), str(raw / name), settings, parts, transductive=False)
        reported = reported_cases(str(folder), number, split["train"])
        return cls(
            name, raw / name, folder, results / name, number, tuple(identifiers), tuple(split["train"]),
            tuple(sorted(reported)), tuple(cases), dataset_json, manager, of_configuration, settings,
        )  # fmt: skip

    @property
    def splits_file(self) -> Path:
        """nnU-Net's, with the folds of this package appended."""
        return self.folder.parent / "splits_final.json"

    @property
    def is_cascade(self) -> bool:
        """Whether the configuration sees a previous stage."""
        return self.configuration.previous_stage_name is not None

    @property
    def patch_size(self) -> list[int]:
        """In voxels."""
        return list(self.configuration.patch_size)

    @property
    def spacing(self) -> list[float]:
        """Of a preprocessed image's last axes, in mm."""
        return list(self.configuration.spacing)

    @property
    def label_manager(self) -> Any:
        """nnU-Net's."""
        return self.plans_manager.get_label_manager(self.dataset_json)

    def inner_folds(self) -> list[int]:
        """Numbers of the folds that were made inside this one."""
        from nnunet_ssl.data.splits import INNER_FOLD_OF, read_splits

        if not self.splits_file.is_file():
            return []
        splits = read_splits(str(self.splits_file))
        return [number for number, split in enumerate(splits) if split.get(INNER_FOLD_OF) == self.fold]

    def raw_images(self) -> dict[str, tuple[str, ...]]:
        """Channel files of the unlabeled cases that the raw data set has."""
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        from nnunet_ssl.data.raw_images import UNLABELED_FOLDER, find_raw_cases, raw_identifiers

        known = get_filenames_of_train_images_and_targets(str(self.raw), self.dataset_json)
        images = {case: tuple(entry["images"]) for case, entry in known.items()}
        if raw_identifiers(str(self.raw), UNLABELED_FOLDER) is not None:
            found, _ = find_raw_cases(str(self.raw), UNLABELED_FOLDER, self.dataset_json, known)
            images |= {case.identifier: case.images for case in found}
        return images

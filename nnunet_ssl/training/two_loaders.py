"""nnU-Net's trainer with a second loader, for cases without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from nnunetv2.paths import nnUNet_raw

from nnunet_ssl.data.batches import Labeled, LabeledBatches, Unlabeled, describe_training, share_batch
from nnunet_ssl.data.cases import UnlabeledCase, cases_with_ignored_voxels, find_unlabeled_cases, hidden_cases
from nnunet_ssl.data.loader import LoaderSettings, make_unlabeled_loader
from nnunet_ssl.data.preprocessing import preprocessing_settings
from nnunet_ssl.data.previous_stage import PreviousStage, check_complete, check_no_hidden_labels
from nnunet_ssl.data.workers import WatchedAugmenter
from nnunet_ssl.training.averaged import AveragedTrainer
from nnunet_ssl.training.hyperparameters import MethodParameters


class TwoLoaderTrainer(AveragedTrainer):
    """Finds the unlabeled cases, shares the plan's batch and loads both parts; what is wanted, ``Method`` says."""

    uses_unlabeled: ClassVar[bool]
    transductive: ClassVar[bool]
    switch_epoch: Any
    in_second_stage: Any
    unlabeled_patch_size: Any
    wanted_views: Any
    batch_size: int
    oversample_foreground_percent: float
    # The plan's batch, or a rank's part of it, and how much of it nnU-Net centers on structures.
    _whole_batch: tuple[int, float]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads this signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.unlabeled_batch_size = 0
        self.unlabeled_cases: list[UnlabeledCase] = []
        self.dataloader_unlabeled: Iterator[dict[str, Any]] | None = None
        self._stage_1 = LabeledBatches()

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        if self.uses_unlabeled:
            self.probabilistic_oversampling = True
            self._whole_batch = self.batch_size, self.oversample_foreground_percent
            self._share_batch(0, 1)  # the cases are not known yet: as if the unlabeled ones were the many

    def _share_batch(self, labeled_cases: int, unlabeled_cases: int) -> None:
        cases = labeled_cases, unlabeled_cases
        shares = share_batch(*self._whole_batch, *cases, self.hp.unlabeled_fraction, self._examples_are_added)
        self.batch_size, self.unlabeled_batch_size, self.oversample_foreground_percent = shares

    @property
    def _examples_are_added(self) -> bool:
        return isinstance(self.hp, MethodParameters) and self.hp.unlabeled_examples == "added"

    @property
    def stage_1_batch_size(self) -> int:
        """Labeled examples per step where training is on labels alone: the plan's batch, but no single one."""
        return self.batch_size + (0 if self._examples_are_added else self.unlabeled_batch_size)

    def check_cases(self) -> None:
        """Check labels, find the unlabeled cases and share the batch between both kinds.

        Raises:
            UserError: Where the cases do not fit the training.
        """
        self.check_labels()
        # All trainers alike: the first stage's segmentations tell of hidden labels, whoever learns from them.
        hidden = hidden_cases(self.preprocessed_dataset_folder, self.fold)
        check_no_hidden_labels(self.previous_stage, hidden, self.fold, self.configuration_name)
        if self.uses_unlabeled:
            self.unlabeled_cases = self.find_unlabeled_cases()
            self._share_batch(len(self.do_split()[0]), len(self.unlabeled_cases))
            stage_1 = self.stage_1_batch_size if self.switch_epoch > 0 else None
            sizes = self.batch_size, self.unlabeled_batch_size, stage_1, self._examples_are_added
            self.print_to_log_file(describe_training(self.unlabeled_cases, *sizes))

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's two loaders; makes the unlabeled one beside them."""
        labeled, validation = super().get_dataloaders()
        if self.uses_unlabeled:
            self.dataloader_unlabeled = make_unlabeled_loader(self.unlabeled_cases, self.loader_settings())
        return labeled, validation

    def on_train_epoch_start(self) -> None:
        """Start with nothing left over, as a training that goes on from here does."""
        self._stage_1 = LabeledBatches()
        super().on_train_epoch_start()

    def batches(self, batch: dict[str, Any]) -> tuple[Labeled, Unlabeled | None]:
        """A step's labeled batch, of the plan's size in stage 1, and its unlabeled one in stage 2; on the device."""
        labeled = Labeled.of(batch).to(self.device)
        if self.dataloader_unlabeled is None:
            return labeled, None
        if self.in_second_stage:
            return labeled, Unlabeled.of(next(self.dataloader_unlabeled)).to(self.device)
        return self._stage_1.fill(labeled, self.dataloader_train, self.stage_1_batch_size), None

    def on_train_end(self) -> None:
        """As nnU-Net; stop the unlabeled loader too."""
        super().on_train_end()
        if isinstance(self.dataloader_unlabeled, WatchedAugmenter):
            self.dataloader_unlabeled._finish()

    @property
    def previous_stage(self) -> PreviousStage | None:
        """What the second stage of a cascade reads; None for other configurations."""
        return PreviousStage.of(self.folder_with_segs_from_previous_stage, self.label_manager.foreground_labels)

    def loader_settings(self) -> LoaderSettings:
        """What the loader of unlabeled batches is asked for."""
        return LoaderSettings(
            batch_size=self.unlabeled_batch_size,
            patch_size=self.unlabeled_patch_size,
            network_patch_size=self.configuration_manager.patch_size,
            views=self.wanted_views(),
            augmentation=self._augmentation,
            make_transforms=self.get_training_transforms,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            label_manager=self.label_manager,
            previous_stage=self.previous_stage,
            pin_memory=self.device.type == "cuda",
            timeout=self.hp.loader_timeout,
        )

    def find_unlabeled_cases(self) -> list[UnlabeledCase]:
        """The unlabeled cases of this training; see ``data.cases.find_unlabeled_cases``."""
        folder = self.preprocessed_dataset_folder
        raw = os.path.join(nnUNet_raw.get(), self.plans_manager.dataset_name) if nnUNet_raw.is_set() else None
        settings = preprocessing_settings(self.plans_manager, self.configuration_name)
        train, val = self.do_split()
        split = {"train": train, "val": val, "unlabeled": hidden_cases(folder, self.fold)}
        partly = cases_with_ignored_voxels(self.dataset_class(folder, train), self.label_manager.ignore_label)
        cases, notes = find_unlabeled_cases(folder, raw, settings, split, self.transductive, partly)
        for note in notes:
            self.print_to_log_file(note)
        plans = self.plans_manager
        names = plans.dataset_name, self.configuration_name, plans.plans_name, type(self).__name__
        check_complete(self.previous_stage, cases, *names)
        return cases

    def record(self) -> dict[str, Any]:
        """What the training learns from and runs with, see ``run_record``."""
        labeled, validation = self.do_split()
        return {
            "trainer": type(self).__name__,
            "device": self.device.type,
            "hyperparameters": self.hp.as_dict(),
            "batch": {"labeled": self.batch_size, "unlabeled": self.unlabeled_batch_size},
            "labeled": sorted(labeled),
            "validation": sorted(validation),
            "unlabeled": {case.identifier: case.source for case in self.unlabeled_cases},
        }

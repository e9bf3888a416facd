"""nnU-Net's trainer as the plans' hyper-parameters want it, and careful about its inputs."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.augmentation import Augmentation, adjust, check_mirror_axes, warning_about_sides
from nnunet_ssl.data.splits import check_preprocessed, read_splits
from nnunet_ssl.data.workers import WatchedAugmenter
from nnunet_ssl.nnunet import patching
from nnunet_ssl.nnunet.checks import check_configuration, check_dataset_json, check_labels_of_cases, using
from nnunet_ssl.runtime.cpu import prepare_cpu
from nnunet_ssl.runtime.distributed import data_parallel, device_of_process
from nnunet_ssl.training.hyperparameters import HyperParameters, method_name

# Hyper-parameters that nnU-Net's trainer holds as attributes of the same name.
_NNUNETS_OWN = (
    *("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr", "weight_decay"),
    *("save_every", "oversample_foreground_percent"),
)


class ConfiguredTrainer(nnUNetTrainer):
    """nnU-Net's trainer with hyper-parameters from the plans, seeds, and checks of all that people edit.

    Targets stay at full resolution until the loss: a method may still move them.
    """

    Parameters: ClassVar[type[HyperParameters]]
    hp: Any

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads this signature)
    ) -> None:
        plans_file = f"{plans.get('plans_name')}.json"
        check_configuration(plans, configuration, plans_file)
        check_dataset_json(dataset_json, "dataset.json")
        self.hp = self.read_hyperparameters(plans)
        check_mirror_axes(self.hp.mirror_axes, PlansManager(plans).get_configuration(configuration).patch_size)
        self._files = f"{plans_file} or dataset.json"
        with using(self._files):
            super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            self.device = device_of_process(device)
            if self.device.type != "cuda":
                self.grad_scaler = None
        for name in _NNUNETS_OWN:
            setattr(self, name, getattr(self.hp, name))
        self.generator = torch.Generator()
        self.print_to_log_file(f"Hyper-parameters: {self.hp.as_dict()}", add_timestamp=False)
        if device.type == "cpu":
            prepare_cpu(self.hp.cpu_bfloat16, self.print_to_log_file)

    @classmethod
    def blocks(cls) -> tuple[str, ...]:
        """The methods whose hyper-parameters this trainer reads: its base trainers and itself; the later wins."""
        bases = [kind for kind in reversed(cls.__mro__) if issubclass(kind, ConfiguredTrainer)]
        return tuple(method_name(kind) for kind in bases if kind.__name__.startswith("nnUNetTrainer"))

    @classmethod
    def read_hyperparameters(cls, plans: Mapping[str, Any]) -> Any:
        """What the plans say, and defaults for the rest.

        Raises:
            UserError: For what this trainer does not understand.
        """
        return cls.Parameters.from_plans(plans, cls.blocks())

    def build_networks(self) -> None:
        """nnU-Net's ``initialize``: network, optimizer and loss, from the seed where there is one."""
        if self.hp.seed is not None:
            # Alike on all ranks: DDP would copy rank 0's anyway.
            torch.manual_seed(self.hp.seed)
        with patching.ddp_wrapper(data_parallel), using(self._files):
            super().initialize()

    def seed_everything(self, rank: int) -> None:
        """Let each process draw numbers of its own, from the seed where there is one."""
        self.generator = torch.Generator(device=self.device if self.device.type == "cuda" else "cpu")
        if self.hp.seed is None:
            self.generator.seed()
            return
        self.generator.manual_seed(self.hp.seed + rank)
        torch.manual_seed(self.hp.seed + rank)
        np.random.seed(self.hp.seed + rank)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Augmentation:  # noqa: N802
        """nnU-Net's choices, with rotation range and mirroring axes as the hyper-parameters say."""
        stock = Augmentation(*super().configure_rotation_dummyDA_mirroring_and_inital_patch_size())
        patch_size = self.configuration_manager.patch_size
        self._augmentation = adjust(stock, self.hp.rotation_degrees, self.hp.mirror_axes, patch_size)
        self.inference_allowed_mirroring_axes = self._augmentation.mirror_axes
        warning = warning_about_sides(self.dataset_json["labels"], self._augmentation)
        if warning:
            self.print_to_log_file(warning)
        return self._augmentation

    @staticmethod
    def get_training_transforms(
        patch_size: Any,
        rotation_for_DA: Any,  # noqa: N803
        deep_supervision_scales: Any,
        mirror_axes: Any,
        do_dummy_2d_data_aug: bool,
        **keywords: Any,
    ) -> BasicTransform:
        """nnU-Net's augmentation with targets left at full resolution."""
        return nnUNetTrainer.get_training_transforms(
            patch_size, rotation_for_DA, None, mirror_axes, do_dummy_2d_data_aug, **keywords
        )

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's two loaders, with an end to waiting for them."""
        with patching.background_workers(functools.partial(WatchedAugmenter, timeout=self.hp.loader_timeout)):
            loaders: tuple[Any, Any] = super().get_dataloaders()
        return loaders

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's, from a file that is in order.

        Raises:
            UserError: Where the file is damaged, or names cases that are not preprocessed.
        """
        file = os.path.join(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.fold != "all" and os.path.isfile(file):
            read_splits(file)
        train, val = super().do_split()
        folder = self.preprocessed_dataset_folder
        check_preprocessed([*train, *val], self.dataset_class.get_identifiers(folder), folder, self.fold, file)
        return train, val

    def check_labels(self) -> None:
        """Refuse labels that dataset.json does not list.

        Raises:
            UserError: Naming the first case that has one.
        """
        train, val = self.do_split()
        cases = self.dataset_class(self.preprocessed_dataset_folder, sorted({*train, *val}))
        check_labels_of_cases(((c, cases.load_case(c)[3]) for c in cases.identifiers), self.label_manager)

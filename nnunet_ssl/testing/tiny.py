"""Data sets, trainers and batches made on the spot, small enough for seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.batches import Labeled, Unlabeled
from nnunet_ssl.data.preprocessing import (
    SETTINGS_FILE,
    UNLABELED_SUFFIX,
    preprocessed_cases,
    preprocessing_settings,
)
from nnunet_ssl.data.pseudo_labels import UNCERTAIN, PseudoLabels, as_stored
from nnunet_ssl.data.views import PSEUDO_LABELS, VIEWS
from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.nnunet.plans import merged
from nnunet_ssl.training import Losses, Step
from nnunet_ssl.training.hyperparameters import SHARED, declared, method_name
from nnunet_ssl.training.step import LossTerm, weighted_sum

# Reading order of the shapes: 2D, isotropic 3D, anisotropic 3D (nnU-Net augments its slices as 2D images).
PATCHES = {"2d": (32, 32), "3d": (16, 16, 16), "anisotropic": (4, 32, 32)}
# What the labels of a data set are: classes of which one holds, overlapping regions, or either with ignored voxels.
SCENARIOS = ("labels", "regions", "ignore", "regions and ignore")


def make_plans(patch: tuple[int, ...], *, channels: int = 1, batch_size: int = 4, ssl: dict | None = None) -> dict:
    """nnU-Net plans with a tiny network; "2d" or "3d_fullres" by the number of sides."""
    dims = len(patch)
    name = "2d" if dims == 2 else "3d_fullres"
    stride = [[1] * dims, *[[2 if side >= 8 else 1 for side in patch]] * 3]
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [2.0 * side for side in patch],
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        **{f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")},
        **{f"resampling_fn_{kind}_kwargs": dict(resampling, is_seg=kind == "seg") for kind in ("data", "seg")},
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 4,
                "features_per_stage": [4, 8, 8, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 4,
                "strides": stride,
                "n_conv_per_stage": [1, 1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1, 1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": dims == 2,
    }
    return {
        "dataset_name": "Dataset900_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [1, *patch] if dims == 2 else list(patch),
        "image_reader_writer": "NaturalImage2DIO" if dims == 2 else "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {name: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(c): {k: 1.0 for k in ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")}
            for c in range(channels)
        },
        **({"ssl": ssl} if ssl is not None else {}),
    }


def make_dataset_json(labels: dict[str, Any], channels: int = 1, regions_order: list[int] | None = None) -> dict:
    """nnU-Net's description of a data set of 2D images; regions where an order of them is given."""
    content = {
        "channel_names": {str(c): f"channel {c}" for c in range(channels)},
        "labels": labels,
        "numTraining": 4,
        "file_ending": ".png",
    }
    return content | ({"regions_class_order": regions_order} if regions_order else {})


# Noise is never learned: unlabeled terms wait in test_learned, and where a test asks for it.
SSL = {
    "num_epochs": 4, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 3, "save_every": 1,
    "learned_dice": 0.0,
}  # fmt: skip


def make_labels(num_labels: int, scenario: str = "labels") -> dict[str, Any]:
    """The entry "labels" of dataset.json, for one of ``SCENARIOS``; the first region holds all others."""
    named: dict[str, Any] = {"background": 0, **{f"structure {i}": i for i in range(1, num_labels)}}
    if "regions" in scenario:
        named["structure 1"] = list(range(1, num_labels))
    return named | ({"ignore": num_labels} if "ignore" in scenario else {})


def in_place(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters by name to where a trainer reads them in the plans, without those of other built-in methods.

    Names that nobody knows stay, for the trainer to refuse.
    """
    own = set(declared(cls.Parameters)) - SHARED if hasattr(cls, "Parameters") else set()
    others = {name for trainer in TRAINERS for name in declared(trainer.Parameters)} - SHARED - own
    block = {name: value for name, value in values.items() if name in own}
    flat = {name: value for name, value in values.items() if name not in own | others}
    return flat | ({method_name(cls): block} if block else {})


class TinyDataset:
    """A preprocessed data set in nnU-Net's folders: 4 labeled, 3 hidden, 2 validation, 8 unlabeled cases.

    Args:
        root: Holds nnU-Net's three folders.
        patch: Of the plans and of the images, in voxels.
        num_labels: Background included.
        channels: Of the images.
        scenario: One of ``SCENARIOS``.
        device: Where its trainers train.
    """

    labeled = ("lab_0", "lab_1", "lab_2", "lab_3")
    hidden = ("hid_0", "hid_1", "hid_2")
    validation = ("val_0", "val_1")
    unlabeled = tuple(f"un_{i}" for i in range(8))

    def __init__(
        self,
        root: Path,
        patch: tuple[int, ...],
        num_labels: int = 3,
        channels: int = 1,
        scenario: str = "labels",
        device: str = "cpu",
    ) -> None:
        self.root, self.patch, self.channels, self.num_labels = root, patch, channels, num_labels
        self.device = torch.device(device)
        self.shape = (1, *patch) if len(patch) == 2 else patch
        self.plans = make_plans(patch, channels=channels, ssl=dict(SSL))
        (self.configuration,) = self.plans["configurations"]
        self.ignore_label = num_labels if "ignore" in scenario else None
        self.has_regions = "regions" in scenario
        order = list(range(1, num_labels)) if self.has_regions else None
        self.dataset_json = make_dataset_json(make_labels(num_labels, scenario), channels, order)
        self.base = root / "nnUNet_preprocessed" / self.plans["dataset_name"]
        self.folder = self.base / self.plans["configurations"][self.configuration]["data_identifier"]
        self._write()

    def _write(self) -> None:
        for name in ("nnUNet_raw", "nnUNet_results"):
            (self.root / name / self.plans["dataset_name"]).mkdir(parents=True)
        un = Path(str(self.folder) + UNLABELED_SUFFIX)
        self.folder.mkdir(parents=True)
        un.mkdir()
        rng = np.random.default_rng(0)
        for case in (*self.labeled, *self.hidden, *self.validation):
            self.write_case(case, rng)
        for case in self.unlabeled:
            self._write_blosc(un / f"{case}.b2nd", rng.normal(size=(self.channels, *self.shape)).astype(np.float32))
        settings = preprocessing_settings(PlansManager(self.plans), self.configuration)
        (un / SETTINGS_FILE).write_text(json.dumps(settings))
        split = {"train": list(self.labeled), "val": list(self.validation), "unlabeled": list(self.hidden)}
        (self.base / "splits_final.json").write_text(json.dumps([split]))
        (self.base / "dataset.json").write_text(json.dumps(self.dataset_json))
        (self.base / "dataset_fingerprint.json").write_text("{}")

    @staticmethod
    def _write_blosc(file: Path, array: np.ndarray) -> None:
        blosc2.asarray(np.ascontiguousarray(array), urlpath=str(file), mode="w")

    def write_case(self, case: str, rng: np.random.Generator) -> None:
        """Write a preprocessed case: labels of noise, and an image that shows them under noise."""
        labels = rng.integers(0, self.num_labels, (1, *self.shape)).astype(np.int16)
        image = (rng.normal(size=(self.channels, *self.shape)) + labels).astype(np.float32)
        locations: dict[Any, np.ndarray] = {c: np.argwhere(labels == c) for c in range(1, self.num_labels)}
        if self.has_regions:
            # nnU-Net names regions as dataset.json does, and all that is annotated by -1 and every label.
            locations[tuple(range(1, self.num_labels))] = np.argwhere(labels > 0)
            del locations[1]
        if self.ignore_label is not None:
            labels[..., : self.patch[-1] // 4] = self.ignore_label
            locations = {key: where[where[:, -1] >= self.patch[-1] // 4] for key, where in locations.items()}
            all_annotated = (-1, *range(self.num_labels))
            locations[all_annotated] = np.argwhere(labels != self.ignore_label)
        whole = tuple(image.shape)
        nnUNetDatasetBlosc2.save_case(
            image, labels, {"class_locations": locations}, str(self.folder / case), whole, whole, (1, *self.shape),
            (1, *self.shape),
        )  # fmt: skip

    def scramble_labels(self, cases: tuple[str, ...]) -> None:
        """Replace label files and class locations by noise; images stay."""
        rng = np.random.default_rng(99)
        for case in cases:
            noise = rng.integers(0, self.num_labels, (1, *self.shape)).astype(np.int16)
            self._write_blosc(self.folder / f"{case}_seg.b2nd", noise)
            save_pickle({"class_locations": {1: rng.integers(0, 2, (5, 4))}}, str(self.folder / f"{case}.pkl"))

    def scramble_labels_keeping_locations(self, cases: tuple[str, ...]) -> None:
        """Replace label files by noise; nnU-Net's validation loader crops by class locations, so these stay."""
        rng = np.random.default_rng(98)
        for case in cases:
            noise = rng.integers(0, self.num_labels, (1, *self.shape)).astype(np.int16)
            self._write_blosc(self.folder / f"{case}_seg.b2nd", noise)

    def write_pseudo_labels(self, fold: int | str, name: str) -> None:
        """Pseudo-labels of noise, partly uncertain, of all cases whose labels are hidden or unknown, where none are.

        Of one unlabeled case they are not kept.
        """
        made = PseudoLabels.of(str(self.folder), fold, name)
        if made.manifest_file.is_file():
            return
        folder = f"{self.folder}{UNLABELED_SUFFIX}"
        cases = {**dict.fromkeys(self.hidden, self.folder), **dict.fromkeys(preprocessed_cases(folder), folder)}
        rng = np.random.default_rng(7)
        made.start({})
        for case, place in cases.items():
            shape = blosc2.open(urlpath=f"{place}/{case}.b2nd", mode="r").shape[1:]
            stored = as_stored(rng.integers(0, self.num_labels, shape), rng.random(shape) < 0.2)
            made.write_case(case, stored, {"kept": case != self.unlabeled[-1], "why": "made up"}, self.patch)
        made.finish(list(cases), preprocessing_settings(PlansManager(self.plans), self.configuration), self.labeled)

    def trainer(self, cls: Any, fold: int | str = 0, **ssl: Any) -> Any:
        """A trainer of this data set, with further hyper-parameters; not initialized.

        Hyper-parameters of other methods may be among them, so that one set serves all trainers.
        """
        if PSEUDO_LABELS in getattr(cls, "views", ()):
            self.write_pseudo_labels(fold, cls.Parameters().labels)
        plans = json.loads(json.dumps(self.plans))
        plans["ssl"] = merged(plans["ssl"], in_place(cls, ssl))
        plans["continue_training"] = False
        trainer = cls(plans, self.configuration, fold, dict(self.dataset_json), self.device)
        if not hasattr(trainer, "hp"):
            for name, value in (
                ("num_epochs", 4),
                ("num_iterations_per_epoch", 2),
                ("num_val_iterations_per_epoch", 1),
            ):
                setattr(trainer, name, value)
        return trainer

    def initialized(self, cls: type, **ssl: Any) -> Any:
        """A trainer ready for steps, with all its networks in training mode."""
        trainer = self.trainer(cls, **ssl)
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
        trainer.network.train()
        for companion in trainer.companions.values():
            companion.start_epoch()
        return trainer

    def batches(self, trainer: Any, seed: int = 0) -> tuple[dict, dict]:
        """A labeled and an unlabeled batch of noise, as loaders give them; every view is other noise.

        Where voxels are ignored, these are a quarter of every labeled example. Pseudo-labels are noise too, partly
        uncertain.
        """
        rng = torch.Generator().manual_seed(seed)
        size = (self.channels, *self.patch)
        labeled = trainer.batch_size
        target = torch.randint(0, self.num_labels, (labeled, 1, *self.patch), generator=rng).to(torch.int16)
        data = torch.randn((labeled, *size), generator=rng)
        if self.ignore_label is not None:
            target[..., : self.patch[-1] // 4] = self.ignore_label
        target = self.as_target(target)
        larger = getattr(trainer, "unlabeled_patch_size", self.patch)
        unlabeled_size = (max(1, getattr(trainer, "unlabeled_batch_size", 0)), self.channels, *larger)
        views = {name: torch.randn(unlabeled_size, generator=rng) for name in VIEWS}
        of_patch = (unlabeled_size[0], 1, *larger)
        labels = torch.randint(-1, self.num_labels, of_patch, generator=rng, dtype=torch.int16)
        views[PSEUDO_LABELS] = torch.where(labels < 0, UNCERTAIN, labels)
        return {"data": data, "target": target, "keys": []}, {**views, "keys": []}

    def as_target(self, labels: torch.Tensor) -> torch.Tensor:
        """A label map (B, 1, *S) as nnU-Net's loss takes it: as it is, or as boolean channels of regions."""
        if not self.has_regions:
            return labels
        regions = [labels > 0, *(labels == c for c in range(2, self.num_labels))]
        if self.ignore_label is not None:
            regions[0] = regions[0] & (labels != self.ignore_label)
            regions.append(labels == self.ignore_label)
        return torch.cat(regions, 1)


def step_of(trainer: Any, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> Step:
    """What a trainer's method makes of batches as loaders give them, without autocast and without a step."""
    views = None if unlabeled is None or not trainer.uses_unlabeled else Unlabeled.of(unlabeled).to(trainer.device)
    made: Step = trainer.step(Labeled.of(labeled).to(trainer.device), views)
    return made


def weighted(trainer: Any, losses: Losses) -> torch.Tensor:
    """The sum of a step's losses by their weights, without what unlabeled terms wait for."""
    terms = {n: LossTerm(v, 1.0 if n in trainer.supervised_terms else trainer.weight(n)) for n, v in losses.items()}
    return weighted_sum(terms)

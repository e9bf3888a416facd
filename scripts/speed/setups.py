"""Cases, trainers and batches to measure on; nothing is loaded from disk unless a part says so."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.losses.predictions import downsample_target
from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.testing.tiny import make_plans

# The stock trainer first; the others in the order of the README.
MEASURED = {"stock": nnUNetTrainer} | {t.__name__.removeprefix("nnUNetTrainer"): t for t in TRAINERS}
DATASET = "Dataset900_Benchmark"
NUM_LABELS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: plans with one configuration to look at, and how many labels there are."""

    name: str
    plans: dict[str, Any]
    configuration: str
    num_labels: int = NUM_LABELS

    @property
    def patch(self) -> tuple[int, ...]:
        """In voxels."""
        return tuple(PlansManager(self.plans).get_configuration(self.configuration).patch_size)


def planned(
    name: str,
    patch: tuple[int, ...],
    batch: int,
    spacing: tuple[float, ...] | None = None,
    features: tuple[int, int] | None = None,
    num_labels: int = NUM_LABELS,
) -> Case:
    """A case with the plain U-Net that nnU-Net plans for a patch.

    Args:
        name: As it is printed.
        patch: In voxels.
        batch: Labeled and unlabeled examples together.
        spacing: In mm; 1 if not given. Decides on kernels and strides.
        features: Of the first stage, and the most of any; nnU-Net's own if not given.
        num_labels: The background included.
    """
    dims = len(patch)
    spacing = spacing or (1.0,) * dims
    first, most = features or (32, 512 if dims == 2 else 320)
    _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, patch, 4, 999)
    stages = len(strides)
    configuration = "2d" if dims == 2 else "3d_fullres"
    resampling = dict.fromkeys(("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"), "none")
    plans = make_plans(patch, batch_size=batch)
    settings = plans["configurations"][configuration]
    settings |= {
        "median_image_size_in_voxels": [2 * side for side in patch],
        "spacing": list(spacing),
        **resampling,
        **{f"{key}_kwargs": {} for key in resampling},
    }
    settings["architecture"]["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": [min(first * 2**i, most) for i in range(stages)],
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "strides": [list(stride) for stride in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    return Case(name, plans, configuration, num_labels)


def cases_on_cpu() -> list[Case]:
    """2D, 3D and anisotropic 3D, the last two with as many voxels."""
    return [
        planned("2D 256 x 256", (256, 256), 4),
        planned("3D 64 x 64 x 64", (64, 64, 64), 2),
        planned("3D 16 x 128 x 128, slices 5 mm apart", (16, 128, 128), 2, (5.0, 1.0, 1.0)),
    ]


def smallest_cases() -> list[Case]:
    """Of the same kinds, for seconds: whether everything works, not what it costs."""
    return [
        planned("2D 32 x 32", (32, 32), 4, features=(4, 8)),
        planned("3D 16 x 16 x 16", (16, 16, 16), 2, features=(4, 8)),
        planned("3D 4 x 32 x 32, slices 5 mm apart", (4, 32, 32), 2, (5.0, 1.0, 1.0), (4, 8)),
    ]


def small_cases() -> list[Case]:
    """Small networks, whose steps wait for data rather than others."""
    return [
        planned("2D 128 x 128, 8 to 64 features", (128, 128), 4, features=(8, 64)),
        planned("3D 32 x 32 x 32, 8 to 64 features", (32, 32, 32), 2, features=(8, 64)),
    ]


def case_of_plans(file: Path, configuration: str) -> Case:
    """nnU-Net's plans of a data set: own patch, batch and network, and the labels of the dataset.json beside them.

    Regions count as the labels that they are made of.
    """
    plans, description = load_json(str(file)), load_json(str(file.parent / "dataset.json"))
    num_labels = len(PlansManager(plans).get_label_manager(description).all_labels)
    return Case(f"{plans['dataset_name']} {configuration}", plans, configuration, num_labels)


def make_trainer(
    cls: type, case: Case, device: torch.device, bfloat16: bool = False, stage: int = 2, **settings: Any
) -> nnUNetTrainer:
    """A trainer in training mode, in its first epoch.

    Args:
        cls: The stock trainer's, or one of this package.
        case: What to train.
        device: Where.
        bfloat16: On the CPU, whether the trainers of this package use autocast.
        stage: That this epoch belongs to: 1, with labels alone, or 2, with the whole loss.
        settings: Further hyper-parameters.
    """
    plans = copy.deepcopy(case.plans) | {"dataset_name": DATASET, "continue_training": False}
    # Every transform moves something.
    first_stage = 0.5 if stage == 1 else 0.0
    plans["ssl"] = {
        "supervised_fraction": first_stage,
        "SupTC": {"identity_probability": 0.0},
        "cpu_bfloat16": bfloat16,
    } | settings
    channels = len(plans["configurations"][case.configuration]["normalization_schemes"])
    labels = {"background": 0, **{f"structure {i}": i for i in range(1, case.num_labels)}}
    dataset_json = {
        "channel_names": {str(c): f"channel {c}" for c in range(channels)}, "labels": labels, "file_ending": ".nii.gz"
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = cls(plans, case.configuration, 0, dataset_json, device)
        # initialize looks into the folder to see how the data are stored.
        folder = Path(trainer.preprocessed_dataset_folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            (folder / "x.b2nd").touch()
        trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()
    for companion in getattr(trainer, "companions", {}).values():
        companion.start_epoch()
    return trainer


def make_batches(trainer: nnUNetTrainer, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """A labeled and an unlabeled batch of noise; the second is empty for trainers without such images."""
    labeled, unlabeled = trainer.batch_size, getattr(trainer, "unlabeled_batch_size", 0)
    channels, larger = trainer.num_input_channels, getattr(trainer, "unlabeled_patch_size", case.patch)
    data = torch.randn(labeled, channels, *case.patch)
    target = torch.randint(0, case.num_labels, (labeled, 1, *case.patch)).to(torch.int16)
    strong, weak = (torch.randn(unlabeled, channels, *larger) for _ in range(2))
    return {"data": data, "target": target, "keys": []}, {"strong": strong, "weak": weak, "keys": []}


def make_step(
    cls: type, case: Case, device: torch.device, bfloat16: bool = False, stage: int = 2
) -> tuple[nnUNetTrainer, Callable[[], object]]:
    """A trainer, and a function that does one training step of a stage on a batch in memory."""
    trainer = make_trainer(cls, case, device, bfloat16, stage)
    labeled, unlabeled = make_batches(trainer, case)
    if cls is nnUNetTrainer:
        labeled["target"] = downsample_target(labeled["target"], output_shapes(trainer, case))
    else:
        trainer.dataloader_unlabeled = iter(lambda: unlabeled, None) if trainer.uses_unlabeled else None
        trainer.dataloader_train = iter(lambda: labeled, None)
    return trainer, lambda: trainer.train_step(labeled)


def autocast_of(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """As its training steps use: this package's trainers know, the stock trainer does so on CUDA."""
    if hasattr(trainer, "autocast"):
        return trainer.autocast()
    return torch.autocast("cuda") if trainer.device.type == "cuda" else contextlib.nullcontext()


def output_shapes(trainer: nnUNetTrainer, case: Case) -> list[tuple[int, ...]]:
    """Spatial shapes of the network's outputs."""
    scales = trainer._get_deep_supervision_scales()
    return [tuple(round(side * s) for side, s in zip(case.patch, scale)) for scale in scales]


def write_cases(case: Case, folder: Path, sides: tuple[int, ...], number: int) -> None:
    """Preprocessed cases of noise, three of four with hidden labels, and the split that says so: half of a batch each.

    Args:
        case: What to train.
        folder: nnUNet_preprocessed.
        sides: Of every image, in voxels.
        number: Of labeled cases.
    """
    base = folder / DATASET
    configuration = PlansManager(case.plans).get_configuration(case.configuration)
    cases, channels = base / configuration.data_identifier, len(configuration.normalization_schemes)
    cases.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (1, *sides) if len(sides) == 2 else sides
    identifiers = [f"case_{i:03}" for i in range(4 * number + 1)]
    for identifier in identifiers:
        labels = rng.integers(0, case.num_labels, (1, *shape)).astype(np.int16)
        image = rng.normal(size=(channels, *shape)).astype(np.float32)
        locations = {c: np.argwhere(labels == c)[:1000] for c in range(1, case.num_labels)}
        blocks = (1, *(min(64, side) for side in shape))
        nnUNetDatasetBlosc2.save_case(
            image, labels, {"class_locations": locations}, str(cases / identifier), blocks, blocks, blocks, blocks
        )
    split = {"train": identifiers[:number], "unlabeled": identifiers[number:-1], "val": identifiers[-1:]}
    (base / "splits_final.json").write_text(json.dumps([split]))
    (base / "dataset_fingerprint.json").write_text("{}")


def use_folders(root: Path) -> None:
    """Point nnU-Net at folders below ``root``."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(root / name)

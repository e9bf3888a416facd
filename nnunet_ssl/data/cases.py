"""Which cases are unlabeled, the image-only view of them, and their loader.

Nothing in this module opens a label: cases with labels lie beside theirs in nnU-Net's folder, and the view below
reads the image file alone.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits

from nnunet_ssl.data.augmentation import Augmentation, initial_patch_size
from nnunet_ssl.data.preprocessing import (
    TEST_SUFFIX,
    UNLABELED_SUFFIX,
    check_same_preprocessing,
    preprocessed_cases,
)
from nnunet_ssl.data.previous_stage import PreviousStage, previous_stage
from nnunet_ssl.data.raw_images import TEST_FOLDER, UNLABELED_FOLDER, raw_identifiers
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.data.workers import in_background_workers
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer

# Why the images of a fold's validation cases count as unlabeled, in transductive trainers.
TRANSDUCTIVE = "validation image"
# Of order-3 splines in regions of zeros, in units of the normalized image's standard deviation.
_RESAMPLING_NOISE = 0.01


@dataclasses.dataclass(frozen=True)
class UnlabeledCase:
    """One image without a label: where its preprocessed file lies, and why it counts as unlabeled."""

    identifier: str
    folder: str
    source: str


class UnlabeledDataset:
    """Preprocessed images by identifier; images only.

    Args:
        cases: The cases to hold. Identifiers must be unique.
    """

    def __init__(self, cases: Sequence[UnlabeledCase]) -> None:
        self._folders = {case.identifier: case.folder for case in cases}
        self.identifiers = sorted(self._folders)
        # As nnU-Net does: no memory mapping on Windows.
        self._mmap = {} if os.name == "nt" else {"mmap_mode": "r"}

    def load_image(self, identifier: str) -> Any:
        """Open an image (C, *S), in voxels of the plan's spacing; it is read as it is sliced."""
        file = os.path.join(self._folders[identifier], identifier + ".b2nd")
        return blosc2.open(urlpath=file, mode="r", dparams={"nthreads": 1}, **self._mmap)


class UnlabeledDataLoader(nnUNetDataLoader):
    """Random patches of unlabeled images, with nnU-Net's cropping and the transforms it is given.

    Yields ``{"data": (B, C, *S) float32, "keys": B identifiers}``, and where wanted ``"weak"`` like ``"data"``: the
    same patches, moved the same way, without changes of their intensities.

    Args:
        dataset: Image-only view.
        batch_size: B.
        patch_size: Size that is cut out, in voxels, before the transforms.
        final_patch_size: The patch of the network, in voxels. What transforms return may exceed it by margins that hang
            over the image's border: the middle then lies wherever nnU-Net would put a patch.
        label_manager: Asked for by nnU-Net's loader; no label is ever read.
        transforms: Applied to the image of each example.
        previous_stage: What the second stage of a cascade sees besides the image: further channels of what the
            transforms return.
        masked_channels: Channels that the plans normalize inside nnU-Net's mask of nonzero voxels. Where there are
            any, the transforms get that mask as ``segmentation`` (-1 outside, 0 inside), found from the image alone.
        weak: Whether to yield weakly augmented patches too.
    """

    def __init__(
        self,
        dataset: UnlabeledDataset,
        batch_size: int,
        patch_size: Sequence[int],
        final_patch_size: Sequence[int],
        label_manager: LabelManager,
        transforms: BasicTransform | None = None,
        masked_channels: Sequence[int] = (),
        previous_stage: PreviousStage | None = None,
        weak: bool = False,
    ) -> None:
        super().__init__(dataset, batch_size, patch_size, final_patch_size, label_manager, transforms=transforms)
        self.masked_channels = list(masked_channels)
        self.previous_stage = previous_stage
        self.weak = weak
        # With an ignore label nnU-Net's cropping looks for annotated voxels. There are none here.
        self.has_ignore = False

    def generate_train_batch(self) -> dict[str, Any]:
        """Draw one batch."""
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            examples = [self._example(key) for key in keys]
        names = ("data", "weak") if self.weak else ("data",)
        return {name: torch.stack(images) for name, images in zip(names, zip(*examples))} | {"keys": keys}

    def _example(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        image = self._data.load_image(key)
        lower, upper = self.get_bbox(image.shape[1:], False, None)
        box = [[low, high] for low, high in zip(lower, upper)]
        patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        if self.patch_size_was_2d:
            patch = patch[:, 0]
        if self.transforms is None:
            return patch, patch
        data = {"image": patch}
        if self.weak:
            # What nnU-Net's transforms move like an image, and leave alone where they change intensities.
            data["regression_target"] = patch.clone()
        if self.masked_channels:
            data["segmentation"] = outside_of_mask(patch[self.masked_channels]).to(torch.int16).neg()
        if self.previous_stage is None:
            transformed = self.transforms(**data)
            return transformed["image"], transformed.get("regression_target")
        cropped = crop_and_pad_nd(self.previous_stage.load(key), box, -1, cast_cropped_to=np.int16)
        previous = torch.from_numpy(cropped)[None]
        mask = data.get("segmentation", torch.zeros_like(previous))
        # nnU-Net's transforms turn channel 1 into further channels of the image, and change them: the weak view's come
        # from a second copy.
        transformed = self.transforms(**data | {"segmentation": torch.cat([mask, previous, previous])})
        image, weak = transformed["image"], transformed.get("regression_target")
        if weak is None:
            return image, image
        return image, torch.cat([weak, self.previous_stage.one_hot(transformed["segmentation"][1])])


def outside_of_mask(image: torch.Tensor) -> torch.Tensor:
    """Where nnU-Net's normalization left an image alone, because its raw voxels were zero.

    Those voxels are zero but for what spline resampling adds. Normalized voxels inside cross zero too, yet not all of
    a neighborhood at once: the mask is opened with a window of 3 voxels.

    Args:
        image: (C, *S), preprocessed channels that are normalized inside the mask.

    Returns:
        Boolean (1, *S).
    """
    pool = torch.nn.functional.max_pool2d if image.ndim == 3 else torch.nn.functional.max_pool3d
    largest = image.abs().amax(dim=0, keepdim=True)
    eroded = pool(largest, 3, stride=1, padding=1) < _RESAMPLING_NOISE
    return pool(eroded.float(), 3, stride=1, padding=1) > 0


def find_unlabeled_cases(
    preprocessed_folder: str,
    raw_folder: str | None,
    preprocessing: dict[str, Any],
    split: Mapping[str, Sequence[str]],
    transductive: bool,
    partly_annotated: Sequence[str] = (),
) -> tuple[list[UnlabeledCase], list[str]]:
    """Collect the unlabeled cases of a training.

    Args:
        preprocessed_folder: nnU-Net's folder of the configuration, ``<dataset>/<data_identifier>``.
        raw_folder: The raw data set, if it is on this machine: then images that were removed from it do not count.
        preprocessing: What the plan says of preprocessing, see ``preprocessing.preprocessing_settings``.
        split: ``train``, ``val`` and ``unlabeled`` identifiers of the fold.
        transductive: Whether the images of the fold's validation cases and of imagesTs count as unlabeled too.
        partly_annotated: Labeled cases with ignored voxels: their images count as unlabeled too.

    Returns:
        The cases, sorted by identifier, at least one; and notes for the log.

    Raises:
        UserError: Where there are none, some are not preprocessed yet, or a case is also labeled or reported on.
    """
    notes: list[str] = []
    unlabeled = _from_folder(preprocessed_folder + UNLABELED_SUFFIX, raw_folder, UNLABELED_FOLDER, preprocessing, notes)
    cases = unlabeled + _from_fold(preprocessed_folder, split["unlabeled"], "hidden label")
    # With fold "all" nnU-Net validates on its training cases; these are labeled.
    reported = sorted(set(split["val"]) - set(split["train"]))
    if transductive:
        cases += _from_fold(preprocessed_folder, reported, TRANSDUCTIVE)
        cases += _from_folder(preprocessed_folder + TEST_SUFFIX, raw_folder, TEST_FOLDER, preprocessing, notes)
    if not cases and not partly_annotated:
        raise UserError(
            "No unlabeled case. There are three ways to add some: put images into imagesUn/ of the raw data set, or "
            "list them in dataset.json, and run 'nnunet-ssl preprocess'; hide labels for an experiment with "
            "'nnunet-ssl split' and train the fold it prints; or train nnUNetTrainerSemiTCPlus, which uses the images "
            "of the validation cases and of imagesTs/."
        )
    _check_disjoint(cases, split["train"], "labeled")
    cases += _from_fold(preprocessed_folder, partly_annotated, "partly annotated")
    if not transductive:
        _check_disjoint(cases, reported, "validation")
    return sorted(cases, key=lambda case: case.identifier), notes


def cases_with_ignored_voxels(dataset: nnUNetBaseDataset, ignore_label: int | None) -> list[str]:
    """The labeled cases of a data set in which some voxels are not annotated; none without an ignore label."""
    if ignore_label is None:
        return []
    # Slice by slice: of most cases the first ones decide.
    segmentations = {identifier: dataset.load_case(identifier)[1] for identifier in dataset.identifiers}
    return [i for i, s in segmentations.items() if any((s[:, z] == ignore_label).any() for z in range(s.shape[1]))]


def hidden_cases(preprocessed_folder: str, fold: int | str) -> list[str]:
    """What a fold of splits_final.json lists under ``unlabeled``; nothing where there is no such fold."""
    splits_file = Path(preprocessed_folder).parent / "splits_final.json"
    if fold == "all" or not splits_file.is_file():
        return []
    splits = read_splits(str(splits_file))
    return splits[int(fold)].get("unlabeled", []) if int(fold) < len(splits) else []


def _from_fold(folder: str, identifiers: Sequence[str], source: str) -> list[UnlabeledCase]:
    missing = [i for i in identifiers if not os.path.isfile(os.path.join(folder, i + ".b2nd"))]
    if missing:
        raise UserError(
            f"{len(missing)} cases of the fold ({source}) are not preprocessed in {folder}, e.g. {missing[0]}. "
            f"Run nnUNetv2_preprocess for this configuration."
        )
    return [UnlabeledCase(i, folder, source) for i in identifiers]


def _from_folder(
    folder: str, raw_folder: str | None, raw_name: str, preprocessing: dict[str, Any], notes: list[str]
) -> list[UnlabeledCase]:
    identifiers = preprocessed_cases(folder)
    raw = raw_identifiers(raw_folder, raw_name)
    command = "nnunet-ssl preprocess" + (" --test-images" if raw_name == TEST_FOLDER else "")
    if not identifiers:
        if raw:
            raise UserError(
                f"{raw_name} holds {len(raw)} images, but none is preprocessed in {folder}. Run '{command} -d DATASET "
                f"-c CONFIGURATION' with the plans you train with."
            )
        return []
    check_same_preprocessing(folder, preprocessing)
    if raw is not None:
        in_raw = set(raw)
        missing, removed = sorted(in_raw - set(identifiers)), sorted(set(identifiers) - in_raw)
        if missing:
            notes.append(
                f"WARNING: {len(missing)} of {len(raw)} images of {raw_name} are not preprocessed and not used, e.g. "
                f"{missing[0]}. Run '{command}' again."
            )
        if removed:
            notes.append(f"{len(removed)} images in {folder} are no longer in {raw_name} and not used.")
        identifiers = [i for i in identifiers if i in in_raw]
    return [UnlabeledCase(i, folder, raw_name) for i in identifiers]


def _check_disjoint(cases: Sequence[UnlabeledCase], others: Sequence[str], meaning: str) -> None:
    sources: dict[str, str] = {}
    for case in cases:
        if case.identifier in sources:
            raise UserError(
                f"Case {case.identifier} counts as unlabeled twice: {sources[case.identifier]} and {case.source}. "
                f"Rename or remove one."
            )
        sources[case.identifier] = case.source
    both = sorted(set(sources) & set(others))
    if both:
        raise UserError(
            f"{len(both)} {meaning} cases of the fold are unlabeled cases too, e.g. {both[0]} ({sources[both[0]]}). "
            f"Remove them from one of the two; to learn from validation images on purpose use nnUNetTrainerSemiTCPlus."
        )


def describe_training(trainer: SemiSupervisedTrainer, cases: Sequence[UnlabeledCase]) -> str:
    """One line for the log: "Training with 95 unlabeled cases (95 hidden label), 2 labeled + 2 unlabeled per batch"."""
    counts = ", ".join(f"{n} {source}" for source, n in sorted(Counter(case.source for case in cases).items()))
    batch = f"{trainer.batch_size} labeled + {trainer.unlabeled_batch_size} unlabeled per batch"
    total = trainer.batch_size + trainer.unlabeled_batch_size
    first = f", all {total} labeled in stage 1" if trainer.switch_epoch else ""
    return f"Training with {len(cases)} unlabeled cases ({counts}), {batch}{first}"


def share_batch(
    total: int, centered_fraction: float, labeled_cases: int, unlabeled_cases: int, largest: float = 0.5
) -> tuple[int, int, float]:
    """Share the plan's batch between labeled and unlabeled examples, at least one of either.

    Half each by default, as in the papers, whose unlabeled cases are the many. Every unlabeled example takes the place
    of a labeled one, which is worth more the more labels there are to learn from: so unlabeled ones get the nearest
    number to the square of their share of the cases, where that is less. (Their share itself, of which half the cases
    make half the batch, lost to training on labels alone with 50 labeled cases of 99.)

    Args:
        total: The plan's batch size, or a process's part of it.
        centered_fraction: Of the labeled examples that nnU-Net centers on a structure.
        labeled_cases: How many there are to draw from.
        unlabeled_cases: The same.
        largest: Part of the batch that unlabeled examples never exceed, but for the one.

    Returns:
        Labeled and unlabeled examples per step, and the fraction that nnU-Net really reaches with a batch of
        ``total``: of 2 it centers 1, not 0.33, on a structure.
    """
    share = (unlabeled_cases / (labeled_cases + unlabeled_cases)) ** 2
    # Whole examples, also where a product like 10 * 0.3 falls a rounding error short of them.
    most = math.floor(total * largest + 1e-6)
    unlabeled = max(1, min(most, round(total * share), total - 1))
    centered = total - round(total * (1 - centered_fraction))
    return max(1, total - unlabeled), unlabeled, centered / total


class LabeledBatches:
    """Batches for stage 1: as many labeled examples as the plan's batch has, out of smaller labeled ones.

    What is too many for one batch goes into the next: nothing is loaded in vain.
    """

    def __init__(self) -> None:
        self._rest: list[dict[str, Any]] = []

    def fill(self, batch: dict[str, Any], more: Iterator[dict[str, Any]], total: int) -> dict[str, Any]:
        """A batch of ``total`` examples.

        Args:
            batch: Its first examples, after those that the last batch left over: ``data`` and ``target`` on a device,
                and ``keys``.
            more: Where to draw further ones. They are joined on the device of ``batch``, as a copy that joins them on
                the host would not lie in pinned memory.
            total: Wanted examples.
        """
        parts = [*self._rest, batch]
        while sum(len(part["data"]) for part in parts) < total:
            parts.append(to_device(next(more), batch["data"].device))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in ("data", "target")}
        keys = [key for part in parts for key in part["keys"]]
        rest = {name: values[total:] for name, values in tensors.items()} | {"keys": keys[total:]}
        self._rest = [rest] if len(rest["data"]) else []
        return {name: values[:total] for name, values in tensors.items()} | {"keys": keys[:total]}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; what is no tensor stays."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def make_unlabeled_loader(
    trainer: SemiSupervisedTrainer, cases: Sequence[UnlabeledCase], augmentation: Augmentation
) -> Iterator[dict[str, Any]]:
    """A trainer's loader of unlabeled batches, with the augmentation of its labeled ones, in background workers.

    Args:
        trainer: Says patch, batch and normalization.
        cases: What to draw from.
        augmentation: The trainer's.
    """
    rotation, slice_by_slice, _, mirror_axes = augmentation
    patch_size, masked = trainer.unlabeled_patch_size, trainer.configuration_manager.use_mask_for_norm
    loader = UnlabeledDataLoader(
        UnlabeledDataset(cases),
        trainer.unlabeled_batch_size,
        initial_patch_size(patch_size, rotation, slice_by_slice),
        trainer.configuration_manager.patch_size,
        trainer.label_manager,
        trainer.get_training_transforms(
            patch_size,
            rotation,
            None,
            mirror_axes,
            slice_by_slice,
            use_mask_for_norm=masked,
            is_cascaded=trainer.is_cascaded,
            foreground_labels=trainer.label_manager.foreground_labels,
        ),
        masked_channels=[channel for channel, is_masked in enumerate(masked) if is_masked],
        previous_stage=previous_stage(trainer),
        weak=trainer.wants_weak_view,
    )
    return in_background_workers(loader, trainer.device.type == "cuda", trainer.hp.loader_timeout)

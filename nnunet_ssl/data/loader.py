"""The image-only view of unlabeled cases, and their loader.

Nothing in this module opens a label: cases with labels lie beside theirs in nnU-Net's folder, and the view below
reads the image file alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits

from nnunet_ssl.data.augmentation import Augmentation, initial_patch_size
from nnunet_ssl.data.previous_stage import PreviousStage, previous_stage
from nnunet_ssl.data.workers import in_background_workers

if TYPE_CHECKING:
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer
from nnunet_ssl.data.cases import UnlabeledCase

# Of order-3 splines in regions of zeros, in units of the normalized image's standard deviation.
_RESAMPLING_NOISE = 0.01


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

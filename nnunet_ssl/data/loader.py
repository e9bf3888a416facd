"""The image-only view of unlabeled cases, and their loader.

Nothing in this module opens a label: cases with labels lie beside theirs in nnU-Net's folder, and the view below
reads the image file alone. Pseudo-labels, which have a folder of their own, are read for methods that ask for them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnunet_ssl.data.augmentation import Augmentation, initial_patch_size
from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.data.pseudo_labels import PseudoLabels, as_learned
from nnunet_ssl.data.views import PSEUDO_LABELS, STRONG, Views
from nnunet_ssl.data.workers import in_background_workers

# Of order-3 splines in regions of zeros, in units of the normalized image's standard deviation.
_RESAMPLING_NOISE = 0.01
# A patch whose standard deviation is less than this part of the image's shows air; so often another place is drawn.
_EMPTY, _PLACES = 0.2, 4


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

    Yields every wanted view by its name, (B, C, *S) float32, and ``keys``, the B identifiers; with pseudo-labels, these
    too, (B, 1, *S) int16. Labeled patches are centered on structures in part; here no structure is known, but places
    that show nothing but air are drawn anew.

    Args:
        dataset: Image-only view.
        batch_size: B.
        patch_size: Size that is cut out, in voxels, before the transforms.
        final_patch_size: The patch of the network, in voxels. What transforms return may exceed it by margins that hang
            over the image's border: the middle then lies wherever nnU-Net would put a patch.
        label_manager: Asked for by nnU-Net's loader; no label is ever read.
        transforms: nnU-Net's, for the image of each example; None for none.
        masked_channels: Channels that the plans normalize inside nnU-Net's mask of nonzero voxels. Where there are
            any, the transforms get that mask as ``segmentation`` (-1 outside, 0 inside), found from the image alone.
        previous_stage: What the second stage of a cascade sees besides the image: further channels of what the
            transforms return.
        views: Wanted views, see ``Views``.
        pseudo_labels: Of every case, where the views name them.
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
        views: Sequence[str] = (STRONG,),
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        in_views = Views(transforms, views)
        super().__init__(dataset, batch_size, patch_size, final_patch_size, label_manager, transforms=in_views)
        self.masked_channels = list(masked_channels)
        self.previous_stage = previous_stage
        self.pseudo_labels = pseudo_labels if PSEUDO_LABELS in views else None
        # With an ignore label nnU-Net's cropping looks for annotated voxels. There are none here.
        self.has_ignore = False
        self._spreads: dict[str, float] = {}

    def generate_train_batch(self) -> dict[str, Any]:
        """Draw one batch."""
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            examples = [self._example(key) for key in keys]
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]} | {"keys": keys}

    def _example(self, key: str) -> dict[str, Tensor]:
        patch, box = self._place(key)
        if self.patch_size_was_2d:
            patch = patch[:, 0]
        data = {"image": patch}
        if self.masked_channels:
            data["segmentation"] = outside_of_mask(patch[self.masked_channels]).to(torch.int16).neg()
        if self.previous_stage is not None:
            cropped = crop_and_pad_nd(self.previous_stage.load(key), box, -1, cast_cropped_to=np.int16)
            previous = torch.from_numpy(cropped)[None]
            # nnU-Net's transforms look for the previous segmentation behind the mask.
            mask = data.get("segmentation", torch.zeros_like(previous))
            data["segmentation"] = torch.cat([mask, previous])
        if self.pseudo_labels is not None:
            # Outside of the image is background, as nnU-Net has it for labels.
            cropped = crop_and_pad_nd(self.pseudo_labels.load(key), box, 0)
            labels = torch.from_numpy(as_learned(cropped)).reshape(1, *patch.shape[1:])
            before = [data["segmentation"]] if "segmentation" in data else []
            data["segmentation"] = torch.cat([*before, labels])
        views: dict[str, Tensor] = self.transforms(**data)
        return views

    def _place(self, key: str) -> tuple[Tensor, list[list[int]]]:
        """A patch (C, *S), by nnU-Net's rules, and its bounds per axis."""
        image = self._data.load_image(key)
        if key not in self._spreads:
            # Of the middle slice, or of all of a 2D image: bodies lie in the middle.
            self._spreads[key] = float(np.std(image[:, image.shape[1] // 2]))
        for _ in range(_PLACES):
            lower, upper = self.get_bbox(image.shape[1:], False, None)
            box = [[low, high] for low, high in zip(lower, upper)]
            patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
            if patch.std() >= _EMPTY * self._spreads[key]:
                break
        return patch, box


def outside_of_mask(image: torch.Tensor) -> torch.Tensor:
    """Where nnU-Net's normalization left an image alone, because its raw voxels were zero.

    Those voxels are zero but for what spline resampling adds. Normalized voxels inside cross zero too, yet not all of
    a neighborhood at once: the mask is opened with a window of 3 voxels.

    Args:
        image: (C, *S), preprocessed channels that are normalized inside the mask.

    Returns:
        Boolean (1, *S).
    """
    largest = image.abs().amax(dim=0, keepdim=True)
    return _largest_nearby(_largest_nearby(largest) < _RESAMPLING_NOISE)


def _largest_nearby(image: Tensor) -> Tensor:
    """Maximum of a window of 3 voxels per axis, (C, *S); axis by axis, as max pooling takes twenty times as long."""
    for axis in range(1, image.ndim):
        largest = image.clone()
        for here, there in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
            target, neighbor = ((slice(None),) * axis + (part,) for part in (here, there))
            torch.maximum(largest[target], image[neighbor], out=largest[target])
        image = largest
    return image


@dataclasses.dataclass(frozen=True)
class LoaderSettings:
    """What a training asks of its loader of unlabeled batches.

    Attributes:
        batch_size: Examples per batch.
        patch_size: Of the views, in voxels per axis; the network's, or more by margins.
        network_patch_size: In voxels per axis.
        views: Wanted views, see ``Views``.
        augmentation: That of the labeled batches.
        make_transforms: nnUNetTrainer.get_training_transforms, or one with its arguments.
        use_mask_for_norm: Per channel of the image, whether the plans normalize it inside nnU-Net's mask.
        label_manager: nnU-Net's.
        previous_stage: For the second stage of a cascade.
        pin_memory: Whether batches go to a GPU.
        timeout: How long to wait for a batch, in seconds.
        pseudo_labels: Where the views name them.
    """

    batch_size: int
    patch_size: Sequence[int]
    network_patch_size: Sequence[int]
    views: Sequence[str]
    augmentation: Augmentation
    make_transforms: Callable[..., BasicTransform]
    use_mask_for_norm: Sequence[bool]
    label_manager: LabelManager
    previous_stage: PreviousStage | None
    pin_memory: bool
    timeout: float
    pseudo_labels: PseudoLabels | None = None


def make_unlabeled_loader(cases: Sequence[UnlabeledCase], settings: LoaderSettings) -> Iterator[dict[str, Any]]:
    """A loader of unlabeled batches, with the augmentation of labeled ones, in background workers.

    Args:
        cases: What to draw from.
        settings: Patch, batch, views and normalization.
    """
    rotation, slice_by_slice, _, mirror_axes = settings.augmentation
    masked = settings.use_mask_for_norm
    transforms = settings.make_transforms(
        settings.patch_size,
        rotation,
        None,
        mirror_axes,
        slice_by_slice,
        use_mask_for_norm=masked,
        is_cascaded=settings.previous_stage is not None,
        foreground_labels=settings.label_manager.foreground_labels,
    )
    loader = UnlabeledDataLoader(
        UnlabeledDataset(cases),
        settings.batch_size,
        initial_patch_size(settings.patch_size, rotation, slice_by_slice),
        settings.network_patch_size,
        settings.label_manager,
        transforms,
        masked_channels=[channel for channel, is_masked in enumerate(masked) if is_masked],
        previous_stage=settings.previous_stage,
        views=settings.views,
        pseudo_labels=settings.pseudo_labels,
    )
    return in_background_workers(loader, settings.pin_memory, settings.timeout)

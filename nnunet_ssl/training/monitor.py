"""Two fixed unlabeled patches that are looked at throughout a training: how labels settle, and pictures of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.loader import UnlabeledDataset
from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.files import replace_atomically

NUM_WATCHED = 2
# The statistic that says how stable pseudo-labels are.
STABILITY = "stability"
_SEED = 0


@dataclasses.dataclass(frozen=True)
class View:
    """What a method makes of unlabeled images, to be looked at.

    Attributes:
        pseudo_labels: Label maps (B, *S); watched from epoch to epoch.
        maps: Further label maps and boolean masks (B, *S) by name, in the order of the picture.
        image: (B, C, *S), shown instead of the images, for methods that move them.
    """

    pseudo_labels: Tensor
    maps: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    image: Tensor | None = None


class Monitor:
    """Watches the middle of the first unlabeled cases, without augmentation.

    Args:
        cases: The unlabeled cases.
        patch_size: What the unlabeled loader gives, in voxels per axis; 2D patches are taken from the middle slice.
        previous_stage: What the second stage of a cascade sees besides the image.

    Attributes:
        images: The patches (B, C, *S), on the CPU.
    """

    def __init__(
        self, cases: Sequence[UnlabeledCase], patch_size: Sequence[int], previous_stage: PreviousStage | None = None
    ) -> None:
        dataset = UnlabeledDataset(cases)
        self.identifiers = dataset.identifiers[:NUM_WATCHED]
        self.images = torch.stack([_center_patch(dataset.load_image(i), patch_size) for i in self.identifiers])
        if previous_stage is not None:
            labels = [_center_patch(previous_stage.load(i)[:][None], patch_size)[0] for i in self.identifiers]
            channels = torch.stack([previous_stage.one_hot(segmentation) for segmentation in labels])
            self.images = torch.cat([self.images, channels], dim=1)
        self._last: Tensor | None = None

    @staticmethod
    def generator(device: torch.device) -> torch.Generator:
        """For what is random in a view: the same numbers at every look."""
        return torch.Generator(device=device).manual_seed(_SEED)

    def stability(self, view: View) -> float:
        """How much of the pseudo-labels stayed since the last look.

        Returns:
            Their Dice coefficient with those of the last look, mean over labels and patches; not a number at the first
            look and where there is no foreground.
        """
        labels = view.pseudo_labels.cpu()
        stability = float("nan") if self._last is None else mean_dice(labels, self._last)
        self._last = labels
        return stability

    def draw(self, file: str, view: View) -> None:
        """Draw a PNG file, a row per patch: the image, then every map; of volumes one slice.

        Raises:
            UserError: Where the file cannot be written.
        """
        images = self.images if view.image is None else view.image
        maps = {**view.maps, "pseudo-labels": view.pseudo_labels}
        replace_atomically(file, lambda temporary: _draw(temporary, self.identifiers, images, maps))


def mean_dice(first: Tensor, second: Tensor) -> float:
    """Mean over labels above zero of the Dice coefficient of two label maps; not a number where both are empty."""
    values = torch.cat([first.unique(), second.unique()]).unique()
    scores = [
        2 * ((first == v) & (second == v)).sum().item() / ((first == v).sum() + (second == v).sum()).item()
        for v in values[values > 0]
    ]
    return float(np.mean(scores)) if scores else float("nan")


def picture_file(folder: str, epoch: int) -> str:
    """Where the picture of an epoch (from 1) lies."""
    return os.path.join(folder, f"unlabeled_epoch_{epoch:04d}.png")


def _center_patch(image: np.ndarray, patch_size: Sequence[int]) -> Tensor:
    """(C, *patch_size) from the middle of an image (C, *S); zeros beyond its border."""
    sides = [1] * (3 - len(patch_size)) + list(patch_size)
    box = [[(whole - side) // 2, (whole - side) // 2 + side] for whole, side in zip(image.shape[1:], sides)]
    patch = torch.from_numpy(np.ascontiguousarray(crop_and_pad_nd(image, box, 0))).float()
    return patch[:, 0] if len(patch_size) == 2 else patch


def _draw(file: str, identifiers: Sequence[str], images: Tensor, maps: Mapping[str, Tensor]) -> None:
    """A row per patch: the image, then every map; of volumes the slice with most foreground."""
    columns = 1 + len(maps)
    figure = Figure(figsize=(2.4 * columns, 2.6 * len(identifiers)), dpi=100)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(identifiers), columns, squeeze=False)
    largest = max(1, int(maps["pseudo-labels"].max()))
    for b, (identifier, row) in enumerate(zip(identifiers, grid)):
        foreground = (maps["pseudo-labels"][b] > 0).float()
        index = int(foreground.flatten(1).sum(1).argmax()) if foreground.ndim == 3 else None
        shown = images[b, 0].float().cpu()
        row[0].imshow(shown if index is None else shown[index], cmap="gray")
        row[0].set_title(identifier, fontsize=8, parse_math=False)
        for axes, (name, values) in zip(row[1:], maps.items()):
            plane = values[b].cpu() if index is None else values[b, index].cpu()
            is_mask = values.dtype == torch.bool
            axes.imshow(
                plane.float(), cmap="gray" if is_mask else "nipy_spectral", vmin=0, vmax=1 if is_mask else largest,
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(name, fontsize=8)
    for axes in grid.flat:
        axes.axis("off")
    figure.tight_layout()
    with open(file, "wb") as stream:
        canvas.print_png(stream)

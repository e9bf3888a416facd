"""Losses of overlap between maps of probabilities, in float32 whatever autocast does around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_ssl.losses.predictions import (
    probabilities,
    target_maps,
)

# Added to numerator and denominator: a class absent from both sides counts as fully agreed, not as 0 / 0.
SMOOTH = 1.0


def soft_iou_loss(first: Tensor, second: Tensor, mask: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """1 - mean over images and classes of sum(p q) / sum(p + q - p q).

    The loss of Bortsova et al. (MICCAI 2019), used there both against labels and between the two branches. All
    channels count, the background too. Symmetric in its two arguments, and gradient flows into both.

    Args:
        first: Probabilities p (B, K, *S).
        second: Probabilities or a one-hot map q (B, K, *S).
        mask: (B, 1, *S), boolean or 0/1; voxels at 0 do not count. All count if absent.
        counted: (B, K), boolean; the classes of each image over which its mean is taken; an image in which none counts
            adds 0 to the mean over images. All count if absent.

    Returns:
        Scalar in [0, 1].
    """
    overlap = first * second
    overlap, union = _sums((overlap, first + second - overlap), mask)
    return _mean(1.0 - (overlap + SMOOTH) / (union + SMOOTH), counted)


def tanimoto_loss(first: Tensor, second: Tensor, mask: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """Mean over images and classes of sum((p - q)^2) / sum(p^2 + q^2 - p q), which is 0 for equal predictions.

    Equals 1 - sum(p q) / sum(p^2 + q^2 - p q): of hard predictions 1 - IoU, as ``soft_iou_loss``, but of soft ones too
    it is 0 where they are equal, however unsure they are. The gradient takes the denominator as a constant. It is thus
    a multiple of p - q in every voxel: it brings both predictions together, and is 0 where they are equal. The
    denominator's own gradient would make a class more probable in every voxel wherever predictions of it differ.

    Args:
        first: As for ``soft_iou_loss``.
        second: As for ``soft_iou_loss``.
        mask: As for ``soft_iou_loss``.
        counted: As for ``soft_iou_loss``.

    Returns:
        Scalar in [0, 1].
    """
    difference = (first - second).square()
    extent = (difference + first * second).detach()
    difference, extent = _sums((difference, extent), mask)
    return _mean(difference / (extent + SMOOTH), counted)


@torch.no_grad()
def found_classes(probability: Tensor, has_regions: bool, mask: Tensor | None = None) -> Tensor:
    """Which classes a prediction has anywhere in each image, without gradient; nothing is handed to the host.

    Args:
        probability: (B, K, *S).
        has_regions: Whether channels are overlapping regions, found above one half, instead of exclusive classes, found
            where no other is likelier.
        mask: (B, 1, *S), boolean; voxels that count. All count if absent.

    Returns:
        (B, K), boolean.
    """
    # The largest value and not its index, which takes longer to find. NaN counts as found, so that it is not hidden.
    found = ~(probability <= 0.5 if has_regions else probability < probability.amax(1, keepdim=True))
    return (found if mask is None else found & mask).flatten(2).any(2)


def _sums(maps: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The sums (B, K) of maps (B, K, *S) over the voxels that count."""
    # Selected, not multiplied: 0 * inf of an excluded voxel would be NaN.
    kept = maps if mask is None else [torch.where(mask.bool(), m, 0.0) for m in maps]
    return [m.flatten(2).sum(2) for m in kept]


def _mean(losses: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of losses (B, K) over images and the classes that count in them."""
    if counted is None:
        return losses.mean()
    # A mean per image first: an image weighs the same whatever the others show, also where those are on other devices.
    return (torch.where(counted, losses, 0.0).sum(1) / counted.sum(1).clamp_min(1)).mean()


class SoftIoULoss(nn.Module):
    """``soft_iou_loss`` of logits against nnU-Net's targets: label maps or region channels, with ignore label.

    Args:
        has_regions: Whether the target holds one channel per region (with the ignored voxels as a last channel where
            there is an ignore label) rather than a label map.
        ignore_label: nnU-Net's ignore label, if the data set has one.
    """

    def __init__(self, has_regions: bool, ignore_label: int | None) -> None:
        super().__init__()
        self.has_regions = has_regions
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (B, K, *S) against target (B, 1, *S) or region channels (B, R, *S)."""
        predicted = probabilities(logits, self.has_regions)
        truth, mask = target_maps(target, predicted.shape[1], self.has_regions, self.ignore_label)
        return soft_iou_loss(predicted, truth.to(predicted.dtype), mask)

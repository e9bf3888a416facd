"""Losses: pure functions on tensors, in float32 whatever autocast does around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# Added to numerator and denominator: a class absent from both sides counts as fully agreed, not as 0 / 0.
SMOOTH = 1.0


def probabilities(logits: Tensor, has_regions: bool) -> Tensor:
    """Network output to probabilities, in float32.

    Args:
        logits: (B, K, *S).
        has_regions: Whether channels are overlapping regions (sigmoid) rather than exclusive classes (softmax).

    Returns:
        (B, K, *S).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.sigmoid(logits) if has_regions else torch.softmax(logits, dim=1)


def soft_iou_loss(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - mean over images and classes of sum(p q) / sum(p + q - p q).

    The loss of Bortsova et al. (MICCAI 2019), used there both against labels and between the two branches. All
    channels count, the background too. Symmetric in its two arguments, and gradient flows into both.

    Args:
        first: Probabilities p (B, K, *S).
        second: Probabilities or a one-hot map q (B, K, *S).
        mask: (B, 1, *S), boolean or 0/1; voxels at 0 do not count. All count if absent.

    Returns:
        Scalar in [0, 1].
    """
    overlap = first * second
    union = first + second - overlap
    if mask is not None:
        # Selected, not multiplied: 0 * inf of an excluded voxel would be NaN.
        keep = mask.bool()
        overlap = torch.where(keep, overlap, 0.0)
        union = torch.where(keep, union, 0.0)
    axes = list(range(2, first.ndim))
    iou = (overlap.sum(axes) + SMOOTH) / (union.sum(axes) + SMOOTH)
    return 1.0 - iou.mean()


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
        mask = None
        if self.has_regions:
            if self.ignore_label is not None:
                mask = ~target[:, -1:].bool()
                target = target[:, :-1]
            truth = target.to(predicted.dtype)
        else:
            labels = target[:, 0].long()
            if self.ignore_label is not None:
                mask = (labels != self.ignore_label)[:, None]
                labels = torch.where(mask[:, 0], labels, 0)
            truth = functional.one_hot(labels, predicted.shape[1]).movedim(-1, 1).to(predicted.dtype)
        return soft_iou_loss(predicted, truth, mask)


def downsample_target(target: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Targets at the resolutions of deep supervision, as nnU-Net's loader would have made them.

    Args:
        target: (B, 1, *S) labels or (B, R, *S) region channels, any type.
        shapes: Spatial shapes, the full one included where wanted.

    Returns:
        A target of the same type per shape, sampled by nearest neighbor.
    """
    as_float: Tensor | None = None
    targets = []
    for shape in shapes:
        if tuple(shape) == tuple(target.shape[2:]):
            targets.append(target)
            continue
        as_float = target.float() if as_float is None else as_float
        targets.append(functional.interpolate(as_float, shape, mode="nearest-exact").to(target.dtype))
    return targets

"""Variants of nnU-Net's own loss."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ssl.runtime.precision import at_least_float32

# Not 0: nnU-Net leaves a part of weight 0 out, and where no voxel is annotated the cross-entropy too; a loss without
# any part has no gradient.
_SMALLEST_WEIGHT = 1e-9


def with_cross_entropy_share(loss: Any, share: float) -> nn.Module:
    """Share CE + (1 - share) Dice, instead of nnU-Net's CE + Dice.

    Args:
        loss: nnU-Net's, with or without deep supervision; changed and returned.
        share: In [0, 1].
    """
    parts = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    parts.weight_ce, parts.weight_dice = share, max(1.0 - share, _SMALLEST_WEIGHT)
    return loss


def with_ignored_voxels(loss: Any, has_regions: bool, ignore_value: int) -> nn.Module:
    """A loss like nnU-Net's in which voxels can be ignored, whether the data set declares an ignore label or not.

    Where all voxels count, it is nnU-Net's.

    Args:
        loss: nnU-Net's, with or without deep supervision.
        has_regions: Whether targets are region channels; their last one then holds the ignored voxels.
        ignore_value: Marks ignored voxels in a label map; no class has it. Of regions their number.
    """
    parts = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    # nnU-Net's mean over regions becomes a sum where a data set has an ignore label.
    weight_ce = parts.weight_ce / (ignore_value if has_regions and not parts.use_ignore_label else 1)
    masked = MaskedLoss(parts.dc, weight_ce, parts.weight_dice, None if has_regions else ignore_value)
    return DeepSupervisionWrapper(masked, loss.weight_factors) if loss is not parts else masked


class MaskedLoss(nn.Module):
    """nnU-Net's Dice and cross-entropy over the voxels that count; 0 with a gradient of 0 where none does.

    nnU-Net's own asks the device how many those are, and waits for the answer, at every resolution.

    Args:
        dice: nnU-Net's Dice loss.
        weight_ce: Of the cross-entropy; that of regions is added up over them.
        weight_dice: Of the Dice loss.
        ignore_value: Marks voxels that do not count in a label map; None for regions, whose last channel does.
    """

    def __init__(self, dice: nn.Module, weight_ce: float, weight_dice: float, ignore_value: int | None) -> None:
        super().__init__()
        self.dc, self.weight_ce, self.weight_dice, self.ignore_value = dice, weight_ce, weight_dice, ignore_value

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of logits (B, K, *S) against labels (B, 1, *S), or region channels (B, K + 1, *S)."""
        # In float16 the gradient of the Dice loss of next to nothing is infinite, and infinite times 0 no number.
        logits = at_least_float32(logits)
        if self.ignore_value is None:
            counted, wanted = target[:, -1:] == 0, target[:, :-1]
            losses = functional.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
            total = torch.where(counted, losses, 0.0).sum()
        else:
            counted = target != self.ignore_value
            wanted, labels = torch.where(counted, target, 0), target[:, 0].long()
            total = functional.cross_entropy(logits, labels, ignore_index=self.ignore_value, reduction="sum")
        cross_entropy = total / counted.sum().clamp_min(1)
        # The Dice loss of nothing is -1 and not 0.
        dice = self.dc(logits, wanted, loss_mask=counted) + (~counted.any()).float()
        return self.weight_ce * cross_entropy + self.weight_dice * dice


def as_target(labels: Tensor, label_manager: LabelManager) -> Tensor:
    """A label map as nnU-Net's losses take it.

    Args:
        labels: (B, 1, *S); no voxel is ignored.
        label_manager: nnU-Net's.

    Returns:
        The same or, with regions, boolean channels (B, R, *S).
    """
    if not label_manager.has_regions:
        return labels
    regions = [region if isinstance(region, tuple) else (region,) for region in label_manager.foreground_regions]
    return torch.cat([_any_of(labels, region) for region in regions], dim=1)


def _any_of(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    # Not torch.isin: it would copy the values to the device, and the host would wait.
    found = labels == values[0]
    for value in values[1:]:
        found = found | (labels == value)
    return found

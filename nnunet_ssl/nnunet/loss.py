"""Variants of nnU-Net's own loss."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional

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

    Args:
        loss: nnU-Net's, with or without deep supervision; changed.
        has_regions: Whether targets are region channels; their last one then holds the ignored voxels.
        ignore_value: Marks ignored voxels in a label map; no class has it.
    """
    parts = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    if has_regions:
        parts.use_ignore_label, parts.ce = True, nn.BCEWithLogitsLoss(reduction="none")
        return loss  # type: ignore[no-any-return]
    masked = MaskedLoss(parts.dc, parts.weight_ce, parts.weight_dice, ignore_value)
    return DeepSupervisionWrapper(masked, loss.weight_factors) if loss is not parts else masked


class MaskedLoss(nn.Module):
    """nnU-Net's Dice and cross-entropy of a label map over the voxels that count; 0 with a gradient where none does.

    nnU-Net's own asks the device how many those are, and waits for the answer, at every resolution.

    Args:
        dice: nnU-Net's Dice loss.
        weight_ce: Of the cross-entropy.
        weight_dice: Of the Dice loss.
        ignore_value: Marks voxels that do not count.
    """

    def __init__(self, dice: nn.Module, weight_ce: float, weight_dice: float, ignore_value: int) -> None:
        super().__init__()
        self.dc, self.weight_ce, self.weight_dice, self.ignore_value = dice, weight_ce, weight_dice, ignore_value

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of logits (B, K, *S) against labels (B, 1, *S)."""
        counted = target != self.ignore_value
        dice = self.dc(logits, torch.where(counted, target, 0), loss_mask=counted)
        labels = target[:, 0].long()
        total = functional.cross_entropy(logits, labels, ignore_index=self.ignore_value, reduction="sum")
        cross_entropy = total / counted.sum().clamp_min(1)
        # The Dice loss of nothing is -1 and not 0.
        return self.weight_ce * cross_entropy + self.weight_dice * torch.where(counted.any(), dice, 0.0 * dice)

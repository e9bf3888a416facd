"""Variants of nnU-Net's own loss."""

from __future__ import annotations

import copy
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

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


def pseudo_label_loss(trainer: Any) -> tuple[nn.Module, int]:
    """The loss on labels, with ignored voxels, also where the data set has no ignore label; and their value.

    Args:
        trainer: nnU-Net's, or one that derives from it: its ``_build_loss`` reads its ``label_manager``.

    Returns:
        The loss, with deep supervision where the trainer has it, and the value of ignored voxels: the data set's own
        ignore label, or a number above all labels.
    """
    own = trainer.label_manager
    manager = copy.copy(own)
    if not own.has_ignore_label:
        manager._ignore_label = max(own.all_labels) + 1
    trainer.label_manager = manager
    try:
        loss = trainer._build_loss()
    finally:
        trainer.label_manager = own
    parts = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    if isinstance(parts, DC_and_BCE_loss) and not own.has_ignore_label:
        # With an ignore label nnU-Net adds the cross-entropies of regions up, without one it takes their mean: the loss
        # on pseudo-labels is to weigh what the loss on labels does.
        parts.weight_ce = parts.weight_ce / own.num_segmentation_heads
    if isinstance(parts, DC_and_CE_loss):
        parts = _CrossEntropyAndDice(parts)
    if isinstance(loss, DeepSupervisionWrapper):
        loss.loss = parts
    else:
        loss = parts
    return loss, int(manager.ignore_label)


def as_target(labels: Tensor, label_manager: LabelManager, ignore: int) -> Tensor:
    """A label map as the target of ``pseudo_label_loss``.

    Args:
        labels: (B, 1, *S).
        label_manager: nnU-Net's.
        ignore: The value of ignored voxels.

    Returns:
        The same or, with regions, boolean channels (B, R + 1, *S), the ignored voxels being the last one.
    """
    if not label_manager.has_regions:
        return labels
    regions = [region if isinstance(region, tuple) else (region,) for region in label_manager.foreground_regions]
    return torch.cat([_any_of(labels, region) for region in (*regions, (ignore,))], dim=1)


def _any_of(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    # Not torch.isin: it would copy the values to the device, and the host would wait.
    found = labels == values[0]
    for value in values[1:]:
        found = found | (labels == value)
    return found


class _CrossEntropyAndDice(nn.Module):
    """nnU-Net's DC_and_CE_loss with an ignore label.

    nnU-Net asks at every resolution whether any voxel counts, and the host waits for the answer; a sum that is divided
    by at least one gives the same values. Where no voxel counts, the gradient is zero.
    """

    def __init__(self, loss: DC_and_CE_loss) -> None:
        super().__init__()
        self.loss = loss
        self.loss.ce.reduction = "sum"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Of logits (B, K, *S) and labels (B, 1, *S)."""
        mask = target != self.loss.ignore_label
        dice = self.loss.dc(output, torch.where(mask, target, 0), loss_mask=mask)
        cross_entropy = self.loss.ce(at_least_float32(output), target[:, 0]) / mask.sum().clamp(min=1)
        return self.loss.weight_ce * cross_entropy + self.loss.weight_dice * dice

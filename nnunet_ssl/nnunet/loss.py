"""Variants of nnU-Net's own loss."""

from __future__ import annotations

from typing import Any

from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

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

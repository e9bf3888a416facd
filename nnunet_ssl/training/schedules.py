"""Fraction of training -> weight, and the learning rate of training in two stages."""

from __future__ import annotations

import math

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim import Optimizer

# The key of an optimizer's group of parameters that says by what its learning rate differs from the plan's.
LR_FACTOR = "lr_factor"


def gaussian_ramp(fraction: float, full_at: float) -> float:
    """exp(-5 (1 - min(r / r_full, 1))^2): about 0.007 at the start, 1 from ``full_at`` on.

    Laine and Aila, "Temporal ensembling for semi-supervised learning" (ICLR 2017).

    Args:
        fraction: r, the fraction of the stage that is done, in [0, 1].
        full_at: r_full; 0 switches the ramp off.

    Returns:
        The weight, in (0, 1].
    """
    if full_at <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(fraction / full_at, 1.0)) ** 2)


def first_epoch_of_second_stage(num_epochs: int, supervised_fraction: float) -> int:
    """The epoch at which semi-supervised training starts; ``num_epochs`` if it never does.

    Args:
        num_epochs: Length of the training in epochs.
        supervised_fraction: Fraction of the epochs trained on labels alone, in [0, 1].
    """
    return min(num_epochs, round(num_epochs * supervised_fraction))


class RestartingPolyLRScheduler(PolyLRScheduler):
    """nnU-Net's polynomial decay, run once before and once after the switch of stages.

    With the switch at 0 or at the last epoch this is nnU-Net's own schedule. Groups of parameters keep their own factor
    (``LR_FACTOR``), where nnU-Net's gives all of them one rate.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, num_epochs: int, switch_epoch: int) -> None:
        self.num_epochs = num_epochs
        self.switch_epoch = switch_epoch
        super().__init__(optimizer, initial_lr, num_epochs)

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rate of epoch ``current_step``."""
        epoch = current_step if current_step is not None else 0
        second = epoch >= self.switch_epoch
        self.max_steps = self.num_epochs - self.switch_epoch if second else self.switch_epoch
        super().step(epoch - self.switch_epoch if second else epoch)
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get(LR_FACTOR, 1.0)

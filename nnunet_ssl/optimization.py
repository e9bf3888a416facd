"""From named loss terms to one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# The stock trainer's bound on the norm of a network's gradient.
_GRADIENT_NORM = 12


class LossTerm(NamedTuple):
    """A scalar tensor and its weight in the total."""

    value: Tensor
    weight: float


def weighted_sum(terms: Mapping[str, LossTerm]) -> Tensor:
    """The total loss.

    Raises:
        ValueError: If there is no term.
    """
    total: Tensor | None = None
    for value, weight in terms.values():
        part = value if weight == 1.0 else weight * value
        total = part if total is None else total + part
    if total is None:
        raise ValueError("loss_terms returned no term; at least one is needed.")
    return total


def backward_and_step(
    total: Tensor, networks: Sequence[nn.Module], optimizer: Optimizer, grad_scaler: torch.amp.GradScaler | None
) -> None:
    """Step for step what the stock trainer does.

    Each network's gradient is clipped by its own norm, so that a second network does not shorten the steps of the
    first. With a gradient scaler, an overflow in one network skips the step of all: they share one scale.

    Args:
        total: The loss, a scalar.
        networks: Whose parameters the optimizer holds.
        optimizer: Their gradients must be cleared already.
        grad_scaler: Under float16 autocast.
    """
    if grad_scaler is None:
        total.backward()
    else:
        grad_scaler.scale(total).backward()
        grad_scaler.unscale_(optimizer)
    for network in networks:
        torch.nn.utils.clip_grad_norm_(network.parameters(), _GRADIENT_NORM)
    if grad_scaler is None:
        optimizer.step()
    else:
        grad_scaler.step(optimizer)
        grad_scaler.update()

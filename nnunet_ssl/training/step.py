"""From named loss terms to one finished optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunet_ssl.runtime.distributed import mean_over_ranks

# The stock trainer's bound on the norm of a network's gradient.
_GRADIENT_NORM = 12


class LossTerm(NamedTuple):
    """A scalar tensor and its weight in the total."""

    value: Tensor
    weight: float


class Outcome(NamedTuple):
    """What a step came to, on the host.

    loss: the total on this rank; values: what was to be logged, in its order; counts: those of the labeled batch, mean
    over ranks; is_finite: whether the step is taken by all ranks, but for overflows of float16; moved: whether weights
    have changed.
    """

    loss: float
    values: np.ndarray
    counts: np.ndarray
    is_finite: bool
    moved: bool


def finish_step(
    terms: Mapping[str, LossTerm],
    values: Sequence[Tensor | float],
    counts: Tensor | None,
    networks: Sequence[nn.Module],
    optimizer: Optimizer,
    grad_scaler: torch.amp.GradScaler | None,
) -> Outcome:
    """Gradients of the terms and a step of the optimizer; none where loss or gradient is not finite.

    One transfer to the host for all values: a step waits for the device no more often than the stock trainer's.

    Args:
        terms: At least one; gradients must be cleared already.
        values: Scalars to bring to the host.
        counts: Of the labeled batch, of any shape; brought to the host as their mean over ranks.
        networks: Whose parameters the optimizer holds; each is clipped by its own norm.
        optimizer: Of all networks.
        grad_scaler: Under float16 autocast.

    Raises:
        ValueError: If there is no term.
    """
    total = weighted_sum(terms)
    norms = backward(total, networks, optimizer, grad_scaler)
    told = total.new_zeros(0) if counts is None else counts.flatten()
    shared = mean_over_ranks(torch.cat([total.detach().float().view(1), told.float()]))
    numbers = on_host([*norms, total, *values, shared])
    norms_here, (loss,), logged, (everywhere,), means = np.split(numbers, np.cumsum([len(norms), 1, len(values), 1]))
    # Ranks agree on the steps they skip: they share these values.
    is_finite = bool(np.isfinite(everywhere)) and not gradient_is_broken(norms_here, grad_scaler)
    step(optimizer, grad_scaler, is_finite)
    shape = (0,) if counts is None else tuple(counts.shape)
    moved = is_finite and bool(np.isfinite(norms_here).all())
    return Outcome(loss, logged, means.reshape(shape), is_finite, moved)


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
        raise ValueError("The step of the method has no loss; at least one is needed.")
    return total


def on_host(values: Sequence[Tensor | float]) -> np.ndarray:
    """Values in float32, one after the other, with all elements of each; what is on a device comes in one transfer."""
    tensors = [value.detach().float().flatten() for value in values if isinstance(value, Tensor)]
    transferred = torch.cat(tensors).cpu().numpy()
    sizes = [value.numel() if isinstance(value, Tensor) else 1 for value in values]
    is_tensor = np.repeat([isinstance(value, Tensor) for value in values], sizes)
    numbers = np.empty(sum(sizes), dtype=np.float32)
    numbers[is_tensor] = transferred
    numbers[~is_tensor] = [value for value in values if not isinstance(value, Tensor)]
    return numbers


def backward(
    total: Tensor, networks: Sequence[nn.Module], optimizer: Optimizer, grad_scaler: torch.amp.GradScaler | None
) -> list[Tensor]:
    """Gradients of the loss, clipped as the stock trainer does.

    Each network's gradient is clipped by its own norm, so that a second network does not shorten the steps of the
    first.

    Args:
        total: The loss, a scalar.
        networks: Whose parameters the optimizer holds.
        optimizer: Their gradients must be cleared already.
        grad_scaler: Under float16 autocast.

    Returns:
        Each network's norm, a scalar tensor, before it was clipped.
    """
    if grad_scaler is None:
        total.backward()
    else:
        grad_scaler.scale(total).backward()
        grad_scaler.unscale_(optimizer)
    norms = [torch.nn.utils.clip_grad_norm_(network.parameters(), _GRADIENT_NORM) for network in networks]
    # That of a network without any gradient, such as a head that stage 1 does not use, lies on the CPU.
    return [norm.to(total.device) for norm in norms]


def step(optimizer: Optimizer, grad_scaler: torch.amp.GradScaler | None, is_finite: bool) -> None:
    """Change the weights, unless loss or gradient is not finite.

    A gradient scaler skips steps whose gradient overflows by itself, of all networks at once: they share one scale.
    """
    if is_finite and grad_scaler is not None:
        grad_scaler.step(optimizer)
    elif is_finite:
        optimizer.step()
    if grad_scaler is not None:
        grad_scaler.update()


def gradient_is_broken(norms: np.ndarray, grad_scaler: torch.amp.GradScaler | None) -> bool:
    """Whether the gradient itself is not finite, rather than too large for the scale of float16.

    Args:
        norms: Of all networks (networks,).
        grad_scaler: It halves its scale with every overflow; a scale below 1 is beyond what overflow explains.
    """
    if np.isfinite(norms).all():
        return False
    return grad_scaler is None or grad_scaler.get_scale() < 1.0

"""Networks that are watched, and networks that say what they are told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Spy:
    """Sees every pass of a network: its input, and whether it keeps a graph."""

    def __init__(self, network: nn.Module) -> None:
        self.passes: list[tuple[Tensor, bool]] = []
        network.register_forward_pre_hook(lambda m, inputs: self.passes.append((inputs[0], torch.is_grad_enabled())))

    def sizes(self, with_gradient: bool) -> list[int]:
        """Batch sizes of the passes with or without gradient."""
        return [len(images) for images, kept in self.passes if kept == with_gradient]


class Told:
    """Says of known images what it is told, at all resolutions of the tiny plans where asked.

    Args:
        known: Pairs of images and logits for them.
        deep: Whether it returns a list, as networks with deep supervision do.
    """

    def __init__(self, *known: tuple[Tensor, Tensor], deep: bool = True) -> None:
        self.known, self.deep = known, deep

    def __call__(self, images: Tensor) -> Any:
        (logits,) = (z for x, z in self.known if x.shape == images.shape and torch.equal(x, images))
        if not self.deep:
            return logits
        # The voxels that nearest-exact sampling takes of a target.
        lower = [(..., *[slice(step // 2, None, step)] * (logits.ndim - 2)) for step in (1, 2, 4)]
        return [logits[index] for index in lower]


def has_gradient(network: nn.Module) -> bool:
    """Whether any parameter has one that is not zero."""
    return any(p.grad is not None and p.grad.any() for p in network.parameters())


@torch.no_grad()
def shake(network: nn.Module, seed: int = 0, by: float = 0.3) -> None:
    """Other weights: an averaged network that is not its student."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter += by * torch.randn(parameter.shape, generator=generator)


def toward(logits: Tensor, loss: Tensor) -> Tensor:
    """Where a step of gradient descent moves logits, (B, K, *S)."""
    (gradient,) = torch.autograd.grad(loss, logits)
    return -gradient

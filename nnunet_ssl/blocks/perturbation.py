"""Channel dropout inside a network of nnU-Net's families, without touching its plans or weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import bare


class FeatureDropout:
    """Passes in which whole channels of the encoder's features are left out, through a hook on the decoder.

    Plans with dropout would give other names to a network's weights, so that stock checkpoints no longer fit. The hook
    has no weights, and does nothing but in the passes of this object.

    Args:
        network: The plan's or a companion's, wrapped or not.
        rate: Part of the channels that is left out; the others are raised to the same mean.
        bottleneck_alone: Whether only the deepest features lose channels, as in V-Nets with dropout, or every skip
            connection too, as in Yang et al., "Revisiting weak-to-strong consistency" (CVPR 2023).
    """

    def __init__(self, network: nn.Module, rate: float = 0.5, bottleneck_alone: bool = False) -> None:
        self._network = network
        self.rate = rate
        inner: Any = bare(network)
        self._channels = list(inner.encoder.output_channels)
        self._first = len(self._channels) - 1 if bottleneck_alone else 0
        self._masks: list[Tensor] | None = None
        self._keeps_clean = False
        inner.decoder.register_forward_pre_hook(self._perturb)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Any:
        """What the network returns where channels are left out, (B, K, *S) or a list of them."""
        return self._pass(images, generator, keeps_clean=False)

    def clean_and_perturbed(self, images: Tensor, generator: torch.Generator) -> Any:
        """One pass through the encoder and two through the decoder: the outputs' first half without dropout, (2B, ...).

        Args:
            images: (B, C, *S).
            generator: Draws the channels on its own device.
        """
        return self._pass(images, generator, keeps_clean=True)

    def _pass(self, images: Tensor, generator: torch.Generator, keeps_clean: bool) -> Any:
        # Drawn here, because compiled code cannot draw from a generator.
        self._masks = [self._draw(images, channels, generator) for channels in self._channels[self._first :]]
        self._keeps_clean = keeps_clean
        try:
            return self._network(images)
        finally:
            self._masks = None

    def _draw(self, images: Tensor, channels: int, generator: torch.Generator) -> Tensor:
        shape = (len(images), channels, *[1] * (images.ndim - 2))
        numbers = torch.rand(shape, generator=generator, device=generator.device)
        return ((numbers >= self.rate) / (1.0 - self.rate)).to(images.device)

    def _perturb(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._masks is None:
            return None
        (skips,) = inputs
        masks = [None] * self._first + self._masks
        perturbed = [skip if mask is None else skip * mask.to(skip.dtype) for skip, mask in zip(skips, masks)]
        if self._keeps_clean:
            perturbed = [torch.cat([skip, other]) for skip, other in zip(skips, perturbed)]
        return (perturbed,)

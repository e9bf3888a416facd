"""Channel dropout inside a network of nnU-Net's families, without touching its plans or weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.errors import UserError


class FeatureDropout:
    """Passes in which whole channels of the encoder's features are left out, through a hook on the decoder.

    Plans with dropout would give other names to a network's weights, so that stock checkpoints no longer fit. The hook
    has no weights, and does nothing but in the passes of this object.

    Args:
        network: The plan's or a companion's, wrapped or not.
        rate: Part of the channels that is left out; the others are raised to the same mean.
        bottleneck_alone: Whether only the deepest features lose channels, as in V-Nets with dropout, or every skip
            connection too, as in Yang et al., "Revisiting weak-to-strong consistency" (CVPR 2023).

    Raises:
        UserError: For a network that is no U-Net of nnU-Net's kind.
    """

    def __init__(self, network: nn.Module, rate: float = 0.5, bottleneck_alone: bool = False) -> None:
        self._network = network
        self.rate = rate
        inner: Any = bare(network)
        channels = getattr(getattr(inner, "encoder", None), "output_channels", None)
        if channels is None or not hasattr(inner, "decoder"):
            raise UserError(
                f"Dropping channels needs the encoder and decoder of a U-Net, which were not found in "
                f"{type(inner).__name__}; expected encoder.output_channels and decoder as in nnU-Net's U-Nets. Use "
                f"plans of such a network, or a method without dropped channels."
            )
        self._channels = list(channels)
        self._first = len(self._channels) - 1 if bottleneck_alone else 0
        self._masks: list[Tensor] | None = None
        inner.decoder.register_forward_pre_hook(self._perturb)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Any:
        """What the network returns where channels are left out.

        Args:
            images: (B, C, *S).
            generator: Draws the channels on its own device.

        Returns:
            Logits (B, K, *S), with deep supervision a list of them.
        """
        # Drawn here, because compiled code cannot draw from a generator.
        self._masks = [self._draw(images, channels, generator) for channels in self._channels[self._first :]]
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
        return (perturbed,)

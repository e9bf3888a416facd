"""A second network of nnU-Net's families that learns beside the plan's."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.blocks.networks import set_deep_supervision


class Partner(Companion):
    """A network that learns from labels as the plan's does, and can be exported as a model of its own.

    Args:
        network: Built as nnU-Net does, with the plan's input channels and segmentation heads.
        architecture: Its entry "architecture" in a configuration of the plans.
    """

    predicts: ClassVar[bool] = True

    def __init__(self, network: nn.Module, architecture: dict[str, Any]) -> None:
        super().__init__(network)
        self._architecture = architecture

    def set_deep_supervision(self, enabled: bool) -> None:
        """Return logits at all resolutions, or at the full one alone."""
        set_deep_supervision(self.module, enabled)

    def architecture(self) -> dict[str, Any]:
        """As the plans describe it."""
        return self._architecture

"""The features inside a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    pass
from nnunet_ssl.blocks.networks import bare


class FeatureTap:
    """Runs a network and gives the features of its last decoder stage too, what the full-resolution head reads.

    Args:
        network: A U-Net of nnU-Net's family, wrapped or not.

    Raises:
        UserError: For a network without a decoder of segmentation heads.
    """

    def __init__(self, network: nn.Module) -> None:
        heads = getattr(getattr(bare(network), "decoder", None), "seg_layers", None)
        if not heads:
            raise UserError(
                f"The contrastive term needs the features before the segmentation head, which were not found in "
                f"{type(bare(network)).__name__}; expected decoder.seg_layers as in nnU-Net's U-Nets. Switch the term "
                f"off with DualNet.contrastive_weight=0, or use another network."
            )
        self._network = network
        self._wanted = False
        self._features: Tensor | None = None
        heads[-1].register_forward_pre_hook(self._keep)

    def __call__(self, data: Tensor) -> tuple[Any, Tensor]:
        """The network's outputs and the features (B, C, *S)."""
        # Only now: keeping the features of every pass would keep its whole graph alive.
        self._wanted = True
        outputs = self._network(data)
        self._wanted = False
        features, self._features = self._features, None
        assert features is not None
        return outputs, features

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._wanted:
            self._features = inputs[0]

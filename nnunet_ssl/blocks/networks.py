"""Second networks, and the features inside a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnunet_ssl.errors import UserError
from nnunet_ssl.runtime.distributed import data_parallel

if TYPE_CHECKING:
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer


def bare(network: nn.Module) -> nn.Module:
    """A network without the wrappers of DDP and torch.compile."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def build_partner(trainer: SemiSupervisedTrainer, plans: dict[str, Any]) -> nn.Module:
    """A second network on the trainer's device, built, compiled and wrapped as nnU-Net does with the first.

    Args:
        trainer: Already initialized by nnU-Net.
        plans: Whose network it is, in the trainer's configuration.
    """
    manager = PlansManager(plans)
    partner = trainer.build_network_architecture(
        manager,
        manager.get_configuration(trainer.configuration_name),
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    ).to(trainer.device)
    if trainer._do_i_compile():
        partner = torch.compile(partner)
    return data_parallel(partner) if trainer.is_ddp else partner


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Whether a network of nnU-Net's families returns logits at all resolutions, or at the full one alone."""
    decoder: Any = bare(network).decoder
    decoder.deep_supervision = enabled


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
                f"off with contrastive_weight=0, or use another network."
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


def full_resolution(outputs: Any) -> Tensor:
    """The logits at full resolution of what a network returns, with or without deep supervision."""
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs


def quiet_pass(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, K, *S) of a network in evaluation mode, without its wrappers: nothing of a training changes."""
    inner = bare(network)
    was_training = inner.training
    inner.eval()
    logits = full_resolution(inner(images))
    inner.train(was_training)
    return logits


def split_outputs(outputs: Any, size: int) -> tuple[Any, Any]:
    """What a network returns for a batch, in the same form for its first ``size`` examples and for the others."""
    if isinstance(outputs, (list, tuple)):
        return [o[:size] for o in outputs], [o[size:] for o in outputs]
    return outputs[:size], outputs[size:]

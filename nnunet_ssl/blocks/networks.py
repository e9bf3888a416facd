"""What is known about networks of nnU-Net's families, and their outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule

if TYPE_CHECKING:
    pass


def bare(network: nn.Module) -> nn.Module:
    """A network without the wrappers of DDP and torch.compile."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Whether a network of nnU-Net's families returns logits at all resolutions, or at the full one alone."""
    decoder: Any = bare(network).decoder
    decoder.deep_supervision = enabled


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

"""All networks of a training, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.training.method import NETWORK

Weights = dict[str, Tensor]


def networks_of(trainer: Any) -> dict[str, nn.Module]:
    """The plan's network and the modules of all companions, by name, without their wrappers."""
    companions = getattr(trainer, "companions", {})
    return {NETWORK: bare(trainer.network), **{name: bare(c.module) for name, c in companions.items()}}


def weights_of(trainer: Any) -> Weights:
    """A copy of all parameters and buffers of all networks, as ``NETWORK.PARAMETER``."""
    networks = networks_of(trainer)
    return {f"{n}.{k}": v.detach().clone() for n, network in networks.items() for k, v in network.state_dict().items()}


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that are missing on one side, or not equal bit by bit; NaN equals NaN."""
    shared = first.keys() & second.keys()
    missing = sorted(first.keys() ^ second.keys())
    return [*missing, *(name for name in first if name in shared and not _equal(first[name], second[name]))]


def counted(names: list[str], total: int) -> str:
    """Some names in words: "12 of 40 weights of partner, first partner.encoder..."."""
    networks = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"{len(names)} of {total} weights of {networks}, e.g. {names[0]}"


def fill_zeros(trainer: Any) -> None:
    """Residual blocks start with a gain of zero, and so with no gradient before it."""
    for network in networks_of(trainer).values():
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.constant_(parameter, 0.5)


@torch.no_grad()
def scale_heads(trainer: Any, factor: float) -> None:
    """Scale the last layer of all networks: predictions become surer."""
    for network in networks_of(trainer).values():
        heads = getattr(getattr(network, "decoder", None), "seg_layers", None)
        if heads:
            for parameter in heads[-1].parameters():
                parameter.mul_(factor)


def _equal(first: Tensor, second: Tensor) -> bool:
    first, second = first.cpu(), second.cpu()
    return torch.equal(first, second) or bool(torch.allclose(first, second, rtol=0, atol=0, equal_nan=True))

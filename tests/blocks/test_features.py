"""The features inside a network."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.blocks.features import FeatureTap
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet
from nnunet_ssl.testing.tiny import TinyDataset


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerDualNet:
    """In its second stage from the start."""
    return tiny.initialized(nnUNetTrainerDualNet, **{"supervised_fraction": 0.0, **ssl})


def has_gradient(network: torch.nn.Module) -> bool:
    return any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_features_are_what_the_last_head_reads(tiny):
    trainer = initialized(tiny)
    data = tiny.batches(trainer)[0]["data"]
    for network in trainer.predictors:
        tap = FeatureTap(network)
        outputs, features = tap(data)
        torch.testing.assert_close(network.decoder.seg_layers[-1](features), outputs[0])
        network(data)
        assert tap._features is None, "features of other passes are kept alive"


@pytest.mark.usefixtures("_fresh_compiler")
def test_features_of_a_compiled_network(tiny):
    """The hook is traced with the network; without a C++ compiler only the tracing can be tested."""
    trainer = initialized(tiny)
    labeled, _ = tiny.batches(trainer)
    bare = trainer.network
    compiled = torch.compile(bare, backend="eager")
    tap = FeatureTap(compiled)
    for data in (labeled["data"], labeled["data"][:1], labeled["data"]):
        compiled(data)
        assert tap._features is None
        outputs, features = tap(data)
        torch.testing.assert_close(bare.decoder.seg_layers[-1](features), outputs[0])
        features.sum().backward()
        assert has_gradient(bare)
        bare.zero_grad()


def test_the_contrastive_term_says_what_network_it_needs():
    with pytest.raises(UserError, match="contrastive_weight=0"):
        FeatureTap(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)))

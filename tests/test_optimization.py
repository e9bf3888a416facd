"""One optimizer step of several networks."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.optimization import LossTerm, backward_and_step, weighted_sum


def test_weighted_sum():
    terms = {"a": LossTerm(torch.tensor(2.0), 1.0), "b": LossTerm(torch.tensor(3.0), 0.5)}
    assert weighted_sum(terms).item() == 3.5
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum({})


def test_each_network_is_clipped_by_its_own_norm():
    """A wild second network must not shorten the first one's steps."""
    networks = [torch.nn.Linear(3, 1, bias=False) for _ in range(2)]
    before = [n.weight.detach().clone() for n in networks]
    optimizer = torch.optim.SGD([p for n in networks for p in n.parameters()], lr=1.0)
    total = networks[0](torch.tensor([1.0, 2.0, 2.0])) + networks[1](torch.tensor([300.0, 600.0, 600.0]))
    backward_and_step(total.sum(), networks, optimizer, None)
    steps = [(b - n.weight.detach()).norm().item() for b, n in zip(before, networks)]
    # The first gradient's norm is 3, below the bound of 12; the second's is cut to it.
    assert steps == pytest.approx([3.0, 12.0], rel=1e-5)

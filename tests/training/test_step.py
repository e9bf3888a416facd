"""One optimizer step of several networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.training.step import LossTerm, backward, gradient_is_broken, on_host, step, weighted_sum


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
    norms = backward(total.sum(), networks, optimizer, None)
    assert [norm.item() for norm in norms] == pytest.approx([3.0, 900.0], rel=1e-5)
    step(optimizer, None, is_finite=True)
    steps = [(b - n.weight.detach()).norm().item() for b, n in zip(before, networks)]
    # The first gradient's norm is 3, below the bound of 12; the second's is cut to it.
    assert steps == pytest.approx([3.0, 12.0], rel=1e-5)


def test_a_step_that_is_not_finite_is_not_taken():
    network = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
    (norm,) = backward(network(torch.full((1, 2), float("inf"))).sum(), [network], optimizer, None)
    assert not torch.isfinite(norm)
    step(optimizer, None, is_finite=False)
    assert all(torch.equal(b, p) for b, p in zip(before, network.parameters()))
    assert not optimizer.state, "momentum would carry it into later steps"


def test_on_host():
    values = [torch.tensor(1.5), 2.5, torch.tensor(float("nan"), dtype=torch.bfloat16), 4.0]
    numbers = on_host(values)
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, [1.5, 2.5, np.nan, 4.0])


def test_a_gradient_scaler_skips_overflow_and_broken_gradients_are_told_apart():
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = network.weight.detach().clone()
    for scale in (4.0, 2.0, 1.0, 0.5):
        assert scaler.get_scale() == scale
        optimizer.zero_grad()
        norms = on_host(backward(network(torch.full((1, 2), float("inf"))).sum(), [network], optimizer, scaler))
        assert gradient_is_broken(norms, scaler) == (scale < 1)
        step(optimizer, scaler, is_finite=scale >= 1)
        assert torch.equal(before, network.weight)
    optimizer.zero_grad()
    norms = on_host(backward(network(torch.ones(1, 2)).sum(), [network], optimizer, scaler))
    assert not gradient_is_broken(norms, scaler)
    step(optimizer, scaler, is_finite=False)
    assert torch.equal(before, network.weight), "a loss that is not finite is never followed"

"""The averaged network: its weights against a computation by hand, its buffers, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.blocks.teacher import EMATeacher


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep_supervision = True


class Network(nn.Module):
    """Returns a list of logits, as nnU-Net's networks with deep supervision, or one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.decoder = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Decoder()

    def forward(self, x: torch.Tensor) -> object:
        y = self.norm(self.layer(x))
        return [y, y] if self.decoder.deep_supervision else y


def randomize(network: nn.Module, seed: int) -> np.ndarray:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return np.concatenate([p.detach().numpy().ravel() for p in network.parameters()])


def flat(network: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in bare(network).parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_weights_are_the_mean_at_first_then_the_moving_average(decay):
    network = Network()
    teacher = EMATeacher(network, {}, decay)
    expected = None
    for step in range(6):
        weights = randomize(network, step).astype(np.float64)
        alpha = min(1 - 1 / (step + 1), decay)
        expected = weights if expected is None else alpha * expected + (1 - alpha) * weights
        teacher.after_step()
        np.testing.assert_allclose(flat(teacher.module), expected, rtol=1e-5, atol=1e-6)
    if decay == 0.99:
        means = np.mean([randomize(Network(), step) for step in range(6)], axis=0)
        np.testing.assert_allclose(flat(teacher.module), means, rtol=1e-4, atol=1e-6)


def test_the_student_is_not_touched_and_shares_nothing():
    network = Network()
    teacher = EMATeacher(network, {}, 0.9)
    before = flat(network).copy()
    teacher.after_step()
    assert np.array_equal(flat(network), before)
    assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in teacher.module.parameters()}
    assert all(p.requires_grad for p in network.parameters())
    assert network.decoder.deep_supervision


def test_it_predicts_at_full_resolution_without_gradient_whatever_the_student_does():
    network = Network()
    teacher = EMATeacher(network, {}, 0.9)
    teacher.start_epoch()
    teacher.set_deep_supervision(True)
    logits = teacher(torch.randn(2, 1, 4, 4))
    assert isinstance(logits, torch.Tensor)
    assert not logits.requires_grad
    assert not teacher.module.training


def test_buffers_are_those_of_the_student():
    network = Network().train()
    teacher = EMATeacher(network, {}, 0.9)
    network(torch.randn(8, 1, 4, 4) + 3)
    teacher.after_step()
    assert torch.equal(teacher.module.norm.running_mean, network.norm.running_mean)
    assert teacher.module.norm.running_mean.abs().max() > 0.01
    assert teacher.module.norm.num_batches_tracked == 1


def test_it_goes_on_where_it_stopped():
    networks = [Network(), Network()]
    whole, resumed = (EMATeacher(network, {}, 0.9) for network in networks)
    for step in range(3):
        randomize(networks[0], step)
        whole.after_step()
    state = {key: value for key, value in whole.state().items()}
    state["weights"] = {name: value.clone() for name, value in state["weights"].items()}
    resumed.restore(state)
    for network, teacher in zip(networks, (whole, resumed)):
        randomize(network, 7)
        teacher.after_step()
    np.testing.assert_array_equal(flat(whole.module), flat(resumed.module))
    assert resumed.steps == 4

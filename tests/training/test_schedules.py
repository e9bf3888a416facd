"""Schedules against their formulas and against nnU-Net's own."""

from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_ssl.training.schedules import RestartingPolyLRScheduler, first_epoch_of_second_stage, gaussian_ramp


def rates(scheduler_class, *arguments, epochs):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = scheduler_class(optimizer, *arguments)
    values = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_ramp():
    assert gaussian_ramp(0.0, 0.4) == pytest.approx(math.exp(-5))
    assert gaussian_ramp(0.2, 0.4) == pytest.approx(math.exp(-1.25))
    assert gaussian_ramp(0.4, 0.4) == gaussian_ramp(0.9, 0.4) == 1.0
    assert gaussian_ramp(0.0, 0.0) == 1.0


@pytest.mark.parametrize(("fraction", "epoch"), [(0.0, 0), (0.5, 5), (0.26, 3), (1.0, 10)])
def test_switch(fraction, epoch):
    assert first_epoch_of_second_stage(10, fraction) == epoch


@pytest.mark.parametrize("switch", [0, 10])
def test_one_stage_is_nnunets_schedule(switch):
    ours = rates(RestartingPolyLRScheduler, 0.01, 10, switch, epochs=10)
    assert ours == pytest.approx(rates(PolyLRScheduler, 0.01, 10, epochs=10))


def test_two_stages_are_nnunets_schedule_twice():
    ours = rates(RestartingPolyLRScheduler, 0.01, 10, 4, epochs=10)
    expected = rates(PolyLRScheduler, 0.01, 4, epochs=4) + rates(PolyLRScheduler, 0.01, 6, epochs=6)
    assert ours == pytest.approx(expected)
    assert ours[4] == 0.01

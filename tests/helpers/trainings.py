"""Whole trainings and what they end with."""

from __future__ import annotations

from typing import Any

import torch


def assert_equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def stop_at_epoch(trainer: Any, epoch: int) -> None:
    """Interrupt a training before this epoch, as Ctrl-C does."""
    original = trainer.on_epoch_start

    def stop() -> None:
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt
        original()

    trainer.on_epoch_start = stop

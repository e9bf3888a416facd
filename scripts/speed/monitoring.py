"""What looking at a training costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from setups import MEASURED, Case, make_step
from timing import header, row, time_in_turns

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.training.monitor import Monitor

_STEPS_PER_EPOCH, _EVERY = 250, 50


def monitor_cost(cases: Sequence[Case], names: Sequence[str], device: torch.device, repetitions: int) -> None:
    """What looking at two unlabeled cases every epoch and drawing them every 50 adds to epochs of nnU-Net's length."""
    header("case", "trainer", "step", "look", "with picture", f"share of {_STEPS_PER_EPOCH} steps")
    for case in cases:
        for name in names:
            if not getattr(MEASURED[name], "uses_unlabeled", False):
                continue
            trainer, step = make_step(MEASURED[name], case, device)
            folder = Path(trainer.preprocessed_dataset_folder)
            sides = [1] * (3 - len(case.patch)) + list(trainer.unlabeled_patch_size)
            for identifier in ("a", "b"):
                noise = np.random.default_rng(0).normal(size=(1, *sides)).astype(np.float32)
                blosc2.asarray(noise, urlpath=str(folder / f"{identifier}.b2nd"), mode="w")
            monitor = Monitor(
                [UnlabeledCase(i, str(folder), "noise") for i in ("a", "b")], trainer.unlabeled_patch_size
            )
            looks = [functools.partial(_look, trainer, monitor, file) for file in (None, str(folder.parent / "a.png"))]
            times = time_in_turns([step, *looks], repetitions, device)
            seconds, look, picture = (float(t) for t in np.median(times, axis=0))
            share = (look * (_EVERY - 1) + picture) / _EVERY / (_STEPS_PER_EPOCH * seconds)
            cells = (f"{t:.2f} s" for t in (seconds, look, picture))
            row(case.name, name, *cells, f"{100 * share:.2f} %")
            del trainer, step


def _look(trainer: Any, monitor: Monitor, picture: str | None) -> None:
    view = trainer.look(monitor)
    monitor.stability(view)
    if picture is not None:
        monitor.draw(picture, view)

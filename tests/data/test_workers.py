"""Data-loading workers that die or hang."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from nnunet_ssl.data.workers import WatchedAugmenter
from nnunet_ssl.methods import nnUNetTrainerSemiTC


class Batches:
    """Yields numbered batches; from one on, something happens instead."""

    def __init__(self, good: int, then: str) -> None:
        self.good, self.then, self.count = good, then, 0

    def set_thread_id(self, number: int) -> None:
        pass

    def __next__(self) -> dict:
        self.count += 1
        if self.count == 2:
            time.sleep(0.5)
        if self.count > self.good:
            if self.then == "hang":
                time.sleep(600)
            if self.then == "fail":
                raise ValueError("a broken file")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"data": np.full(3, self.count)}


def augmenter(then: str, timeout: float) -> WatchedAugmenter:
    return WatchedAugmenter(Batches(2, then), None, 1, 2, None, False, wait_time=0.002, timeout=timeout)


def draw_all(loader: WatchedAugmenter) -> None:
    for _ in range(3):
        next(loader)


@pytest.mark.parametrize(("then", "message"), [
    ("hang", r"No batch came from the data-loading workers for 1 seconds.*loader_timeout"),
    ("fail", r"A data-loading worker has died; what it printed is above"),
    ("kill", r"A data-loading worker has died.*want of memory"),
])  # fmt: skip
def test_waiting_ends_with_an_error(then, message):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        draw_all(augmenter(then, timeout=1.0))
    assert time.monotonic() - start < 60, "within a minute"


def test_a_pause_of_the_process_is_no_waiting(monkeypatch):
    """A queue may stop a job for hours; when it goes on, its workers do too."""
    loader = augmenter("hang", timeout=30.0)
    next(loader)
    real, clock = time.monotonic, {"jumps": 0}

    def jumping() -> float:
        clock["jumps"] += 1
        return real() + 3600 * (clock["jumps"] > 1)

    monkeypatch.setattr("nnunet_ssl.data.workers.time.monotonic", jumping)
    assert next(loader)["data"][0] == 2
    loader._finish(timeout=1, force=True)


def train_on(trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.train_step(next(trainer.dataloader_train))


def test_both_loaders_of_a_training_are_watched(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.0, num_epochs=1, loader_timeout=45.0)
    trainer.on_train_start()
    loaders = (trainer.dataloader_train, trainer.dataloader_val, trainer.dataloader_unlabeled)
    assert all(isinstance(loader, WatchedAugmenter) and loader.timeout == 45.0 for loader in loaders)
    for process in trainer.dataloader_unlabeled._processes:
        process.kill()
    with pytest.raises(RuntimeError, match="worker has died"):
        train_on(trainer, 50)
    trainer.on_train_end()
    assert all(not loader.initialized for loader in loaders)

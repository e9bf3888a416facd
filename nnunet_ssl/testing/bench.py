"""Where a trainer is put to the test: data sets beneath a folder of its own, and nnU-Net's variables set to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

T = TypeVar("T")

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class Bench:
    """Makes data sets, and keeps what several promises need.

    Args:
        root: An empty folder.
        device: Where steps are tried; what is compared bit by bit is computed on the CPU.
    """

    def __init__(self, root: Path, device: str = "cpu") -> None:
        self.root, self.device = root, device
        self._made: dict[Any, Any] = {}
        self._number = 0

    @contextmanager
    def data(
        self, patch: str = "2d", scenario: str = "labels", num_labels: int = 3, channels: int = 1, device: str = "cpu"
    ) -> Iterator[TinyDataset]:
        """Inside, nnU-Net's folders are those of a new data set; see ``TinyDataset``."""
        self._number += 1
        dataset = TinyDataset(self.root / str(self._number), PATCHES[patch], num_labels, channels, scenario, device)
        with self.at(dataset):
            yield dataset

    @contextmanager
    def at(self, dataset: TinyDataset) -> Iterator[None]:
        """Inside, nnU-Net's folders are those of a data set."""
        with _variables(environment(dataset)):
            yield

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives, made when first asked for."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def clear(self) -> None:
        """End what still runs, and remove all files."""
        for made in self._made.values():
            if hasattr(made, "stop"):
                made.stop()
        shutil.rmtree(self.root, ignore_errors=True)


def environment(dataset: TinyDataset) -> dict[str, str]:
    """nnU-Net's variables for trainings on a data set: one process, nothing compiled."""
    folders = {name: str(dataset.root / name) for name in _FOLDERS}
    return folders | {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "0"}


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def without_drawing() -> Iterator[None]:
    """Inside, no learning curves are drawn: that takes longer than to train a tiny network."""
    from nnunet_ssl.training.logger import TermLogger

    drawn = TermLogger.plot_progress_png
    TermLogger.plot_progress_png = lambda self, output_folder: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        TermLogger.plot_progress_png = drawn  # type: ignore[method-assign]


@contextmanager
def random_numbers_restored() -> Iterator[None]:
    """Inside, seeds may be set: afterwards, the generators of everybody else stand where they stood."""
    import random

    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

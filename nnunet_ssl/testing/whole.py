"""Whole trainings: with everything that was opened on the way, and with a checkpoint of every epoch."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.broken import calling_place
from nnunet_ssl.testing.networks import Weights, weights_of
from nnunet_ssl.testing.tiny import TinyDataset

# Of trainings that several promises look at: noise is learned only so far that some structures are waited for.
SHARED_SETTINGS: dict[str, Any] = {"learned_dice": 0.1, "supervised_fraction": 0.25}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file that was opened: its path, and the line of the method's own files that asked for it."""

    path: Path
    place: str | None


@dataclasses.dataclass(frozen=True)
class Training:
    """A training that has ended.

    Attributes:
        dataset: What it learned from.
        trainer: As it is after the last epoch.
        weights: Of all networks.
        opened: All files that it opened.
        checkpoints: What it would have gone on from, had it stopped before an epoch; by this epoch.
    """

    dataset: TinyDataset
    trainer: Any
    weights: Weights
    opened: tuple[Opened, ...]
    checkpoints: dict[int, Path]


def train(trainer: Any) -> Weights:
    """Train to the end, and return the weights of all networks."""
    trainer.run_training()
    return weights_of(trainer)


def shared_training(cls: type, bench: Bench) -> Training:
    """A training of 4 epochs that is run once per bench."""
    return bench.once(("training", cls), lambda: _train_and_watch(cls, bench))


def _train_and_watch(cls: type, bench: Bench) -> Training:
    with bench.data() as tiny:
        write_decoys(tiny)
        trainer = tiny.trainer(cls, **SHARED_SETTINGS)
        checkpoints = keep_checkpoints(trainer)
        with opened_files(cls) as opened:
            weights = train(trainer)
        return Training(tiny, trainer, weights, tuple(opened), checkpoints)


def keep_checkpoints(trainer: Any) -> dict[int, Path]:
    """Let a training copy checkpoint_latest.pth after every epoch; filled while it runs, see ``Training``."""
    kept: dict[int, Path] = {}
    end_epoch = trainer.on_epoch_end

    def end_and_keep() -> None:
        end_epoch()
        latest, epoch = Path(trainer.output_folder) / "checkpoint_latest.pth", trainer.current_epoch
        if epoch < trainer.num_epochs:
            kept[epoch] = latest.with_name(f"before_epoch_{epoch}.pth")
            shutil.copy(latest, kept[epoch])

    trainer.on_epoch_end = end_and_keep
    return kept


def resume(cls: type, tiny: TinyDataset, checkpoint: Path, **ssl: Any) -> Weights:
    """Go on from a checkpoint in a trainer that has drawn other random numbers before; the weights at the end."""
    torch.manual_seed(123)
    np.random.seed(123)
    trainer = tiny.trainer(cls, **ssl)
    trainer.load_checkpoint(str(checkpoint))
    return train(trainer)


def write_decoys(tiny: TinyDataset, seed: int = 0) -> None:
    """Labels of unlabeled cases where people keep them: beside the preprocessed ones, and in the raw data set."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    raw = tiny.root / "nnUNet_raw" / tiny.plans["dataset_name"]
    for folder in (tiny.base / "gt_segmentations", raw / "labelsTr", raw / "labelsUn"):
        folder.mkdir(parents=True, exist_ok=True)
        for case in (*tiny.hidden, *tiny.unlabeled):
            labels = rng.integers(0, tiny.num_labels, tiny.shape[-2:]).astype(np.uint8)
            Image.fromarray(labels).save(folder / f"{case}.png")


_listeners: list[Callable[[Any], None]] = []


@functools.cache
def _listen() -> None:
    """Let Python tell of every file that it opens; once, for such a hook cannot be taken away."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            for listener in _listeners:
                listener(arguments[0])

    sys.addaudithook(hear)


@contextmanager
def opened_files(cls: type) -> Iterator[list[Opened]]:
    """Inside, note every file that Python or blosc2 opens, and which line of a trainer's own asked for it."""
    opened: list[Opened] = []
    opens = blosc2.open

    def note(path: Any) -> None:
        if isinstance(path, (str, os.PathLike)):
            opened.append(Opened(Path(path), calling_place(cls)))

    def note_and_open(*arguments: Any, **keywords: Any) -> Any:
        note(keywords.get("urlpath") or arguments[0])
        return opens(*arguments, **keywords)

    _listen()
    _listeners.append(note)
    blosc2.open = note_and_open
    try:
        yield opened
    finally:
        _listeners.remove(note)
        blosc2.open = opens

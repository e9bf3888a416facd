"""Promises about stops: everything with weights is in a checkpoint, and going on from it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.networks import Weights, counted, differing, networks_of
from nnunet_ssl.testing.tiny import TinyDataset
from nnunet_ssl.testing.whole import SHARED_SETTINGS, keep_checkpoints, resume, shared_training, train
from nnunet_ssl.training.checkpoint import COMPANIONS, STATE_KEY

COMPANIONS_PROMISE, RESUMING = "companions", "resuming"


def every_network_is_saved(cls: type, bench: Bench) -> None:
    """A checkpoint holds the plan's network and every companion; nothing else with weights hangs on the trainer.

    Raises:
        BrokenPromise: Naming the attribute, or the network.
    """
    training = shared_training(cls, bench)
    trainer = training.trainer
    unsaved = unsaved_weights(trainer)
    if unsaved:
        raise BrokenPromise(
            COMPANIONS_PROMISE,
            f"{unsaved[0]} of {cls.__name__} has weights that no checkpoint holds, no optimizer and no device knows.",
            'Add it in build: self.teacher = self.add("teacher", Companion(module)), or one of nnunet_ssl.blocks.',
        )
    common = shared_storages(trainer)
    if common:
        raise BrokenPromise(
            COMPANIONS_PROMISE,
            f"{common} tensors belong to two networks of {cls.__name__}: they are saved, clipped and optimized twice.",
            "Copy what a companion is made from, or leave out the part that it shares.",
        )
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", map_location="cpu", weights_only=False)
    companions = {name: state["weights"] for name, state in checkpoint[STATE_KEY][COMPANIONS].items()}
    saved = {"network": checkpoint["network_weights"], **companions}
    names = differing({f"{n}.{k}": v for n, weights in saved.items() for k, v in weights.items()}, training.weights)
    if names:
        raise BrokenPromise(
            COMPANIONS_PROMISE,
            f"checkpoint_final.pth lacks or has otherwise {counted(names, len(training.weights))}.",
            "Look whether save_checkpoint, Companion.state or on_train_end is overridden.",
        )


def resuming_changes_nothing(cls: type, bench: Bench, batch_size: int | None = None, **ssl: Any) -> None:
    """A training that stops after an epoch and goes on ends like one that never stopped, whichever epoch it is.

    Args:
        cls: A trainer.
        bench: Where.
        batch_size: The plan's, if another than usual.
        ssl: Hyper-parameters, if others than in trainings that several promises look at; None for the default.

    Raises:
        BrokenPromise: Naming the epoch and the weights that differ.
    """
    settings = {name: value for name, value in {**SHARED_SETTINGS, **ssl}.items() if value is not None}
    if batch_size is None and not ssl:
        training = shared_training(cls, bench)
        whole, checkpoints = training.weights, training.checkpoints
    else:
        with _data(bench, batch_size) as tiny:
            trainer = tiny.trainer(cls, **settings)
            checkpoints = keep_checkpoints(trainer)
            whole = train(trainer)
    for epoch, checkpoint in checkpoints.items():
        with _data(bench, batch_size) as tiny:
            _check_equal(cls, epoch, whole, resume(cls, tiny, checkpoint, **settings))


def unsaved_weights(trainer: Any) -> list[str]:
    """Attributes that hold parameters which belong to no network of the training, e.g. ``teachers[0]``."""
    known = {id(p) for module in (*networks_of(trainer).values(), trainer.loss) for p in module.parameters()}
    found = []
    for path, value in _parts(vars(trainer), ""):
        parameters = [value] if isinstance(value, nn.Parameter) else list(value.parameters())
        if any(id(p) not in known for p in parameters):
            found.append(path)
    return found


def shared_storages(trainer: Any) -> int:
    """How many tensors belong to more than one network of a trainer."""
    # Within one network nnU-Net registers the encoder twice, so sets are compared between networks.
    storages = [{v.data_ptr() for v in n.state_dict().values() if v.numel()} for n in networks_of(trainer).values()]
    return sum(map(len, storages)) - len(set().union(*storages))


@contextmanager
def _data(bench: Bench, batch_size: int | None) -> Iterator[TinyDataset]:
    with bench.data() as tiny:
        if batch_size is not None:
            tiny.plans["configurations"][tiny.configuration]["batch_size"] = batch_size
        yield tiny


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Modules and parameters in attributes, lists and tables, and in companions, added or not."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _parts(inner, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _parts(inner, f"{path}[{index}]")
    elif isinstance(value, Companion):
        for name, inner in vars(value).items():
            yield from _parts(inner, f"{path}.{name}")


def _check_equal(cls: type, epoch: int, whole: Weights, resumed: Weights) -> None:
    names = differing(whole, resumed)
    if names:
        raise BrokenPromise(
            RESUMING,
            f"A training that stops after {epoch} epochs and goes on ends with other weights than one that does not "
            f"stop: {counted(names, len(whole))}.",
            f"What {cls.__name__} or a companion changes from step to step besides weights, such as a counter, must "
            f"be in its memory(), and come back by recall(); random numbers must come from self.generator.",
        )

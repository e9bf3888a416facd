"""Passes over noise before the first epoch, so that all compiling is done when training starts."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.data.batches import Labeled, Unlabeled
from nnunet_ssl.data.views import PSEUDO_LABELS
from nnunet_ssl.training.checkpoint import random_state, restore_random_state


def warm_up(trainer: Any) -> float:
    """Take the passes of a step of every stage and of a validation step, with gradients and without a step.

    Nothing of the training changes: weights, buffers, random numbers and what the method remembers.

    Args:
        trainer: A ``SemiSupervisedTrainer`` whose networks and batches are made.

    Returns:
        Seconds that it took.
    """
    start = time.perf_counter()
    stages = {0, trainer.switch_epoch} - {trainer.num_epochs}
    with _nothing_changes(trainer):
        for epoch in sorted(stage for stage in stages if stage >= min(trainer.current_epoch, trainer.switch_epoch)):
            trainer.current_epoch = epoch
            _step(trainer)
        _validate(trainer)
    return time.perf_counter() - start


def _step(trainer: Any) -> None:
    trainer.network.train()
    for companion in trainer.companions.values():
        companion.start_epoch()
    with_unlabeled = trainer.in_second_stage and trainer.uses_unlabeled
    size = trainer.batch_size if with_unlabeled or not trainer.uses_unlabeled else trainer.stage_1_batch_size
    unlabeled = None
    if with_unlabeled:
        keys = [""] * trainer.unlabeled_batch_size
        noise = _noise(trainer, len(keys), trainer.unlabeled_patch_size)
        labels = torch.zeros_like(noise[:, :1], dtype=torch.int16)
        views = {name: labels if name == PSEUDO_LABELS else noise for name in trainer.wanted_views()}
        unlabeled = Unlabeled(keys, views)
    with trainer.autocast():
        losses = trainer.step(_labeled(trainer, size), unlabeled).losses
    sum(losses.values()).backward()  # type: ignore[union-attr]
    trainer.optimizer.zero_grad(set_to_none=True)


def _validate(trainer: Any) -> None:
    trainer.network.eval()
    with torch.no_grad(), trainer.autocast():
        labeled = _labeled(trainer, trainer.batch_size)
        trainer.supervised_loss(trainer.network(labeled.images), labeled.target)


def _labeled(trainer: Any, size: int) -> Labeled:
    """Noise, and labels in which every class and region occurs."""
    images = _noise(trainer, size, trainer.configuration_manager.patch_size)
    places = torch.arange(images[:, :1].numel(), device=images.device).view(images[:, :1].shape)
    heads = trainer.label_manager.num_segmentation_heads
    if not trainer.has_regions:
        return Labeled(images, (places % heads).short(), [""] * size)
    channels = heads + (trainer.label_manager.ignore_label is not None)
    regions = [(places % (channel + 2) == 0) & (channel < heads) for channel in range(channels)]
    return Labeled(images, torch.cat(regions, 1), [""] * size)


def _noise(trainer: Any, size: int, patch_size: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((size, trainer.num_input_channels, *patch_size), generator=generator).to(trainer.device)


@contextlib.contextmanager
def _nothing_changes(trainer: Any) -> Iterator[None]:
    networks = [bare(network) for network in (trainer.network, *(c.module for c in trainer.companions.values()))]
    buffers = [[buffer.clone() for buffer in network.buffers()] for network in networks]
    drawn, epoch = random_state(trainer.device, trainer.generator), trainer.current_epoch
    memory = copy.deepcopy(trainer.memory())
    try:
        yield
    finally:
        for network, kept in zip(networks, buffers):
            for buffer, value in zip(network.buffers(), kept):
                buffer.copy_(value)
        trainer.recall(memory)
        trainer.current_epoch, trainer._statistics = epoch, {}
        restore_random_state(drawn, trainer.device, trainer.generator)

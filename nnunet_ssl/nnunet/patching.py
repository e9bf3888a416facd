"""Where this package replaces names of nnU-Net's modules at run time: three places, each for the length of one call.

nnU-Net has no hook there. Each replacement says why; tests/nnunet/test_patching.py tells when nnU-Net no longer uses
the name, so that a new version cannot make one of them idle without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer
import torch
from nnunetv2.run import load_pretrained_weights


@contextmanager
def ddp_wrapper(wrap: Callable[..., Any]) -> Iterator[None]:
    """Inside, nnU-Net's trainer wraps its network for several processes by ``wrap(network, device_ids)``.

    It takes a process's rank for the number of its GPU, which holds on one machine only, and knows no CPU here.
    """
    with _replaced(nnunetv2.training.nnUNetTrainer.nnUNetTrainer, DDP=wrap):
        yield


@contextmanager
def background_workers(augmenter: Callable[..., Any]) -> Iterator[None]:
    """Inside, nnU-Net's trainer loads data by ``augmenter`` instead of NonDetMultiThreadedAugmenter.

    That one waits forever for workers that hang.
    """
    with _replaced(nnunetv2.training.nnUNetTrainer.nnUNetTrainer, NonDetMultiThreadedAugmenter=augmenter):
        yield


@contextmanager
def pretrained_weights_on_cpu() -> Iterator[None]:
    """Inside, nnU-Net loads the file of ``-pretrained_weights`` to the CPU.

    It would load it to the GPU with the number of the process, which other machines lack.
    """
    load = functools.partial(torch.load, map_location="cpu", weights_only=False)
    stand_in = SimpleNamespace(load=lambda file, **_: load(file), device=torch.device)
    with _replaced(load_pretrained_weights, torch=stand_in):
        yield


@contextmanager
def _replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    stock = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in stock.items():
            setattr(module, name, value)

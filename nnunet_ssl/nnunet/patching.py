"""Names that a module of nnU-Net uses, replaced while one of its functions runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer


@contextmanager
def replaced_in_trainer_module(**values: Any) -> Iterator[None]:
    """Inside, functions of nnU-Net's trainer module see other values under these names; see ``replaced``."""
    with replaced(nnunetv2.training.nnUNetTrainer.nnUNetTrainer, **values):
        yield


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Inside, functions of a module see other values under these names.

    Args:
        module: Of nnU-Net.
        values: By name, each one that the module has.
    """
    stock = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in stock.items():
            setattr(module, name, value)

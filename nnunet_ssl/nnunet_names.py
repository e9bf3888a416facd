"""Names that nnU-Net's trainer module uses, replaced while one of its functions runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer


@contextmanager
def replaced_in_trainer_module(**values: Any) -> Iterator[None]:
    """Inside, functions of nnU-Net's trainer module see other values under these names.

    Args:
        values: By name, each one that the module has.
    """
    module = nnunetv2.training.nnUNetTrainer.nnUNetTrainer
    stock = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in stock.items():
            setattr(module, name, value)

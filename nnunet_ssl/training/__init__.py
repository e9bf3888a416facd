"""nnU-Net's training overridden once, and what a method is: the names that a method's file needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ssl.data.batches import Labeled, Unlabeled
    from nnunet_ssl.training.hyperparameters import HyperParameters, MethodParameters, other_default, parameter
    from nnunet_ssl.training.method import Losses, Step
    from nnunet_ssl.training.monitor import View
    from nnunet_ssl.training.tools import Output, Outputs
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer

_HOMES = {
    "nnunet_ssl.data.batches": ("Labeled", "Unlabeled"),
    "nnunet_ssl.training.hyperparameters": ("HyperParameters", "MethodParameters", "other_default", "parameter"),
    "nnunet_ssl.training.method": ("Losses", "Step"),
    "nnunet_ssl.training.monitor": ("View",),
    "nnunet_ssl.training.tools": ("Output", "Outputs"),
    "nnunet_ssl.training.trainer": ("SemiSupervisedTrainer",),
}

__all__ = [
    "HyperParameters",
    "Labeled",
    "Losses",
    "MethodParameters",
    "Output",
    "Outputs",
    "SemiSupervisedTrainer",
    "Step",
    "Unlabeled",
    "View",
    "other_default",
    "parameter",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: who reads a record of a training does not wait for nnU-Net's trainer."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A tiny data set, and the promises that every method keeps, for our methods and for yours.

``check_method(nnUNetTrainerMine)`` does what ``nnunet-ssl check Mine`` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ssl.testing.bench import Bench
    from nnunet_ssl.testing.broken import BrokenPromise
    from nnunet_ssl.testing.check import PROMISES, Outcome, check_method

_HOMES = {
    "nnunet_ssl.testing.bench": ("Bench",),
    "nnunet_ssl.testing.broken": ("BrokenPromise",),
    "nnunet_ssl.testing.check": ("PROMISES", "Outcome", "check_method"),
}

__all__ = ["PROMISES", "Bench", "BrokenPromise", "Outcome", "check_method"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: who needs the tiny data set alone does not wait for everything else."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

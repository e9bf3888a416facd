"""Operations of a step that some devices take badly: those that make the host wait, and double precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_ssl.testing.broken import calling_place

_HANDING_OVER = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")


class Noting(TorchDispatchMode):
    """Notes operations of a kind that a deriving class decides on.

    Args:
        cls: The trainer in whose files they are looked for.

    Attributes:
        operations: Their names, in order.
        places: FILE:LINE in the trainer's own files for each; None where it is somebody else's.
    """

    def __init__(self, cls: type) -> None:
        super().__init__()
        self._cls = cls
        self.operations: list[str] = []
        self.places: list[str | None] = []

    def note(self, operation: str) -> None:
        """Take note of one, where it is called."""
        self.operations.append(operation)
        self.places.append(calling_place(self._cls))


class Waits(Noting):
    """Notes the operations for which the host would wait for a device: those that hand it a value or a size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        dtypes = {t.dtype for t in tree_leaves(args[1:]) if isinstance(t, Tensor)}
        # What a mask selects has a size that the host must know.
        if name in _HANDING_OVER or (name.startswith("index") and torch.bool in dtypes):
            self.note(name)
        return func(*args, **(kwargs or {}))


class DoublePrecision(Noting):
    """Notes the operations that give tensors of double precision, which Apple's devices (MPS) do not know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)):
            self.note(str(func))
        return result

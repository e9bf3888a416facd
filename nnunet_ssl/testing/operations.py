"""Operations of a step that some devices take badly: those that make the host wait, and double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

from nnunet_ssl.testing.broken import calling_place

_HANDING_OVER = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
# Calls that read what a tensor holds: on the CPU, PyTorch does so without an operation that could be noted.
_READING = {"tolist", "numpy", "cpu", "__array__"}


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
    """Notes the operations for which the host would wait for a device: those that hand it a value or a size.

    Where everything lies on the CPU, what would lie on a device there is told by how it was made: all tensors do but
    those made of nothing, of numbers or of such tensors, without a word of a device or a generator, as the training's
    draws on its device.
    """

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self._calls = _Calls(self)
        # Whether a call is under way that concerns the host alone.
        self.on_host = False

    def __enter__(self) -> Self:
        super().__enter__()
        self._calls.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func.name().removeprefix("aten::").partition(".")[0], _tensors(args[1:])
        # What a mask selects has a size that the host must know.
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors)
        if (name in _HANDING_OVER or by_mask or _leaves_its_device(name, args, kwargs or {})) and not self.on_host:
            self.note(name)
        return func(*args, **(kwargs or {}))


class DoublePrecision(Noting):
    """Notes the operations that give tensors of double precision, which Apple's devices (MPS) do not know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)):
            self.note(str(func))
        return result


class _Calls(TorchFunctionMode):
    """Tells ``Waits`` which calls read a tensor of a device, and which concern the host alone."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits
        self._of_host = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensors = _tensors((args, kwargs))
        of_host = all(t in self._of_host for t in tensors)
        places = [v for v in (*args, *kwargs.values()) if isinstance(v, (str, torch.device, torch.Generator))]
        if not of_host and (name in _READING or (name == "to" and "cpu" in places)):
            self._waits.note(name)
        before, self._waits.on_host = self._waits.on_host, of_host and bool(tensors)
        try:
            result = func(*args, **kwargs)
        finally:
            self._waits.on_host = before
        if of_host and not places:
            for made in _tensors(result):
                self._of_host[made] = True
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _leaves_its_device(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    target = kwargs.get("device")
    return name == "_to_copy" and target is not None and target.type == "cpu" and args[0].device.type != "cpu"

"""Keeping sums, logarithms and coordinates out of half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return values if values.dtype == torch.float64 else values.float()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off: under it, matrix products return half precision whatever they are given."""
    # As in nnU-Net, which uses no autocast elsewhere: older versions refuse even to switch it off for mps.
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def autocast(device: torch.device, cpu_bfloat16: bool) -> AbstractContextManager[object]:
    """Half precision as the stock trainer uses it: on CUDA always; on the CPU bfloat16 where it is asked for."""
    if device.type == "cuda":
        return torch.autocast("cuda")
    if device.type == "cpu" and cpu_bfloat16:
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()

"""How much memory a process has needed."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> float | None:
    """The most that has been in use since the process started, in MiB: of the GPU, or of the process on a CPU.

    None where it is not told: on Windows without a GPU, and on Apple's GPUs.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    # In KiB, on macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)

"""Time functions in turns, and say what came out."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch


def time_in_turns(functions: Sequence[Callable[[], object]], repetitions: int, device: torch.device) -> np.ndarray:
    """Seconds (repetitions, functions). They take turns, forth and back: a busy machine slows all of them alike."""
    times = np.empty((repetitions + 2, len(functions)))
    for repetition in range(len(times)):
        order = range(len(functions)) if repetition % 2 else reversed(range(len(functions)))
        for i in order:
            _wait_for(device)
            start = time.perf_counter()
            functions[i]()
            _wait_for(device)
            times[repetition, i] = time.perf_counter() - start
    return times[2:]  # the first two warm up


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratio_of(times: np.ndarray) -> str:
    """Median and quartiles of the single turns' ratios of what is compared (column 1) over the reference (column 0)."""
    low, ratio, high = np.percentile(times[:, 1] / times[:, 0], [25, 50, 75])
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def header(*cells: str) -> None:
    """Start a table."""
    row(*cells)
    print("|---" * len(cells) + "|", flush=True)


def row(*cells: str) -> None:
    """One line of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def peak_of_process() -> float:
    """The most memory this process has had, in GiB.

    Linux hands the figure of getrusage on to new processes, so /proc is asked where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def keep_memory() -> None:
    """Let this process keep what it frees, as PyTorch does on CUDA.

    Else glibc returns every large tensor to the kernel at once, and how long that takes varies by a tenth of a step
    from one step to the next.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        library.mallopt(m_mmap_max, 0)
        library.mallopt(m_trim_threshold, 2**31 - 1)

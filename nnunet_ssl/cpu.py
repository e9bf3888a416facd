"""Training on a CPU: its cores, and whether it knows bfloat16."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def own_cores() -> list[int]:
    """The numbers of the cores this process may run on; of all cores where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_has_bfloat16() -> bool:
    """Whether PyTorch computes convolutions in bfloat16 with vector instructions of this CPU.

    Where it does not, it emulates them, tens of times slower than float32.
    """
    # The condition of PyTorch's own dispatch; not public, so a version without it counts as no.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def prepare_cpu(bfloat16: bool, log: Callable[[str], object]) -> None:
    """Before a training on the CPU: no more threads than cores, and a warning where bfloat16 is slow.

    nnUNetv2_train asks for a thread per core of the machine. In a process that was given fewer of them (by taskset, or
    by a scheduler), threads that share a core wait for each other without letting go of it: a backward pass takes
    several times as long.

    Args:
        bfloat16: Whether the training uses it.
        log: Takes the warning.
    """
    torch.set_num_threads(min(torch.get_num_threads(), len(own_cores())))
    if bfloat16 and not cpu_has_bfloat16():
        log("WARNING: this CPU emulates bfloat16; cpu_bfloat16=false trains much faster.")

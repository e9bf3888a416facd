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
    """Whether this CPU has arithmetic for bfloat16, and PyTorch uses it for convolutions.

    Where it does not, convolutions in bfloat16 are emulated: twice as slow as in float32 on a CPU with AVX-512, tens of
    times slower on older ones.
    """
    # The condition of PyTorch's own dispatch; not public, so a version without it counts as no.
    dispatched = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if dispatched is None or not dispatched():
        return False
    # It holds for every CPU with AVX-512, also where oneDNN has to emulate.
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("bf16"))  # x86 and ARM
    # What an older PyTorch has instead; it knows x86 alone.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)())


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
        log("WARNING: this CPU emulates bfloat16; cpu_bfloat16=false trains faster.")

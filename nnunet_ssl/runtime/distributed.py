"""Training in several processes: each one's device, nnU-Net's DDP wrapper on it, and means over all of them.

nnU-Net takes a process's rank for the number of its GPU, which holds on one machine only, and knows no CPU here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl.errors import UserError
from nnunet_ssl.runtime.cpu import own_cores


def local_rank() -> int:
    """This process's number on its machine: torchrun says it; nnU-Net's own processes are all on one."""
    return int(os.environ["LOCAL_RANK"]) if started_by_torchrun() else dist.get_rank()


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= set(os.environ)


def device_of_process(requested: torch.device) -> torch.device:
    """The device of this process in a training in several: its own GPU, or the one device of another kind."""
    return torch.device("cuda", local_rank()) if requested.type == "cuda" else requested


def data_parallel(network: nn.Module, device_ids: Sequence[int] = ()) -> nn.Module:
    """A network wrapped for training in several processes, on the device it is on, whatever number nnU-Net names."""
    device = next(network.parameters()).device
    return DistributedDataParallel(
        nn.SyncBatchNorm.convert_sync_batchnorm(network), device_ids=[device] if device.type == "cuda" else None
    )


@contextmanager
def joined_processes(kind: str) -> Iterator[torch.device]:
    """Inside, the processes that torchrun started train together.

    Args:
        kind: "cuda", where each process has a GPU (NCCL), or "cpu" (gloo).

    Yields:
        The device of this process.

    Raises:
        UserError: Where torchrun did not start this process, or this machine has too few GPUs.
    """
    if not started_by_torchrun():
        raise UserError(
            "This command runs in processes that torchrun starts, e.g. torchrun --nnodes 2 --nproc-per-node 4 ... "
            "--no-python nnunet-ssl train ... On one machine nnUNetv2_train ... -num_gpus N does the same."
        )
    on_this_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    if kind == "cuda":
        if torch.cuda.device_count() < on_this_machine:
            raise UserError(
                f"torchrun started {on_this_machine} processes on this machine, which has {torch.cuda.device_count()} "
                f"GPUs. Start as many as there are (--nproc-per-node), or train with -device cpu."
            )
        torch.cuda.set_device(local_rank())
    # As nnUNetv2_train does: the work on a GPU needs one thread.
    torch.set_num_threads(1 if kind == "cuda" else max(1, len(own_cores()) // on_this_machine))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    yield device_of_process(torch.device(kind))
    # Not after an error: with others waiting for this process it could block, and the error would never be printed.
    dist.destroy_process_group()


def from_all_ranks(value: Any) -> list[Any]:
    """The value of each process, by rank; this one's alone where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over all ranks of a training in several processes, of any shape; the values themselves in one."""
    if dist.is_available() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values

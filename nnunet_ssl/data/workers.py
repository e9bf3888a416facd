"""Background workers that load data, and an end to waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from queue import Empty
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

# Of one look into the queue, in seconds: a process that a scheduler had stopped does not count the pause as waiting.
_LONGEST_LOOK = 1.0


class WatchedAugmenter(NonDetMultiThreadedAugmenter):
    """nnU-Net's background workers. Where they hang, asking for a batch fails instead of waiting forever.

    Args:
        arguments: As batchgenerators' class.
        timeout: How long to wait for a batch, in seconds.
        keywords: As batchgenerators' class.
    """

    def __init__(self, *arguments: Any, timeout: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.timeout = timeout

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            RuntimeError: Where a worker has died, or no batch came in time.
        """
        if not self.initialized:
            self._start()
        waited = 0.0
        while not self.abort_event.is_set():
            start = time.monotonic()
            try:
                batch = self.results_loop_queue.get(timeout=self.wait_time)
            except Empty:
                waited += min(time.monotonic() - start, _LONGEST_LOOK)
                if waited < self.timeout:
                    continue
                self._finish(timeout=1, force=True)
                raise RuntimeError(
                    f"No batch came from the data-loading workers for {self.timeout:.0f} seconds. Their files may be "
                    f"on a disk that hangs, or they need longer: then set loader_timeout (seconds) with nnunet-ssl "
                    f"configure. Continue with --c."
                ) from None
            self.results_loop_queue.task_done()
            return batch
        self._finish()
        raise RuntimeError(
            "A data-loading worker has died; what it printed is above. If it printed nothing it was killed, most often "
            "for want of memory: use fewer workers (nnUNet_n_proc_DA). Continue with --c."
        )


def in_background_workers(loader: nnUNetDataLoader, pin_memory: bool, timeout: float) -> Iterator[dict[str, Any]]:
    """Run a loader as nnU-Net runs its own; in this process where nnUNet_n_proc_DA is 0.

    Args:
        loader: What to run.
        pin_memory: Whether batches go to a GPU.
        timeout: How long to wait for a batch, in seconds.
    """
    workers = get_allowed_n_proc_DA()
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    augmenter = WatchedAugmenter(
        data_loader=loader,
        transform=None,
        num_processes=max(1, workers // 2),
        num_cached=max(3, workers // 4),
        seeds=None,
        pin_memory=pin_memory,
        wait_time=0.002,
        timeout=timeout,
    )
    # Starts the workers, so that the first step finds its batch ready.
    next(augmenter)
    return augmenter

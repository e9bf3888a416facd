"""Copies of this process."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch


def forked(work: Callable[[], None]) -> int:
    """Run in a copy of this process, which has everything imported; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        # The parent's threads are not copied.
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

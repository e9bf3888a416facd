"""nnU-Net's commands and ours within this process: one of their own takes seconds to start."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import sys
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def run_in_process(*words: str, **_: Any) -> None:
    """Run a console script of an installed package; its pools are threads."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=words[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words])
        patch.setattr(torch, "set_num_threads", lambda number: None)
        patch.setattr(multiprocessing, "get_context", lambda method=None: SimpleNamespace(Pool=ThreadPool))
        try:
            status = script.load()()
        except SystemExit as stop:
            status = stop.code
    assert not status, words

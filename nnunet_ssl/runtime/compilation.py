"""torch.compile for networks that see batches of several sizes."""

from __future__ import annotations

from typing import Any

import torch

# Graphs per function: passes with and without gradient, in training and validation, of every batch size of both stages.
_GRAPHS = 32


def compile_per_shape() -> None:
    """Let torch.compile make a graph of its own for every batch size, in this process.

    By itself it makes one for any size once it has seen a second one, and gives the faster layout of convolutions up
    for that; and after a few graphs it goes on uncompiled.
    """
    config: Any = torch._dynamo.config
    config.assume_static_by_default, config.automatic_dynamic_shapes = True, False
    # Its name until PyTorch 2.6.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), _GRAPHS))

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
    if hasattr(config, "recompile_limit"):
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    else:
        # Its name until PyTorch 2.6.
        config.cache_size_limit = max(config.cache_size_limit, _GRAPHS)

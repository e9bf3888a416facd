"""Displacement fields of the tests of transforms."""

from __future__ import annotations

import numpy as np
import torch

from nnunet_ssl.transforms.displacement import sample_displacement

SHAPES = [(24, 31), (12, 15, 18)]


def mean_side(shape, fixed_axes=()):
    """Geometric mean of the sides along which something moves."""
    return np.exp(np.mean([np.log(side) for axis, side in enumerate(shape) if axis not in fixed_axes]))


def field(shape, *, batch=2, smoothness=0.15, std=0.03, seed=0, dtype=torch.float64, **options):
    """Strengths relative to the mean side."""
    generator = torch.Generator().manual_seed(seed)
    side = mean_side(shape, options.get("fixed_axes", ()))
    return sample_displacement(
        batch, shape, sigma=smoothness * side, std=std * side, generator=generator, dtype=dtype, **options
    )


def grid(shape, dtype=torch.float64):
    return torch.stack(torch.meshgrid(*[torch.arange(s, dtype=dtype) for s in shape], indexing="ij"))

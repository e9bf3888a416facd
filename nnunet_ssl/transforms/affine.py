"""Random rotations and changes of size about the center of a patch, with their exact inverse.

A map A(q) = c + M (q - c), with c the center of the patch, is its matrix M (B, D, D). All is elementwise: neither
autocast nor the reduced precision of matrix products on some GPUs touches the coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from nnunet_ssl.transforms.interpolation import Places, coordinates


def random_similarities(
    count: int,
    dims: int,
    rotation: float,
    scaling: float,
    *,
    fixed_axes: Sequence[int] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw rotations with one change of size for all axes.

    Args:
        count: Number of independent maps B.
        dims: D, 2 or 3.
        rotation: Largest rotation in degrees; in 3D of each component of the rotation vector. Uniform.
        scaling: Largest change of size; the factor lies between 1 / (1 + scaling) and 1 + scaling, its logarithm is
            uniform.
        fixed_axes: Axes along which nothing moves: rotations and sizes are those of the remaining plane.
        generator: Draws on its own device; the default generator of ``device`` if absent.
        device: Where to put the matrices.

    Returns:
        Matrices (B, D, D), float32, with orthogonal columns.
    """
    device = torch.device(device)
    moving = tuple(axis for axis in range(dims) if axis not in fixed_axes)
    turns, scaled = _generators(dims, moving, device)
    source = device if generator is None else generator.device
    numbers = (2 * torch.rand((count, len(turns) + 1), generator=generator, device=source) - 1).to(device)
    skew = (math.radians(rotation) * numbers[:, :-1, None, None] * turns).sum(1)
    # Rodrigues' formula; a turn within a plane, whose third axis stays, is one of its cases.
    angle = (skew.square().sum((1, 2), keepdim=True) / 2).sqrt()
    matrix = identity(dims, device) + torch.sinc(angle / math.pi) * skew
    matrix = matrix + torch.sinc(angle / (2 * math.pi)).square() / 2 * product(skew, skew)
    return matrix * torch.exp(math.log1p(scaling) * numbers[:, -1:, None] * scaled)


def product(first: Tensor, second: Tensor) -> Tensor:
    """Matrix products (B, D, D), elementwise."""
    return (first[:, :, :, None] * second[:, None]).sum(2)


def inverse(matrix: Tensor) -> Tensor:
    """The inverse of matrices (B, D, D) with orthogonal columns, which ``random_similarities`` makes."""
    return (matrix / matrix.square().sum(1, keepdim=True)).mT


def affine_after(
    matrix: Tensor, displacement: Tensor, sides: Sequence[int], places: Sequence[Places] | None = None
) -> Tensor:
    """The displacement of A after q + e(q): M (q + e(q) - c) + c - q.

    Args:
        matrix: M (B, D, D).
        displacement: e (B, D, *Q), in voxels.
        sides: Of the patch, which A turns about its center.
        places: The q of each axis, whole voxels of the patch; all of its voxels (Q = S) if absent.

    Returns:
        (B, D, *Q), in voxels.
    """
    dims = len(sides)
    rest = matrix - identity(dims, matrix.device)
    grown = [m.view(*m.shape, *[1] * dims) for m in (matrix, rest)]
    along = [
        coordinates(range(side) if places is None else places[axis], (side - 1) / 2, 1.0, dims - axis - 1, matrix)
        for axis, side in enumerate(sides)
    ]
    # The first sums have few values: each place of one axis, then of two.
    moved = grown[1][:, :, 0] * along[0]
    for axis in range(1, dims):
        moved = moved + grown[1][:, :, axis] * along[axis]
    for axis in range(dims):
        moved = torch.addcmul(moved, grown[0][:, :, axis], displacement[:, axis : axis + 1])
    return moved


@lru_cache(maxsize=64)
def identity(dims: int, device: torch.device) -> Tensor:
    """The matrix (D, D) of the map that moves nothing; kept."""
    return torch.eye(dims, device=device)


@lru_cache(maxsize=64)
def _generators(dims: int, moving: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The infinitesimal rotation of each plane (P, D, D), and which axes change in size (1, 1, D)."""
    planes = list(combinations(moving, 2))
    turns = torch.zeros(len(planes), dims, dims)
    for turn, (first, second) in zip(turns, planes):
        turn[first, second], turn[second, first] = -1.0, 1.0
    scaled = torch.tensor([float(axis in moving) for axis in range(dims)]).view(1, 1, dims)
    return turns.to(device), scaled.to(device)

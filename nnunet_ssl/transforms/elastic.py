"""Random elastic transforms of a training: how strong they are, where they move nothing, and how they are aligned."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nnunet_ssl.transforms.alignment import SolverGrid, align_displacements, solver_grid
from nnunet_ssl.transforms.displacement import sample_displacement

# Enough fields to say their strength to a few percent, few enough to cost nothing.
_NUM_FIELDS_SAID = 16


@dataclasses.dataclass(frozen=True)
class ElasticTransforms:
    """Displacement fields as ``sample_displacement`` makes them.

    Attributes:
        smoothness: Sigma of the Gaussian that smooths them, as a fraction of the patch side.
        displacement_std: Standard deviation per axis, likewise.
        identity_probability: How often nothing moves at all.
        fixed_axes: Along which nothing moves: the slices' axis of anisotropic images.
    """

    smoothness: float
    displacement_std: float
    identity_probability: float = 0.0
    fixed_axes: tuple[int, ...] = ()

    def grid(self, spatial_shape: tuple[int, ...]) -> SolverGrid:
        """How far fields reach beyond a patch, and where their alignment is solved."""
        return solver_grid(spatial_shape, self.smoothness, self.fixed_axes)

    def sample(self, batch_size: int, spatial_shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Fields (B, D, *(S + 2 margin)) in voxels, none of them the identity, on the generator's device."""
        return sample_displacement(
            batch_size,
            spatial_shape,
            smoothness=self.smoothness,
            displacement_std=self.displacement_std,
            generator=generator,
            fixed_axes=self.fixed_axes,
            margin=self.grid(spatial_shape).margin,
        )

    def draw(self, data: Tensor, generator: torch.Generator) -> Tensor:
        """A field for each example of a batch (B, C, *S), on its device; see ``sample``."""
        displacement = self.sample(len(data), tuple(data.shape[2:]), generator).to(data.device)
        moved = torch.rand(len(data), generator=generator, device=generator.device)
        moved = (moved >= self.identity_probability).to(data.device)
        return displacement * moved.view(-1, *[1] * (displacement.ndim - 1))

    def align(self, first: Tensor, second: Tensor, spatial_shape: tuple[int, ...]) -> Tensor:
        """What brings the frame of the first fields into that of the second ones, (B, D, *S) in voxels."""
        return align_displacements(first, second, grid=self.grid(spatial_shape))

    def describe(self, spatial_shape: tuple[int, ...]) -> str:
        """Their strength in voxels, for the log: fields that could fold are scaled down."""
        asked = [self.displacement_std * side for side in spatial_shape]
        # A generator of its own, so that a resumed training draws what the interrupted one would have drawn.
        sample = self.sample(_NUM_FIELDS_SAID, spatial_shape, torch.Generator())
        reached = sample.std(dim=[0, *range(2, sample.ndim)]).tolist()
        moved = [axis for axis in range(len(asked)) if reached[axis] > 0]
        return (
            f"Elastic transforms: displacement of {', '.join(f'{reached[a]:.2f}' for a in moved) or '0'} voxels "
            f"(standard deviation per axis; {', '.join(f'{asked[a]:.2f}' for a in moved) or '0'} asked for, less where "
            f"fields are scaled down so that they cannot fold)"
        )

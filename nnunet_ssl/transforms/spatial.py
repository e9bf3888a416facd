"""Random spatial transforms of a training: how strong they are, where they move nothing, and how they are aligned."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.transforms.affine import affine_after, identity, inverse, product, random_similarities
from nnunet_ssl.transforms.alignment import SolverGrid, align_displacements, inside_mask, solver_grid, without_margin
from nnunet_ssl.transforms.displacement import sample_displacement

# To say their strength: fields are costly and each shows its strength at many places, affine maps are neither.
_FIELDS_SAID = 2
_AFFINE_MAPS_SAID = 256
_PLACES_SAID = 1024


class Transform(NamedTuple):
    """A map of each example of a batch, phi(q) = A(q + e(q)): the output voxel q takes its value from there.

    Attributes:
        matrix: Of the affine map A about the center of the patch, (B, D, D).
        elastic: e (B, D, *(S + 2 margin)), in voxels, with the margin of ``SpatialTransforms.grid``.
        displacement: phi(q) - q, (B, D, *S), in voxels: what ``warp`` takes.
    """

    matrix: Tensor
    elastic: Tensor
    displacement: Tensor

    def halves(self) -> tuple[Transform, Transform]:
        """The maps of the first and of the second half of the batch; views."""
        first, second = zip(*(t.tensor_split(2) for t in self))
        return Transform(*first), Transform(*second)


@dataclasses.dataclass(frozen=True)
class SpatialTransforms:
    """A random rotation and change of size, with a random elastic field before it.

    Small patches need the first: a field that cannot fold moves a voxel by a fraction of the width of its Gaussian.
    The elastic field is the same along every axis, in voxels: its two measures are fractions of one side, the geometric
    mean of the sides along which something moves.

    Attributes:
        rotation: Largest rotation, in degrees; in 3D about each axis.
        scaling: Largest change of size; sizes change by factors between 1 / (1 + scaling) and 1 + scaling.
        smoothness: Sigma of the Gaussian that smooths the elastic field, as a fraction of that side.
        displacement_std: Standard deviation of its components, likewise.
        identity_probability: How often nothing moves at all.
        fixed_axes: Along which nothing moves: the slices' axis of anisotropic images.
    """

    rotation: float
    scaling: float
    smoothness: float
    displacement_std: float
    identity_probability: float = 0.0
    fixed_axes: tuple[int, ...] = ()

    def side(self, spatial_shape: tuple[int, ...]) -> float:
        """The geometric mean of the sides along which something moves, in voxels."""
        moving = [side for axis, side in enumerate(spatial_shape) if axis not in self.fixed_axes]
        return math.prod(moving) ** (1 / len(moving))

    def grid(self, spatial_shape: tuple[int, ...]) -> SolverGrid:
        """How far fields reach beyond a patch, and where their alignment is solved."""
        return solver_grid(spatial_shape, self.smoothness * self.side(spatial_shape), self.fixed_axes)

    def draw(self, data: Tensor, generator: torch.Generator, identity_probability: float | None = None) -> Transform:
        """A transform for each example of a batch (B, C, *S), on its device; another share of identities if given."""
        count, shape = len(data), tuple(data.shape[2:])
        elastic = self._elastic(count, shape, generator, data.device)
        matrix = self._affine(count, len(shape), generator, data.device)
        moved = torch.rand((count, 1, 1), generator=generator, device=generator.device).to(data.device)
        moved = moved >= (self.identity_probability if identity_probability is None else identity_probability)
        matrix = torch.where(moved, matrix, identity(len(shape), data.device))
        elastic = elastic * moved.view(-1, *[1] * (elastic.ndim - 1))
        on_patch = without_margin(elastic, self.grid(shape).margin)
        return Transform(matrix, elastic, affine_after(matrix, on_patch, shape))

    def align(self, first: Transform, second: Transform) -> tuple[Tensor, Tensor]:
        """What brings the frame of the first transforms into that of the second ones, and where it can.

        Returns:
            The displacement a (B, D, *S) in voxels of phi_1^-1 after phi_2, and a boolean (B, 1, *S): voxels whose
            counterpart lies in the patch, and which show the image and not its repeated border.
        """
        grid = self.grid(tuple(second.displacement.shape[2:]))
        between = product(inverse(first.matrix), second.matrix)
        alignment = align_displacements(first.elastic, second.elastic, grid=grid, between=between)
        return alignment, inside_mask(alignment) & inside_mask(second.displacement)

    def describe(self, spatial_shape: tuple[int, ...]) -> str:
        """How far they move a voxel, for the log: fields that could fold are weaker than asked for."""
        # A generator of its own, so that a resumed training draws what the interrupted one would have drawn.
        generator, device = torch.Generator(), torch.device("cpu")
        margin = self.grid(spatial_shape).margin
        elastic = without_margin(self._elastic(_FIELDS_SAID, spatial_shape, generator, device), margin)
        matrix = self._affine(_AFFINE_MAPS_SAID, len(spatial_shape), generator, device)
        chosen = torch.randint(math.prod(spatial_shape), (_PLACES_SAID,), generator=generator)
        center = (np.array(spatial_shape)[:, None] - 1) / 2
        places = torch.from_numpy(np.stack(np.unravel_index(chosen.numpy(), spatial_shape)) - center).float()
        field = elastic.flatten(2)[:, :, chosen]
        moved = matrix.unflatten(0, (_FIELDS_SAID, -1)) @ (places + field)[:, None] - places
        asked = self.displacement_std * self.side(spatial_shape)
        reached = field.square().sum(1).mean().div(len(spatial_shape) - len(self.fixed_axes)).sqrt()
        return (
            f"Transforms: rotation up to {self.rotation:g} degrees, sizes changed by up to {self.scaling:g}, and an "
            f"elastic field with a standard deviation of {reached:.2f} voxels ({asked:.2f} asked for, less where it "
            f"could fold). A voxel moves by {moved.norm(dim=2).mean():.2f} voxels on average, by "
            f"{field.norm(dim=1).mean():.2f} of them elastically"
        )

    def _elastic(
        self, count: int, spatial_shape: tuple[int, ...], generator: torch.Generator, device: torch.device
    ) -> Tensor:
        side = self.side(spatial_shape)
        return sample_displacement(
            count,
            spatial_shape,
            sigma=self.smoothness * side,
            std=self.displacement_std * side,
            generator=generator,
            fixed_axes=self.fixed_axes,
            margin=self.grid(spatial_shape).margin,
            device=device,
        )

    def _affine(self, count: int, dims: int, generator: torch.Generator, device: torch.device) -> Tensor:
        return random_similarities(
            count, dims, self.rotation, self.scaling, fixed_axes=self.fixed_axes, generator=generator, device=device
        )

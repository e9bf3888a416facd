"""Shifted crops, the composition of pseudo-labels from two of them (COM), and CutMix: pure functions on tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def room_for_shift(
    shift: float, patch_size: Sequence[int], image_size: Sequence[float], fixed_axes: Sequence[int] = ()
) -> tuple[int, ...]:
    """How far a crop may lie off the center, in voxels per axis.

    No more than the image has beyond the patch: crops that hang over the border lose what they show there, and networks
    that learn from such labels shrink structures.

    Args:
        shift: Wanted, as a fraction of the patch side.
        patch_size: In voxels.
        image_size: Of an ordinary image, in voxels.
        fixed_axes: Along which nothing is shifted.
    """
    room = [max(0, int(whole - side) // 2) for whole, side in zip(image_size, patch_size)]
    wanted = [0 if axis in fixed_axes else round(shift * side) for axis, side in enumerate(patch_size)]
    return tuple(map(min, wanted, room))


def draw_shift(margin: Sequence[int], generator: np.random.Generator) -> tuple[int, ...]:
    """One of the diagonal directions: by the margin or by minus the margin along each axis, in voxels.

    Args:
        margin: In voxels per axis.
        generator: Numpy's: crops are cut by numbers that the host must know, and a draw on a GPU would be waited for.
    """
    signs = generator.integers(2, size=len(margin))
    return tuple(m if sign else -m for m, sign in zip(margin, signs))


def shifted_crop(image: Tensor, margin: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The crop that is smaller by a margin on every side and lies off the center by a shift; a view.

    Args:
        image: (B, C, *(S + 2 margin)).
        margin: Per spatial axis, in voxels.
        shift: Per spatial axis, in voxels, at most the margin in either direction; zeros for the center crop.

    Returns:
        (B, C, *S); its voxel q is the center crop's voxel q + shift.

    Raises:
        ValueError: For a shift that leaves the image.
    """
    if any(abs(s) > m for s, m in zip(shift, margin)):
        raise ValueError(f"A shift of {tuple(shift)} voxels leaves the image, which has margins of {tuple(margin)}.")
    for axis, (voxels, offset) in enumerate(zip(margin, shift), start=2):
        image = image.narrow(axis, voxels + offset, image.shape[axis] - 2 * voxels)
    return image


def compose_pseudo_labels(fixed: Tensor, temporary: Tensor, shift: Sequence[int]) -> Tensor:
    """COM: each voxel's pseudo-label from that of two crops in which it lies farther from the border.

    The nearer the border, the less of its surroundings a network has seen when it labels a voxel. Along axes that are
    not shifted both crops have the same border, which does not count. Where both are as far, and where the shifted crop
    does not reach, the center crop's label stays.

    Args:
        fixed: Pseudo-labels of the center crop, (B, C, *S).
        temporary: Pseudo-labels of the crop shifted by ``shift``, of the same shape.
        shift: In voxels per spatial axis.

    Returns:
        The dynamic pseudo-labels in the center crop's frame, (B, C, *S): its voxel q is the temporary label at
        q - shift or the fixed label at q.
    """
    moved = [(axis, offset) for axis, offset in enumerate(shift) if offset]
    if not moved:
        return fixed
    shape = fixed.shape[2:]
    own, other = (
        _depth(shape, {axis: offset * is_shifted for axis, offset in moved}, fixed.device) for is_shifted in (0, 1)
    )
    in_place = temporary.roll([offset for _, offset in moved], [axis + 2 for axis, _ in moved])
    # What the roll has brought around the edge lies outside the shifted crop, at a negative depth.
    return torch.where(other > own, in_place, fixed)


def _depth(shape: Sequence[int], offsets: Mapping[int, int], device: torch.device) -> Tensor:
    """How many voxels lie between each voxel and the nearest face of a crop, along some axes; below 0 outside.

    Args:
        shape: S, of the center crop, whose voxels are asked about.
        offsets: By axis, how far the crop lies off the center crop.
        device: Where to put them.

    Returns:
        Whole numbers that broadcast to S.
    """
    depths = []
    for axis, offset in offsets.items():
        place = torch.arange(shape[axis], device=device) - offset
        along = torch.minimum(place, shape[axis] - 1 - place)
        depths.append(along.view([-1 if a == axis else 1 for a in range(len(shape))]))
    return functools.reduce(torch.minimum, depths)


def cutmix_boxes(
    batch_size: int,
    spatial_shape: Sequence[int],
    share: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random box per image, of any aspect ratio and a fixed share of the volume, up to rounding.

    CutMix for segmentation as in French et al., "Semi-supervised semantic segmentation needs strong, varied
    perturbations" (BMVC 2020), there in 2D.

    Args:
        batch_size: B.
        spatial_shape: S, in voxels.
        share: Part of the voxels that lies in the box, in (0, 1].
        generator: Draws on its own device; the default generator of ``device`` if absent.
        device: Where to put the boxes; the generator's device if absent.

    Returns:
        Boolean (B, 1, *S), true inside the box.
    """
    dims = len(spatial_shape)
    source = device if generator is None else generator.device
    numbers = torch.rand((2, batch_size, dims), generator=generator, device=source)
    # The sides' shares multiply to the volume's: its exponent is split at random, uniformly, between the sides that can
    # be divided.
    exponents = torch.stack([-torch.log1p(-n) * (side > 1) for n, side in zip(numbers[0].T, spatial_shape)], dim=1)
    exponents = exponents / exponents.sum(1, keepdim=True).clamp_min(1e-9)
    lengths = [side * share ** exponents[:, axis] for axis, side in enumerate(spatial_shape)]
    boxes = _boxes(spatial_shape, lengths, numbers[1])
    return boxes if device is None else boxes.to(device)


def boxes_of_side(
    batch_size: int,
    spatial_shape: Sequence[int],
    side: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A box per image at a random place, with the same part of every axis.

    As copy-paste between labeled and unlabeled images takes it: Bai et al., "Bidirectional copy-paste for
    semi-supervised medical image segmentation" (CVPR 2023), with two thirds of every side.

    Args:
        batch_size: B.
        spatial_shape: S, in voxels.
        side: Part of each axis, in (0, 1].
        generator: Draws on its own device; the default generator of ``device`` if absent.
        device: Where to put the boxes; the generator's device if absent.

    Returns:
        Boolean (B, 1, *S), true inside the box.
    """
    dims = len(spatial_shape)
    source = device if generator is None else generator.device
    places = torch.rand((batch_size, dims), generator=generator, device=source)
    boxes = _boxes(spatial_shape, [torch.full_like(places[:, 0], side * whole) for whole in spatial_shape], places)
    return boxes if device is None else boxes.to(device)


def _boxes(spatial_shape: Sequence[int], lengths: Sequence[Tensor], places: Tensor) -> Tensor:
    """Boxes (B, 1, *S), on the device of ``places``.

    Args:
        spatial_shape: S, in voxels.
        lengths: Along each axis (B,), in voxels, not yet rounded.
        places: (B, D) in [0, 1): how far along the room that an axis leaves.
    """
    dims = len(spatial_shape)
    boxes = torch.ones((len(places), 1, *spatial_shape), dtype=torch.bool, device=places.device)
    for axis, (side, wanted) in enumerate(zip(spatial_shape, lengths)):
        length = wanted.round().clamp(1, side)
        start = (places[:, axis] * (side - length + 1)).floor()
        place = torch.arange(side, device=places.device)
        within = (place >= start[:, None]) & (place < (start + length)[:, None])
        boxes &= within.view(len(places), 1, *[side if a == axis else 1 for a in range(dims)])
    return boxes


def draw_beta(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draws of Beta(alpha, alpha), by Jöhnk's method, on the generator's device: (count,).

    PyTorch's own does not take a generator.
    """
    # Of so many pairs one is accepted but with a chance below 1e-6, for every alpha up to 1.
    pairs = torch.rand((2, count, 32), generator=generator, device=generator.device, dtype=torch.float32)
    first, second = pairs.clamp_min(1e-6).pow(1.0 / alpha)
    accepted = (first + second <= 1.0) & (first + second > 0.0)
    chosen = accepted.to(torch.uint8).argmax(1, keepdim=True)
    x, y = first.gather(1, chosen)[:, 0], second.gather(1, chosen)[:, 0]
    return x / (x + y).clamp_min(torch.finfo(torch.float32).tiny)


def mix(own: Tensor, partner: Tensor, boxes: Tensor) -> Tensor:
    """The partner inside the boxes (B, 1, *S), one's own outside; images or labels, (B, C, *S)."""
    return torch.where(boxes, partner, own)


def others(images: Tensor, further: Tensor) -> Tensor:
    """What each image or label map is mixed with: another one of its batch; a single one with the first further one."""
    return images.roll(1, 0) if len(images) > 1 else further[:1]


def mixed_with_others(own: Tensor, further: Tensor, boxes: Tensor | None) -> Tensor:
    """Each image or label map with another one inside its box, see ``others``; as they are without boxes."""
    return own if boxes is None else mix(own, others(own, further), boxes)

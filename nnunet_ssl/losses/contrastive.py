"""Contrast in feature space: uncertain voxels against the prototypes of reliable ones."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_ssl.runtime.precision import at_least_float32, without_autocast

_TINY = 1e-6


def class_prototypes(features: Tensor, labels: Tensor, reliable: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Per class, the mean of the L2-normalized features of its reliable voxels.

    Args:
        features: (B, C, *S), any floating type; computed in float32 or more.
        labels: (B, G, *S), the class of each voxel in each group of exclusive classes.
        reliable: (B, *S), boolean.
        num_classes: K, classes per group.

    Returns:
        Prototypes (G, K, C), zero for classes without reliable voxels, and which classes have some, (G, K).
    """
    features = at_least_float32(features)
    weights = torch.where(reliable, 1.0 / _norm(features), 0.0)
    sums, counts = [], []
    for group in labels.unbind(1):
        members = torch.stack([(group == k) & reliable for k in range(num_classes)], dim=1).flatten(2)
        weighted = members * weights.flatten(1)[:, None]
        # Sums over millions of voxels overflow float16.
        with without_autocast(features.device):
            sums.append(torch.einsum("bkn,bcn->kc", weighted, features.flatten(2)))
        counts.append(members.sum((0, 2)))
    count = torch.stack(counts)
    return torch.stack(sums) / count.clamp_min(1)[..., None], count > 0


def draw_voxels(candidates: Tensor, number: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw voxels at random, without replacement and without asking the device how many there are.

    Args:
        candidates: (B, *S), boolean: what may be drawn.
        number: How many at most.
        generator: Draws on its own device; the default generator of the candidates' device if absent.

    Returns:
        Positions in the flattened (B * S), (N,), and whether each is a candidate (fewer may exist than are asked for).
    """
    flat = candidates.flatten()
    device = flat.device if generator is None else generator.device
    keys = torch.rand(flat.numel(), generator=generator, device=device).to(flat.device)
    keys, positions = torch.where(flat, keys, -1.0).topk(min(number, flat.numel()), sorted=False)
    return positions, keys >= 0


def contrastive_loss(
    features: Tensor,
    labels: Tensor,
    reliable: Tensor,
    uncertain: Tensor,
    table: Tensor,
    num_points: int,
    margin: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pull uncertain voxels to the prototype of their class, and push prototypes apart to a margin.

    With unit features f of uncertain voxels i, and prototypes c (``class_prototypes``): the mean over i of
    w_y(i) |f_i - c_y(i)|^2, plus the mean over pairs of classes of max(0, margin - |c_j - c_k|)^2, both averaged over
    groups of exclusive classes. A class without reliable voxels has no prototype and is left out. Gradient flows into
    the features, through voxels and prototypes alike.

    After Lu et al., "Semi-supervised medical image segmentation via dual networks" (2025), for any number of classes.

    Args:
        features: (B, C, *S), of the network that learns.
        labels: (B, G, *S), true or pseudo-labels.
        reliable: (B, *S), boolean: voxels that form prototypes.
        uncertain: (B, *S), boolean: voxels that are pulled; what is neither does not count.
        table: Weights w of the labels of pulled voxels, (G, K).
        num_points: How many uncertain voxels are drawn at most.
        margin: In units of the unit sphere's radius, at most 2.
        generator: Draws the voxels.

    Returns:
        Scalar.
    """
    prototypes, present = class_prototypes(features, labels, reliable, table.shape[1])
    positions, valid = draw_voxels(uncertain, num_points, generator)
    voxels = features[0, 0].numel()
    batch, place = positions.div(voxels, rounding_mode="floor"), positions % voxels
    points = at_least_float32(features.flatten(2)[batch, :, place])
    points = points / _norm(points)[:, None]
    pulls, pushes = [], []
    for group, (centers, exists) in enumerate(zip(prototypes, present)):
        own = labels[:, group].flatten(1)[batch, place]
        pulled = valid & exists[own]
        distance = table[group][own] * (points - centers[own]).square().sum(1)
        pulls.append(torch.where(pulled, distance, 0.0).sum() / pulled.sum().clamp_min(1))
        pushes.append(_push_apart(centers, exists, margin))
    return torch.stack(pulls).mean() + torch.stack(pushes).mean()


def _push_apart(centers: Tensor, exists: Tensor, margin: float) -> Tensor:
    first, second = torch.triu_indices(len(centers), len(centers), offset=1, device=centers.device)
    both = exists[first] & exists[second]
    squared = (centers[first] - centers[second]).square().sum(1)
    # The root has no gradient at 0, where two prototypes coincide.
    shortfall = (margin - (squared + _TINY**2).sqrt()).clamp_min(0.0)
    return torch.where(both, shortfall.square(), 0.0).sum() / both.sum().clamp_min(1)


def _norm(features: Tensor) -> Tensor:
    """L2 norm along axis 1, never 0."""
    return features.square().sum(1).clamp_min(_TINY**2).sqrt()

"""Views on what networks predict and on targets, in float32 whatever autocast does around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ssl.runtime.precision import at_least_float32


def probabilities(logits: Tensor, has_regions: bool) -> Tensor:
    """Network output to probabilities, in float32.

    Args:
        logits: (B, K, *S).
        has_regions: Whether channels are overlapping regions (sigmoid) rather than exclusive classes (softmax).

    Returns:
        (B, K, *S).
    """
    logits = at_least_float32(logits)
    return torch.sigmoid(logits) if has_regions else torch.softmax(logits, dim=1)


def target_maps(
    target: Tensor, num_channels: int, has_regions: bool, ignore_label: int | None
) -> tuple[Tensor, Tensor | None]:
    """nnU-Net's targets as maps that compare with probabilities.

    Args:
        target: Label map (B, 1, *S) or, with regions, channels (B, R, *S), the ignored voxels being a last one.
        num_channels: K, the network's output channels.
        has_regions: Whether channels are overlapping regions.
        ignore_label: nnU-Net's ignore label, if the data set has one.

    Returns:
        0/1 maps (B, K, *S) in float32, and the mask (B, 1, *S) of voxels that are not ignored; None if all count.
    """
    if has_regions:
        if ignore_label is None:
            return target.float(), None
        return target[:, :-1].float(), ~target[:, -1:].bool()
    labels, mask = target.long(), None
    if ignore_label is not None:
        mask = labels != ignore_label
        labels = torch.where(mask, labels, 0)
    maps = torch.zeros((len(labels), num_channels, *labels.shape[2:]), device=labels.device)
    return maps.scatter_(1, labels, 1.0), mask


def grouped_labels(target: Tensor, has_regions: bool, ignore_label: int | None) -> tuple[Tensor, Tensor]:
    """nnU-Net's targets as labels in groups of exclusive classes, as ``log_probabilities`` has them.

    Args:
        target: Label map (B, 1, *S) or, with regions, channels (B, R, *S), the ignored voxels being a last one.
        has_regions: Whether channels are overlapping regions.
        ignore_label: nnU-Net's ignore label, if the data set has one.

    Returns:
        Labels (B, G, *S), whole numbers, 0 in ignored voxels, and which voxels are annotated, boolean (B, *S).
    """
    if ignore_label is None:
        labels, annotated = target.long(), torch.ones_like(target[:, 0], dtype=torch.bool)
    elif has_regions:
        labels, annotated = target[:, :-1].long(), ~target[:, -1].bool()
    else:
        labels, annotated = target.long(), target[:, 0] != ignore_label
    return torch.where(annotated[:, None], labels, 0), annotated


def log_probabilities(logits: Tensor, has_regions: bool, temperature: float = 1.0) -> Tensor:
    """Logarithms of probabilities in groups of exclusive classes, in float32.

    The softmax over K classes is one group of K; K regions are K groups of two, absent and present. So every loss
    below is written once for both.

    Args:
        logits: (B, C, *S).
        has_regions: Whether channels are overlapping regions.
        temperature: Divides the logits; below 1 sharpens.

    Returns:
        (B, G, K, *S): G = 1, K = C for classes; G = C, K = 2 for regions.
    """
    scaled = at_least_float32(logits) / temperature
    if has_regions:
        return torch.stack([functional.logsigmoid(-scaled), functional.logsigmoid(scaled)], dim=2)
    return functional.log_softmax(scaled, dim=1)[:, None]


# A logit that stands for "never": its probability is 0 in float32, and nothing becomes infinite.
_NEVER = -1e4


def without_structures(logits: Tensor, structures: Sequence[int], has_regions: bool) -> Tensor:
    """Predictions that do not tell some structures from the background.

    The background's probability becomes that of "background or one of these", the marginal of Shi et al., "Marginal
    loss and exclusion loss for partially supervised multi-organ segmentation" (Medical Image Analysis 70, 2021).

    Args:
        logits: (B, K, *S).
        structures: Numbers of classes, the first after the background being 0, or of regions.
        has_regions: Whether channels are overlapping regions: then these keep their values and get no gradient.

    Returns:
        (B, K, *S), in float32 where there are such structures: they have no probability, or no gradient.
    """
    if not structures:
        return logits
    channels = list(logits.unbind(1))
    if has_regions:
        for structure in structures:
            channels[structure] = channels[structure].detach()
        return torch.stack(channels, 1)
    channels = [at_least_float32(channel) for channel in channels]
    merged = [0, *(structure + 1 for structure in structures)]
    background = torch.stack([channels[channel] for channel in merged], 1).logsumexp(1)
    for channel in merged:
        channels[channel] = torch.full_like(background, _NEVER)
    channels[0] = background
    return torch.stack(channels, 1)


def likeliest(values: Tensor, dim: int = 1) -> Tensor:
    """Where the largest value along an axis is, the first of equals: the axis is gone. Without gradient."""
    # As argmax, which PyTorch computes several times slower on a CPU, where the axis is not the last one.
    return values.detach().max(dim).indices


def hard_labels(logits: Tensor, like: Tensor, has_regions: bool) -> Tensor:
    """Predictions in the form of nnU-Net's targets, without gradient; no voxel is ignored.

    Args:
        logits: (B, K, *S).
        like: A target, (., 1, *S) or region channels (., R, *S), which have one more channel, of ignored voxels, where
            there is an ignore label. Gives type and channels.
        has_regions: Whether channels are overlapping regions.

    Returns:
        Label map (B, 1, *S) or region channels (B, R, *S), of the target's type.
    """
    if not has_regions:
        return likeliest(logits)[:, None].to(like.dtype)
    regions = (logits.detach() > 0).to(like.dtype)
    further = like.shape[1] - regions.shape[1]
    return torch.cat([regions, regions.new_zeros(len(regions), further, *regions.shape[2:])], 1) if further else regions


def consistent_regions(
    maps: Tensor, regions: Sequence[tuple[int, ...]], order: Sequence[int], left_out: Sequence[int] = ()
) -> Tensor:
    """Regions that fit one label map: of those found one by one, an inner one may lie outside of the outer one.

    A label map is painted as nnU-Net exports predictions, region by region, the later above, and read again.

    Args:
        maps: Boolean (B, R, *S), or of 0 and 1.
        regions: The labels of each region.
        order: With which label each region paints, nnU-Net's ``regions_class_order``.
        left_out: Numbers of regions that do not paint.

    Returns:
        Of the type and shape of ``maps``.
    """
    painted = torch.zeros_like(maps[:, 0], dtype=torch.int16)
    for region, label in enumerate(order):
        if region not in left_out:
            painted = torch.where(maps[:, region] > 0, label, painted)
    read = [torch.stack([painted == label for label in labels]).any(0) for labels in regions]
    return torch.stack(read, 1).to(maps.dtype)


def label_map(logits: Tensor, has_regions: bool) -> Tensor:
    """Labels (B, *S) of logits (B, K, *S), to be looked at; of regions, a number for each combination that holds."""
    if not has_regions:
        return likeliest(logits)
    powers = 2 ** torch.arange(logits.shape[1], device=logits.device)
    return torch.einsum("bk...,k->b...", (logits > 0).long(), powers)


def downsample_target(target: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Targets at the resolutions of deep supervision, as nnU-Net's loader would have made them.

    Args:
        target: (B, 1, *S) labels or (B, R, *S) region channels, any type.
        shapes: Spatial shapes, the full one included where wanted.

    Returns:
        A target of the same type per shape, sampled by nearest neighbor.
    """
    as_float: Tensor | None = None
    targets = []
    for shape in shapes:
        if tuple(shape) == tuple(target.shape[2:]):
            targets.append(target)
            continue
        as_float = target.float() if as_float is None else as_float
        targets.append(functional.interpolate(as_float, shape, mode="nearest-exact").to(target.dtype))
    return targets

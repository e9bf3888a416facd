"""Losses: pure functions on tensors, in float32 whatever autocast does around them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ssl.runtime.precision import at_least_float32

# Added to numerator and denominator: a class absent from both sides counts as fully agreed, not as 0 / 0.
SMOOTH = 1.0


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


def soft_iou_loss(first: Tensor, second: Tensor, mask: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """1 - mean over images and classes of sum(p q) / sum(p + q - p q).

    The loss of Bortsova et al. (MICCAI 2019), used there both against labels and between the two branches. All
    channels count, the background too. Symmetric in its two arguments, and gradient flows into both.

    Args:
        first: Probabilities p (B, K, *S).
        second: Probabilities or a one-hot map q (B, K, *S).
        mask: (B, 1, *S), boolean or 0/1; voxels at 0 do not count. All count if absent.
        counted: (B, K), boolean; the classes of each image over which its mean is taken; an image in which none counts
            adds 0 to the mean over images. All count if absent.

    Returns:
        Scalar in [0, 1].
    """
    overlap = first * second
    union = first + second - overlap
    if mask is not None:
        # Selected, not multiplied: 0 * inf of an excluded voxel would be NaN.
        keep = mask.bool()
        overlap = torch.where(keep, overlap, 0.0)
        union = torch.where(keep, union, 0.0)
    axes = list(range(2, first.ndim))
    loss = 1.0 - (overlap.sum(axes) + SMOOTH) / (union.sum(axes) + SMOOTH)
    if counted is None:
        return loss.mean()
    # A mean per image first: an image weighs the same whatever the others show, also where those are on other devices.
    return (torch.where(counted, loss, 0.0).sum(1) / counted.sum(1).clamp_min(1)).mean()


@torch.no_grad()
def found_classes(probability: Tensor, has_regions: bool, mask: Tensor | None = None) -> Tensor:
    """Which classes a prediction has anywhere in each image, without gradient; nothing is handed to the host.

    Args:
        probability: (B, K, *S).
        has_regions: Whether channels are overlapping regions, found above one half, instead of exclusive classes, found
            where no other is likelier.
        mask: (B, 1, *S), boolean; voxels that count. All count if absent.

    Returns:
        (B, K), boolean.
    """
    # The largest value and not its index, which takes longer to find. NaN counts as found, so that it is not hidden.
    found = ~(probability <= 0.5 if has_regions else probability < probability.amax(1, keepdim=True))
    return (found if mask is None else found & mask).flatten(2).any(2)


def soft_dice_loss(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - mean over channels of 2 sum(p q) / sum(p + q), summed over the batch.

    Args:
        first: Probabilities (B, K, *S).
        second: A one-hot map (B, K, *S).
        mask: (B, 1, *S), boolean; voxels that count.

    Returns:
        Scalar in [0, 1].
    """
    overlap, total = first * second, first + second
    if mask is not None:
        overlap, total = (torch.where(mask, t, 0.0) for t in (overlap, total))
    axes = [0, *range(2, first.ndim)]
    return 1.0 - ((2 * overlap.sum(axes) + SMOOTH) / (total.sum(axes) + SMOOTH)).mean()


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


def label_map(logits: Tensor, has_regions: bool) -> Tensor:
    """Labels (B, *S) of logits (B, K, *S), to be looked at; of regions, a number for each combination that holds."""
    if not has_regions:
        return likeliest(logits)
    powers = 2 ** torch.arange(logits.shape[1], device=logits.device)
    return torch.einsum("bk...,k->b...", (logits > 0).long(), powers)


def entropy(log_p: Tensor) -> Tensor:
    """Shannon entropy in nats, the mean over groups: (B, G, K, *S) to (B, *S)."""
    return -(log_p.exp() * log_p).sum(2).mean(1)


def upper_threshold(values: Tensor, fraction: float) -> Tensor:
    """The smallest value that at least this fraction of the values does not exceed: an empirical quantile.

    Without interpolation (numpy's method "inverted_cdf"), so that it is one of the values; on the device, for tensors
    of any size (torch.quantile stops at 2^24 in many versions).

    Args:
        values: Any shape, not empty.
        fraction: In [0, 1].

    Returns:
        Scalar tensor.
    """
    flat = values.flatten()
    rank = min(max(math.ceil(fraction * flat.numel()), 1), flat.numel())
    # The larger values are fewer than the smaller ones, and topk works in parallel where kthvalue does not.
    return flat.topk(flat.numel() - rank + 1, sorted=False).values.min()


def pseudo_label_cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against pseudo-labels, voxel by voxel: the mean over groups.

    Args:
        log_p: (B, G, K, *S).
        labels: (B, G, *S), whole numbers below K.

    Returns:
        (B, *S).
    """
    return -log_p.gather(2, labels[:, :, None])[:, :, 0].mean(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the voxels where the mask is true; 0 where there is none, with a gradient of 0."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def cosine_distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - cos(p, q) along the class axis, voxel by voxel; the classes of all groups form one vector.

    Args:
        log_p: (B, G, K, *S).
        log_q: Of the same shape.

    Returns:
        (B, *S), in [0, 1].
    """
    return 1.0 - functional.cosine_similarity(log_p.exp().flatten(1, 2), log_q.exp().flatten(1, 2), dim=1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, voxel by voxel: the mean over groups; (B, G, K, *S) twice to (B, *S)."""
    return (log_p.exp() * (log_p - log_q)).sum(2).mean(1)


class SoftIoULoss(nn.Module):
    """``soft_iou_loss`` of logits against nnU-Net's targets: label maps or region channels, with ignore label.

    Args:
        has_regions: Whether the target holds one channel per region (with the ignored voxels as a last channel where
            there is an ignore label) rather than a label map.
        ignore_label: nnU-Net's ignore label, if the data set has one.
    """

    def __init__(self, has_regions: bool, ignore_label: int | None) -> None:
        super().__init__()
        self.has_regions = has_regions
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (B, K, *S) against target (B, 1, *S) or region channels (B, R, *S)."""
        predicted = probabilities(logits, self.has_regions)
        truth, mask = target_maps(target, predicted.shape[1], self.has_regions, self.ignore_label)
        return soft_iou_loss(predicted, truth.to(predicted.dtype), mask)


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

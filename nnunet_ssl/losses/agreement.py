"""How sure predictions are, and how well two of them agree; in float32 whatever autocast does around."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


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


def squared_distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of (p - q)^2 over a group's classes, the mean over groups: (B, G, K, *S) twice to (B, *S).

    In [0, 1], whatever the number of classes: the usual mean over classes makes the term vanish with many. Of two
    classes both are the same.
    """
    return (log_p.exp() - log_q.exp()).square().sum(2).mean(1) / 2


def normalized_entropy(log_p: Tensor) -> Tensor:
    """``entropy`` as a share of the largest possible, in [0, 1]: (B, G, K, *S) to (B, *S)."""
    return entropy(log_p) / math.log(log_p.shape[2])


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, voxel by voxel: the mean over groups; (B, G, K, *S) twice to (B, *S)."""
    return (log_p.exp() * (log_p - log_q)).sum(2).mean(1)


def tempered_by_doubt(loss: Tensor, doubt: Tensor) -> Tensor:
    """exp(-doubt) loss + doubt, voxel by voxel: a loss counts less where there is doubt, and doubt costs something.

    With doubt = KL(teacher || student), as in Lu et al., "Semi-supervised medical image segmentation via dual networks"
    (2025). Gradient flows through both: as a function of the student, the whole is least where it is the teacher.

    Args:
        loss: Not negative, (B, *S).
        doubt: Not negative, of the same shape.
    """
    return torch.exp(-doubt) * loss + doubt

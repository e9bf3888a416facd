"""nnU-Net's loss over the voxels that count, put together anew in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, log_expit, log_softmax
from torch import Tensor


def arrays(outputs: Sequence[Tensor]) -> list[np.ndarray]:
    """Logits at all resolutions, in float64."""
    return [o.detach().numpy().astype(np.float64) for o in outputs]


def reference_loss(
    logits: Sequence[np.ndarray],
    target: np.ndarray,
    counted: np.ndarray,
    has_regions: bool = False,
    ignore_label: int | None = None,
) -> float:
    """Cross-entropy minus Dice plus 1 where nothing counts, weighed 4:2:..:0 over the resolutions.

    Args:
        logits: (B, K, *S) by falling resolution.
        target: (B, 1, *S) labels or (B, K, *S) regions; what does not count may hold anything.
        counted: (B, 1, *S).
        has_regions: Whether channels are regions.
        ignore_label: Of the data set; where it has one, nnU-Net adds the cross-entropy of regions up.
    """
    factors = np.array([1 / 2**i for i in range(len(logits))])
    if len(logits) > 1:
        factors[-1] = 0
    total = 0.0
    for factor, z in zip(factors / factors.sum(), logits):
        step = [round(a / b) for a, b in zip(target.shape[2:], z.shape[2:])]
        # Nearest-exact sampling reads the voxel in the middle.
        index = np.ix_(*[np.arange(n) * s + s // 2 for n, s in zip(z.shape[2:], step)])
        y, mask = (values[(slice(None), slice(None), *index)] for values in (target, counted))
        summed = z.shape[1] if has_regions and ignore_label is not None else 1
        total += factor * _at_one_resolution(z, y, mask.astype(bool), has_regions, summed)
    return float(total)


def _at_one_resolution(z: np.ndarray, y: np.ndarray, mask: np.ndarray, has_regions: bool, times: int) -> float:
    if has_regions:
        p, truth = expit(z), y.astype(float)
        log_loss = -(truth * log_expit(z) + (1 - truth) * log_expit(-z)).mean(1)
    else:
        log_p = log_softmax(z, axis=1)
        labels = np.where(mask, y, 0).astype(int)
        truth = np.stack([labels[:, 0] == k for k in range(z.shape[1])], 1).astype(float)
        log_loss = -(truth * log_p).sum(1)
        p, truth = np.exp(log_p[:, 1:]), truth[:, 1:]
    cross_entropy = log_loss[mask[:, 0]].sum() / max(1, mask.sum())
    # The tiny plans take the Dice of a batch in 2D, and of every image in 3D.
    axes = (0, 2, 3) if z.ndim == 4 else (2, 3, 4)
    overlap, predicted, true = ((part * mask).sum(axes) for part in (p * truth, p, truth))
    dice = ((2 * overlap + 1e-5) / (predicted + true + 1e-5)).mean()
    return times * cross_entropy - dice + (not mask.any())

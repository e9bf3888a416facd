"""Strong changes of intensity, on the device of the images: what a student sees and its teacher does not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ssl.runtime.precision import without_autocast

# Sigmas of the blur, in voxels of every axis, and how many of them a kernel reaches to either side.
_BLUR, _REACH = (0.5, 1.5), 2.0


def strong_intensities(
    images: Tensor,
    strength: float,
    generator: torch.Generator,
    probability: float = 0.8,
    num_channels: int | None = None,
) -> Tensor:
    """Contrast, brightness, gamma and blur, drawn anew for every image and channel; nothing moves.

    As color jitter and blur for photographs in FixMatch and UniMatch (Sohn et al. 2020, Yang et al. 2023), for
    normalized images without a known range. nnU-Net's own augmentation leaves a third of the patches unchanged. What is
    exactly 0, where images are normalized inside a mask, stays 0.

    Args:
        images: (B, C, *S), in standard deviations.
        strength: 1 for contrast between 0.5 and 1.5, a shift of up to half a standard deviation, gamma between 0.5 and
            2, and a blur of 0.5 to 1.5 voxels; 0 for none of it.
        generator: Draws on its own device.
        probability: That an image's channel is changed at all; blur has half of it.
        num_channels: How many channels are images, the first ones; all if absent. Others, such as a previous stage's
            segmentation, stay.

    Returns:
        (B, C, *S), of the same type.
    """
    count = images.shape[1] if num_channels is None else num_channels
    if strength <= 0 or count == 0:
        return images
    pictures = images[:, :count]
    spread = (images.shape[0], count, *[1] * (images.ndim - 2))

    def draw() -> Tensor:
        return torch.rand(spread, generator=generator, device=generator.device).to(images.device, images.dtype)

    axes = list(range(2, images.ndim))
    mean, lowest, highest = pictures.mean(axes, True), pictures.amin(axes, True), pictures.amax(axes, True)
    contrast = 1.0 + strength * (draw() - 0.5)
    shift = strength * (draw() - 0.5)
    gamma = 2.0 ** (strength * (2.0 * draw() - 1.0))
    span = (highest - lowest).clamp_min(1e-6)
    changed = ((pictures - lowest) / span).clamp_min(0.0) ** gamma * span + lowest
    changed = (changed - mean) * contrast + mean + shift
    changed = torch.where(draw() < probability / 2, _blur(changed, draw(), strength), changed)
    changed = torch.where((draw() < probability) & (pictures != 0), changed, pictures)
    return changed if count == images.shape[1] else torch.cat([changed, images[:, count:]], 1)


def with_noise(images: Tensor, std: float, generator: torch.Generator, num_channels: int | None = None) -> Tensor:
    """Gaussian noise, cut off at twice its standard deviation, as mean teachers for segmentation add it.

    Args:
        images: (B, C, *S), in standard deviations.
        std: Of the noise, before it is cut off; 0 for none.
        generator: Draws on its own device.
        num_channels: How many channels are images, the first ones; all if absent.
    """
    if std <= 0:
        return images
    noise = torch.randn(images.shape, generator=generator, device=generator.device).clamp(-2.0, 2.0)
    noise[:, images.shape[1] if num_channels is None else num_channels :] = 0.0
    return images + std * noise.to(images.device, images.dtype)


def _blur(images: Tensor, amount: Tensor, strength: float) -> Tensor:
    """A Gaussian per image and channel, axis by axis; ``amount`` (B, C, 1, ...) in [0, 1]."""
    batch, channels = images.shape[:2]
    lowest, highest = _BLUR
    sigma = strength * (lowest + (highest - lowest) * amount.reshape(-1, 1)).float()
    reach = max(1, round(_REACH * strength * highest))
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).to(images.dtype)
    dims = images.ndim - 2
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    flat = images.reshape(1, batch * channels, *images.shape[2:])
    for axis in range(dims):
        shape = [batch * channels, 1, *[2 * reach + 1 if a == axis else 1 for a in range(dims)]]
        # Pairs of the last axis first.
        margins = [reach if a == axis else 0 for a in reversed(range(dims)) for _ in range(2)]
        padded = functional.pad(flat, margins, mode="replicate")
        # Not in the half precision of what may be around: images keep their digits.
        with without_autocast(images.device):
            flat = convolve(padded, kernels.reshape(shape), groups=batch * channels)
    return flat.reshape(images.shape)

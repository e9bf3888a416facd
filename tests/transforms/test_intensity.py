"""Strong changes of intensity and noise, against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from nnunet_ssl.transforms.intensity import strong_intensities, with_noise

SHAPES = {"2d": (12, 10), "3d": (6, 8, 7), "thin": (1, 9, 8)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(shape: tuple[int, ...], batch: int = 4, channels: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *shape, generator=generator(5))


def by_scipy(images: np.ndarray, strength: float, probability: float, seed: int) -> np.ndarray:
    source = generator(seed)
    spread = (*images.shape[:2], *[1] * (images.ndim - 2))
    contrast, shift, gamma, blurred, sigma, changed = (
        torch.rand(spread, generator=source).double().numpy().reshape(images.shape[:2]) for _ in range(6)
    )
    out = images.copy()
    for b, c in np.ndindex(images.shape[:2]):
        if changed[b, c] >= probability:
            continue
        x = images[b, c]
        span = x.max() - x.min()
        y = ((x - x.min()) / span) ** (2.0 ** (strength * (2 * gamma[b, c] - 1))) * span + x.min()
        y = (y - x.mean()) * (1 + strength * (contrast[b, c] - 0.5)) + x.mean() + strength * (shift[b, c] - 0.5)
        if blurred[b, c] < probability / 2:
            for axis in range(x.ndim):
                y = gaussian_filter1d(
                    y, strength * (0.5 + sigma[b, c]), axis, mode="nearest", radius=max(1, round(3 * strength))
                )
        out[b, c] = np.where(x != 0, y, x)
    return out


@pytest.mark.parametrize("probability", [0.8, 1.0])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_strong_intensities_equal_scipy(shape, strength, probability):
    images = pictures(shape).double()
    images[0, 0].flatten()[:5] = 0.0
    found = strong_intensities(images, strength, generator(3), probability)
    expected = by_scipy(images.numpy(), strength, probability, 3)
    assert found.dtype == images.dtype
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert (found != images).any()


def test_every_image_and_channel_is_changed_by_itself_and_so_often():
    images = pictures((6, 6), 1, 1).expand(300, 2, 6, 6)
    found = strong_intensities(images, 1.0, generator())
    changed = (found != images).flatten(2).any(2)
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.05)
    assert len(found.flatten(2).flatten(0, 1).unique(dim=0)) > 400


def test_nothing_moves_and_outside_the_mask_stays_zero():
    images = torch.zeros(8, 1, 16, 16)
    images[:, :, 4:12, 4:12] = pictures((8, 8), 8, 1) + 3
    found = strong_intensities(images, 1.0, generator(), probability=1.0)
    assert torch.equal(found == 0, images == 0)
    # The order of brightness stays, but for the blur.
    unblurred = [i for i in range(8) if torch.equal(found[i].flatten().argsort(), images[i].flatten().argsort())]
    assert len(unblurred) >= 2


def test_channels_of_a_previous_stage_are_never_changed():
    images = torch.cat([pictures((8, 8), 4, 1), torch.randint(0, 2, (4, 2, 8, 8)).float()], 1)
    for found in (strong_intensities(images, 1.0, generator(), 1.0, num_channels=1),
                  with_noise(images, 0.3, generator(), num_channels=1)):  # fmt: skip
        assert torch.equal(found[:, 1:], images[:, 1:])
        assert not torch.equal(found[:, :1], images[:, :1])


@pytest.mark.parametrize("change", [lambda x, g: strong_intensities(x, 0.0, g), lambda x, g: with_noise(x, 0.0, g)])
def test_strength_zero_changes_and_draws_nothing(change):
    source, images = generator(), pictures((6, 6))
    assert torch.equal(change(images, source), images)
    assert torch.equal(torch.rand(3, generator=source), torch.rand(3, generator=generator()))


@pytest.mark.parametrize("value", [0.0, 7.0, 1e4])
def test_constant_and_huge_images_stay_finite(value):
    images = torch.full((3, 1, 8, 8), value)
    images[1, 0, 2, 2] = -1e6
    assert torch.isfinite(strong_intensities(images, 1.0, generator(), 1.0)).all()


def test_blur_keeps_its_digits_under_autocast():
    images = pictures((8, 8)) + 100
    plain = strong_intensities(images, 1.0, generator(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(strong_intensities(images, 1.0, generator(), 1.0), plain)


def test_noise_is_gaussian_and_cut_off_at_twice_its_deviation():
    images = pictures((64, 64), 8, 1)
    noise = (with_noise(images, 0.1, generator()) - images).flatten().double().numpy()
    expected = 0.1 * np.clip(np.random.default_rng(0).normal(size=200_000), -2, 2)
    assert np.abs(noise).max() <= 0.2 + 1e-5
    assert noise.std() == pytest.approx(expected.std(), rel=0.03)
    assert noise.mean() == pytest.approx(0, abs=0.003)
    assert (np.abs(noise) > 0.1999).mean() == pytest.approx(0.0455, abs=0.006)

"""Seeded synthetic images that look like chest radiographs, as an nnU-Net raw data set.

Every case is drawn anew from a parametric chest: shapes, pose, contrast, ribs and noise vary, so that a few labeled
cases do not cover them. No real image is involved.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

LABELS = {"background": 0, "lung": 1, "heart": 2, "clavicle": 3}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many cases to make, and their side in pixels."""

    labeled: int = 5
    unlabeled: int = 60
    test: int = 20
    side: int = 96


def write_dataset(folder: Path, sizes: Sizes, seed: int = 0) -> None:
    """Write imagesTr, labelsTr, imagesUn, imagesTs, labelsTs and dataset.json.

    Args:
        folder: ``Dataset<number>_<name>`` in nnU-Net's raw folder; made if missing.
        sizes: Numbers of cases.
        seed: The same seed makes the same images.
    """
    rng = np.random.default_rng(seed)
    for name in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    parts = (("Tr", sizes.labeled, True), ("Un", sizes.unlabeled, False), ("Ts", sizes.test, True))
    number = 0
    for part, count, with_labels in parts:
        for _ in range(count):
            image, labels = draw_case(rng, sizes.side)
            name = f"chest_{number:04d}"
            number += 1
            Image.fromarray(image).save(folder / f"images{part}" / f"{name}_0000.png")
            if with_labels:
                Image.fromarray(labels).save(folder / f"labels{part}" / f"{name}.png")
    description = {
        "channel_names": {"0": "radiograph"},
        "labels": LABELS,
        "numTraining": sizes.labeled,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def draw_case(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One image and its labels, both (side, side) uint8.

    Args:
        rng: Source of everything that varies.
        side: In pixels.
    """
    y, x = _posed_grid(rng, side)
    body = _ellipse(y, x, 0.15, 0.0, 1.15 * rng.uniform(0.9, 1.05), 0.92 * rng.uniform(0.88, 1.05))
    lungs = _lung(rng, y, x, -1) | _lung(rng, y, x, 1)
    heart = _ellipse(
        y, x, 0.28 + rng.normal(0, 0.05), 0.12 + rng.normal(0, 0.05), rng.uniform(0.24, 0.36), rng.uniform(0.2, 0.34)
    )
    heart &= y < 0.55
    clavicles = _clavicle(rng, y, x, -1) | _clavicle(rng, y, x, 1)

    labels = np.zeros((side, side), np.uint8)
    labels[lungs & body] = LABELS["lung"]
    labels[heart] = LABELS["heart"]
    labels[clavicles] = LABELS["clavicle"]

    image = 0.1 + 0.5 * body
    image -= rng.uniform(0.18, 0.34) * lungs
    image += rng.uniform(0.08, 0.2) * heart
    image += rng.uniform(0.06, 0.14) * clavicles
    image += rng.uniform(0.05, 0.16) * np.exp(-((x / 0.09) ** 2)) * body  # spine
    image += _ribs(rng, y, x) * body
    image = gaussian_filter(image, rng.uniform(0.5, 1.2) * side / 96)
    image += rng.uniform(-0.12, 0.12) * x + rng.uniform(-0.12, 0.12) * y  # uneven exposure
    image += gaussian_filter(rng.normal(size=image.shape), side / 16) * rng.uniform(0.1, 0.6)
    image = np.clip(image, 0.01, 0.99) ** rng.uniform(0.7, 1.4)
    image += rng.normal(0, rng.uniform(0.01, 0.04), image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels


def _posed_grid(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in [-1, 1], rotated, scaled and shifted a little."""
    axis = np.linspace(-1, 1, side)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    angle = rng.normal(0, 0.06)
    scale_y, scale_x = rng.uniform(0.9, 1.15, 2)
    y, x = y - rng.normal(0, 0.06), x - rng.normal(0, 0.06)
    return (np.cos(angle) * y - np.sin(angle) * x) * scale_y, (np.sin(angle) * y + np.cos(angle) * x) * scale_x


def _ellipse(y: np.ndarray, x: np.ndarray, cy: float, cx: float, ry: float, rx: float) -> np.ndarray:
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1


def _lung(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, sign: int) -> np.ndarray:
    """Narrow at the top, wide below, cut by a curved diaphragm."""
    cy, cx = rng.normal(-0.02, 0.04), sign * (0.42 + rng.normal(0, 0.03))
    height, width = rng.uniform(0.55, 0.72), rng.uniform(0.22, 0.32)
    narrowing = 1 + 0.45 * np.clip((cy - y) / height, -0.3, 1)
    outline = ((y - cy) / height) ** 2 + np.abs((x - cx - 0.1 * sign * (y - cy)) / width * narrowing) ** 2.4 < 1
    diaphragm = 0.42 + rng.normal(0, 0.04) + 0.9 * (x - cx) ** 2
    return outline & (y < diaphragm)


def _clavicle(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, sign: int) -> np.ndarray:
    """A thin, slightly bent bar from the middle outwards."""
    along = sign * x
    slope, bend = rng.normal(-0.22, 0.08), rng.normal(0.3, 0.1)
    center = -0.46 + rng.normal(0, 0.04) + slope * (along - 0.12) + bend * (along - 0.35) ** 2
    return (np.abs(y - center) < rng.uniform(0.03, 0.045)) & (along > 0.1) & (along < rng.uniform(0.55, 0.7))


def _ribs(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    phase, frequency = rng.uniform(0, 2 * np.pi), rng.uniform(16, 22)
    waves = np.sin(frequency * (y + rng.uniform(0.2, 0.4) * x**2) + phase)
    return rng.uniform(0.03, 0.09) * np.clip(waves, 0, 1) * (np.abs(x) > 0.12)

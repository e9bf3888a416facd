#!/usr/bin/env python
"""Draw what the contrastive term does to a toy feature space.

Three classes of unit vectors in space that overlap at first; half of the points are reliable and make the prototypes,
the other half is uncertain and pulled to them.

    python scripts/pictures/contrastive.py --out docs/pictures/contrastive.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

from nnunet_ssl.losses.contrastive import class_prototypes, contrastive_loss

matplotlib.use("agg")
from matplotlib import pyplot

POINTS, CLASSES, MARGIN, STEPS = 120, 3, 1.0, 300
COLORS = ("tab:blue", "tab:orange", "tab:green")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    return parser.parse_args()


def main() -> None:
    target = parse_arguments().out
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(POINTS).view(1, 1, 1, -1)
    angles = 0.25 * labels[0, 0, 0] + 0.15 * torch.randn(CLASSES * POINTS, generator=generator)
    features = torch.stack([angles.cos(), angles.sin()]).view(1, 2, 1, -1).clone().requires_grad_()
    reliable = (torch.arange(CLASSES * POINTS) % 2 == 0).view(1, 1, -1)
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4))
    draw(panels[0], "before", features, labels, reliable)
    optimizer = torch.optim.SGD([features], lr=5.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = contrastive_loss(features, labels, reliable, ~reliable, torch.ones(1, CLASSES), 64, MARGIN, generator)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    draw(panels[1], f"after {STEPS} steps", features, labels, reliable)
    panels[2].plot(losses)
    panels[2].set(title="contrastive term", xlabel="step", ylim=0)
    figure.suptitle("three classes of unit vectors: reliable o, uncertain x, prototype *")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)
    print(f"Written to {target}")


def draw(axes, title: str, features: torch.Tensor, labels: torch.Tensor, reliable: torch.Tensor) -> None:
    centers, _ = class_prototypes(features.detach(), labels, reliable, CLASSES)
    unit = torch.nn.functional.normalize(features.detach(), dim=1)[0, :, 0]
    # Slightly different radii, so that points of one direction can be told apart.
    unit = unit * (1 + 0.1 * torch.rand(unit.shape[1], generator=torch.Generator().manual_seed(1)))
    for k, color in enumerate(COLORS):
        for sure, marker in ((True, "o"), (False, "x")):
            chosen = (labels[0, 0, 0] == k) & (reliable[0, 0] == sure)
            axes.scatter(*unit[:, chosen], c=color, marker=marker, s=20, alpha=0.6, linewidth=1)
        axes.scatter(*centers[0, k], c=color, marker="*", s=250, edgecolor="black")
    axes.set(title=title, xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")


if __name__ == "__main__":
    main()

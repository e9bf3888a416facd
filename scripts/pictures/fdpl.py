#!/usr/bin/env python
"""Draw what FDPL learns from: the crops of an image, their pseudo-labels, and a mixed pair.

Takes a model that nnUNetTrainerFDPL trained and two images of its data set. The picture for the documentation comes
from the demo's data:

    python scripts/pictures/fdpl.py --model RESULTS/nnUNetTrainerFDPL__PLANS__2d --fold 0 --images A.png B.png \
        --out docs/pictures/fixed_dynamic.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_ssl.transforms.mixing import compose_pseudo_labels, cutmix_boxes, mix, shifted_crop

matplotlib.use("agg")
from matplotlib import pyplot

NUM_COLORS = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("--fold", required=True)
    parser.add_argument("--images", type=Path, nargs=2, required=True, help="two raw images, first channel")
    parser.add_argument("--shift", type=float, default=0.125, help="fraction of the patch side")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    return parser.parse_args()


def load_patches(predictor: nnUNetPredictor, images: list[Path], margin: list[int]) -> Tensor:
    """The middle of each preprocessed image, patch and margin, (2, C, *S); zeros where the image is smaller."""
    configuration, dataset = predictor.configuration_manager, predictor.dataset_json
    preprocessor = configuration.preprocessor_class(verbose=False)
    patches = []
    for image in images:
        stem = image.name.removesuffix(f"_0000{dataset['file_ending']}")
        names = [f"{stem}_{c:04d}{dataset['file_ending']}" for c in range(len(dataset["channel_names"]))]
        channels = [str(image.with_name(name)) for name in names]
        data = preprocessor.run_case(channels, None, predictor.plans_manager, configuration, dataset)[0]
        if len(configuration.patch_size) == 2:
            data = data[:, data.shape[1] // 2]
        wanted = [side + 2 * m for side, m in zip(configuration.patch_size, margin)]
        missing = [max(w - have, 0) for w, have in zip(wanted, data.shape[1:])]
        data = np.pad(data, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
        starts = [(have - w) // 2 for w, have in zip(wanted, data.shape[1:])]
        patches.append(data[(slice(None), *(slice(s, s + w) for s, w in zip(starts, wanted)))])
    return torch.from_numpy(np.stack(patches)).float()


def middle_slice(volume: Tensor) -> np.ndarray:
    """(C, *S) to its first channel's slice (H, W)."""
    plane = volume[0]
    return (plane if plane.ndim == 2 else plane[plane.shape[0] // 2]).numpy()


def show(axes, title: str, image: Tensor | None = None, labels: Tensor | None = None) -> None:
    if image is not None:
        axes.imshow(middle_slice(image), cmap="gray")
    if labels is not None:
        shown = middle_slice(labels).astype(float)
        axes.imshow(np.where(shown > 0, shown, np.nan), cmap="tab10", vmin=0, vmax=NUM_COLORS, alpha=0.6)
    axes.set_title(title)
    axes.axis("off")


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(arguments.model), (arguments.fold,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    network = predictor.network.eval()
    patch = predictor.configuration_manager.patch_size
    margin = [round(arguments.shift * side) for side in patch]
    if len(patch) == 3 and max(patch) / patch[0] > ANISO_THRESHOLD:
        margin[0] = 0
    whole = load_patches(predictor, arguments.images, margin)
    center = shifted_crop(whole, margin, [0] * len(margin))

    def label(images: Tensor) -> Tensor:
        return network(images).argmax(1, keepdim=True)

    fixed = label(center)
    figure, rows = pyplot.subplots(4, 4, figsize=(12, 12))
    diagonals = [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    for column, signs in enumerate(diagonals):
        # In 3D the first axis is shifted too, alternately.
        full = signs if len(patch) == 2 else (signs[0] * signs[1], *signs)
        shift = [sign * m for sign, m in zip(full, margin)]
        crop = shifted_crop(whole, margin, shift)
        temporary = label(crop)
        dynamic = compose_pseudo_labels(fixed, temporary, shift)
        show(rows[0][column], f"x_d, shift {tuple(shift)}", crop[0])
        show(rows[1][column], "y_t in its frame", crop[0], temporary[0])
        show(rows[2][column], f"y_d; {100 * (dynamic != fixed)[0].float().mean():.1f} % not y_f", center[0], dynamic[0])
    boxes = cutmix_boxes(2, center.shape[2:], 0.5, torch.Generator().manual_seed(1))
    show(rows[3][0], "x_f", center[0])
    show(rows[3][1], "y_f", center[0], fixed[0])
    show(rows[3][2], "mixed with another image", mix(center, center.roll(1, 0), boxes)[0])
    show(rows[3][3], "its labels", mix(center, center.roll(1, 0), boxes)[0], mix(fixed, fixed.roll(1, 0), boxes)[0])
    figure.tight_layout()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=50)
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

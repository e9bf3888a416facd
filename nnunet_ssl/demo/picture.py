"""The demo's picture of some cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager


def draw_cases(
    file: Path,
    identifiers: Sequence[str],
    images: Path,
    truth: Path,
    predictions: Mapping[str, Path],
    dataset_json: dict[str, Any],
) -> None:
    """Image, truth and each trainer's prediction side by side, a row per case; 3D shows the middle of the truth.

    Args:
        file: The PNG to write.
        identifiers: Cases to show.
        images: Folder of the images.
        truth: Folder of the labels.
        predictions: Trainer to folder.
        dataset_json: nnU-Net's dataset.json.
    """
    ending = dataset_json["file_ending"]
    reader = determine_reader_writer_from_dataset_json(
        dataset_json, str(images / f"{identifiers[0]}_0000{ending}"), verbose=False
    )()
    order = dataset_json.get("regions_class_order")
    num_labels = 1 + max(LabelManager(dataset_json["labels"], order).all_labels)
    columns = ["image", "truth", *predictions]
    figure, axes = plt.subplots(
        len(identifiers), len(columns), figsize=(2.6 * len(columns), 2.7 * len(identifiers)), squeeze=False
    )
    for row, identifier in zip(axes, identifiers):
        image = reader.read_images([str(images / f"{identifier}_0000{ending}")])[0][0]
        maps = [
            reader.read_seg(str(folder / f"{identifier}{ending}"))[0][0] for folder in (truth, *predictions.values())
        ]
        middle = int(np.argmax((maps[0] > 0).sum((1, 2))))
        for axis in row:
            axis.imshow(image[middle], cmap="gray")
            axis.axis("off")
        for axis, labels in zip(row[1:], maps):
            shown = np.ma.masked_equal(labels[middle], 0)
            axis.imshow(shown, cmap="tab10", vmin=0, vmax=max(9, num_labels), alpha=0.55, interpolation="nearest")
        row[0].set_title(identifier, fontsize=8)
    for axis, title in zip(axes[0], columns):
        axis.set_title(f"{title}\n{axis.get_title()}".strip(), fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)

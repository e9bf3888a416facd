"""The worst, the median and the best case of a comparison, with everybody's outlines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.candidates import Candidate, Reference
from nnunet_ssl.evaluation.comparison import MEAN, Comparison, read_truth
from nnunet_ssl.evaluation.figures import TRUTH_COLOR, color, contour_picture
from nnunet_ssl.evaluation.postprocessing import Cleaning, clean
from nnunet_ssl.nnunet.label_maps import read_image, read_labels, reader_class

# Display window of an image's gray values, in percentiles.
_WINDOW = (0.5, 99.5)


@dataclasses.dataclass(frozen=True)
class CasePicture:
    """One shown case.

    Attributes:
        title: Which case, and why.
        pictures: PNG files, one per plane.
    """

    title: str
    pictures: list[bytes]


def draw_cases(
    comparison: Comparison, candidates: Sequence[Candidate], reference: Reference, cleaning: Cleaning | None = None
) -> list[CasePicture]:
    """Worst, median and best case by Dice, mean over structures and candidates; empty where there are no images."""
    dice = comparison.per_structure("Dice")
    scores = np.ma.masked_invalid(dice.get(MEAN, next(iter(dice.values())))).mean(0).filled(np.nan)
    order = [i for i in np.argsort(scores, kind="stable") if not np.isnan(scores[i])]
    shown: dict[int, str] = {}
    if order:
        for title, i in (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])):
            shown.setdefault(i, title)
    pictures = []
    for i, title in shown.items():
        case = comparison.cases[i]
        if case in reference.images:
            named = f"{title}: {case}, mean Dice {scores[i]:.3f}"
            try:
                pictures.append(CasePicture(named, _draw_case(case, candidates, reference, cleaning)))
            except UserError as error:
                # The values do not depend on the image.
                print(f"No picture of {case}: {error}")
    return pictures


def _draw_case(
    case: str, candidates: Sequence[Candidate], reference: Reference, cleaning: Cleaning | None
) -> list[bytes]:
    reader = reader_class(reference.dataset_json, reference.labels[case])
    truth, spacing = read_truth(reference.labels[case], [c.predictions[case] for c in candidates], reader)
    predicted = [read_labels(c.predictions[case], reader).labels for c in candidates]
    if cleaning:
        predicted = [clean(labels, spacing, cleaning) for labels in predicted]
    channels = read_image(reference.images[case], reader)
    if channels.shape[1:] != truth.shape:
        raise UserError(f"The image of {case} has shape {channels.shape[1:]}, its label map {truth.shape}.")
    # Color where the file is a color image, else the first channel.
    is_color = len(reference.images[case]) == 1 and len(channels) in (3, 4)
    image = np.moveaxis(channels[:3], 0, -1) if is_color else channels[0]
    low, high = np.percentile(image, _WINDOW)
    image = np.clip((image - low) / max(high - low, 1e-9), 0, 1)
    maps = [(truth, TRUTH_COLOR), *((labels, color(i)) for i, labels in enumerate(predicted))]
    ignore = reference.dataset_json["labels"].get("ignore")
    if ignore is not None:
        maps[0] = (np.where(truth == ignore, 0, truth), TRUTH_COLOR)
    if truth.ndim == 2:
        return [contour_picture(image, maps, spacing[0] / spacing[1])]
    center = _center(truth if truth.any() else predicted[0])
    pictures = []
    for axis in range(3):
        rows, columns = (a for a in range(3) if a != axis)
        plane = [(labels.take(center[axis], axis), line_color) for labels, line_color in maps]
        pictures.append(contour_picture(image.take(center[axis], axis), plane, spacing[rows] / spacing[columns]))
    return pictures


def _center(labels: np.ndarray) -> list[int]:
    places = np.argwhere(labels > 0)
    if not len(places):
        return [side // 2 for side in labels.shape]
    return [round(v) for v in places.mean(0)]

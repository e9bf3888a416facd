"""Label map files and image files, through nnU-Net's own readers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_ssl.errors import UserError


def reader_class(dataset_json: dict[str, Any], example: Path) -> type:
    """nnU-Net's reader and writer of a data set.

    Raises:
        UserError: Where none can read the example.
    """
    try:
        reader: type = determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)
    except RuntimeError:
        raise UserError(f"No reader of nnU-Net reads {example}.") from None
    return reader


class LabelMap(NamedTuple):
    """A label map as its file holds it.

    Attributes:
        labels: (*S), 2D or 3D: nnU-Net gives 2D images a further axis of length one, which is left out here.
        spacing: Voxel size per axis, in mm.
        left_out: Which of nnU-Net's three axes that is, if any.
        properties: What nnU-Net's writer needs.
    """

    labels: np.ndarray
    spacing: tuple[float, ...]
    left_out: tuple[int, ...]
    properties: dict[str, Any]


def read_labels(file: Path, reader: type) -> LabelMap:
    """Read a label map.

    Raises:
        UserError: Where the file cannot be read.
    """
    try:
        labels, properties = reader().read_seg(str(file))
    except Exception as error:
        raise UserError(f"{file} cannot be read as a label map: {error}") from None
    axes = _spatial_axes(labels.shape[1:])
    left_out = tuple(set(range(3)) - set(axes))
    spacing = tuple(float(properties["spacing"][axis]) for axis in axes)
    return LabelMap(labels[0].squeeze(left_out), spacing, left_out, properties)


def knows_spacing(file: Path, reader: type) -> bool:
    """Whether a label map says how large its voxels are; where not, nnU-Net's readers take them as 1."""
    if issubclass(reader, NaturalImage2DIO):
        return False
    # nnU-Net keeps the spacing of TIFF files beside them, and copies of label maps lack it.
    return not issubclass(reader, Tiff3DIO) or file.with_suffix(".json").is_file()


def write_labels(labels: np.ndarray, like: LabelMap, target: Path, reader: type) -> None:
    """Write a label map; the file appears complete or not at all.

    Args:
        labels: (*S).
        like: Of the same shape; gives everything but the labels.
        target: The file.
        reader: nnU-Net's reader and writer.
    """
    folder = Path(tempfile.mkdtemp(prefix=".part_", dir=target.parent))
    try:
        reader().write_seg(np.expand_dims(labels, like.left_out), str(folder / target.name), like.properties)
        # Some formats have a second file, for the spacing; the label map comes last.
        for file in sorted(folder.iterdir(), key=lambda written: written.name == target.name):
            os.replace(file, target.with_name(file.name))
    finally:
        shutil.rmtree(folder)


def read_image(files: Sequence[Path], reader: type) -> np.ndarray:
    """An image (C, *S), 2D or 3D.

    Raises:
        UserError: Where a file cannot be read.
    """
    try:
        image, _ = reader().read_images([str(file) for file in files])
    except Exception as error:
        raise UserError(f"{files[0]} cannot be read as an image: {error}") from None
    axes = _spatial_axes(image.shape[1:])
    return np.asarray(image).squeeze(tuple(1 + axis for axis in range(3) if axis not in axes))


def _spatial_axes(shape: Sequence[int]) -> tuple[int, ...]:
    axes = tuple(axis for axis, side in enumerate(shape) if side > 1)
    return axes if len(axes) >= 2 else (1, 2)

"""Label files of unlabeled images, made by anybody, as pseudo-labels in the voxels of the preprocessed images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.pseudo_labels import PseudoLabels, as_stored
from nnunet_ssl.errors import UserError

# Of positions and directions, in mm; as nnU-Net's own check of a data set.
_TOLERANCE = 1e-3
_NO_FILE = "no file"
# What nnU-Net's readers note of an image's place in space, by the key in their properties.
_GEOMETRY = {"sitk_stuff": ("origin", "direction"), "nibabel_stuff": ("original_affine",)}


def find_label_files(
    folder: Path, ending: str, unlabeled: Collection[str], labeled: Collection[str], reported: Collection[str]
) -> dict[str, Path]:
    """The label files of a folder by case.

    Args:
        folder: Holds CASE.ending.
        ending: Of dataset.json.
        unlabeled: Cases of the fold that may get pseudo-labels.
        labeled: Cases that the fold trains on.
        reported: Its validation cases.

    Raises:
        UserError: Where there is none, or one is of another case.
    """
    files = {f.name.removesuffix(ending): f for f in sorted(folder.glob(f"*{ending}")) if not f.name.startswith(".")}
    for case in files:
        if case in unlabeled:
            continue
        kind = "a labeled" if case in labeled else "a validation" if case in reported else "no unlabeled"
        raise UserError(
            f"{files[case]}: {case} is {kind} case of this fold. Expected files of unlabeled cases alone, e.g. "
            f"{min(unlabeled)}{ending}; take it out of the folder."
        )
    if not files:
        raise UserError(f"{folder} holds no file with the ending {ending}, as dataset.json has it.")
    return files


def import_case(
    labels: PseudoLabels,
    case: UnlabeledCase,
    images: Sequence[str],
    file: Path | None,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: Mapping[str, Any],
    uncertain_value: int | None = None,
) -> None:
    """Write the pseudo-labels of a case from its file; a case without one is dropped. Finished ones are skipped.

    Args:
        labels: Where they go; started.
        case: Whose.
        images: Channel files of the raw image.
        file: Its labels.
        plans_manager: nnU-Net's.
        configuration: Of the plans.
        dataset_json: nnU-Net's.
        uncertain_value: See ``preprocess_labels``.

    Raises:
        UserError: As ``preprocess_labels``, and where raw and preprocessed image do not fit together.
    """
    image = Path(case.folder) / f"{case.identifier}.b2nd"
    is_done = labels.is_done(case.identifier, [image, *([file] if file else [])])
    # A file may have been taken away.
    if is_done and (labels.scores(case.identifier)["why"] == _NO_FILE) == (file is None):
        return
    shape = tuple(blosc2.open(urlpath=str(image), mode="r").shape[1:])
    found, uncertain = np.zeros(shape, np.int16), np.ones(shape, bool)
    if file is not None:
        if not images:
            raise UserError(f"{file}: the raw data set has no image of {case.identifier} to compare it with.")
        found, uncertain = preprocess_labels(images, file, plans_manager, configuration, dataset_json, uncertain_value)
        if found.shape != shape:
            raise UserError(f"{file} has {list(found.shape)} voxels when preprocessed, {image} has {list(shape)}.")
    why = "" if file is not None and found.any() else _NO_FILE if file is None else "the file shows no structure"
    scores = {
        "kept": not why, "why": why, "agreement": None, "unchanged": None,
        "uncertain": round(float(uncertain.mean()), 6),
    }  # fmt: skip
    patch_size = plans_manager.get_configuration(configuration).patch_size
    labels.write_case(case.identifier, as_stored(found, uncertain), scores, patch_size)


def preprocess_labels(
    images: Sequence[str],
    file: Path,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: Mapping[str, Any],
    uncertain_value: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A label file in the voxels of its preprocessed image: transposed, cropped and resampled as nnU-Net does.

    Args:
        images: Channel files of the case.
        file: Its label file.
        plans_manager: nnU-Net's.
        configuration: Of the plans.
        dataset_json: nnU-Net's.
        uncertain_value: What marks uncertain voxels in the file; the data set's ignore label does so anyway.

    Returns:
        Labels (*S), 0 where they are uncertain, and where that is (boolean).

    Raises:
        UserError: Where the file has another geometry than the image, or labels that dataset.json does not list.
    """
    reader, manager = plans_manager.image_reader_writer_class(), plans_manager.get_configuration(configuration)
    try:
        raw, properties = reader.read_images(list(images))
        labels, of_labels = reader.read_seg(str(file))
    except Exception as error:  # readers raise anything for broken files
        raise UserError(f"{file} or its image cannot be read: {error}") from None
    _check_geometry(file, raw, properties, labels, of_labels)
    label_manager = plans_manager.get_label_manager(dict(dataset_json))
    marks = {v for v in (uncertain_value, label_manager.ignore_label) if v is not None}
    known = {0, *label_manager.all_labels}
    unknown = sorted({int(v) for v in np.unique(labels)} - known - marks)
    if unknown:
        raise UserError(
            f"{file} has voxels of label {', '.join(map(str, unknown))}; dataset.json lists "
            f"{', '.join(map(str, sorted(known)))}"
            + (f", and {', '.join(map(str, sorted(marks)))} marks uncertain ones." if marks else ".")
        )
    mark = max(known) + 1
    labels = np.where(np.isin(labels, list(marks)), mark, labels)
    preprocessor = manager.preprocessor_class(verbose=False)
    _, done, _ = preprocessor.run_case_npy(raw, labels, properties, plans_manager, manager, dict(dataset_json))
    # nnU-Net marks what lies outside of its mask of nonzero voxels by -1.
    final = np.maximum(done[0], 0)
    return np.where(final == mark, 0, final).astype(np.int16), final == mark


def _check_geometry(
    file: Path, raw: np.ndarray, of_image: Mapping[str, Any], labels: np.ndarray, of_labels: Mapping[str, Any]
) -> None:
    def refuse(what: str, found: Any, expected: Any) -> None:
        raise UserError(f"{file} has {what} {found}; its image has {expected}. Resample it to the image's grid.")

    if labels.shape[1:] != raw.shape[1:]:
        refuse("shape", list(labels.shape[1:]), list(raw.shape[1:]))
    if not np.allclose(of_labels["spacing"], of_image["spacing"], atol=_TOLERANCE):
        refuse("spacing", *(np.round(properties["spacing"], 4).tolist() for properties in (of_labels, of_image)))
    for key, names in _GEOMETRY.items():
        for name in names:
            found, expected = of_labels.get(key, {}).get(name), of_image.get(key, {}).get(name)
            if found is not None and expected is not None and not np.allclose(found, expected, atol=_TOLERANCE):
                refuse(name.replace("_", " "), np.round(found, 4).tolist(), np.round(expected, 4).tolist())

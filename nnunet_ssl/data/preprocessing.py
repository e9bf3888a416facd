"""Preprocess images without labels, with nnU-Net's own preprocessor and plans, into folders of their own.

Every case is written under a temporary name and then renamed: a file with the final name is complete. A folder
remembers the settings it was made with, so that images made with other plans are never mixed in silently.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.raw_images import CaseReport, RawCase, number_of_channels
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replace_atomically, write_among_others

UNLABELED_SUFFIX = "_unlabeled"
TEST_SUFFIX = "_test_images"
SETTINGS_FILE = "preprocessing.json"
# 8 GiB in single precision, of which nnU-Net makes several copies.
_MOST_VOXELS = 2**31
# As nnU-Net compresses its own.
_COMPRESSION = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1}


def preprocessing_settings(plans_manager: PlansManager, configuration: str) -> dict[str, Any]:
    """What decides the preprocessed voxels; two plans that agree in this may share preprocessed images."""
    manager = plans_manager.get_configuration(configuration)
    names = (
        "preprocessor_name",
        "spacing",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_data_kwargs",
    )
    settings = {name: manager.configuration[name] for name in names}
    settings["transpose_forward"] = plans_manager.transpose_forward
    settings["image_reader_writer"] = plans_manager.plans["image_reader_writer"]
    settings["intensities"] = plans_manager.foreground_intensity_properties_per_channel
    return json.loads(json.dumps(settings))


def preprocessed_cases(folder: str) -> list[str]:
    """Identifiers of the complete images in a folder; none if there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(name[: -len(".b2nd")] for name in os.listdir(folder) if name.endswith(".b2nd"))


def check_same_preprocessing(folder: str, settings: dict[str, Any]) -> None:
    """Refuse images that were preprocessed with other settings.

    Raises:
        UserError: Naming the settings that differ.
    """
    file = os.path.join(folder, SETTINGS_FILE)
    found = load_json(file) if os.path.isfile(file) else {}
    different = sorted(k for k in settings if found.get(k) != settings[k])
    if different:
        raise UserError(
            f"The images in {folder} were preprocessed with other settings than the plans ask for (different: "
            f"{', '.join(different)}). Run 'nnunet-ssl preprocess --overwrite' with these plans."
        )


def preprocess_case(
    case: RawCase, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], output_folder: str
) -> CaseReport:
    """Preprocess one image and write it; never raises, so that one broken case does not stop the others."""
    try:
        note = _preprocess_and_write(case, plans, configuration, dataset_json, output_folder)
    except UserError as error:
        return CaseReport(case.identifier, str(error))
    except Exception as error:  # readers raise anything for broken files; the last line says what
        reason = str(error).strip().splitlines() or traceback.format_exception_only(error)
        return CaseReport(case.identifier, f"{type(error).__name__}: {reason[-1]}")
    return CaseReport(case.identifier, note=note)


def preprocess_cases(
    cases: list[RawCase],
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    output_folder: str,
    num_processes: int,
    overwrite: bool = False,
) -> tuple[int, Iterator[CaseReport]]:
    """Preprocess cases in parallel processes; finished ones are skipped.

    Args:
        cases: From ``raw_images``.
        plans: nnU-Net's plans.
        configuration: A configuration of the plans.
        dataset_json: nnU-Net's dataset.json.
        output_folder: Made if missing.
        num_processes: 1 works in this process.
        overwrite: Redo finished cases, also those made with other settings.

    Returns:
        How many cases there are to do, and their reports as they end.

    Raises:
        UserError: If the folder holds images made with other settings and ``overwrite`` is not given.
    """
    settings = preprocessing_settings(PlansManager(plans), configuration)
    done = set(preprocessed_cases(output_folder))
    if done and overwrite:
        for identifier in done:
            os.remove(os.path.join(output_folder, identifier + ".b2nd"))
        done = set()
    if done:
        check_same_preprocessing(output_folder, settings)
    os.makedirs(output_folder, exist_ok=True)
    # Parts of the work on several machines write it at once.
    write_among_others(os.path.join(output_folder, SETTINGS_FILE), json.dumps(settings, indent=2).encode())
    todo = [case for case in cases if case.identifier not in done or _is_newer(case, output_folder)]
    arguments = (plans, configuration, dataset_json, output_folder)
    if num_processes == 1 or len(todo) < 2:
        return len(todo), (preprocess_case(case, *arguments) for case in todo)
    return len(todo), _in_processes(preprocess_case, todo, arguments, min(num_processes, len(todo)))


def _in_processes(
    work: Callable[..., CaseReport], cases: list[RawCase], arguments: tuple[Any, ...], num_processes: int
) -> Iterator[CaseReport]:
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, case, *arguments): case for case in cases}
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    reason = "a worker process died (killed, or out of memory); run again with a smaller -np"
                    yield CaseReport(futures[future].identifier, reason)
        except BaseException:
            # Ctrl-C: what has not begun is not begun any more.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_newer(case: RawCase, output_folder: str) -> bool:
    """Whether an image was replaced since it was preprocessed."""
    made = os.path.getmtime(os.path.join(output_folder, case.identifier + ".b2nd"))
    return any(os.path.getmtime(file) > made for file in case.images)


def _preprocess_and_write(
    case: RawCase, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], output_folder: str
) -> str:
    plans_manager = PlansManager(plans)
    manager = plans_manager.get_configuration(configuration)
    raw, properties = plans_manager.image_reader_writer_class().read_images(case.images)
    _check_voxels(raw, number_of_channels(dataset_json))
    transposed = plans_manager.transpose_forward
    _check_spacing(
        [properties["spacing"][a] for a in transposed], [raw.shape[1 + a] for a in transposed], manager.spacing
    )
    preprocessor = manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case_npy(raw, None, properties, plans_manager, manager, dataset_json)
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not np.isfinite(data).all():
        raise UserError(
            f"the voxels (up to {np.abs(raw).max():.3g}) are too large to be normalized in single precision"
        )
    blocks, chunks = comp_blosc2_params(data.shape, tuple(manager.patch_size), data.itemsize)
    final = os.path.join(output_folder, case.identifier + ".b2nd")
    parameters = {"chunks": chunks, "blocks": blocks, "cparams": _COMPRESSION, "mode": "w"}
    replace_atomically(final, lambda part: blosc2.asarray(data, urlpath=part, **parameters))
    sides = data.shape[-len(manager.patch_size) :]
    if all(side < patch for side, patch in zip(sides, manager.patch_size)):
        return f"smaller than the patch ({list(sides)} < {list(manager.patch_size)} voxels): padded with zeros"
    return ""


def _check_voxels(raw: np.ndarray, num_channels: int) -> None:
    if raw.size == 0:
        raise UserError(f"the image has no voxels (shape {raw.shape})")
    if raw.shape[0] != num_channels:
        raise UserError(f"the image has {raw.shape[0]} channels, dataset.json names {num_channels}")
    if not np.isfinite(raw).all():
        raise UserError("the image holds NaN or infinite voxels; nnU-Net's normalization cannot take them")
    for channel in range(num_channels):
        if raw[channel].min() == raw[channel].max():
            raise UserError(f"channel {channel} is constant (all voxels are {raw[channel].flat[0]}); nothing to learn")


def _check_spacing(spacing: Sequence[float], shape: Sequence[int], planned: Sequence[float]) -> None:
    """Of an image, in mm and in the axes of the plans; plans in 2D leave the first axis alone."""
    if not all(0 < float(side) < np.inf for side in spacing):
        raise UserError(f"the header says that voxels measure {list(spacing)} mm; expected positive lengths")
    target = [*spacing[: len(spacing) - len(planned)], *planned]
    voxels = np.prod([side * old / new for side, old, new in zip(shape, spacing, target)])
    if voxels > _MOST_VOXELS:
        raise UserError(
            f"the header says that voxels measure {list(spacing)} mm; in the plan's spacing the image would have "
            f"{voxels:.2g} of them, expected at most {_MOST_VOXELS:.2g}. Correct the header"
        )

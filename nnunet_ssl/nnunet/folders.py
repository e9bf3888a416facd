"""nnU-Net's folders and files of a data set, with errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.checks import check_configuration, check_dataset_json, check_plans

_VARIABLES = {"nnUNet_raw": nnUNet_raw, "nnUNet_preprocessed": nnUNet_preprocessed, "nnUNet_results": nnUNet_results}


def require_variables(*names: str) -> list[Path]:
    """The folders that nnU-Net's environment variables name.

    Raises:
        UserError: If one is not set.
    """
    missing = [name for name in names if not _VARIABLES[name].is_set()]
    if missing:
        raise UserError(
            f"The environment variable {' and '.join(missing)} is not set. nnU-Net needs nnUNet_raw, "
            f"nnUNet_preprocessed and nnUNet_results to name its three folders, e.g. export {missing[0]}=/data/"
            f"{missing[0]}"
        )
    return [Path(_VARIABLES[name].get()) for name in names]


def dataset_name(dataset: str) -> str:
    """``501`` or ``Dataset501_JSRT`` to the full name.

    Raises:
        UserError: If there is no such data set.
    """
    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"Data set {dataset!r}: {error}") from None


def read_json(file: Path, hint: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If it is missing (with the hint) or not JSON.
    """
    if not os.path.isfile(file):
        raise UserError(f"{file} is missing. {hint}")
    try:
        return load_json(str(file))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None


def read_plans(preprocessed: Path, plans_name: str) -> dict[str, Any]:
    """The plans file of a data set."""
    file = preprocessed / f"{plans_name}.json"
    return check_plans(read_json(file, "Run nnUNetv2_plan_and_preprocess first, or name the plans with -p."), str(file))


def read_dataset_json(file: Path) -> dict[str, Any]:
    """nnU-Net's description of a data set.

    Raises:
        UserError: Where it is missing, or an entry is.
    """
    return check_dataset_json(read_json(file, "nnUNetv2_plan_and_preprocess copies it from the raw data."), str(file))


def require_configurations(plans: dict[str, Any], configurations: list[str]) -> None:
    """Check that the plans have these configurations, and that they can be worked with.

    Raises:
        UserError: Naming those there are, or the entry that is wrong.
    """
    for configuration in configurations:
        check_configuration(plans, configuration, f"{plans['plans_name']}.json")

"""Where the folder lies that nnUNet_extTrainer must name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nnunet_ssl.errors import UserError


def trainers_folder() -> Path:
    """The folder of trainers: inside an installed package, or beside it in an editable install.

    Raises:
        UserError: If it is in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = [package / "trainers", package.parent / "trainers"]
    for folder in candidates:
        if (folder / "nnunet_ssl_trainers.py").is_file():
            return folder
    raise UserError(
        f"The folder of trainers is missing; looked at {' and '.join(map(str, candidates))}. Reinstall nnunet-ssl."
    )


def check_found_through_trainers_folder(base: type) -> None:
    """Refuse trainers that nnU-Net imported as a copy of the installed package.

    That happens where nnUNet_extTrainer names the repository or the package: the copy is dropped after the look-up,
    and nothing defined in it can be pickled.

    Args:
        base: The base class as the running code knows it.

    Raises:
        UserError: If the installed package knows another one.
    """
    module = sys.modules.get(base.__module__)
    if getattr(module, base.__name__, None) is not base:
        raise UserError(
            f"nnU-Net found this trainer through the wrong folder: nnUNet_extTrainer="
            f"{os.environ.get('nnUNet_extTrainer', '')}. It must name the folder of trainers, not the repository or "
            f'the package. Run: eval "$(nnunet-ssl env)"'
        )

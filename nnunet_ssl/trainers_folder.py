"""Where the folder lies that nnUNet_extTrainer must name."""

from __future__ import annotations

from pathlib import Path

from nnunet_ssl.errors import UserError


def trainers_folder() -> Path:
    """The folder of trainers: inside an installed package, or beside it in an editable install.

    Raises:
        UserError: If it is in neither place.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "trainers", package.parent / "trainers"]
    for folder in candidates:
        if (folder / "nnunet_ssl_trainers.py").is_file():
            return folder
    raise UserError(
        f"The folder of trainers is missing; looked at {' and '.join(map(str, candidates))}. Reinstall nnunet-ssl."
    )

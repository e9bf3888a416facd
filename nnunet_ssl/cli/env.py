"""Print the line that lets nnU-Net find the trainers. Use it as: eval "$(nnunet-ssl env)"."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.trainers_folder import trainers_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No option is needed; nnU-Net's own variables stay as they are."""
    parser.add_argument(
        "--also", type=Path, action="append", default=[], metavar="DIR", help="a folder with trainers of your own"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print an export of nnUNet_extTrainer that keeps the folders it names already."""
    wanted = [str(trainers_folder()), *map(_checked, arguments.also)]
    named = filter(str.strip, os.environ.get("nnUNet_extTrainer", "").split(os.pathsep))
    others = [path for path in named if os.path.abspath(path) not in wanted]
    print(f"export nnUNet_extTrainer={shlex.quote(os.pathsep.join(dict.fromkeys([*wanted, *others])))}")
    return 0


def _checked(folder: Path) -> str:
    """The absolute path of a folder of trainers.

    Raises:
        UserError: Where it is none, or its name cannot stand in a list of folders.
    """
    path = os.path.abspath(folder)
    if not os.path.isdir(path):
        raise UserError(f"--also {folder}: {path} is not a folder; expected one with Python files of trainers.")
    if os.pathsep in path:
        raise UserError(f"--also {folder}: {path} holds a {os.pathsep!r}, which separates folders; rename it.")
    return path

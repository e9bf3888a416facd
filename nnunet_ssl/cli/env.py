"""Print the line that lets nnU-Net find the trainers. Use it as: eval "$(nnunet-ssl env)"."""

from __future__ import annotations

import argparse
import os
import shlex

from nnunet_ssl.nnunet.trainers_folder import trainers_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No option is needed; nnU-Net's own variables stay as they are."""


def run(arguments: argparse.Namespace) -> int:
    """Print an export of nnUNet_extTrainer that keeps the folders it names already."""
    ours = str(trainers_folder())
    others = [p for p in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if p.strip() and p != ours]
    print(f"export nnUNet_extTrainer={shlex.quote(os.pathsep.join([ours, *others]))}")
    return 0

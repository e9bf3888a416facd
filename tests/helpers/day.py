"""nnU-Net's own commands, one after the other, in folders of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nnunet_ssl.nnunet.trainers_folder import trainers_folder

QUICK = ("num_epochs=2", "num_iterations_per_epoch=2", "num_val_iterations_per_epoch=1", "save_every=1", "seed=0",
         "supervised_fraction=0.5")  # fmt: skip


class Day:
    """Runs commands in a fresh set of nnU-Net folders."""

    def __init__(self, root: Path, number: int, name: str) -> None:
        self.root, self.number, self.name = root, str(number), name
        self.environment = {
            **os.environ,
            **{v: str(root / v) for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
        }
        self.raw = root / "nnUNet_raw" / name
        self.preprocessed = root / "nnUNet_preprocessed" / name
        self.results = root / "nnUNet_results" / name

    def run(self, *words: str, status: int = 0, **environment: str) -> str:
        command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
        result = subprocess.run(
            command,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.root,
            check=False,
        )
        assert result.returncode == status, result.stdout[-3000:]
        return result.stdout

    def without_this_package(self) -> dict[str, str]:
        """An environment in which importing nnunet_ssl fails and no trainer folder is set: stock nnU-Net."""
        folder = self.root / "blocked"
        folder.mkdir(exist_ok=True)
        (folder / "nnunet_ssl.py").write_text("raise ImportError('nnunet_ssl is not installed here')\n")
        return {"PYTHONPATH": str(folder), "nnUNet_extTrainer": ""}

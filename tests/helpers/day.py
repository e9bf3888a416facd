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
    """Runs commands in a fresh set of nnU-Net folders.

    Args:
        root: Holds nnU-Net's three folders.
        number: Of the data set.
        name: Of the data set.
        executables: Those of ``preloaded``; ``run_alone`` starts the ones that users start.
    """

    def __init__(self, root: Path, number: int, name: str, executables: Path) -> None:
        self.root, self.number, self.name, self.executables = root, str(number), name, executables
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

    def run(self, *words: str, status: int = 0) -> str:
        """Run a command in a process that has everything imported."""
        return self._run(self.executables, *words, status=status)

    def run_alone(self, *words: str, status: int = 0, **environment: str) -> str:
        """Run a command in a process that imports everything itself, as users do."""
        return self._run(Path(sys.executable).parent, *words, status=status, **environment)

    def _run(self, folder: Path, *words: str, status: int, **environment: str) -> str:
        result = subprocess.run(
            [str(folder / words[0]), *words[1:]],
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

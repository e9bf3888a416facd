"""Run nnU-Net's and our commands one after the other, with progress, logs and errors that say where to look."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.runtime.cpu import own_cores

_EPOCH = re.compile(r"Epoch (\d+)\b")


class Commands:
    """Runs commands in an environment of their own.

    Args:
        folder: Holds nnU-Net's three folders and the logs.
        environment: Further variables.
        cores: Which cores of the CPU the commands may use, where the system lets choose.
        quiet: Do not show how far a training is, e.g. where several run at once.
    """

    _naming = threading.Lock()

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        cores: Sequence[int] | None = None,
        quiet: bool = False,
    ) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.cores = cores if hasattr(os, "sched_setaffinity") else None
        self.quiet = quiet
        self.environment = {
            **os.environ,
            "nnUNet_raw": str(folder / "nnUNet_raw"),
            "nnUNet_preprocessed": str(folder / "nnUNet_preprocessed"),
            "nnUNet_results": str(folder / "nnUNet_results"),
            "nnUNet_extTrainer": str(trainers_folder()),
            "PYTHONUNBUFFERED": "1",
        }
        # A worker more than cores only gets in the way.
        available = len(self.cores or own_cores())
        self.environment.setdefault("nnUNet_n_proc_DA", str(max(1, min(4, available // 2))))
        self.environment.setdefault("nnUNet_def_n_proc", str(min(4, available)))
        self.environment.update(environment or {})

    def run(self, *words: str, epochs: int = 0) -> None:
        """Run one command and show how long it took; with ``epochs``, how far a training is.

        Raises:
            UserError: If the command fails, with the end of its output.
        """
        print("$ " + " ".join(words), flush=True)
        with self._naming:
            log = self.logs / f"{len(list(self.logs.iterdir())):02d}_{words[0]}.txt"
            log.touch()
        # The commands of the environment this runs in, whether it is activated or not.
        beside = Path(sys.executable).with_name(words[0])
        script = beside if beside.exists() else shutil.which(words[0])
        if script is None:
            raise UserError(f"The command {words[0]} is neither beside {sys.executable} nor on the PATH.")
        start = time.monotonic()
        tail: deque[str] = deque(maxlen=25)
        with (
            open(log, "w") as file,
            subprocess.Popen(
                [str(script), *words[1:]],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process,
        ):
            if self.cores is not None:
                os.sched_setaffinity(process.pid, self.cores)
            for line in process.stdout or ():
                file.write(line)
                tail.append(line)
                match = _EPOCH.search(line)
                if epochs and match and not self.quiet:
                    _show(f"    epoch {int(match[1]) + 1} of {epochs}, {time.monotonic() - start:.0f} s")
        if process.returncode != 0:
            raise UserError(
                f"{words[0]} failed (status {process.returncode}); its output is in {log}:\n{''.join(tail)}"
            )
        _show(f"    {'' if not self.quiet else words[0] + ': '}{time.monotonic() - start:.0f} s\n")


def _show(text: str) -> None:
    # On a terminal the line is rewritten; in a log file every epoch gets its own.
    if sys.stdout.isatty():
        print(f"\r{text:40}", end="", flush=True)
    else:
        print(text.rstrip("\n"), flush=True)

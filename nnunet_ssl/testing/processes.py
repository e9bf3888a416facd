"""The promise that two processes train one model, as one process would."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.testing.bench import Bench, environment
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.networks import counted, differing
from nnunet_ssl.testing.rank import SEPARABLE, Found, Job, supervised_gradient

PROCESSES = "processes"
# How long one process waits for the other.
WAIT = 60.0
# Besides, a process must start and import everything; on a busy machine that takes long.
_START = 240.0


@dataclasses.dataclass
class Pair:
    """Two processes that train together, and the gradient that one process alone has on their joined batch.

    Attributes:
        alone: Of the losses on labels; None where it is not the same twice, because the method draws at random there.
    """

    processes: list[subprocess.Popen[bytes]]
    folder: Path
    alone: Tensor | None
    timeout: float

    def found(self) -> list[Found]:
        """What both came to, once they have ended.

        Raises:
            BrokenPromise: Where one of them failed, or both wait for ever.
        """
        until = time.monotonic() + _START + 3 * self.timeout
        for process in self.processes:
            try:
                process.wait(max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.stop()
        files = [self.folder / f"found{rank}.pt" for rank in range(2)]
        if not all(file.is_file() for file in files):
            raise BrokenPromise(PROCESSES, *_stuck(self.folder, self.timeout))
        found: list[Found] = [torch.load(file, weights_only=False) for file in files]
        # Which of two that wait for each other gives up first is chance; the method's own line says more.
        failed = sorted((f for f in found if f.error), key=lambda f: (not f.in_own_files, f.failed_at))
        if failed:
            assert failed[0].error is not None
            what, place = failed[0].error
            raise BrokenPromise(
                PROCESSES,
                f"A training in two processes ends with an error, where one process alone trains: {what}",
                f"Look at {place}. Both processes must go the same way and call the same networks: what decides "
                f"between two ways must be equal on both (runtime.distributed.mean_over_ranks).",
            )
        return found

    def stop(self) -> None:
        """End both."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def start_pair(cls: type, bench: Bench) -> Pair:
    """Let two processes train beside this one; once per bench."""
    return bench.once(("pair", cls), lambda: _start(cls, bench, WAIT))


def two_processes_train_one_model(cls: type, bench: Bench) -> None:
    """Two processes over gloo hold equal weights, skip the same steps, and learn from labels as one process does.

    Raises:
        BrokenPromise: Where they do not, or wait for each other for ever.
    """
    pair = start_pair(cls, bench)
    first, second = pair.found()
    check_equal_weights(cls, first, second)
    check_broken_step(cls, first, second)
    if pair.alone is not None:
        for found in (first, second):
            assert found.supervised is not None
            check_gradient(found.supervised, pair.alone)


def check_equal_weights(cls: type, first: Found, second: Found) -> None:
    """Both hold the same weights of all networks after steps on different data."""
    assert first.after_steps is not None
    assert second.after_steps is not None
    names = differing(first.after_steps, second.after_steps)
    if names:
        raise BrokenPromise(
            PROCESSES,
            f"After a few steps, two processes hold different {counted(names, len(first.after_steps))}.",
            f"Each process has data of its own: what {cls.__name__} or a companion makes of them besides gradients "
            f"must be shared by all (runtime.distributed.mean_over_ranks), and what weights depend on drawn alike.",
        )


def check_broken_step(cls: type, first: Found, second: Found) -> None:
    """Both skip a step that is broken on one."""
    for found in (first, second):
        assert found.after_steps is not None
        assert found.after_broken_step is not None
        names = differing(found.after_steps, found.after_broken_step)
        if found.finite or names:
            raise BrokenPromise(
                PROCESSES,
                "A step whose losses are not finite in one process is taken by the other, or changes weights: "
                f"{counted(names, len(found.after_steps)) if names else 'none so far'}.",
                f"Look whether {cls.__name__} overrides train_step, or changes weights but in Companion.after_step.",
            )


def check_gradient(found: Tensor, expected: Tensor) -> None:
    """The gradient of two processes is that of one on the joined batch."""
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-6):
        raise BrokenPromise(
            PROCESSES,
            f"The gradient of the losses on labels in two processes is not that of one process on the joined batch; "
            f"it differs by up to {(found - expected).abs().max():.2g}.",
            "Look at the loss on labels: a mean over examples may be taken by each process, anything else over a whole "
            "batch must be gathered first, as nnU-Net's Dice loss does.",
        )


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(cls: type, bench: Bench, timeout: float) -> Pair:
    with bench.data() as tiny:
        alone, batches = _alone(cls, tiny)
        folder = bench.root / "pair"
        folder.mkdir()
        torch.save(Job(cls.__module__, cls.__qualname__, tiny, batches, free_port(), timeout), folder / "job.pt")
        variables = {**os.environ, **environment(tiny)}
    processes = []
    for rank in range(2):
        program = f"import sys; sys.path[:] = {sys.path!r}; from nnunet_ssl.testing.rank import main; "
        command = [_python(), "-c", f"{program}main({str(folder)!r}, {rank})"]
        with open(folder / f"log{rank}.txt", "w") as log:
            processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
    return Pair(processes, folder, alone, timeout)


def _alone(cls: type, tiny: Any) -> tuple[Tensor | None, Any]:
    gradients = []
    for seed in (3, 4):
        trainer = tiny.initialized(cls, **SEPARABLE)
        batches = tiny.batches(trainer)
        trainer.generator.manual_seed(seed)
        torch.manual_seed(seed)
        gradients.append(supervised_gradient(trainer, batches[0]))
    first, second = gradients
    return (first if torch.allclose(first, second, rtol=1e-5, atol=1e-8) else None), batches


def _python() -> str:
    executable = spawn.get_executable()
    return executable.decode() if isinstance(executable, bytes) else executable


def _stuck(folder: Path, timeout: float) -> tuple[str, str]:
    """What was found, and where to look, when a process never ended or fell over."""
    stacks = [(folder / f"stuck{rank}.txt").read_text() for rank in range(2) if (folder / f"stuck{rank}.txt").exists()]
    logs = [(folder / f"log{rank}.txt").read_text().strip().splitlines() for rank in range(2)]
    places = [line.strip() for stack in stacks for line in stack.splitlines() if line.startswith("  File")][:3]
    last = [lines[-1] for lines in logs if lines]
    return (
        f"Two processes wait for each other for more than {timeout:.0f} seconds, or one of them fell over.",
        f"Both must call the same networks and communicate equally often. They stood at {'; '.join(places or last)}.",
    )

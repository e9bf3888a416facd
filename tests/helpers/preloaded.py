"""Python processes that have everything imported: importing nnU-Net takes longer than most of what tests run.

A server imports the modules below once and forks for every process that is asked for. Who asks does not notice: it
starts an executable of a folder, ``python`` or a command such as ``nnUNetv2_train``, with an environment, a working
folder and open files of its own; it can kill it, and gets its exit status. Workers of ``multiprocessing`` are started
so, too. What such a process could not do, with another PYTHONPATH for instance, one does that imports by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# With all that is in them: nnU-Net looks through its own trainers before it looks for others.
PACKAGES = ("nnunetv2.training.nnUNetTrainer", "nnunetv2.experiment_planning", "nnunet_ssl.cli", "nnunet_ssl.demo")
MODULES = (
    "nnunetv2.run.run_training",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.ensembling.ensemble",
    "nnunetv2.evaluation.find_best_configuration",
    "nnunet_ssl.methods",
    "imageio.plugins.pillow",
    "pytest",
)
# Modules read these while they are imported: with other values than the server's, a process imports by itself.
READ_AT_IMPORT = ("PYTHONPATH", "PYTHONHOME", "nnUNet_def_n_proc")
# Above the numbers of files that a process is handed.
_FREE_NUMBERS = 500


@contextlib.contextmanager
def preloaded(**environment: str) -> Iterator[Path]:
    """The folder of executables, while their server runs.

    Args:
        environment: Further variables of the server.
    """
    helpers = Path(__file__).parent
    # Threads that wait take no core from others; pictures are drawn coarsely.
    light = {"OMP_WAIT_POLICY": "PASSIVE", "MATPLOTLIBRC": str(helpers / "matplotlibrc")}
    variables = {**os.environ, **light, **environment}
    scripts = [script.name for script in importlib.metadata.entry_points(group="console_scripts")]
    # In the folder for temporary files: the name of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="preloaded") as name:
        folder = Path(name)
        (folder / "server.json").write_text(json.dumps({v: variables.get(v) for v in READ_AT_IMPORT}))
        for executable in ("python", *(s for s in scripts if s.startswith(("nnUNetv2_", "nnunet-ssl")))):
            ask = f"'{sys.executable}' -IS '{helpers / 'preloaded_client.py'}' '{folder}' {executable}"
            (folder / executable).write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
            (folder / executable).chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        # It ends with its standard input, and so with this process. In a session of its own: Ctrl-C is not for it.
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            env=variables,
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        listener.close()
        try:
            yield folder
        finally:
            server.communicate()


def serve(listener: socket.socket) -> None:
    """Answer who connects, until standard input ends; the modules are imported for the first one."""
    imported = False
    while listener.fileno() in select.select([listener.fileno(), 0], [], [])[0]:
        connection, _ = listener.accept()
        if not imported:
            _import_everything()
            imported = True
        if os.fork() == 0:
            try:
                listener.close()
                keep(connection)
            finally:
                os._exit(1)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _import_everything() -> None:
    from lighter import replacements

    for name in (*PACKAGES, *MODULES):
        module = importlib.import_module(name)
        if name in PACKAGES:
            for found in pkgutil.walk_packages(module.__path__, f"{name}."):
                importlib.import_module(found.name)
    for owner, name, value in replacements():
        setattr(owner, name, value)
    # The folder of this file, which an installed program does not have.
    del sys.path[0]


def keep(connection: socket.socket) -> None:
    """Start what a client asks for, in one more copy of this process; tell how it ended, and end it with the client."""
    request, files = _receive(connection)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            connection.close()
            _take_over(request, files)
            status = _status_of(request["kind"], request["words"])
        finally:
            os._exit(status)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection.fileno()], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(str(status).encode())


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    content, files, _, _ = socket.recv_fds(connection, 65536, 250)
    while not content.endswith(b"\n"):
        content += connection.recv(65536)
    return json.loads(content), files


def _take_over(request: dict[str, Any], files: list[int]) -> None:
    """Files, environment, folder and names of the process that was asked for; nothing of the server's."""
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, _FREE_NUMBERS) for file in files]
    for file, number in zip(moved, request["files"]):
        os.dup2(file, number)
    for file in {*files, *moved} - {*request["files"]}:
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.executable = request["executable"]
    multiprocessing.set_executable(sys.executable)
    # Random numbers and threads as in a process that has begun by itself.
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _status_of(kind: str, words: list[str]) -> int:
    """Exit status of what is run here, and ended as every process ends; but its memory is not put in order."""
    status = 1
    try:
        _run(kind, words)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status & 255


def _run(kind: str, words: list[str]) -> None:
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = words
    if kind == "command":
        (script,) = importlib.metadata.entry_points(group="console_scripts", name=Path(words[0]).name)
        sys.exit(script.load()())
    if kind == "script":
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    if kind == "worker":
        _, code, *arguments = words
        sys.argv = ["-c", *arguments]
        exec(code, vars(sys.modules["__main__"]))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

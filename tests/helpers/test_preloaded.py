"""Processes of the server are like those that import everything themselves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "nnUNet_def_n_proc": "1", **more}


def script(folder: Path, code: str) -> str:
    file = folder / "script.py"
    file.write_text(code)
    return str(file)


TOLD = """
import json, os, random, sys
import numpy as np
started = "nnunetv2.run.run_training" in sys.modules
print(json.dumps([started, sys.argv[1:], os.getcwd(), os.environ.get("OWN"), sys.stdin.read(), sys.path[0], __name__]))
print(random.random(), np.random.rand(), file=sys.stderr)
os.environ["OWN"] = "changed"
sys.modules["left_behind"] = sys
assert "left_behind" in sys.modules
"""


def test_a_script_has_words_folder_environment_and_files_of_its_own(executables, tmp_path):
    file = script(tmp_path, TOLD)
    drawn = set()
    for own in ("a", "b"):
        done = subprocess.run(
            [executables / "python", file, own, "*"],
            env=environment(OWN=own), cwd=tmp_path, input=f"input {own}", capture_output=True, text=True, check=True,
        )  # fmt: skip
        expected = [True, [own, "*"], str(tmp_path), own, f"input {own}", str(tmp_path), "__main__"]
        assert json.loads(done.stdout) == expected
        drawn |= {*done.stderr.split()}
    assert len(drawn) == 4, "random numbers are the server's"
    assert os.environ.get("OWN") is None


@pytest.mark.parametrize(("code", "status", "told"), [
    ("", 0, ""), ("import sys; sys.exit(3)", 3, ""), ("import sys; sys.exit('told')", 1, "told"),
    ("1 / 0", 1, "ZeroDivisionError"), ("import os; os._exit(7)", 7, ""),
    ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ("import atexit; atexit.register(print, 'at the end')", 0, "at the end"),
    ("import threading, time; threading.Thread(target=lambda: time.sleep(0.1) or print('late')).start()", 0, "late"),
])  # fmt: skip
def test_how_it_ends_is_told(executables, tmp_path, code, status, told):
    done = subprocess.run([executables / "python", script(tmp_path, code)], env=environment(), capture_output=True)
    assert done.returncode == status
    assert told in (done.stdout + done.stderr).decode()


def test_a_killed_process_is_gone(executables, tmp_path):
    file = script(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    process = subprocess.Popen([executables / "python", file], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    number = int(process.stdout.readline())
    assert Path(f"/proc/{number}").exists()
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while Path(f"/proc/{number}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not Path(f"/proc/{number}").exists()
    process.stdout.close()


def test_a_command_is_that_of_the_console(executables):
    alone = Path(sys.executable).with_name("nnunet-ssl")
    for words in (["trainers"], ["split"]):
        here, there = (
            subprocess.run([program, *words], env=environment(), capture_output=True, text=True)
            for program in (executables / "nnunet-ssl", alone)
        )
        assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)


@pytest.mark.parametrize("name", ["PYTHONPATH", "nnUNet_def_n_proc"])
def test_what_is_read_while_modules_are_imported_is_not_the_servers(executables, tmp_path, name):
    own = environment(**{name: {"PYTHONPATH": str(tmp_path), "nnUNet_def_n_proc": "3"}[name]})
    code = "import sys; print('torch' in sys.modules)"
    done = subprocess.run([executables / "python", script(tmp_path, code)], env=own, capture_output=True, check=True)
    assert done.stdout.startswith(b"False")


def _seen(number: int) -> tuple[int, int, bool]:
    return number, os.getpid(), "nnunetv2.run.run_training" in sys.modules


def test_workers_of_multiprocessing_come_from_there(executables):
    assert multiprocessing.spawn.get_executable() == os.fsencode(executables / "python")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        seen = pool.map(_seen, range(8), chunksize=1)
    assert [number for number, _, _ in seen] == list(range(8))
    assert os.getpid() not in {process for _, process, _ in seen}
    assert all(imported for _, _, imported in seen)

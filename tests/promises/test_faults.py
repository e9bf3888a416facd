"""Kills, full disks, and long trainings. With --thorough as often as docs/reliability.md says."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from made_up_results import Results, compare
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from processes import forked
from raw_dataset import RawDataset

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerSemiTC
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

pytestmark = pytest.mark.forks

LONG = {"num_epochs": 12, "num_iterations_per_epoch": 2}


def train(tiny: TinyDataset, cls: type, *, resume: bool) -> None:
    """As nnUNetv2_train, with --c where asked."""
    from nnunetv2.run.run_training import maybe_load_checkpoint

    trainer = tiny.trainer(cls, **LONG)
    maybe_load_checkpoint(trainer, resume, False)
    trainer.run_training()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    companions = checkpoint["nnunet_ssl"]["companions"]
    further = {f"{name}.{k}": v for name, companion in companions.items() for k, v in companion["weights"].items()}
    return checkpoint["network_weights"] | further


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of this process")
def test_killed_trainings_end_with_the_weights_of_the_uninterrupted_one(tmp_path, trainer_class, often, monkeypatch):
    """At random moments, and as soon as a checkpoint is being written; continued with --c every time."""
    sites = {}
    for name in ("whole", "killed"):
        sites[name] = TinyDataset(tmp_path / name, PATCHES["2d"])

    def start(name: str, resume: bool = False) -> int:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(tmp_path / name / variable))
        return forked(lambda: train(sites[name], trainer_class, resume=resume))

    def folder(name: str) -> Path:
        parts = (trainer_class.__name__, "nnUNetPlans", "2d")
        return tmp_path / name / "nnUNet_results" / "Dataset900_Tiny" / "__".join(parts) / "fold_0"

    began = time.monotonic()
    assert os.waitpid(start("whole"), 0)[1] == 0
    duration = time.monotonic() - began
    rng = np.random.default_rng(0)
    kills = while_writing = trainings = 0
    resume = False
    while True:
        child = start("killed", resume)
        if kills < often(2, 9):
            if kills % 2:
                kill_while_writing(child, folder("killed"))
                while_writing += 1
            else:
                time.sleep(rng.uniform(0, duration))
                os.kill(child, signal.SIGKILL)
            kills += 1
        status = os.waitpid(child, 0)[1]
        resume = True
        if os.WIFSIGNALED(status):
            check_checkpoints(folder("killed"))
            continue
        assert status == 0
        trainings += 1
        expected, found = weights(folder("whole")), weights(folder("killed"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        if kills >= often(2, 9):
            break
        resume = False
    print(f"{trainer_class.__name__}: {kills} kills, {while_writing} while writing, {trainings} trainings ended alike")


def kill_while_writing(child: int, folder: Path) -> None:
    """As soon as a checkpoint's temporary file is there, which was not before."""
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.pth.part")}
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for part in folder.glob("*.pth.part"):
            if before.get(part.name) != _changed(part):
                os.kill(child, signal.SIGKILL)
                return
    raise AssertionError("the training ended without writing a checkpoint")


def _changed(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def check_checkpoints(folder: Path) -> None:
    """Whatever has a final name is complete."""
    for file in folder.glob("*.pth"):
        assert torch.load(file, weights_only=False)["nnunet_ssl"]["version"]


# ---- full disks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many KiB; only some users may."""
    disks = []

    def make(kibibytes: int) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a small disk")
        disks.append(disk)
        return disk

    yield make
    # blosc2 maps files into memory.
    gc.collect()
    for disk in disks:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free - leave))
    return ballast


def test_a_checkpoint_on_a_full_disk(tiny, small_disk, monkeypatch):
    disk = small_disk(4096)
    monkeypatch.setenv("nnUNet_results", str(disk))
    trainer = tiny.trainer(nnUNetTrainerDualNet, num_epochs=2)
    trainer.run_training()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    before = file.read_bytes()
    fill(disk, len(before) // 2)
    with pytest.raises(UserError, match=r"checkpoint_final\.pth could not be written.*space left there: 0\.\d MiB"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.part"))


def test_a_training_on_a_full_disk_ends_and_continues(tiny, small_disk, monkeypatch):
    disk = small_disk(4096)
    monkeypatch.setenv("nnUNet_results", str(disk))
    trainer = tiny.trainer(nnUNetTrainerSemiTC)
    original = trainer.on_epoch_start

    def on_epoch_start() -> None:
        original()
        if trainer.current_epoch == 2:
            fill(disk, 8192)

    trainer.on_epoch_start = on_epoch_start
    with pytest.raises(UserError, match=r"could not be written"):
        trainer.run_training()
    (disk / "ballast").unlink()
    again = tiny.trainer(nnUNetTrainerSemiTC)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert again.current_epoch == 2
    again.run_training()
    assert (Path(again.output_folder) / "checkpoint_final.pth").is_file()


def test_preprocessing_on_a_full_disk(tmp_path, small_disk, monkeypatch, capsys):
    raw = RawDataset(tmp_path)
    disk = small_disk(1024)
    raw.output.symlink_to(disk)
    for case in "abc":
        raw.write(f"imagesUn/{case}_0000.png", size=(60, 60))
    assert raw.run() == 0
    first = raw.load("a")
    for case in "de":
        raw.write(f"imagesUn/{case}_0000.png", size=(300, 300))
    ballast = fill(disk, 20_000)
    capsys.readouterr()
    assert raw.run() == 1
    out = capsys.readouterr().out
    for case in "de":
        assert f"{case}.b2nd could not be written" in out
    assert sorted(p.name for p in disk.glob("*.b2nd*")) == ["a.b2nd", "b.b2nd", "c.b2nd"]
    np.testing.assert_array_equal(raw.load("a"), first)
    ballast.unlink()
    assert raw.run() == 0
    assert blosc2.open(str(raw.output / "e.b2nd")).shape == (1, 1, 300, 300)


def test_a_report_on_a_full_disk(results: Results, small_disk, capsys):
    disk = small_disk(2048)
    folder = ("-o", str(disk / "out"))
    assert compare(results, *folder) == 0
    before = {p.name: p.read_bytes() for p in (disk / "out").iterdir()}
    fill(disk, 4096)
    assert compare(results, *folder, "--fill-holes") == 2
    assert "could not be written" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (disk / "out").iterdir()} == before


# ---- long trainings -----------------------------------------------------------------------------------------------


def workers(process: int) -> list[int]:
    """Processes that this one has started, and those that they have."""
    found = [
        int(p) for thread in Path(f"/proc/{process}/task").iterdir() for p in (thread / "children").read_text().split()
    ]
    return [*found, *(p for worker in found for p in workers(worker))]


def memory_and_files(others: Collection[int] = ()) -> tuple[float, int]:
    """MiB of this process and its workers, and their open files; without those of others."""
    processes = {os.getpid(), *workers(os.getpid())} - {*others}
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in processes)
    files = sum(len(list(Path(f"/proc/{p}/fd").iterdir())) for p in processes)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files


@pytest.mark.slow
@pytest.mark.draws
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' process table")
def test_neither_memory_nor_open_files_grow(tiny, often, monkeypatch):
    """2,000 iterations with --thorough, with loaders in processes of their own."""
    # Files of fonts stay open from the first picture on.
    figure = Figure()
    figure.text(0, 0, "text")
    FigureCanvasAgg(figure).draw()
    others = workers(os.getpid())
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    epochs = often(6, 40)
    trainer = tiny.trainer(
        nnUNetTrainerSemiTC, num_epochs=epochs, num_iterations_per_epoch=often(20, 50), picture_every=5,
        supervised_fraction=0.1,
    )  # fmt: skip
    seen = []
    original = trainer.on_epoch_end

    def on_epoch_end() -> None:
        original()
        gc.collect()
        seen.append(memory_and_files(others))

    trainer.on_epoch_end = on_epoch_end
    trainer.run_training()
    memory, files = np.transpose(seen)
    third = epochs // 3
    growth = memory[-third:].mean() - memory[third : 2 * third].mean()
    print(f"{epochs * trainer.num_iterations_per_epoch} iterations: {memory[third]:.0f} MiB, then {growth:+.1f}; "
          f"files {files[third]:.0f} to {files[-1]:.0f}")  # fmt: skip
    assert files[-1] <= files[third]
    assert growth < 0.03 * memory[third]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' process table")
def test_growth_is_seen():
    """The measure of the test above: memory that is kept, and a file that stays open."""
    memory, files = memory_and_files()
    # More than could be left of what other tests have freed.
    kept = [np.ones(2**25), open(os.devnull)]  # noqa: SIM115
    more_memory, more_files = memory_and_files()
    kept[1].close()
    assert more_memory > memory + 100
    assert more_files == files + 1

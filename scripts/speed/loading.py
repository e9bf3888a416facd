"""Share of the time a training waits for data, samples per second of the loaders, and long lists of unlabeled cases."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from setups import DATASET, MEASURED, Case, make_trainer, planned, use_folders, write_cases
from timing import header, peak_of_process, row

from nnunet_ssl.data.cases import find_unlabeled_cases
from nnunet_ssl.data.loader import make_unlabeled_loader
from nnunet_ssl.data.preprocessing import SETTINGS_FILE, UNLABELED_SUFFIX, preprocessing_settings
from nnunet_ssl.data.views import STRONG, STRONG_2

_NUM_CASES = 4
# More batches than the loaders' queues hold.
_WARM_UP = 20


class Stopwatch:
    """Passes on what an iterator gives and adds up the seconds until it gives it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.seconds = 0.0

    def __iter__(self) -> Stopwatch:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.source)
        self.seconds += time.perf_counter() - start
        return batch


@contextlib.contextmanager
def loading(
    cls: type, case: Case, device: torch.device, folder: Path, workers: int, views: Sequence[str] = ()
) -> Iterator[Any]:
    """A trainer whose loaders run, on cases of twice the patch's sides in a folder of their own.

    Args:
        cls: The trainer's.
        case: What it trains.
        device: Where.
        folder: Of the cases; made if missing.
        workers: nnU-Net's setting.
        views: Of unlabeled images, instead of those that the trainer asks for.
    """
    os.environ["nnUNet_n_proc_DA"] = str(workers)
    use_folders(folder)
    preprocessed = folder / "nnUNet_preprocessed"
    if not (preprocessed / DATASET / "splits_final.json").exists():
        write_cases(case, preprocessed, tuple(2 * side for side in case.patch), _NUM_CASES)
    trainer = make_trainer(cls, case, device)
    with contextlib.redirect_stdout(io.StringIO()):
        if getattr(trainer, "uses_unlabeled", False):
            trainer.unlabeled_cases = trainer.find_unlabeled_cases()
        if views:
            own = trainer.loader_settings
            trainer.loader_settings = lambda: dataclasses.replace(own(), views=views)
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    loaders = [trainer.dataloader_train, trainer.dataloader_val, getattr(trainer, "dataloader_unlabeled", None)]
    try:
        yield trainer
    finally:
        for loader in loaders:
            if loader is not None:
                _end(loader)


def share_waiting(
    cases: Mapping[int, Case], names: Sequence[str], device: torch.device, folder: Path, workers: int, steps: int
) -> None:
    """Share of the time of training steps in which no batch is ready, labeled or unlabeled.

    nnU-Net's setting of workers gives the labeled loader as many, its validation loader and the unlabeled one half.
    """
    header(f"waiting, {workers} workers", *names)
    for number, case in cases.items():
        cells = []
        for name in names:
            with loading(MEASURED[name], case, device, folder / str(number), workers) as trainer:
                labeled = Stopwatch(trainer.dataloader_train)
                watches = [labeled]
                if getattr(trainer, "dataloader_unlabeled", None) is not None:
                    trainer.dataloader_unlabeled = Stopwatch(trainer.dataloader_unlabeled)
                    watches.append(trainer.dataloader_unlabeled)
                for step in range(_WARM_UP + steps):
                    if step == _WARM_UP:
                        start = time.perf_counter()
                        for watch in watches:
                            watch.seconds = 0.0
                    trainer.train_step(next(labeled))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                whole = time.perf_counter() - start
            shares = [f"{100 * watch.seconds / whole:.1f} %" for watch in watches]
            cells.append(" + ".join(shares))
        row(case.name, *cells)


def loader_speed(
    cases: Mapping[int, Case], device: torch.device, folder: Path, workers: Sequence[int], batches: int
) -> None:
    """Samples per second of the stock trainer's loader and of the unlabeled ones, by nnU-Net's setting of workers.

    FDPL's has larger patches and a weak view of each, SemiTC's is the plain one, here also with a second strong view.
    One loader runs at a time. The unlabeled ones have half as many processes, at least one, for half as many samples
    per step.
    """
    columns = {
        "stock, labeled": ("stock", ()),
        "SemiTC, unlabeled": ("SemiTC", ()),
        "FDPL, unlabeled": ("FDPL", ()),
        "SemiTC, two strong views": ("SemiTC", (STRONG, STRONG_2)),
    }
    header("samples per second", "workers", *columns)
    for number, case in cases.items():
        for count in workers:
            cells = []
            for name, views in columns.values():
                with loading(MEASURED[name], case, device, folder / str(number), count, views) as trainer:
                    is_stock = name == "stock"
                    source = trainer.dataloader_train if is_stock else trainer.dataloader_unlabeled
                    size = trainer.batch_size if is_stock else trainer.unlabeled_batch_size
                    for other in (trainer.dataloader_train, trainer.dataloader_val):
                        if other is not source:
                            _end(other)
                    # What lies ready in the queues at first would count too.
                    for _ in range(_WARM_UP):
                        next(source)
                    start = time.perf_counter()
                    for _ in range(batches):
                        next(source)
                    cells.append(f"{size * batches / (time.perf_counter() - start):.1f}")
            row(case.name, str(count), *cells)


def start_with_list(length: int, folder: Path) -> tuple[float, float, float]:
    """Seconds to find so many unlabeled cases, seconds until the loader's first batch, and memory in MiB."""
    case = planned("2D", (64, 64), 4, features=(4, 8))
    write_cases(case, folder / "nnUNet_preprocessed", (96, 96), 2)
    os.environ["nnUNet_n_proc_DA"] = "2"
    trainer = make_trainer(MEASURED["SemiTC"], case, torch.device("cpu"))
    base = Path(trainer.preprocessed_dataset_folder)
    image = base / "case_000.b2nd"
    images, raw = Path(str(base) + UNLABELED_SUFFIX), folder / "raw" / DATASET / "imagesUn"
    images.mkdir()
    raw.mkdir(parents=True)
    for i in range(length):
        os.symlink(image, images / f"u{i:06}.b2nd")
        (raw / f"u{i:06}_0000.nii.gz").touch()
    (raw.parent / "dataset.json").write_text('{"channel_names": {"0": "x"}, "labels": {}, "file_ending": ".nii.gz"}')
    settings = preprocessing_settings(trainer.plans_manager, case.configuration)
    save_json(settings, str(images / SETTINGS_FILE))
    before = peak_of_process()
    start = time.perf_counter()
    split = {"train": ["case_000"], "val": ["case_001"], "unlabeled": []}
    cases, _ = find_unlabeled_cases(str(base), str(raw.parent), settings, split, False)
    assert len(cases) == length
    found = time.perf_counter() - start
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    loader = make_unlabeled_loader(cases, trainer.loader_settings())
    next(loader)
    whole = time.perf_counter() - start
    memory = 1024 * (peak_of_process() - before)
    _end(loader)
    return found, whole - found, memory


def growth_with_list(lengths: Sequence[int], script: Path) -> None:
    """Start-up time and memory of the unlabeled loader, each in a process of its own."""
    header("unlabeled cases in the list", "found and checked", "first batch after", "memory of the process")
    for length in lengths:
        words = [sys.executable, str(script), "--list-of", str(length)]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        found, first, memory = map(float, output[-3:])
        row(f"{length:,}", f"{found:.2f} s", f"{first:.2f} s", f"+ {memory:.0f} MiB")


def _end(loader: Any) -> None:
    # Its thread may notice that the workers are gone before it hears that they were told to go, and says so.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loader._finish()

"""Generated bad inputs: every one is told about or does no harm, and healthy cases never notice.

Each round runs in a copy of this process, so that a crash of an image library or an endless loop counts as what it is.
With --thorough 500 of them, otherwise a part.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from PIL import Image
from processes import forked

from nnunet_ssl.cli import main
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerSemiTC
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, make_dataset_json, make_plans

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="runs copies of this process"), pytest.mark.forks]
HEALTHY = ("healthy_a", "healthy_b")


def finished(work: Callable[[], None], output: Path, seconds: float = 120.0) -> str:
    """Run in a copy of this process, with its output in a file: returned. Fails where it crashes or hangs."""

    def redirected() -> None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # pytest has put streams of its own in their place.
        sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)  # noqa: SIM115
        work()

    child = forked(redirected)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            text = output.read_text(errors="replace")
            assert status == 0, re.sub(r"x{9,}", "x..x", text)[-3000:]
            return text
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"hangs: {output.read_text(errors='replace')[-3000:]}")


# ---- images -------------------------------------------------------------------------------------------------------


class Volumes:
    """A planned 3D data set without images."""

    def __init__(self, root: Path) -> None:
        self.raw = root / "nnUNet_raw" / "Dataset900_Tiny"
        self.preprocessed = root / "nnUNet_preprocessed" / "Dataset900_Tiny"
        for folder in (self.raw / "imagesTr", self.raw / "imagesUn", self.preprocessed):
            folder.mkdir(parents=True)
        dataset_json = make_dataset_json({"background": 0, "a": 1}) | {"file_ending": ".nii"}
        (self.preprocessed / "nnUNetPlans.json").write_text(json.dumps(make_plans(PATCHES["3d"])))
        (self.preprocessed / "dataset.json").write_text(json.dumps(dataset_json))
        self.write("labeled_0000.nii", self.noise(np.random.default_rng(1)), "imagesTr")

    @staticmethod
    def noise(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(100, 20, (14, 15, 16)).astype(np.float32)

    def write(self, name: str, array: np.ndarray, folder: str = "imagesUn") -> Path:
        file = self.raw / folder / name
        sitk.WriteImage(sitk.GetImageFromArray(array), str(file))
        return file


Breaker = Callable[[Volumes, str, np.random.Generator], None]


def voxels(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Breaker:
    return lambda data, case, rng: data.write(f"{case}_0000.nii", change(data.noise(rng), rng)) and None


def with_some(value: float) -> Breaker:
    def change(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        array.flat[rng.integers(0, array.size, rng.integers(1, 50))] = value
        return array

    return voxels(change)


def in_bytes(change: Callable[[bytearray, np.random.Generator], bytes]) -> Breaker:
    def break_it(data: Volumes, case: str, rng: np.random.Generator) -> None:
        file = data.write(f"{case}_0000.nii", data.noise(rng))
        file.write_bytes(change(bytearray(file.read_bytes()), rng))

    return break_it


def flip_header(content: bytearray, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 6)):
        content[rng.integers(0, 348)] = rng.integers(0, 256)
    return bytes(content)


def change_spacing(content: bytearray, rng: np.random.Generator) -> bytes:
    value = rng.choice([0.0, -1.0, np.nan, np.inf, 1e-12, 1e9, 1e30])
    content[80:92] = np.full(3, value, np.float32).tobytes()
    return bytes(content)


def hostile_name(data: Volumes, case: str, rng: np.random.Generator) -> None:
    names = [" {}", "{} x", "-{}", "{}\n", "{}'\"", "{}%s%n", "{}{{}}", "é{}", "{}" + "n" * 180, "..{}", "{}_0001",
             "$HOME{}", "{};ls", "{}\\", "CON{}", "{}.nii"]  # fmt: skip
    data.write("x.nii", data.noise(rng)).rename(
        data.raw / "imagesUn" / (str(rng.choice(names)).format(case) + "_0000.nii")
    )


def other_channels(data: Volumes, case: str, rng: np.random.Generator) -> None:
    for channel in rng.choice([(1,), (0, 1), (0, 2), (9999,)][rng.integers(4)], 1):
        data.write(f"{case}_{channel:04d}.nii", data.noise(rng))


def other_files(data: Volumes, case: str, rng: np.random.Generator) -> None:
    file = data.raw / "imagesUn" / f"{case}_0000.nii"
    match rng.integers(5):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to("nowhere")
        case 2:
            file.with_suffix(".nii.gz").write_bytes(b"\x1f\x8b\x08")
        case 3:
            file.write_text('{"a": 1}')
        case _:
            data.write(f"{case}.nii", data.noise(rng))


BREAKERS: dict[str, Breaker] = {
    "NaN": with_some(np.nan),
    "infinite": with_some(np.inf),
    "huge": with_some(3e38),
    "constant": voxels(lambda array, rng: np.full_like(array, rng.integers(5))),
    "one voxel thick": voxels(lambda array, rng: array[:1]),
    "one voxel": voxels(lambda array, rng: array[:1, :1, :1]),
    "flat": voxels(lambda array, rng: array[0]),
    "four axes": voxels(lambda array, rng: np.stack([array] * 2)),
    "other type": voxels(lambda array, rng: array.astype(rng.choice(["int8", "uint16", "int32", "float64", "uint64"]))),
    "truncated": in_bytes(lambda content, rng: bytes(content[: rng.integers(0, len(content))])),
    "header": in_bytes(flip_header),
    "spacing": in_bytes(change_spacing),
    "noise": in_bytes(lambda content, rng: rng.bytes(rng.integers(0, 4000))),
    "hostile name": hostile_name,
    "channels": other_channels,
    "not an image": other_files,
}


def test_broken_images(tmp_path, often):
    rng = np.random.default_rng(2024)
    data = Volumes(tmp_path)
    for case in HEALTHY:
        data.write(f"{case}_0000.nii", data.noise(rng))
    words = ["preprocess", "-d", "900", "-c", "3d_fullres", "-np", "1"]
    output = data.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
    finished(lambda: [][main(words) :], tmp_path / "log")
    expected = {case: blosc2.open(str(output / f"{case}.b2nd"))[:] for case in HEALTHY}
    kinds = list(BREAKERS)
    tried = refused = 0
    for start in range(0, often(48, 304), len(kinds)):
        for file in output.iterdir():
            file.unlink()
        cases = {f"bad{start + i}": kind for i, kind in enumerate(kinds)}
        for case, kind in cases.items():
            BREAKERS[kind](data, case, rng)
        text = finished(lambda: print("status", main(words)), tmp_path / "log")
        assert re.search(r"status [01]$", text.strip())
        assert "Traceback" not in text
        failed = text.split("failed:")[-1]
        written = {p.name.removesuffix(".b2nd"): p for p in output.glob("*.b2nd")}
        assert not list(output.glob("*.part"))
        for case, kind in cases.items():
            files = [name for name in written if case in name]
            told = case in failed or case in repr(failed) or not any(
                case in p.name and p.is_file() for p in (data.raw / "imagesUn").iterdir()
            )  # fmt: skip
            assert told or files, f"{case} ({kind}) vanished: {text}"
            assert all(np.isfinite(blosc2.open(str(written[name]))[:]).all() for name in files), kind
            refused += bool(told and not files)
        for case, voxels_before in expected.items():
            np.testing.assert_array_equal(blosc2.open(str(written[case]))[:], voxels_before)
        tried += len(cases)
        for file in (data.raw / "imagesUn").iterdir():
            if "healthy" not in file.name:
                file.rmdir() if file.is_dir() else file.unlink()
    print(f"{tried} broken images: {refused} refused, {tried - refused} of no harm")


# ---- JSON ---------------------------------------------------------------------------------------------------------

JUNK = [None, True, -1, 0, 10**12, 2.5, float("nan"), float("inf"), "", "x" * 5000, "../../etc", [], {}, [[]], [None],
        {"a": None}, ["a", 1], "é\n"]  # fmt: skip


def damage(content: Any, rng: np.random.Generator) -> Any:
    """One entry somewhere becomes junk, or goes."""
    content = copy.deepcopy(content)
    place, key = None, None
    inner = content
    while isinstance(inner, (dict, list)) and inner and (place is None or rng.random() < 0.75):
        place, key = (
            inner,
            (list(inner)[rng.integers(len(inner))] if isinstance(inner, dict) else rng.integers(len(inner))),
        )
        inner = inner[key]
    if place is None:
        return JUNK[rng.integers(len(JUNK))]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = JUNK[rng.integers(len(JUNK))]
    return content


def as_text(content: Any, rng: np.random.Generator) -> str:
    text = json.dumps(content)
    return text[: rng.integers(len(text))] if rng.random() < 0.1 else text


@pytest.mark.parametrize("name", ["dataset.json", "splits_final.json", "nnUNetPlans.json"])
def test_broken_json_files_of_commands(tmp_path, name, often):
    """What commands do with it: they end well, or tell what is wrong; nothing is half written."""
    rng = np.random.default_rng(7)
    tiny = TinyDataset(tmp_path, PATCHES["2d"])
    (tiny.base / "nnUNetPlans.json").write_text(json.dumps(tiny.plans))
    raw = tmp_path / "nnUNet_raw" / "Dataset900_Tiny"
    for folder in ("imagesTr", "imagesUn"):
        (raw / folder).mkdir()
    for case in (*tiny.labeled, *tiny.hidden, *tiny.validation):
        (raw / "imagesTr" / f"{case}_0000.png").touch()
    Image.fromarray(rng.integers(0, 255, (40, 40)).astype(np.uint8)).save(raw / "imagesUn" / "new_0000.png")
    split = {"train": [*tiny.labeled, *tiny.hidden], "val": list(tiny.validation)}
    (tiny.base / "splits_final.json").write_text(json.dumps([split] * 5))
    shutil.rmtree(f"{tiny.folder}{UNLABELED_SUFFIX}")
    file = tiny.base / name
    content = json.loads(file.read_text())
    commands = {
        "dataset.json": [["preprocess", "-d", "900", "-c", "2d", "-np", "1"], ["split", "-d", "900", "--labeled", "2"]],
        "splits_final.json": [["split", "-d", "900", "--labeled", "2", "--folds", "0"]],
        "nnUNetPlans.json": [
            ["preprocess", "-d", "900", "-c", "2d", "-np", "1"],
            ["configure", "-d", "900", "-o", "New", "--overwrite", "-c", "2d", "--batch-size", "2"],
            ["configure", "-d", "900", "-o", "New", "--overwrite", "-c", "2d", "--partner-network"],
        ],
    }[name]
    before = {p: p.read_bytes() for p in tiny.base.glob("*.json")}

    def statuses() -> list[str]:
        texts = [finished(lambda w=words: print("status", main(w)), tmp_path / "log") for words in commands]
        for text in texts:
            assert re.search(r"status [0-2]\s*$", text), text
        return [text.split()[-1] for text in texts]

    assert set(statuses()) == {"0"}
    seen = []
    for _ in range(often(12, 60)):
        for p in tiny.base.glob("*.json"):
            p.write_bytes(before[p]) if p in before else p.unlink()
        file.write_text(as_text(damage(content, rng), rng))
        damaged = file.read_bytes()
        seen.append(statuses())
        for p in before.keys() - {file, tiny.base / "splits_final.json"}:
            assert p.read_bytes() == before[p]
        if name != "splits_final.json" or seen[-1] == ["2"]:
            assert file.read_bytes() == damaged
        if name == "nnUNetPlans.json" and seen[-1][1:] == ["2", "2"]:
            assert not (tiny.base / "New.json").exists()
    assert not list(tiny.base.rglob("*.part"))
    refused = sum("2" in statuses for statuses in seen)
    print(f"{name}: {len(seen)} damaged, {refused} refused")
    assert refused > 0


@pytest.mark.parametrize("cls", [nnUNetTrainerSemiTC, nnUNetTrainerDualNet], ids=lambda c: c.__name__)
@pytest.mark.parametrize("part", ["plans", "dataset_json", "splits"])
def test_broken_json_files_of_trainings(tmp_path, cls, part, often):
    """A training ends well, or with an error that says what is wrong, before a checkpoint is written."""
    rng = np.random.default_rng(11)
    tiny = TinyDataset(tmp_path, PATCHES["2d"])
    splits = json.loads((tiny.base / "splits_final.json").read_text())
    originals = {"plans": tiny.plans, "dataset_json": tiny.dataset_json, "splits": splits}
    refused = tried = 0
    for _ in range(often(8, 25)):
        damaged = damage(originals[part], rng)
        if part == "splits":
            (tiny.base / "splits_final.json").write_text(json.dumps(damaged))
        elif isinstance(damaged, dict):
            setattr(tiny, part, damaged)
        else:
            continue

        def training() -> None:
            try:
                plans = tiny.plans | {"continue_training": False}
                if isinstance(plans.get("ssl"), dict):
                    # However many epochs it says.
                    plans["ssl"] = plans["ssl"] | {"num_epochs": 1, "num_iterations_per_epoch": 1}
                trainer = cls(plans, "2d", 0, dict(tiny.dataset_json), torch.device("cpu"))
                if "ssl" not in plans:
                    return
                trainer.run_training()
            except UserError as error:
                print("refused:", error)

        text = finished(training, tmp_path / "log")
        tried += 1
        refused += "refused:" in text
    print(f"{cls.__name__}, {part}: {tried} trainings, {refused} refused")

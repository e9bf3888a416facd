"""Whether the tables of the benchmark are made, on its smallest cases; what it measures is no test."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from nnunet_ssl.methods import nnUNetTrainerCPS, nnUNetTrainerFixMatch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "speed" / "step.py"
PARTS = {
    "steps": 4, "memory": 1, "waiting": 1, "usual": 6, "patch": 4, "classes": 4, "list": 2, "workers": 1, "monitor": 3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "stage", "parts"),
    [("0", 2, tuple(PARTS)), ("2", 2, tuple(PARTS)), ("0", 1, ("steps", "memory"))],
    ids=["2d", "anisotropic", "stage 1"],
)
def test_every_table_is_made(executables, case, stage, parts):
    words = ["--smoke", "--cases", case, "--trainers", "stock", "SemiTC", "DualNet", "FDPL", "--only", *parts]
    words += ["--stage", str(stage)]
    done = subprocess.run(
        [str(executables / "python"), str(SCRIPT), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "WARNING" not in done.stdout
    found = re.split(r"^(\w+)$", done.stdout, flags=re.MULTILINE)
    tables = {name: re.findall(r"^\| (?!-)", text, re.MULTILINE) for name, text in zip(found[1::2], found[2::2])}
    assert {name: len(lines) - 1 for name, lines in tables.items()} == {name: PARTS[name] for name in parts}


def test_plans_are_measured_with_the_labels_of_their_data_set(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from setups import case_of_plans, planned

    plans = planned("small", (32, 32), 4, features=(4, 8)).plans | {"dataset_name": "Dataset001_Regions"}
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3, "ignore": 4}
    description = {"channel_names": {"0": "x"}, "labels": labels, "regions_class_order": [1, 2, 3]}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    assert case_of_plans(tmp_path / "plans.json", "2d").num_labels == 4


def test_maps_are_counted_per_image(monkeypatch, tmp_path):
    """A network alone keeps what nnU-Net's loss of it does; twice as many passes keep twice as much."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    kept_maps = importlib.import_module("maps").kept_maps
    found = []
    for cls in (nnUNetTrainerFixMatch, nnUNetTrainerCPS):
        root = tmp_path / cls.__name__
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(name, str(root / name))
        found.append(kept_maps(cls, root))
    one, two = found
    assert 8 < one < 16
    assert two == pytest.approx(2 * one, rel=0.1)

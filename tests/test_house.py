"""The house as a whole: what no single module can promise."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]

LONGEST = 350
# Everything passes through the trainer: what is not a hook of nnU-Net's belongs into a room of its own.
SHORTER = {"nnunet_ssl/training/trainer.py": 300}


def test_files_are_short_enough_to_read():
    folders = ("nnunet_ssl", "trainers", "tests", "scripts")
    lines = {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
    }
    assert set(SHORTER) < set(lines), "a limit for a file that is not there says nothing"
    too_long = {name: count for name, count in lines.items() if count > SHORTER.get(name, LONGEST)}
    assert not too_long, "make two rooms of it"

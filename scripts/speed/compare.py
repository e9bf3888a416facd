#!/usr/bin/env python
"""How long a large comparison takes, and how much memory: hundreds of cases, ten trainers.

Makes label maps with several structures and moved copies of them as predictions, and runs ``nnunet-ssl compare``.

    python scripts/speed/compare.py [--cases 300] [--trainers 10] [--side 512] [--depth 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK

NUM_STRUCTURES = 5


def make_labels(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Ellipsoids of random size, one per structure."""
    labels = np.zeros(shape, np.uint8)
    places = np.meshgrid(*(np.linspace(-1, 1, side) if side > 1 else np.zeros(1) for side in shape), indexing="ij")
    for value in range(1, NUM_STRUCTURES + 1):
        center, radius = generator.uniform(-0.6, 0.6, len(shape)), generator.uniform(0.1, 0.35, len(shape))
        labels[sum(((p - c) / r) ** 2 for p, c, r in zip(places, center, radius)) < 1] = value
    return labels


def write(file: Path, labels: np.ndarray) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(file), useCompression=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--trainers", type=int, default=10)
    parser.add_argument("--side", type=int, default=512, help="of each slice, in pixels")
    parser.add_argument("--depth", type=int, default=1, help="slices")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = ["labelsTs", *(f"trainer_{i}" for i in range(arguments.trainers))]
        for part in names:
            (folder / part).mkdir()
        structures = {"background": 0, **{f"structure {i}": i for i in range(1, NUM_STRUCTURES + 1)}}
        content = {"channel_names": {"0": "x"}, "labels": structures, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(content))
        for case in range(arguments.cases):
            labels = make_labels(generator, (arguments.depth, arguments.side, arguments.side))
            for i, part in enumerate(names):
                write(folder / part / f"case_{case:04d}.nii.gz", np.roll(labels, 3 * i, axis=2))
        predictions = [f"{part}={folder / part}" for part in names[1:]]
        words = ["compare", "--predictions", *predictions, "--labels", str(folder / "labelsTs")]
        command = [str(Path(sys.executable).with_name("nnunet-ssl")), *words, "-o", str(folder / "out")]
        start = time.perf_counter()
        subprocess.run([*command, "-np", str(arguments.processes)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        # Of the largest process; there are as many as asked for, and the one that waits for them.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        size = (folder / "out" / "report.html").stat().st_size / 2**20
        shape = f"{arguments.depth} x {arguments.side} x {arguments.side}"
        what = f"{arguments.cases} cases x {arguments.trainers} trainers, {shape}"
        print(f"{what}: {seconds:.0f} s, at most {peak:.2f} GB per process, report of {size:.1f} MB")


if __name__ == "__main__":
    main()

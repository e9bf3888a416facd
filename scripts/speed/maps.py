#!/usr/bin/env python
"""How many maps of all classes a step of each trainer keeps for its backward pass.

A map holds a number per class and voxel. With many classes they outweigh a network's features: 118 classes on 128 x 128
x 128 voxels are 0.92 GiB per image in float32. Counted in a step with 100 classes on tiny patches, in stage 2, at the
resolution of the image; nothing is timed.

    python scripts/speed/maps.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path

import torch

from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset
from nnunet_ssl.training.hyperparameters import method_name
from nnunet_ssl.training.trainer import SemiSupervisedTrainer

CLASSES = 100


def kept_maps(cls: type[SemiSupervisedTrainer], root: Path) -> float:
    """In units of the map of one image."""
    tiny = TinyDataset(root, PATCHES["2d"], num_labels=CLASSES)
    trainer = tiny.initialized(cls, supervised_fraction=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter([unlabeled]) if trainer.uses_unlabeled else None
    of_one_image = 4 * CLASSES * tiny.patch[0] * tiny.patch[1]
    # Storages are held, so that no later one lies in their place.
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= of_one_image:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.step(*trainer.batches(labeled))
    return sum(storage.nbytes() for storage in kept.values()) / of_one_image


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"
    print("| trainer | maps | of stock's |\n|---|---|---|")
    stock = 0.0
    for cls in TRAINERS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
                os.environ[name] = str(Path(folder) / name)
            maps = kept_maps(cls, Path(folder))
        stock = stock or maps
        print(f"| {method_name(cls)} | {maps:.0f} | {maps / stock:.1f} |", flush=True)


if __name__ == "__main__":
    main()

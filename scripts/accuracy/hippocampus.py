#!/usr/bin/env python
"""Compare the trainers on hippocampi in T1 MRI: two structures, and many cases to score.

For every split, some training cases of one of nnU-Net's folds keep their labels, the rest is unlabeled, and the final
checkpoint is scored on the fold's 40 validation cases. Voxels are the images' own, as in nnU-Net's plan; on a CPU the
patch is nearly the plan's and the network has fewer features. Rows that name a control differ from Supervised by what a
method does besides looking at unlabeled images. Folds 3 and 4 are not reported by default: defaults of the trainers
were tuned on them. Finished trainings are kept: the script resumes where it stopped.

    python scripts/accuracy/hippocampus.py --data DIR/Dataset503_Hippocampus --out DIR --devices cpu cpu
"""

from __future__ import annotations

from options import ROWS, parse_arguments
from runs import Experiment

PAPER = {
    "labeled": ["4", "8", "16", "all"],
    "folds": [0, 1, 2, 0, 1],
    "draws": [0, 0, 0, 1, 1],
    "seeds": [1],
    "rows": [row for row in ROWS if row != "SemiTCPlus"],
}
SCALES = {
    "smoke": {"labeled": ["2"], "folds": [0], "draws": [0], "seeds": [1], "rows": ["Supervised", "DualNet"]}
    | {"downscale": 2.0, "patch_size": [16, 16, 16], "batch_size": 2, "base_features": 4, "max_features": 8}
    | {"epochs": 2, "iterations": 2},
    "cpu": PAPER | {"patch_size": [32, 48, 32], "batch_size": 2, "base_features": 8, "max_features": 64}
    | {"epochs": 20, "iterations": 60},
    "gpu": PAPER | {"epochs": 100, "iterations": 250},
}  # fmt: skip
# nnU-Net's learning rate is slow in short trainings; all crops lie the same way round.
SETTINGS = {"cpu": ("initial_lr=0.05", "mirror_axes=[]")}


def main() -> None:
    arguments = parse_arguments(__doc__, SCALES, ROWS)
    experiment = Experiment(arguments, "3d_fullres", SETTINGS.get(arguments.scale, ("mirror_axes=[]",)))
    experiment.table([ROWS[row] for row in arguments.rows])


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Compare the trainers on chest radiographs: the protocol of Bortsova et al. (MICCAI 2019), table 1.

For every split, some training cases of one of nnU-Net's folds keep their labels, the rest is unlabeled, and the final
checkpoint is scored on the fold's validation cases at full resolution; with --test-images and --test-labels on the test
cases too. All trainers share labels, iterations, augmentation and network. With all labels ("all") nothing is left for
SemiTC, DualNet and FDPL to learn from, so they are left out there, as SemiTC is in the paper. Folds 3 and 4 are not
reported by default: the defaults of the trainers were tuned on them. Finished trainings are kept: the script resumes
where it stopped.

    python scripts/accuracy/jsrt.py --data DIR/Dataset501_JSRT --out DIR --devices cpu cpu
"""

from __future__ import annotations

from options import ROWS, parse_arguments
from runs import Experiment

# These labels name sides, which mirrored or turned images hardly tell apart.
UPRIGHT = ("mirror_axes=[]", "rotation_degrees=15")
# In trainings as short as that of the CPU nnU-Net's learning rate of 0.01 finds no clavicle.
SETTINGS = {"cpu": (*UPRIGHT, "initial_lr=0.05")}
PAPER = {
    "labeled": ["5", "10", "25", "50", "all"],
    "folds": [0, 1, 2, 0, 1],
    "draws": [0, 0, 0, 1, 1],
    "seeds": [1],
    "rows": ["Supervised", "SupTC", "SemiTC", "SemiTCPlus"],
}
SCALES = {
    "smoke": {"labeled": ["2"], "folds": [0], "draws": [0], "seeds": [1], "rows": ["Supervised", "SemiTC"]}
    | {"downscale": 8.0, "batch_size": 2, "base_features": 4, "max_features": 8, "epochs": 2, "iterations": 2},
    "cpu": PAPER | {"downscale": 4.0, "batch_size": 4, "base_features": 16, "max_features": 128}
    | {"epochs": 16, "iterations": 50},
    "gpu": PAPER | {"epochs": 100, "iterations": 250},
}  # fmt: skip


def main() -> None:
    arguments = parse_arguments(__doc__, SCALES, ROWS)
    experiment = Experiment(arguments, "2d", SETTINGS.get(arguments.scale, UPRIGHT))
    experiment.table([ROWS[row] for row in arguments.rows])


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Compare the trainers on left atria in cardiac MRI, with the ablations of the papers.

For every split, some training cases of one of nnU-Net's folds keep their labels, the rest is unlabeled, and the final
checkpoint is scored on the fold's validation cases at full resolution. All rows share labels, iterations, seeds,
augmentation, patch and batch; "Partner" trains the residual-encoder network that DualNet pairs with the plans' own.
Folds 3 and 4 are not reported by default: the defaults of the trainers were tuned on them. Finished trainings are kept:
the script resumes where it stopped.

    python scripts/accuracy/left_atrium.py --data DIR/Dataset502_LeftAtrium --out DIR --devices cpu cpu
"""

from __future__ import annotations

from options import ROWS, Variant, parse_arguments
from runs import Experiment

TERMS = ("pseudo_label", "consistency", "uncertainty", "contrastive")
ROWS = {
    **ROWS,
    "Partner": Variant("Supervised, partner network", "Supervised", partner_network=True),
    **{f"DualNet-{t}": Variant(f"DualNet without {t}", "DualNet", (f"DualNet.{t}_weight=0",)) for t in TERMS},
    "FDPL-fixed-only": Variant("FDPL, fixed only", "FDPL", ("FDPL.dynamic_weight=0",)),
    "FDPL-dynamic-only": Variant("FDPL, dynamic only", "FDPL", ("FDPL.fixed_weight=0",)),
    "FDPL-cutmix": Variant("FDPL without CutMix", "FDPL", ("FDPL.cutmix=none",)),
    "FDPL-cutmix-both": Variant("FDPL, CutMix for both networks", "FDPL", ("FDPL.cutmix=both",)),
}
PAPER = {
    "labeled": ["8", "16"],
    "folds": [0, 1, 2],
    "draws": [0, 0, 0],
    "seeds": [1],
    "rows": ["Supervised", "SupTC", "SemiTC", "SemiTCPlus", "DualNet", "FDPL"],
}
SCALES = {
    "smoke": {"labeled": ["2"], "folds": [0], "draws": [0], "seeds": [1]}
    | {"rows": ["Supervised", "DualNet", "FDPL-both", "Two"]}
    | {"downscale": 2.0, "patch_size": [16, 32, 32], "batch_size": 2, "base_features": 4, "max_features": 8}
    | {"epochs": 2, "iterations": 2},
    "cpu": PAPER | {"downscale": 2.0, "patch_size": [16, 24, 32], "batch_size": 4, "base_features": 8}
    | {"max_features": 64, "epochs": 20, "iterations": 100},
    "gpu": PAPER | {"epochs": 100, "iterations": 250},
}  # fmt: skip
# nnU-Net's learning rate is slow in short trainings; mirrored hearts do not exist.
SETTINGS = {"cpu": ("initial_lr=0.05", "mirror_axes=[]")}


def main() -> None:
    arguments = parse_arguments(__doc__, SCALES, ROWS)
    experiment = Experiment(arguments, "3d_fullres", SETTINGS.get(arguments.scale, ("mirror_axes=[]",)))
    experiment.table([ROWS[row] for row in arguments.rows])


if __name__ == "__main__":
    main()

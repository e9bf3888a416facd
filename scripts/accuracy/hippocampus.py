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

from options import Variant, parse_arguments
from runs import Experiment

METHODS = (
    "SupTC",
    "SemiTC",
    "DualNet",
    "FDPL",
    "MeanTeacher",
    "UAMT",
    "ICT",
    "EM",
    "CPS",
    "FixMatch",
    "UniMatch",
    "BCP",
)
# EM without its term is training on labels alone; with unlabeled images that come on top, on full batches.
LABELS_ALONE = ("EM.entropy_weight=0", "EM.unlabeled_examples=added")
ROWS = {
    "Supervised": Variant("Supervised", "Supervised"),
    "Restart": Variant("Supervised, restart", "EM", (*LABELS_ALONE, "EM.supervised_fraction=0.5")),
    "Averaged": Variant("Supervised, averaged weights", "Supervised", ("averaged_decay=0.99",)),
    "SupTC-consistency": Variant("SupTC without consistency", "SupTC", ("SupTC.consistency_weight=0",)),
    "SemiTC-consistency": Variant("SemiTC without consistency", "SemiTC", ("SemiTC.consistency_weight=0",)),
    "BCP-pseudo": Variant("BCP without pseudo-labels", "BCP", ("BCP.pseudo_label_weight=0",)),
    **{name: Variant(name, name) for name in METHODS},
}
PAPER = {
    "labeled": ["4", "8", "16", "all"],
    "folds": [0, 1, 2, 0, 1],
    "draws": [0, 0, 0, 1, 1],
    "seeds": [1],
    "rows": list(ROWS),
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

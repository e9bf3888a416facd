#!/usr/bin/env python
"""Compare the trainers on left atria in cardiac MRI, with the ablations of the papers, at CPU scale.

For every fold of nnU-Net's own split, some training cases keep their labels, the rest is unlabeled, and the final
checkpoint is scored on the fold's validation cases at full resolution: Dice by nnU-Net's own evaluation, the 95th
percentile of surface distances in mm by ours. All rows share labels, iterations, seeds, augmentation and plans;
"partner" is the residual-encoder network that DualNet pairs with the plans' own. Finished runs are kept: the script
resumes where it stopped.

    python scripts/left_atrium_table.py --data DIR/Dataset502_LeftAtrium --out DIR --labeled 8 --seeds 1 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import SimpleITK
from accuracy import Experiment, Variant, add_common_arguments, print_table

from nnunet_ssl.evaluation.distances import surface_distances
from nnunet_ssl.methods import nnUNetTrainerDualNet

ROWS = {
    "supervised": [Variant("Supervised", "Supervised")],
    "partner": [Variant("Supervised, partner network", "Supervised", partner_network=True)],
    "dual": [Variant("DualNet", "DualNet")],
    "ablation": [
        Variant(f"DualNet without {term}", "DualNet", (f"{term}_weight=0",))
        for term in nnUNetTrainerDualNet.unlabeled_terms
    ],
    "fdpl": [Variant("FDPL", "FDPL")],
    "fdpl-ablation": [
        Variant("FDPL, fixed only", "FDPL", ("dynamic_weight=0",)),
        Variant("FDPL, dynamic only", "FDPL", ("fixed_weight=0",)),
        Variant("FDPL without CutMix", "FDPL", ("cutmix=false",)),
    ],
    "fdpl-shift": [
        Variant(f"FDPL, shift {shift}", "FDPL", (f"shift={shift}",)) for shift in (0.0, 0.0625, 0.1875, 0.25, 0.375)
    ],
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(downscale=2.0, batch_size=2, base_features=16, max_features=64)
    parser.add_argument("--labeled", type=int, nargs="+", default=[8])
    parser.add_argument("--folds", type=int, nargs="+", default=[0], help="nnU-Net's folds to report on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    reported = [row for row in ROWS if row != "fdpl-shift"]
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=reported, help="fdpl-shift is for folds that are not reported"
    )
    return parser.parse_args()


def hd95(experiment: Experiment, validation: Path) -> np.ndarray:
    """Mean over cases per structure, in mm; a case without prediction has no distance and does not count."""
    truth_folder = experiment.arguments.data / "labelsTr"
    per_case = []
    for file in sorted(validation.glob("*.nii.gz")):
        images = [SimpleITK.ReadImage(str(folder / file.name)) for folder in (validation, truth_folder)]
        predicted, truth = (SimpleITK.GetArrayFromImage(image) for image in images)
        spacing = images[1].GetSpacing()[::-1]
        distances = [surface_distances(predicted == v, truth == v, spacing) for v in experiment.structures.values()]
        per_case.append([np.nan if d is None else d.hausdorff_95 for d in distances])
    return np.nanmean(per_case, axis=0)


def main() -> None:
    arguments = parse_arguments()
    experiment = Experiment(arguments, "3d_fullres", labeled=[8, 16])
    variants = [variant for row in arguments.rows for variant in ROWS[row]]
    for labeled in arguments.labeled:
        dice, distance = ({variant.name: [] for variant in variants} for _ in range(2))
        runs = [(seed, base) for seed in arguments.seeds for base in arguments.folds]
        for seed, base in runs:
            for variant in variants:
                slug = "".join(c for c in variant.name.title() if c.isalnum())
                plans = f"nnUNetPlansTable_{slug}_{seed}"
                validation = experiment.run(variant, plans, [f"seed={seed}"], experiment.fold(base, labeled))
                dice[variant.name].append(experiment.overlap(validation, "Dice"))
                distance[variant.name].append(hd95(experiment, validation))
                values = f"Dice {dice[variant.name][-1].mean():.2f}, HD95 {distance[variant.name][-1].mean():.2f} mm"
                print(f"{variant.name}, seed {seed}, fold {base}: {values}", flush=True)
        names = [f"seed {seed}, fold {base}" for seed, base in runs]
        for title, rows in (
            (f"{labeled} labeled, Dice in percent", dice),
            (f"{labeled} labeled, HD95 in mm", distance),
        ):
            print_table(title, rows, names, list(experiment.structures))


if __name__ == "__main__":
    main()

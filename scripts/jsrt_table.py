#!/usr/bin/env python
"""Compare the trainers on chest radiographs: the protocol of Bortsova et al. (MICCAI 2019), table 1, at CPU scale.

For every fold of nnU-Net's own split, some training cases keep their labels, the rest is unlabeled, and the final
checkpoint is scored on the fold's validation cases at full resolution by nnU-Net's own evaluation. All trainers of a
row share labels, iterations, augmentation and network. Finished runs are kept: the script resumes where it stopped.

    python scripts/jsrt_table.py --data DIR/Dataset501_JSRT --out DIR --labeled 5 --folds 0 1 2
"""

from __future__ import annotations

import argparse

from accuracy import Experiment, Variant, add_common_arguments, print_table

AUGMENTATIONS = {"default": [], "upright": ["mirror_axes=[]", "rotation_degrees=15"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(downscale=4.0, batch_size=4)
    parser.add_argument("--labeled", type=int, nargs="+", default=[5])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2], help="nnU-Net's folds to report on")
    parser.add_argument("--trainers", nargs="+", default=["Supervised", "SupTC", "SemiTC"])
    parser.add_argument("--augmentations", nargs="+", choices=AUGMENTATIONS, default=list(AUGMENTATIONS))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    experiment = Experiment(arguments, "2d", labeled=[5, 10, 25])
    variants = [Variant(name, name) for name in arguments.trainers]
    for labeled in arguments.labeled:
        for augmentation in arguments.augmentations:
            rows = {variant.name: [] for variant in variants}
            for base in arguments.folds:
                fold = experiment.fold(base, labeled)
                for variant in variants:
                    settings = ["seed=1", *AUGMENTATIONS[augmentation]]
                    validation = experiment.run(variant, f"nnUNetPlansTable_{augmentation}", settings, fold)
                    rows[variant.name].append(experiment.overlap(validation, "IoU"))
                    print(f"{variant.name}, fold {base}: mean IoU {rows[variant.name][-1].mean():.2f}", flush=True)
            title = f"{labeled} labeled, {augmentation} augmentation, IoU in percent"
            print_table(title, rows, [f"fold {base}" for base in arguments.folds], list(experiment.structures))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Compare the trainers on chest radiographs: the protocol of Bortsova et al. (MICCAI 2019), table 1, at CPU scale.

For every fold of nnU-Net's own split, some training cases keep their labels, the rest is unlabeled, and the final
checkpoint is scored on the fold's validation cases at full resolution by nnU-Net's own evaluation. All trainers of a
row share labels, iterations, augmentation and network. Finished runs are kept: the script resumes where it stopped.

    python scripts/jsrt_table.py --data DIR/Dataset501_JSRT --out DIR --labeled 5 --folds 0 1 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_ssl.demo.commands import Commands

AUGMENTATIONS = {
    "default": [],
    "upright": ["--set", "mirror_axes=[]", "--set", "rotation_degrees=15"],
}
CONFIGURATION = "2d"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the raw data set, DatasetXXX_Name")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything the script makes")
    parser.add_argument("--labeled", type=int, nargs="+", default=[5])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2], help="nnU-Net's folds to report on")
    parser.add_argument("--trainers", nargs="+", default=["Supervised", "SupTC", "SemiTC"])
    parser.add_argument("--augmentations", nargs="+", choices=AUGMENTATIONS, default=list(AUGMENTATIONS))
    parser.add_argument("--downscale", type=float, default=4.0, help="512 px becomes 512 / downscale")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--base-features", type=int, default=16)
    parser.add_argument("--max-features", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=50, help="steps per epoch")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="further hyper-parameters")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def plans_name(augmentation: str) -> str:
    return f"nnUNetPlansTable_{augmentation}"


def prepare(arguments: argparse.Namespace, commands: Commands, dataset: str) -> list[dict]:
    """Plan, write the small plans, preprocess and split; returns the folds."""
    raw = arguments.out / "nnUNet_raw"
    raw.mkdir(exist_ok=True)
    if not (raw / dataset).exists():
        os.symlink(arguments.data.resolve(), raw / dataset, target_is_directory=True)
    preprocessed = arguments.out / "nnUNet_preprocessed" / dataset
    number = str(int(dataset[7:10]))
    if not (preprocessed / "nnUNetPlans.json").exists():
        commands.run("nnUNetv2_extract_fingerprint", "-d", number, "-np", "2")
        commands.run("nnUNetv2_plan_experiment", "-d", number)
    small = "nnUNetPlansSmall"
    sizes = {"downscale": "downscale", "batch-size": "batch_size", "base-features": "base_features"}
    sizes["max-features"] = "max_features"
    if not (preprocessed / f"{small}.json").exists():
        options = [w for flag, name in sizes.items() for w in (f"--{flag}", str(getattr(arguments, name)))]
        commands.run("nnunet-ssl", "configure", "-d", dataset, "-o", small, "-c", CONFIGURATION, *options)
        commands.run("nnUNetv2_preprocess", "-d", number, "-c", CONFIGURATION, "-plans_name", small, "-np", "2")
    budget = [f"num_epochs={arguments.epochs}", f"num_iterations_per_epoch={arguments.iterations}"]
    common = [*budget, "num_val_iterations_per_epoch=1", "cpu_bfloat16=true", "seed=1", *arguments.settings]
    for augmentation in arguments.augmentations:
        pairs = [word for setting in common for word in ("--set", setting)] + AUGMENTATIONS[augmentation]
        output = ("-p", small, "-o", plans_name(augmentation))
        commands.run("nnunet-ssl", "configure", "-d", dataset, *output, "--overwrite", *pairs)
    splits_file = preprocessed / "splits_final.json"
    if not splits_file.exists():
        # All at once, so that larger labeled sets contain the smaller ones and fold numbers do not depend on options.
        commands.run("nnunet-ssl", "split", "-d", dataset, "--labeled", "5", "10", "25")
    return load_json(str(splits_file))


def fold_number(splits: list[dict], base: int, labeled: int) -> int:
    """The fold that hides labels of a base fold's training cases."""
    for number, split in enumerate(splits):
        if "unlabeled" in split and len(split["train"]) == labeled and split["val"] == splits[base]["val"]:
            return number
    raise SystemExit(
        f"splits_final.json has no fold with {labeled} labels from fold {base}; remove the file to redo it."
    )


def refuse_other_settings(of_model: Path, wanted: Path) -> None:
    """A finished run counts only if it ran with the settings asked for now."""
    if load_json(str(of_model)) != load_json(str(wanted)):
        raise SystemExit(f"{of_model.parent} was trained with other settings than {wanted}; use another --out.")


def scores(summary: Path, structures: dict[str, int], metric: str) -> np.ndarray:
    """Mean over cases per structure, in percent."""
    means = load_json(str(summary))["mean"]
    return np.array([100 * means[str(label)][metric] for label in structures.values()])


def print_table(arguments: argparse.Namespace, results: dict, structures: dict[str, int]) -> None:
    for labeled in arguments.labeled:
        for augmentation in arguments.augmentations:
            print(f"\n{labeled} labeled, {augmentation} augmentation, IoU in percent\n")
            folds = arguments.folds
            print(f"| trainer | mean ± sd over splits | {' | '.join(f'fold {f}' for f in folds)} | "
                  f"{' | '.join(structures)} |")  # fmt: skip
            print("|---" * (2 + len(folds) + len(structures)) + "|")
            for trainer in arguments.trainers:
                runs = [results.get((labeled, augmentation, fold, trainer)) for fold in folds]
                if any(run is None for run in runs):
                    continue
                table = np.stack(runs)
                per_fold, per_structure = table.mean(1), table.mean(0)
                spread = per_fold.std(ddof=1) if len(folds) > 1 else 0.0
                cells = [f"{per_fold.mean():.1f} ± {spread:.1f}", *(f"{v:.1f}" for v in (*per_fold, *per_structure))]
                print(f"| {trainer} | {' | '.join(cells)} |")


def main() -> None:
    arguments = parse_arguments()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    commands = Commands(arguments.out)
    dataset = arguments.data.resolve().name
    splits = prepare(arguments, commands, dataset)
    labels = load_json(str(arguments.data / "dataset.json"))["labels"]
    structures = {name: value for name, value in labels.items() if value != 0}
    results = {}
    jobs = [(n, a, f, t) for n in arguments.labeled for f in arguments.folds for a in arguments.augmentations
            for t in arguments.trainers]  # fmt: skip
    for job in jobs:
        labeled, augmentation, base, trainer = job
        fold = fold_number(splits, base, labeled)
        plans = plans_name(augmentation)
        folder = arguments.out / "nnUNet_results" / dataset / f"nnUNetTrainer{trainer}__{plans}__{CONFIGURATION}"
        summary = folder / f"fold_{fold}" / "validation" / "summary.json"
        if summary.exists():
            refuse_other_settings(
                folder / "plans.json", arguments.out / "nnUNet_preprocessed" / dataset / f"{plans}.json"
            )
        else:
            options = ("-p", plans, "-tr", f"nnUNetTrainer{trainer}", "-device", arguments.device)
            commands.run("nnUNetv2_train", dataset, CONFIGURATION, str(fold), *options, epochs=arguments.epochs)
        results[job] = scores(summary, structures, "IoU")
        print(f"{job}: mean IoU {results[job].mean():.2f}", flush=True)
    print_table(arguments, results, structures)


if __name__ == "__main__":
    main()

"""What the accuracy tables share: prepare small plans, train every variant on every fold, score, print.

Finished runs are kept: a script resumes where it stopped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_ssl.demo.commands import Commands
from nnunet_ssl.precision import cpu_has_bfloat16

_SMALL = "nnUNetPlansSmall"


@dataclass(frozen=True)
class Variant:
    """One row of a table: a trainer, with settings of its own, perhaps on the partner network."""

    name: str
    trainer: str
    settings: tuple[str, ...] = ()
    partner_network: bool = False


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="the raw data set, DatasetXXX_Name")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything the script makes")
    parser.add_argument("--downscale", type=float, help="coarser voxels by this factor")
    parser.add_argument("--patch-size", type=int, nargs="+", help="patch, in voxels")
    parser.add_argument("--batch-size", type=int, help="batch of the plans, labeled and unlabeled together")
    parser.add_argument("--base-features", type=int, default=16)
    parser.add_argument("--max-features", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=50, help="steps per epoch")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="further hyper-parameters")
    parser.add_argument("--device", default="cpu")


class Experiment:
    """A data set in a folder of its own, with small plans, and the runs on it.

    Args:
        arguments: With what ``add_common_arguments`` declares.
        configuration: nnU-Net's, "2d" or "3d_fullres".
        labeled: The sizes of labeled sets for which folds are made, all at once: larger sets then contain the smaller
            ones, and fold numbers do not depend on what is asked for first.
    """

    def __init__(self, arguments: argparse.Namespace, configuration: str, labeled: Sequence[int]) -> None:
        self.arguments, self.configuration = arguments, configuration
        self.out = arguments.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.commands = Commands(self.out)
        self.dataset = arguments.data.resolve().name
        self.preprocessed = self.out / "nnUNet_preprocessed" / self.dataset
        self._prepare(labeled)
        self.splits: list[dict] = load_json(str(self.preprocessed / "splits_final.json"))
        labels = load_json(str(arguments.data / "dataset.json"))["labels"]
        self.structures = {name: value for name, value in labels.items() if value != 0}

    def _prepare(self, labeled: Sequence[int]) -> None:
        raw = self.out / "nnUNet_raw"
        raw.mkdir(exist_ok=True)
        if not (raw / self.dataset).exists():
            os.symlink(self.arguments.data.resolve(), raw / self.dataset, target_is_directory=True)
        number = str(int(self.dataset[7:10]))
        if not (self.preprocessed / "nnUNetPlans.json").exists():
            self.commands.run("nnUNetv2_extract_fingerprint", "-d", number, "-np", "2")
            self.commands.run("nnUNetv2_plan_experiment", "-d", number)
        if not (self.preprocessed / f"{_SMALL}.json").exists():
            options = []
            for name in ("downscale", "patch_size", "batch_size", "base_features", "max_features"):
                value = getattr(self.arguments, name)
                if value is not None:
                    values = value if isinstance(value, list) else [value]
                    options += [f"--{name.replace('_', '-')}", *map(str, values)]
            target = ("-d", self.dataset, "-o", _SMALL, "-c", self.configuration)
            self.commands.run("nnunet-ssl", "configure", *target, *options)
            plans = ("-c", self.configuration, "-plans_name", _SMALL, "-np", "2")
            self.commands.run("nnUNetv2_preprocess", "-d", number, *plans)
        if not (self.preprocessed / "splits_final.json").exists():
            self.commands.run("nnunet-ssl", "split", "-d", self.dataset, "--labeled", *map(str, labeled))

    def fold(self, base: int, labeled: int) -> int:
        """The fold that hides labels of one of nnU-Net's own folds."""
        for number, split in enumerate(self.splits):
            if "unlabeled" in split and len(split["train"]) == labeled and split["val"] == self.splits[base]["val"]:
                return number
        raise SystemExit(
            f"splits_final.json has no fold with {labeled} labels from fold {base}; remove the file to redo it."
        )

    def run(self, variant: Variant, plans: str, settings: Sequence[str], fold: int) -> Path:
        """Train a variant on a fold under a plans name, unless that is done; returns its validation folder.

        Raises:
            SystemExit: Where a finished run had other settings than those asked for.
        """
        budget = [f"num_epochs={self.arguments.epochs}", f"num_iterations_per_epoch={self.arguments.iterations}"]
        precision = f"cpu_bfloat16={str(cpu_has_bfloat16()).lower()}"
        common = [*budget, "num_val_iterations_per_epoch=1", precision]
        chosen = [*common, *self.arguments.settings, *settings, *variant.settings]
        pairs = [word for setting in chosen for word in ("--set", setting)]
        network = ["-c", self.configuration, "--partner-network"] if variant.partner_network else []
        source = ("-d", self.dataset, "-p", _SMALL, "-o", plans, "--overwrite")
        self.commands.run("nnunet-ssl", "configure", *source, *network, *pairs)
        trainer = f"nnUNetTrainer{variant.trainer}"
        folder = self.out / "nnUNet_results" / self.dataset / f"{trainer}__{plans}__{self.configuration}"
        validation = folder / f"fold_{fold}" / "validation"
        if not (validation / "summary.json").exists():
            options = ("-p", plans, "-tr", trainer, "-device", self.arguments.device)
            words = (self.dataset, self.configuration, str(fold), *options)
            self.commands.run("nnUNetv2_train", *words, epochs=self.arguments.epochs)
        elif load_json(str(folder / "plans.json")) != load_json(str(self.preprocessed / f"{plans}.json")):
            raise SystemExit(f"{folder} was trained with other settings than those asked for; use another --out.")
        return validation

    def overlap(self, validation: Path, metric: str) -> np.ndarray:
        """nnU-Net's own mean over cases per structure, in percent."""
        means = load_json(str(validation / "summary.json"))["mean"]
        return np.array([100 * means[str(label)][metric] for label in self.structures.values()])


def print_table(title: str, rows: dict[str, list[np.ndarray]], runs: Sequence[str], structures: Sequence[str]) -> None:
    """Mean and standard deviation over runs, each run, and each structure over all runs; values (structures,)."""
    print(f"\n{title}\n")
    print(f"| | mean ± sd | {' | '.join(runs)} | {' | '.join(structures)} |")
    print("|---" * (2 + len(runs) + len(structures)) + "|")
    for name, values in rows.items():
        table = np.stack(values)
        per_run, per_structure = table.mean(1), table.mean(0)
        spread = per_run.std(ddof=1) if len(per_run) > 1 else 0.0
        cells = [f"{per_run.mean():.1f} ± {spread:.1f}", *(f"{v:.1f}" for v in (*per_run, *per_structure))]
        print(f"| {name} | {' | '.join(cells)} |")

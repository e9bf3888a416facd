"""What the accuracy tables share: prepare plans and folds, train every variant, predict, compare, print.

Finished trainings and predictions are kept: a script resumes where it stopped. Trainings run one after the other, or
on several devices at once.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from options import Split, Training, Variant
from tables import Costs, Values, collect, first_row, overview, summary, summary_table, tables

from nnunet_ssl.data.raw_images import TEST_FOLDER, UNLABELED_FOLDER
from nnunet_ssl.data.splits import hide_labels
from nnunet_ssl.demo.commands import Commands
from nnunet_ssl.files import write_atomically
from nnunet_ssl.nnunet.plans import PLANS_KEY
from nnunet_ssl.runtime.cpu import cpu_has_bfloat16, own_cores
from nnunet_ssl.training.run_record import RECORD_FILE

_SMALL = "nnUNetPlansSmall"
# They decide on patch, batch and network; the plans with them are made once.
_NETWORK_OPTIONS = ("downscale", "patch_size", "batch_size", "base_features", "max_features")
# Memory stays with the process, as on a GPU: returning it to the kernel after every step costs a fifth of the time.
_KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


class Experiment:
    """A data set in a folder of its own, with plans of the asked size, and the trainings on it.

    Args:
        arguments: As ``parse_arguments`` returns them.
        configuration: nnU-Net's, "2d" or "3d_fullres".
        settings: Hyper-parameters of all trainings.
    """

    def __init__(self, arguments: argparse.Namespace, configuration: str, settings: Sequence[str] = ()) -> None:
        self.arguments, self.configuration = arguments, configuration
        self.out = arguments.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.commands = Commands(self.out)
        self.dataset = arguments.data.resolve().name
        self.preprocessed = self.out / "nnUNet_preprocessed" / self.dataset
        self.results = self.out / "nnUNet_results" / self.dataset
        budget = [f"num_epochs={arguments.epochs}", f"num_iterations_per_epoch={arguments.iterations}"]
        if arguments.devices[0] == "cpu":
            budget += ["num_val_iterations_per_epoch=1", f"cpu_bfloat16={str(cpu_has_bfloat16()).lower()}"]
        self.settings = [*budget, *settings, *arguments.settings]
        self._prepare()

    def _prepare(self) -> None:
        network = {option: getattr(self.arguments, option) for option in _NETWORK_OPTIONS}
        asked = {"data set": self.dataset, "configuration": self.configuration, **network}
        record = self.out / "experiment.json"
        made = load_json(str(record)) if record.exists() else asked
        if made != asked:
            raise SystemExit(f"{self.out} holds plans made for {made}, not for {asked}; use another --out.")
        write_atomically(str(record), json.dumps(asked, indent=2).encode())
        raw = self.out / "nnUNet_raw" / self.dataset
        raw.mkdir(parents=True, exist_ok=True)
        parts = {part.name: part for part in self.arguments.data.resolve().iterdir()}
        # Unlabeled are the cases that hide their labels; test images come by an option of their own.
        for other in (UNLABELED_FOLDER, TEST_FOLDER):
            parts.pop(other, None)
        if self.arguments.test_images is not None:
            parts[TEST_FOLDER] = self.arguments.test_images.resolve()
        for name, target in parts.items():
            if not (raw / name).exists():
                os.symlink(target, raw / name, target_is_directory=target.is_dir())
        number = str(int(self.dataset[7:10]))
        if not (self.preprocessed / "nnUNetPlans.json").exists():
            self.commands.run("nnUNetv2_extract_fingerprint", "-d", number, "-np", "2")
            self.commands.run("nnUNetv2_plan_experiment", "-d", number)
        if not (self.preprocessed / f"{_SMALL}.json").exists():
            options = []
            for option, value in network.items():
                if value is not None:
                    values = value if isinstance(value, list) else [value]
                    options += [f"--{option.replace('_', '-')}", *map(str, values)]
            target = ("-d", self.dataset, "-o", _SMALL, "-c", self.configuration)
            self.commands.run("nnunet-ssl", "configure", *target, *options)
            plans = ("-c", self.configuration, "-plans_name", _SMALL, "-np", "2")
            self.commands.run("nnUNetv2_preprocess", "-d", number, *plans)
        if self.arguments.test_images is not None:
            plans = ("-c", self.configuration, "-p", _SMALL, "-np", "2")
            self.commands.run("nnunet-ssl", "preprocess", "-d", self.dataset, "--test-images", *plans)

    def table(self, variants: Sequence[Variant]) -> None:
        """Train every variant on every split, with every number of labels and seed that was asked for, and compare."""
        plans: dict[tuple[Variant, int], str] = {}
        for seed in self.arguments.seeds:
            for variant in variants:
                # Trainers without settings of their own share plans.
                own = "".join(c for c in variant.name.title() if c.isalnum())
                kind = own if variant.settings or variant.partner_network else "All"
                plans[variant, seed] = f"nnUNetPlansTable_{kind}_{seed}"
            for name in sorted({plans[variant, seed] for variant in variants}):
                variant = next(v for v in variants if plans[v, seed] == name)
                self.configure(variant, name, [f"seed={seed}"])
        tables: dict[str, tuple[list[Split], dict[str, list[Training]]]] = {}
        for labeled in self.arguments.labeled:
            splits = self.splits(labeled)
            folds = [self.fold(split, labeled) for split in splits]
            for seed in self.arguments.seeds:
                title = f"{labeled} labeled" + (f", seed {seed}" if len(self.arguments.seeds) > 1 else "")
                rows = [v for v in variants if v.has_something_to_learn(labeled)]
                tables[title] = splits, {v.name: [Training(v, plans[v, seed], fold) for fold in folds] for v in rows}
        self.run(training for _, table in tables.values() for row in table.values() for training in row)
        self.compare(tables)

    def splits(self, labeled: str) -> list[Split]:
        """The splits with so many labels, draw by draw; draws do not differ where every case keeps its label."""
        if labeled == "all":
            return [Split(base, 0) for base in dict.fromkeys(self.arguments.folds)]
        pairs = zip(self.arguments.folds, self.arguments.draws)
        # The tables' order of values, too: each draw has a report of its own.
        return sorted((Split(*pair) for pair in pairs), key=lambda split: split.draw)

    def fold(self, split: Split, labeled: str) -> int:
        """The number of the fold in splits_final.json that keeps so many labels; made where it is missing."""
        if labeled == "all":
            return split.base
        file = self.preprocessed / "splits_final.json"
        for attempt in ("find", "make and find"):
            if attempt != "find":
                draw = ("--folds", str(split.base), "--labeled", labeled, "--seed", str(split.draw))
                self.commands.run("nnunet-ssl", "split", "-d", self.dataset, *draw)
            folds = load_json(str(file)) if file.exists() else []
            if len(folds) > split.base:
                own = [fold for fold in folds if "unlabeled" not in fold]
                (wanted,) = hide_labels(own, [split.base], [int(labeled)], split.draw)
                if wanted.split in folds:
                    return folds.index(wanted.split)
        raise SystemExit(f"{file} has no fold with {labeled} labels from {split.name}; remove it to start anew.")

    def configure(self, variant: Variant, plans: str, settings: Sequence[str] = ()) -> None:
        """Write the plans of a variant's trainings."""
        chosen = [*self.settings, *settings, *variant.settings]
        pairs = [word for setting in chosen for word in ("--set", setting)]
        network = ["-c", self.configuration, "--partner-network"] if variant.partner_network else []
        source = ("-d", self.dataset, "-p", _SMALL, "-o", plans, "--overwrite")
        self.commands.run("nnunet-ssl", "configure", *source, *network, *pairs)

    def model(self, training: Training) -> Path:
        """nnU-Net's folder of a model, over all its folds."""
        return self.results / f"nnUNetTrainer{training.variant.trainer}__{training.plans}__{self.configuration}"

    def _refuse_other_settings(self, training: Training) -> None:
        """What was trained with other plans, or with defaults that have changed since, must not enter a table."""
        model, planned = self.model(training), load_json(str(self.preprocessed / f"{training.plans}.json"))
        record = model / f"fold_{training.fold}" / RECORD_FILE
        if not record.exists():
            return
        cls = training.variant.trainer_class
        wanted = json.loads(json.dumps(cls.read_hyperparameters(planned).as_dict()))
        recorded = load_json(str(record))
        saw, sees = TEST_FOLDER in recorded["unlabeled"].values(), self.arguments.test_images is not None
        if cls.transductive and saw != sees:
            raise SystemExit(f"{record.parent} was trained with{'' if saw else 'out'} test images; use another --out.")
        used = recorded["hyperparameters"]
        changed = sorted(name for name in {*wanted, *used} if wanted.get(name) != used.get(name))
        # Settings of other methods make no difference.
        network, used_network = (
            {key: value for key, value in plans.items() if key != PLANS_KEY}
            for plans in (planned, load_json(str(model / "plans.json")))
        )
        if changed or used_network != network:
            differences = ", ".join(f"{n} {used.get(n)} and not {wanted.get(n)}" for n in changed) or "another network"
            raise SystemExit(f"{record.parent} was trained with {differences}; use another --out.")

    def run(self, trainings: Iterable[Training]) -> None:
        """Do what is left of the trainings and of the predictions of test cases, on every device one at a time.

        Raises:
            SystemExit: Where one that is there was trained with other settings than those asked for.
        """
        waiting: queue.Queue[Training] = queue.Queue()
        for training in dict.fromkeys(trainings):
            self._refuse_other_settings(training)
            waiting.put(training)
        failures: list[BaseException] = []

        def work(device: str, commands: Commands) -> None:
            while not failures:
                try:
                    training = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._run(training, device, commands)
                except BaseException as error:
                    failures.append(error)

        devices = self.arguments.devices
        threads = [
            threading.Thread(target=work, args=(device, self._commands_on(device, devices[:place].count(device))))
            for place, device in enumerate(devices)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _commands_on(self, device: str, place: int) -> Commands:
        if device != "cpu":
            number = device.partition(":")[2] or "0"
            return Commands(self.out, {"CUDA_VISIBLE_DEVICES": number}, quiet=len(self.arguments.devices) > 1)
        sharing = self.arguments.devices.count("cpu")
        own = own_cores()[place::sharing] or own_cores()
        environment = {"OMP_NUM_THREADS": str(len(own)), "OMP_WAIT_POLICY": "PASSIVE", **_KEEP_MEMORY}
        return Commands(self.out, environment, cores=own if sharing > 1 else None, quiet=sharing > 1)

    def _run(self, training: Training, device: str, commands: Commands) -> None:
        folder = self.model(training) / f"fold_{training.fold}"
        trainer, words = f"nnUNetTrainer{training.variant.trainer}", ("-p", training.plans, "-tr")
        kind = device.partition(":")[0]
        if not (folder / "validation" / "summary.json").exists():
            # What was interrupted goes on from its last checkpoint; after the last epoch that is the final one.
            kept = [folder / f"checkpoint_{name}.pth" for name in ("final", "latest")]
            go_on = ["--c"] if any(file.exists() for file in kept) else []
            target = (self.dataset, self.configuration, str(training.fold), *words, trainer, "-device", kind, *go_on)
            commands.run("nnUNetv2_train", *target, epochs=self.arguments.epochs)
        output = self._test_predictions(training)
        if self.arguments.test_images is not None and not output.exists():
            unfinished = output.with_name(f"{output.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            source = ("-i", str(self.arguments.test_images), "-o", str(unfinished), "-f", str(training.fold))
            target = ("-d", self.dataset, "-c", self.configuration, *words, trainer, "-device", kind)
            commands.run("nnUNetv2_predict", *source, *target, "-npp", "1", "-nps", "1")
            os.replace(unfinished, output)

    def _test_predictions(self, training: Training) -> Path:
        return self.out / "test_predictions" / self.model(training).name / f"fold_{training.fold}"

    def compare(self, comparisons: Mapping[str, tuple[Sequence[Split], Mapping[str, Sequence[Training]]]]) -> None:
        """Write reports, and write and print tables of Dice, IoU and HD95: of validation cases, and of test cases.

        Args:
            comparisons: By title, which is the name of their folder of reports and tables.md too: the splits, which are
                columns, and by row a training per split. Several share an overview.md, where each is one column.
        """
        found: dict[str, dict[str, Values]] = {"validation cases": {}, "test cases": {}}
        for title, (splits, trainings) in comparisons.items():
            reports = self.out / "reports" / title.replace(" ", "_").replace(",", "")
            found["validation cases"][title] = self._compare_validation_cases(reports, splits, trainings)
            if self.arguments.test_images is not None:
                found["test cases"][title] = self._compare_test_cases(reports, splits, trainings)
            columns = [split.name for split in splits]
            _write_and_print(
                reports / "tables.md",
                (tables(f"{title}, {cases}", of[title], columns) for cases, of in found.items() if of),
            )
        if len(comparisons) > 1:
            file = self.out / "reports" / "overview.md"
            _write_and_print(file, (overview(cases, of) for cases, of in found.items() if of))
        self._summarize(comparisons, found["validation cases"])

    def _summarize(
        self,
        comparisons: Mapping[str, tuple[Sequence[Split], Mapping[str, Sequence[Training]]]],
        found: Mapping[str, Values],
    ) -> None:
        """Write and print what every row gains and costs: summary.md, summary.csv and summary.json."""
        records: dict[str, list[dict[str, Any]]] = {}
        for title, (splits, trainings) in comparisons.items():
            # All labels, with the same seed; their splits are nnU-Net's folds.
            whole = f"all labeled{title.partition('labeled')[2]}"
            ceiling: dict[str, np.ndarray] = {}
            if whole in found and whole != title:
                bases = [split.base for split in comparisons[whole][0]]
                places = [bases.index(split.base) for split in splits]
                ceiling = {metric: first_row(of)[places] for metric, of in found[whole].items()}
            costs = {row: [self._costs(training) for training in of_row] for row, of_row in trainings.items()}
            records[title] = summary(found[title], ceiling, costs)
        text = "".join(summary_table(title, of_one) for title, of_one in records.items())
        reports = self.out / "reports"
        _write_and_print(reports / "summary.md", [text])
        write_atomically(str(reports / "summary.json"), json.dumps(records, indent=1).encode())
        flat = [{"title": title, **record} for title, of_one in records.items() for record in of_one]
        table = io.StringIO()
        writer = csv.DictWriter(table, [name for name in flat[0] if name != "splits"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)
        write_atomically(str(reports / "summary.csv"), table.getvalue().encode())

    def _costs(self, training: Training) -> Costs:
        record = load_json(str(self.model(training) / f"fold_{training.fold}" / RECORD_FILE))
        costs = record.get("costs", {})
        memory = costs.get("peak_memory_mib")
        return Costs(costs.get("seconds", np.nan), np.nan if memory is None else memory)

    def _compare_validation_cases(
        self, reports: Path, splits: Sequence[Split], trainings: Mapping[str, Sequence[Training]]
    ) -> Values:
        first = next(iter(trainings.values()))
        values: Values = {}
        # Splits that hold out the same cases go to reports of their own.
        for draw in sorted({split.draw for split in splits}):
            chosen = [i for i, split in enumerate(splits) if split.draw == draw]
            rows = {row: [of_row[i] for i in chosen] for row, of_row in trainings.items()}
            report = reports / f"draw_{draw}"
            target = ("-d", self.dataset, "-c", self.configuration, "-f", *(str(first[i].fold) for i in chosen))
            names = [f"nnUNetTrainer{of_row[0].variant.trainer}" for of_row in rows.values()]
            plans = [of_row[0].plans for of_row in rows.values()]
            self.commands.run(
                "nnunet-ssl", "compare", *target, "-tr", *names, "-p", *plans, "-o", str(report), "-np", "2"
            )
            collect(report / "comparison.csv", rows, [str(first[i].fold) for i in chosen], values)
        return values

    def _compare_test_cases(
        self, reports: Path, splits: Sequence[Split], trainings: Mapping[str, Sequence[Training]]
    ) -> Values:
        values: Values = {}
        for i, split in enumerate(splits):
            report = reports / f"test_{split.base}_{split.draw}"
            folders = [f"{row}={self._test_predictions(of_row[i])}" for row, of_row in trainings.items()]
            words = ("--labels", str(self.arguments.test_labels), "--images", str(self.arguments.test_images))
            self.commands.run("nnunet-ssl", "compare", "--predictions", *folders, *words, "-o", str(report), "-np", "2")
            collect(report / "comparison.csv", trainings, [""], values)
        return values


def _write_and_print(file: Path, parts: Iterable[str]) -> None:
    text = "".join(parts)
    write_atomically(str(file), text.encode())
    print(text, end="", flush=True)

"""Every trainer with everything nnU-Net supports, on data sets made here, through nnU-Net's own entry points.

In the shape of nnU-Net's integration tests: four kinds of labels, all configurations, then the best configuration, the
ensemble and the post-processing. A part of the cells runs by default, all of them with --thorough. Commands run
within this process, and their pools are threads: a process of nnU-Net's takes seconds to start.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from in_process import run_in_process

from nnunet_ssl.demo.synthetic import draw_case
from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.nnunet.trainers_folder import trainers_folder

pytestmark = [pytest.mark.slow, pytest.mark.draws]
NAMES = [t.__name__ for t in TRAINERS]
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
QUICK = ("num_epochs=2", "num_iterations_per_epoch=1", "num_val_iterations_per_epoch=1", "save_every=1", "seed=0",
         "mirror_axes=[]", "supervised_fraction=0.5")  # fmt: skip
SIDE, DEPTH = 32, 16
PSEUDO_LABELS_FIRST = "nnUNetTrainerSelfTraining"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What dataset.json says, and how the images are: 10 labeled (2 to validate), 2 unlabeled, 2 test."""

    labels: dict[str, Any]
    regions_order: tuple[int, ...] = ()
    channels: int = 1
    slice_distance: float = 1.0
    listed: bool = False


PARTS = {"background": 0, "lung": 1, "heart": 2, "ribs": 3}
REGIONS = {"background": 0, "chest": [1, 2, 3], "heart": 2, "ribs": 3}
SCENARIOS = {
    "labels": Scenario(PARTS),
    "ignore": Scenario(PARTS | {"ignore": 4}),
    "regions": Scenario(REGIONS, (1, 2, 3)),
    "regions and ignore": Scenario(REGIONS | {"ignore": 4}, (1, 2, 3)),
    "two channels in listed files": Scenario(PARTS, channels=2, listed=True),
    "anisotropic": Scenario(PARTS, slice_distance=6.0),
}


class Site:
    """nnU-Net's folders with one data set, and its commands."""

    def __init__(self, root: Path, scenario: Scenario, patch: pytest.MonkeyPatch, number: int = 910) -> None:
        self.root, self.scenario, self.number = root, scenario, str(number)
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(variable, str(root / variable))
        self.name = f"Dataset{number}_Matrix"
        self.raw, self.preprocessed, self.results = (
            root / v / self.name for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        )
        self.patch = patch

    def run(self, *words: str) -> None:
        """Run a command in this process."""
        run_in_process(*words)

    def write(self) -> Site:
        for part in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "archive"):
            (self.raw / part).mkdir(parents=True)
        rng = np.random.default_rng(0)
        dataset: dict[str, Any] = {}
        unlabeled: dict[str, Any] = {}
        for part, count in (("Tr", 10), ("Un", 2), ("Ts", 2)):
            for i in range(count):
                case = f"{part}{i}"
                images, label = self.draw(rng, partly_annotated=i % 2 == 0)
                folder = "archive" if self.scenario.listed and part != "Ts" else f"images{part}"
                files = [f"{folder}/{case}_{c:04d}.nii.gz" for c in range(self.scenario.channels)]
                for file, image in zip(files, images):
                    self.write_image(file, image)
                if part == "Tr":
                    self.write_image(f"labelsTr/{case}.nii.gz", label)
                    dataset[case] = {"images": files, "label": f"labelsTr/{case}.nii.gz"}
                elif part == "Un":
                    unlabeled[case] = {"images": files}
                    # For nnUNetTrainerSelfTraining, which takes labels from anywhere.
                    (self.raw / "made_elsewhere").mkdir(exist_ok=True)
                    self.write_image(f"made_elsewhere/{case}.nii.gz", label)
        content: dict[str, Any] = {
            "channel_names": {str(c): f"channel {c}" for c in range(self.scenario.channels)},
            "labels": self.scenario.labels,
            "numTraining": 10,
            "file_ending": ".nii.gz",
        }
        if self.scenario.regions_order:
            content["regions_class_order"] = self.scenario.regions_order
        if self.scenario.listed:
            content |= {"dataset": dataset, "unlabeled": unlabeled}
        (self.raw / "dataset.json").write_text(json.dumps(content))
        return self

    def draw(self, rng: np.random.Generator, partly_annotated: bool) -> tuple[list[np.ndarray], np.ndarray]:
        image, label = draw_case(rng, SIDE)
        volume = np.stack([image] * DEPTH) + rng.normal(0, 10, (DEPTH, *image.shape))
        labels = np.stack([np.clip(label, 0, 3)] * DEPTH)
        labels[:2] = labels[-2:] = 0
        if "ignore" in self.scenario.labels and partly_annotated:
            labels[::3] = self.scenario.labels["ignore"]
        return [volume.astype(np.float32) + 20 * c for c in range(self.scenario.channels)], labels.astype(np.uint8)

    def write_image(self, name: str, array: np.ndarray) -> None:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.0, self.scenario.slice_distance))
        sitk.WriteImage(image, str(self.raw / name))

    def prepare(self, configurations: tuple[str, ...]) -> Site:
        """Fingerprint, plans for tiny networks, a low resolution with its cascade, and all preprocessing."""
        self.run("nnUNetv2_extract_fingerprint", "-d", self.number, "-np", "1")
        self.run("nnUNetv2_plan_experiment", "-d", self.number)
        flat = self.scenario.slice_distance > 1
        for configuration, sides in (("2d", (SIDE, SIDE)), ("3d_fullres", (4 if flat else 16, SIDE, SIDE))):
            words = ("-c", configuration, "--batch-size", "2", "--base-features", "4", "--max-features", "8")
            source = ("-p", "nnUNetPlans" if configuration == "2d" else "Tiny", "-o", "Tiny", "--overwrite")
            settings = [w for setting in QUICK for w in ("--set", setting)]
            shape = ("--patch-size", *map(str, sides))
            self.run("nnunet-ssl", "configure", "-d", self.number, *source, *words, *shape, *settings)
        file = self.preprocessed / "Tiny.json"
        plans = json.loads(file.read_text())
        full = plans["configurations"]["3d_fullres"]
        plans["configurations"]["3d_lowres"] = full | {
            "data_identifier": "Tiny_3d_lowres",
            "spacing": [1.5 * side for side in full["spacing"]],
            "next_stage": "3d_cascade_fullres",
        }
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        file.write_text(json.dumps(plans))
        self.preprocess(*(c for c in configurations if c != "3d_cascade_fullres"))
        return self

    def preprocess(self, *configurations: str, plans: str = "Tiny") -> None:
        ours = ("nnunet-ssl", "preprocess", "--test-images", "-p")
        for words in (("nnUNetv2_preprocess", "-plans_name"), ours):
            self.run(*words, plans, "-d", self.number, "-np", "1", "-c", *configurations)

    def train(self, trainer: str, configuration: str, fold: str = "0", *words: str, plans: str = "Tiny") -> Path:
        options = ("-tr", trainer, "-p", plans, "-device", "cpu")
        if trainer == PSEUDO_LABELS_FIRST:
            words_of_labels = ("-d", self.number, "-c", configuration, "-p", plans, "-f", fold)
            files = str(self.raw / "made_elsewhere")
            self.run("nnunet-ssl", "pseudo-label", *words_of_labels, "--from", files)
        self.run("nnUNetv2_train", self.number, configuration, fold, *options, *words)
        return self.model(trainer, configuration, fold, plans)

    def model(self, trainer: str, configuration: str, fold: str = "0", plans: str = "Tiny") -> Path:
        return self.results / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the prepared data sets lie; each is made when first asked for."""
    return {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in SCENARIOS}


@pytest.fixture
def site_of(sites: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.default_num_processes", 1)

    def site(name: str) -> Site:
        made = Site(sites[name], SCENARIOS[name], monkeypatch)
        return made if made.raw.exists() else made.write().prepare(CONFIGURATIONS)

    return site


def check(folder: Path) -> None:
    """What a finished training with --npz leaves."""
    assert (folder / "checkpoint_final.pth").is_file()
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(list((folder / "validation").glob("*.npz"))) == 2
    state = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert all(torch.isfinite(w).all() for w in state["network_weights"].values())
    logged = [v[-1] for k, v in state["logging"].items() if k.startswith("ssl_") and v]
    assert np.isfinite(logged).all()


def marks(scenario: str, usual: bool) -> list[pytest.MarkDecorator]:
    """Whoever uses a prepared data set uses it in one process; what is not usual runs with --thorough."""
    together = pytest.mark.xdist_group(f"matrix: {scenario}")
    return [together] if usual else [together, pytest.mark.thorough]


CELLS = list(itertools.product(SCENARIOS, CONFIGURATIONS, NAMES))
# Every trainer, every configuration and every kind of data at least once. What every trainer does with every kind of
# data, tiny data sets show: test_invariants, test_previous_stage.
PART = [
    ("labels", "3d_cascade_fullres", "nnUNetTrainerSemiTC"),
    ("ignore", "2d", "nnUNetTrainerSupTC"),
    ("ignore", "3d_fullres", "nnUNetTrainerFDPL"),
    ("regions", "3d_lowres", "nnUNetTrainerSemiTCPlus"),
    ("regions and ignore", "2d", "nnUNetTrainerDualNet"),
    ("two channels in listed files", "2d", "nnUNetTrainerFDPL"),
    ("two channels in listed files", "3d_fullres", "nnUNetTrainerSemiTC"),
    ("anisotropic", "3d_fullres", "nnUNetTrainerDualNet"),
    ("anisotropic", "3d_fullres", "nnUNetTrainerSupervised"),
    ("regions and ignore", "3d_fullres", "nnUNetTrainerSelfTraining"),
    ("labels", "2d", "nnUNetTrainerMeanTeacher"),
    ("labels", "3d_fullres", "nnUNetTrainerUAMT"),
    ("two channels in listed files", "2d", "nnUNetTrainerICT"),
    ("anisotropic", "2d", "nnUNetTrainerEM"),
    ("regions", "2d", "nnUNetTrainerCPS"),
    ("ignore", "2d", "nnUNetTrainerFixMatch"),
    ("regions", "3d_fullres", "nnUNetTrainerUniMatch"),
    ("regions and ignore", "3d_fullres", "nnUNetTrainerBCP"),
]


def test_the_usual_part_misses_nothing():
    assert [set(values) for values in zip(*PART)] == [set(SCENARIOS), set(CONFIGURATIONS), set(NAMES)]
    assert set(PART) < set(CELLS)


@pytest.mark.parametrize(("scenario", "configuration", "trainer"), [
    pytest.param(*cell, id="-".join(cell), marks=marks(cell[0], cell in PART)) for cell in CELLS
])  # fmt: skip
def test_train_and_validate(site_of, scenario, configuration, trainer):
    site = site_of(scenario)
    if configuration == "3d_cascade_fullres":
        # nnU-Net's validations of the first stage predict the labeled cases, ours the unlabeled ones.
        for fold in map(str, range(5)):
            site.train(trainer, "3d_lowres", fold)
        site.run("nnunet-ssl", "cascade", "-d", site.number, "-p", "Tiny", "-tr", trainer, "-device", "cpu",
                 "-f", *"01234")  # fmt: skip
    folder = site.train(trainer, configuration, "0", "--npz")
    check(folder)
    log = next(folder.glob("training_log*")).read_text()
    uses = next(t for t in TRAINERS if t.__name__ == trainer).uses_unlabeled
    assert ("2 imagesUn" in log) == uses
    learns_from_parts = uses and trainer != PSEUDO_LABELS_FIRST
    assert ("partly annotated" in log) == (learns_from_parts and "ignore" in scenario)


@pytest.mark.parametrize(("scenario", "trainer"), [
    pytest.param(s, t, marks=marks(s, (s, t) == ("regions and ignore", "nnUNetTrainerSemiTC")))
    for s, t in itertools.product(SCENARIOS, NAMES) if s == "labels" or t == "nnUNetTrainerSemiTC"
])  # fmt: skip
def test_best_configuration_ensemble_and_postprocessing(site_of, scenario, trainer):
    site = site_of(scenario)
    for configuration, fold in itertools.product(("2d", "3d_fullres"), "01"):
        site.train(trainer, configuration, fold, "--npz")
    options = ("-p", "Tiny", "-tr", trainer, "-f", "0", "1")
    site.run("nnUNetv2_find_best_configuration", site.number, *options, "-c", "2d", "3d_fullres", "-np", "1")
    best = json.loads((site.results / "inference_information.json").read_text())
    assert len(best["all_results"]) == 3
    predicted = []
    for configuration in ("2d", "3d_fullres"):
        predicted.append(str(site.root / f"predicted_{configuration}"))
        words = ("-i", str(site.raw / "imagesTs"), "-o", predicted[-1], "-d", site.number, "-c", configuration)
        # 0 processes: prediction and export run in this one.
        site.run("nnUNetv2_predict", *words, *options, "--save_probabilities", "-device", "cpu", "-npp", "0", "-nps",
                 "0")  # fmt: skip
    ensemble, final = (str(site.root / name) for name in ("ensemble", "final"))
    site.run("nnUNetv2_ensemble", "-i", *predicted, "-o", ensemble, "-np", "1")
    folder = Path(best["best_model_or_ensemble"]["postprocessing_file"])
    plans = str(Path(best["best_model_or_ensemble"]["some_plans_file"]))
    site.run("nnUNetv2_apply_postprocessing", "-i", ensemble, "-o", final, "-pp_pkl_file", str(folder), "-np", "1",
             "-plans_json", plans, "-dataset_json", str(site.raw / "dataset.json"))  # fmt: skip
    assert sorted(p.name for p in Path(final).glob("*.nii.gz")) == ["Ts0.nii.gz", "Ts1.nii.gz"]
    found = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(f"{final}/Ts0.nii.gz")))
    assert set(found.tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("trainer", [
    pytest.param(t, marks=marks("labels", t == "nnUNetTrainerDualNet")) for t in NAMES
])  # fmt: skip
def test_plans_of_another_data_set(site_of, trainer, monkeypatch):
    """The usual way to pretrain: plan and train on one data set, then fine-tune on another with the same plans."""
    source = site_of("labels")
    weights = source.train(trainer, "2d") / "checkpoint_final.pth"
    target = Site(source.root, Scenario(PARTS), monkeypatch, 911)
    if not target.raw.exists():
        target.write()
        target.run("nnUNetv2_extract_fingerprint", "-d", "911", "-np", "1")
        target.run("nnUNetv2_plan_experiment", "-d", "911")
        target.run("nnUNetv2_move_plans_between_datasets", "-s", "910", "-t", "911", "-sp", "Tiny", "-tp", "Borrowed")
        target.preprocess("2d", plans="Borrowed")
    check(target.train(trainer, "2d", "1", "--npz", "-pretrained_weights", str(weights), plans="Borrowed"))


@pytest.mark.parametrize("trainer", [
    pytest.param(t, marks=marks("labels", t == "nnUNetTrainerFDPL")) for t in NAMES
])  # fmt: skip
def test_fold_all_and_the_options_of_a_training(site_of, trainer):
    site = site_of("labels")
    folder = site.train(trainer, "2d", "all", "--disable_checkpointing")
    assert not list(folder.glob("*.pth"))
    folder = site.train(trainer, "2d", "all")
    assert len(json.loads((folder / "validation" / "summary.json").read_text())["metric_per_case"]) == 10
    record = json.loads((folder / "nnunet_ssl.json").read_text())
    for words, checkpoint in ((("--val",), "final"), (("--val", "--val_best"), "best"), (("--c",), "final")):
        site.train(trainer, "2d", "all", *words)
        assert json.loads((folder / "nnunet_ssl.json").read_text()) == record | {
            "validated_with": f"checkpoint_{checkpoint}.pth"
        }

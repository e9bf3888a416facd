"""The base trainer: augmentation options, warnings, logging, stages, and how nnU-Net finds it."""

from __future__ import annotations

import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ssl.cli import VERBS, main
from nnunet_ssl.data.augmentation import Augmentation, labels_that_name_sides, warning_about_sides
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import TRAINERS, nnUNetTrainerSemiTC, nnUNetTrainerSupervised, nnUNetTrainerSupTC
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, make_dataset_json
from nnunet_ssl.training.logger import TermLogger


def log_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


# ---- augmentation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_unset_options_leave_nnunets_choices(tmp_path, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    ours = tiny.trainer(nnUNetTrainerSupervised).configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    stock = tiny.trainer(nnUNetTrainer).configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert ours.rotation == stock[0]
    assert ours.slice_by_slice == stock[1]
    assert list(ours.initial_patch_size) == list(stock[2])
    assert ours.mirror_axes == stock[3]


def test_options_change_rotation_and_mirroring_everywhere(tiny, trainer_class):
    trainer = tiny.trainer(trainer_class, rotation_degrees=15, mirror_axes=[], num_epochs=1, supervised_fraction=0.0)
    trainer.run_training()
    assert trainer._augmentation.rotation == pytest.approx((-np.pi / 12, np.pi / 12))
    loaders = [trainer.dataloader_train] + [trainer.dataloader_unlabeled] * trainer.uses_unlabeled
    for loader in loaders:
        assert "MirrorTransform" not in str(loader.data_loader.transforms)
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] is None
    some = tiny.trainer(trainer_class, mirror_axes=[1])
    assert some.configure_rotation_dummyDA_mirroring_and_inital_patch_size().mirror_axes == (1,)
    assert some.inference_allowed_mirroring_axes == (1,)


def test_a_mirroring_axis_that_is_not_there(tiny):
    for axes in ([2], [0, 0]):
        with pytest.raises(UserError, match=r"expected some of the patch's axes \[0, 1\], each once"):
            tiny.trainer(TRAINERS[0], mirror_axes=axes)


@pytest.mark.parametrize("name", ["left_lung", "Kidney-R", "LungRight", "l atrium", "RIGHT_X", "sin. lung"])
def test_names_of_sides(name):
    assert labels_that_name_sides([name, "liver", "cortical layer", "relapse", "vertebra_L1", "L5", "R2star"]) == [name]


def test_warning_about_sides():
    quiet = Augmentation((-0.2, 0.2), False, (1, 1), None)
    for loud in (quiet._replace(mirror_axes=(0,)), quiet._replace(rotation=(-3.1, 3.1))):
        assert "left_lung" in warning_about_sides({"left_lung": 1}, loud)
        assert warning_about_sides({"lung": 1}, loud) == ""
    assert warning_about_sides({"left_lung": 1}, quiet) == ""


def test_the_warning_reaches_the_log(tiny):
    tiny.dataset_json = make_dataset_json({"background": 0, "left": 1, "right": 2})
    trainer = tiny.trainer(TRAINERS[0])
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert "WARNING: the labels left, right tell left from right" in log_of(trainer)


# ---- stages and logging -------------------------------------------------------------------------------------------


def test_stages_and_the_log(tiny):
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.5)
    trainer.run_training()
    rates = trainer.logger.get_value("lrs", step=None)
    assert rates[0] == rates[2] == trainer.initial_lr
    assert rates[1] == rates[3] < rates[0]
    consistency = trainer.logger.get_value("ssl_consistency", step=None)
    assert np.isnan(consistency[:2]).all()
    assert np.isfinite(consistency[2:]).all()
    losses, supervised = (trainer.logger.get_value(k, step=None) for k in ("train_losses", "ssl_supervised"))
    assert losses[1] == pytest.approx(supervised[1], abs=1e-5)
    assert losses[3] == pytest.approx(supervised[3] + consistency[3], abs=1e-5)
    text = log_of(trainer)
    assert "Training with 11 unlabeled cases (3 hidden label, 8 imagesUn), 2 labeled + 2 unlabeled per batch" in text
    assert "Stage 2: the semi-supervised terms are on" in text
    assert "Hyper-parameters: {'num_epochs': 4" in text
    assert f"consistency {consistency[3]:.4f}" in text


def test_progress_of_a_stage(tiny):
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.5)
    seen = []
    step = trainer.step

    def watched(labeled, unlabeled):
        seen.append((trainer.in_second_stage, trainer.stage_progress))
        return step(labeled, unlabeled)

    trainer.step = watched
    trainer.run_training()
    assert seen == [
        (False, 0.0),
        (False, 0.25),
        (False, 0.5),
        (False, 0.75),
        (True, 0.0),
        (True, 0.25),
        (True, 0.5),
        (True, 0.75),
    ]


@pytest.mark.parametrize("batch_size", [4, 3])
def test_the_batch_is_all_labeled_in_stage_1(tiny, batch_size):
    tiny.plans["configurations"]["2d"]["batch_size"] = batch_size
    trainer = tiny.trainer(nnUNetTrainerSemiTC, supervised_fraction=0.5)
    step, seen = trainer.step, []

    def watched(labeled, unlabeled):
        assert len(labeled.images) == len(labeled.target) == len(labeled.keys)
        seen.append((len(labeled.images), 0 if unlabeled is None else len(unlabeled.strong)))
        distinct = torch.unique(labeled.images.flatten(1), dim=0)
        assert len(distinct) == len(labeled.images)
        return step(labeled, unlabeled)

    trainer.step = watched
    trainer.run_training()
    assert seen == [(batch_size, 0)] * 4 + [(batch_size - batch_size // 2, batch_size // 2)] * 4
    assert f"all {batch_size} labeled in stage 1" in log_of(trainer)


def test_progress_png_shows_the_terms(tmp_path, monkeypatch):
    monkeypatch.undo()
    from nnunetv2.training.logging.nnunet_logger import LocalLogger
    from PIL import Image

    plain, ours = LocalLogger(), TermLogger(("supervised", "consistency"), ("consistency",), ("reliable",))
    for logger in (plain, ours):
        for key in logger.my_fantastic_logging:
            logger.my_fantastic_logging[key] = [float("nan"), 0.5, 0.4]
    sizes = []
    for logger in (plain, ours):
        logger.plot_progress_png(str(tmp_path))
        with Image.open(tmp_path / "progress.png") as image:
            sizes.append(image.size)
    assert sizes[1][0] == sizes[0][0]
    assert sizes[1][1] > sizes[0][1] * 1.2
    assert os.listdir(tmp_path) == ["progress.png"]


class Recorder:
    """Stands for nnU-Net's W&B logger."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def log(self, key: str, value: float, step: int) -> None:
        self.values.setdefault(key, []).append(value)

    def update_config(self, config: dict) -> None: ...

    def log_summary(self, key: str, value: float) -> None: ...


def test_terms_weights_and_statistics_reach_every_logger_of_nnunet(tiny, trainer_class):
    trainer = tiny.trainer(trainer_class)
    recorder = Recorder()
    trainer.logger.loggers.append(recorder)
    trainer.run_training()
    weights = [TermLogger.weight(name) for name in trainer.unlabeled_terms]
    statistics = [*trainer.statistic_names, *(["stability"] if trainer.uses_unlabeled else [])]
    for name in (*trainer.term_names, *weights, *statistics):
        assert len(recorder.values[TermLogger.key(name)]) == trainer.num_epochs, name
    assert np.isfinite([recorder.values[TermLogger.key(name)][-1] for name in (*trainer.term_names, *weights)]).all()


def test_the_log_says_what_an_epoch_gave_and_nothing_else():
    logger = TermLogger(("supervised", "consistency"), ("consistency",), (), ("stability",))
    for name, value in (("supervised", 0.5), ("consistency", float("nan")), ("weight_consistency", 0.25)):
        logger.log(TermLogger.key(name), value, 0)
    assert logger.lines() == ["loss terms: supervised 0.5000", "weights: consistency 0.2500"]
    logger.log(TermLogger.key("stability"), float("nan"), 0)
    assert logger.lines() == ["loss terms: supervised 0.5000", "weights: consistency 0.2500"]


def test_bfloat16_on_the_cpu_is_off_by_default(tiny):
    for option, expected in ((False, torch.float32), (True, torch.bfloat16)):
        trainer = tiny.trainer(TRAINERS[0], cpu_bfloat16=option)
        trainer.initialize()
        with trainer.autocast():
            outputs = trainer.network(torch.randn(1, 1, *tiny.patch))
        assert outputs[0].dtype == expected


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_on_a_cpu_without_it_is_warned_about(tiny, monkeypatch, asked, has):
    monkeypatch.setattr("nnunet_ssl.runtime.cpu.cpu_has_bfloat16", lambda: has)
    trainer = tiny.trainer(TRAINERS[0], cpu_bfloat16=asked)
    (log,) = Path(trainer.output_folder).glob("training_log*")
    assert ("this CPU emulates bfloat16" in log.read_text()) == (asked and not has)


@pytest.mark.parametrize(("cores", "threads"), [([1], 1), ([0, 1, 2, 3], 2)])
def test_no_more_threads_than_cores(tiny, monkeypatch, cores, threads):
    """nnUNetv2_train asks for one per core of the machine, also in a process that was given a single one."""
    before = torch.get_num_threads()
    monkeypatch.setattr("nnunet_ssl.runtime.cpu.own_cores", lambda: cores)
    try:
        torch.set_num_threads(2)
        tiny.trainer(TRAINERS[0])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("supervised_loss", ["nnunet", "soft_iou"])
@pytest.mark.parametrize("scenario", ["ignore", "regions", "regions and ignore"])
def test_regions_and_ignore_label(tmp_path, trainer_class, scenario, supervised_loss):
    tiny = TinyDataset(tmp_path, PATCHES["2d"], num_labels=4)
    last = "ignore" if "ignore" in scenario else "rim"
    labels = {"background": 0, "whole": [1, 2] if "regions" in scenario else 1, "core": 2, last: 3}
    order = [1, 2, 3][: 2 if "ignore" in scenario else 3] if "regions" in scenario else None
    tiny.dataset_json = make_dataset_json(labels, regions_order=order)
    everywhere = np.argwhere(np.ones((1, *tiny.shape)))
    for case in (*tiny.labeled, *tiny.validation):
        locations = {1: everywhere} | ({(-1, 0, 1, 2): everywhere} if "ignore" in scenario else {})
        save_pickle({"class_locations": locations}, str(tiny.folder / f"{case}.pkl"))
    trainer = tiny.trainer(trainer_class, supervised_fraction=0.0, num_epochs=1, supervised_loss=supervised_loss)
    trainer.run_training()
    assert trainer.label_manager.has_regions == ("regions" in scenario)
    assert trainer.label_manager.has_ignore_label == ("ignore" in scenario)
    for name in trainer.term_names:
        assert np.isfinite(trainer.logger.get_value(TermLogger.key(name), step=-1))


@pytest.mark.parametrize(("labels", "order", "message"), [
    ({"background": 0, "a": 1}, None, "lab_0 has voxels of label 2, which dataset.json does not list (it has 0, 1)"),
    ({"background": 0, "a": [1], "b": [1, 3]}, [1, 3], "lab_0 has voxels of label 2"),
])  # fmt: skip
def test_cases_with_labels_that_dataset_json_does_not_list(tiny, labels, order, message):
    """nnU-Net's loss would end with an index error, on a GPU with an assertion of the device."""
    tiny.dataset_json = make_dataset_json(labels, regions_order=order)
    trainer = tiny.trainer(TRAINERS[0])
    with pytest.raises(UserError, match=re.escape(message)):
        trainer.run_training()
    assert not list(Path(trainer.output_folder).glob("checkpoint*"))


def test_cases_with_an_ignore_label_that_dataset_json_does_not_list(tiny):
    everywhere = np.argwhere(np.ones((1, *tiny.shape)))
    locations = {1: everywhere, 2: everywhere, (-1, 0, 1, 2): everywhere}
    save_pickle({"class_locations": locations}, str(tiny.folder / "val_1.pkl"))
    with pytest.raises(UserError, match="val_1 was preprocessed with an ignore label"):
        tiny.trainer(TRAINERS[0]).run_training()


def test_the_strength_of_the_transforms_is_said(tiny):
    trainer = tiny.trainer(nnUNetTrainerSupTC, displacement_std=0.5, smoothness=0.2)
    trainer.on_train_start()
    said = log_of(trainer)
    assert "rotation up to 15 degrees" in said
    assert "voxels (16.00 asked for, less where it could fold)" in said
    assert re.search(r"A voxel moves by \d\.\d\d voxels on average, by \d\.\d\d of them elastically", said)


# ---- how nnU-Net finds the trainers -------------------------------------------------------------------------------


def test_nnunet_finds_every_trainer_and_they_can_be_pickled(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    for trainer in TRAINERS:
        found = recursive_find_trainer_class_by_name(trainer.__name__)
        assert found is trainer
        assert pickle.loads(pickle.dumps(found)) is trainer


def test_the_folder_re_exports_every_trainer_and_nothing_else():
    (file,) = trainers_folder().glob("*.py")
    exported = {name: value for name, value in runpy.run_path(str(file)).items() if not name.startswith("__")}
    assert exported == {t.__name__: t for t in TRAINERS}


def test_the_wrong_folder_is_explained(tmp_path):
    """Pointing nnU-Net at the repository imports the package twice, and the copy cannot be pickled."""
    root = Path(__file__).parents[2]
    code = (
        "import torch, json\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "cls = find('nnUNetTrainerSemiTC')\n"
        "cls({}, '2d', 0, {}, torch.device('cpu'))\n"
    )
    environment = {**os.environ, "nnUNet_extTrainer": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0
    assert "through the wrong folder" in result.stderr
    assert 'eval "$(nnunet-ssl env)"' in result.stderr


def test_env_prints_a_line_for_the_shell(capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", f"/other{os.pathsep}{trainers_folder()}")
    assert main(["env"]) == 0
    assert capsys.readouterr().out == f"export nnUNet_extTrainer={trainers_folder()}{os.pathsep}/other\n"


def test_trainers_lists_every_trainer_and_hyperparameter(capsys):
    assert main(["trainers"]) == 0
    listed = capsys.readouterr().out
    assert all(t.__name__ in listed for t in TRAINERS)
    assert main(["trainers", "SemiTC"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in nnUNetTrainerSemiTC.Parameters().as_dict())
    assert main(["trainers", "nnUNetTrainerNone"]) == 2
    assert "there are nnUNetTrainerSupervised" in capsys.readouterr().err


def test_every_verb_explains_itself(capsys):
    for verb in ([], *([verb] for verb in VERBS)):
        with pytest.raises(SystemExit) as stop:
            main([*verb, "--help"])
        assert stop.value.code == 0
        assert len(capsys.readouterr().out) > 100

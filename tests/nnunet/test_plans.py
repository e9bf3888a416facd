"""Derived plans files, and the verb that writes them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.cli import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.checks import check_configuration
from nnunet_ssl.nnunet.plans import shrink, with_hyperparameters
from nnunet_ssl.testing.tiny import make_plans


def nnunet_like_plans(patch: tuple[int, ...]) -> dict:
    """As many stages as nnU-Net plans for such a patch."""
    plans = make_plans(patch)
    (configuration,) = plans["configurations"].values()
    network = configuration["architecture"]["arch_kwargs"]
    dims, stages = len(patch), 6
    network |= {
        "n_stages": stages,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "kernel_sizes": [[3] * dims] * stages,
        "strides": [[1] * dims] + [[2] * dims] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    return plans


def test_hyperparameters_are_added_and_the_original_is_left_alone():
    before = {"num_epochs": 5, "seed": 1, "A": {"x": 1, "y": 2}, "B": {"x": 3}}
    plans = make_plans((32, 32), ssl=copy.deepcopy(before))
    values = {"num_epochs": 7, "A": {"y": 4, "z": 5}, "C": {"x": 6}}
    derived = with_hyperparameters(plans, "Quick", values)
    merged = {"num_epochs": 7, "seed": 1, "A": {"x": 1, "y": 4, "z": 5}, "B": {"x": 3}, "C": {"x": 6}}
    assert derived["ssl"] == merged
    assert derived["plans_name"] == "Quick"
    derived["ssl"]["A"]["x"] = derived["ssl"]["C"]["x"] = 0
    assert plans["ssl"] == before
    assert values["C"] == {"x": 6}
    assert plans["plans_name"] == "nnUNetPlans"


@pytest.mark.parametrize(
    ("patch", "downscale", "expected"), [((512, 512), 4.0, [128, 128]), ((64, 96, 80), 2.0, [32, 48, 40])]
)
def test_a_shrunk_network_runs(patch, downscale, expected):
    plans = with_hyperparameters(nnunet_like_plans(patch), "Small", {})
    (name,) = plans["configurations"]
    small = shrink(plans, name, downscale=downscale, batch_size=3, base_features=4, max_features=16)
    configuration = PlansManager(small).get_configuration(name)
    assert configuration.patch_size == expected
    assert configuration.batch_size == 3
    assert configuration.spacing == [downscale] * len(patch)
    assert configuration.data_identifier == f"Small_{name}"
    network = nnUNetTrainer.build_network_architecture(PlansManager(small), configuration, 1, 3)
    outputs = network(torch.randn(1, 1, *expected))
    assert outputs[0].shape == (1, 3, *expected)
    assert network.encoder.output_channels[:3] == [4, 8, 16]


def test_same_voxels_keep_the_preprocessed_folder():
    plans = with_hyperparameters(nnunet_like_plans((64, 64)), "Small", {})
    small = shrink(plans, "2d", patch_size=[40, 40])
    assert small["configurations"]["2d"]["data_identifier"] == "nnUNetPlans_2d"
    # Rounded up to what the remaining strides divide.
    assert small["configurations"]["2d"]["patch_size"] == [40, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configuration": "3d"}, "no configuration 3d; they have 2d"),
        ({"downscale": 0.5}, "--downscale must be at least 1"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"base_features": -4}, "base features must be at least 1"),
        ({"patch_size": [64]}, "has 2 sides"),
        ({"patch_size": [4, 4]}, "leaves 1 stages"),
        ({"patch_size": [8, 8]}, "leaves 2 stages; nnU-Net's loss needs at least 3"),
    ],
)
def test_errors(options, message):
    configuration = options.pop("configuration", "2d")
    with pytest.raises(UserError, match=message):
        shrink(nnunet_like_plans((64, 64)), configuration, **options)


@pytest.fixture
def preprocessed(tmp_path: Path) -> Path:
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset900_Tiny"
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(nnunet_like_plans((64, 64))))
    return folder


def configure(*options: str) -> int:
    return main(["configure", "-d", "900", "-o", "Quick", *options])


def test_configure_writes_a_plans_file(preprocessed, capsys):
    assert configure("--set", "num_epochs=20", "--set", "mirror_axes=[]", "SemiTC.interpolation=nearest") == 0
    written = json.loads((preprocessed / "Quick.json").read_text())
    assert written["ssl"] == {
        "num_epochs": 20,
        "mirror_axes": [],
        "SemiTC": {"interpolation": "nearest"},
    }
    assert written["plans_name"] == "Quick"
    assert "train with -p Quick" in capsys.readouterr().out
    assert configure() == 2
    assert "exists already" in capsys.readouterr().err
    assert configure("--overwrite", "-c", "2d", "--downscale", "2") == 0
    assert "nnUNetv2_preprocess -d 900 -c 2d -plans_name Quick" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "epochs=3"), "Unknown hyper-parameter 'epochs'"),
        (("--set", "num_epochs"), "expected NAME=VALUE"),
        (("--set", "num_epochs=many"), "must be a whole number, got 'many'"),
        (("--set", "interpolation=nearest"), "write SupTC.interpolation (SemiTC and SemiTCPlus read it too)."),
        (("--downscale", "2"), "Name the configuration whose network to change with -c"),
        (("-p", "Missing"), "Missing.json is missing"),
    ],
)
def test_configure_errors_write_nothing(preprocessed, capsys, options, message):
    assert configure(*options) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in preprocessed.iterdir()] == ["nnUNetPlans.json"]


def test_only_asked_for_sizes_change_a_network(tiny):
    """The partner of the plans' network, not of one that was shrunk on the way."""
    plans = make_plans((32, 32))
    network = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [4, 6, 8, 12]
    plans["configurations"]["large"] = {"inherits_from": "2d", "batch_size": 9}
    (tiny.base / "nnUNetPlans.json").write_text(json.dumps(plans))
    base = ["configure", "-d", plans["dataset_name"], "-o", "Partner", "-c", "large"]
    assert main([*base, "--partner-network"]) == 0
    written = PlansManager(json.loads((tiny.base / "Partner.json").read_text())).get_configuration("large")
    assert written.network_arch_init_kwargs["features_per_stage"] == [4, 6, 8, 12]
    assert written.network_arch_class_name.endswith("ResidualEncoderUNet")
    assert written.batch_size == 9


def in_former_format(plans: dict) -> dict:
    """Plans whose network is described by nnU-Net's former names, which nnU-Net translates."""
    settings = plans["configurations"]["2d"].pop("architecture")["arch_kwargs"]
    plans["configurations"]["2d"] |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": settings["n_conv_per_stage"],
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [3, 3],
        "pool_op_kernel_sizes": settings["strides"],
        "conv_kernel_sizes": settings["kernel_sizes"],
    }
    return plans


def test_plans_in_nnunets_former_format():
    plans = in_former_format(make_plans((32, 32)))
    check_configuration(plans, "2d", "nnUNetPlans.json")
    assert PlansManager(plans).get_configuration("2d").network_arch_init_kwargs["features_per_stage"] == [4, 8, 8, 8]
    del plans["configurations"]["2d"]["UNet_class_name"]
    with pytest.raises(UserError, match=r"nnUNetPlans\.json, configuration 2d lacks 'architecture'"):
        check_configuration(plans, "2d", "nnUNetPlans.json")


def test_every_trainer_trains_with_plans_in_nnunets_former_format(tiny, trainer_class):
    in_former_format(tiny.plans)
    trainer = tiny.trainer(trainer_class, num_epochs=2, num_iterations_per_epoch=1, supervised_fraction=0.5)
    trainer.run_training()
    assert trainer.network.encoder.output_channels == [4, 8, 8, 8]
    assert len(trainer.predictors) == 1 + sum(companion.predicts for companion in trainer.companions.values())


def test_a_configuration_that_inherits_from_itself():
    plans = make_plans((32, 32))
    plans["configurations"]["a"] = {"inherits_from": "b"}
    plans["configurations"]["b"] = {"inherits_from": "a"}
    with pytest.raises(UserError, match="a inherits from itself"):
        check_configuration(plans, "a", "nnUNetPlans.json")

"""Hyper-parameters: declared once, checked, overridden through the plans file."""

from __future__ import annotations

import dataclasses

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import TRAINERS
from nnunet_ssl.methods.semi_tc import TransformationConsistencyParameters as Parameters
from nnunet_ssl.training.hyperparameters import HyperParameters


def read(block, cls=Parameters):
    return cls.from_plans({"ssl": block}, [t.hyperparameters_class for t in TRAINERS])


def test_defaults_without_a_block():
    assert Parameters.from_plans({}) == Parameters()


def test_values_are_brought_to_their_type():
    hp = read({"initial_lr": 1, "mirror_axes": [0, 1], "rotation_degrees": None, "interpolation": "nearest"})
    assert hp.initial_lr == 1.0
    assert isinstance(hp.initial_lr, float)
    assert hp.mirror_axes == (0, 1)
    assert hp.rotation_degrees is None
    assert hp.interpolation == "nearest"
    assert read({"mirror_axes": []}).mirror_axes == ()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"consistency_wieght": 1.0}, r"Unknown hyper-parameter 'consistency_wieght'. Did you mean consistency_weight"),
        ({"num_epochs": "20"}, r"num_epochs must be a whole number, got '20' \(str\)"),
        ({"num_epochs": True}, r"num_epochs must be a whole number, got True"),
        ({"num_epochs": 2.5}, r"num_epochs must be a whole number"),
        ({"num_epochs": 0}, r"num_epochs must lie between 1 and None, got 0"),
        ({"initial_lr": float("nan")}, r"initial_lr must lie between"),
        ({"cpu_bfloat16": 1}, r"cpu_bfloat16 must be true or false"),
        ({"mirror_axes": [3]}, r"mirror_axes must lie between 0 and 2"),
        ({"mirror_axes": 0}, r"mirror_axes must be a list of whole numbers or null"),
        ({"interpolation": "cubic"}, r"interpolation must be one of \['linear', 'nearest'\]"),
        ([], r'"ssl" in the plans file must be an object'),
    ],
)
@pytest.mark.parametrize("cls", [Parameters, HyperParameters])
def test_errors(block, message, cls):
    with pytest.raises(UserError, match=message):
        read(block, cls)


def test_a_plans_file_serves_every_trainer():
    hp = read({"num_epochs": 7, "consistency_weight": 0.5}, HyperParameters)
    assert hp.num_epochs == 7
    assert not hasattr(hp, "consistency_weight")


def test_every_hyperparameter_says_what_it_means():
    for trainer in TRAINERS:
        for field in dataclasses.fields(trainer.hyperparameters_class):
            assert field.metadata["meaning"], field.name
            # The default passes its own check.
            read({field.name: getattr(trainer.hyperparameters_class(), field.name)})


def test_the_trainer_uses_the_plans(tiny):
    trainer = tiny.trainer(TRAINERS[0], num_epochs=9, initial_lr=0.5, weight_decay=0.1, save_every=3)
    assert (trainer.num_epochs, trainer.initial_lr, trainer.weight_decay, trainer.save_every) == (9, 0.5, 0.1, 3)


def test_nothing_is_written_for_a_wrong_plans_file(tiny, trainer_class):
    with pytest.raises(UserError, match="Unknown hyper-parameter"):
        tiny.trainer(trainer_class, nonsense=1)
    assert not list((tiny.root / "nnUNet_results" / "Dataset900_Tiny").iterdir())

"""Hyper-parameters: declared once, checked, overridden through the plans file."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import (
    TRAINERS,
    nnUNetTrainerDualNet,
    nnUNetTrainerFDPL,
    nnUNetTrainerSemiTC,
    nnUNetTrainerSemiTCPlus,
    nnUNetTrainerSupervised,
    nnUNetTrainerSupTC,
)
from nnunet_ssl.training.former_names import FORMER_NAMES
from nnunet_ssl.training.hyperparameters import (
    SHARED,
    HyperParameters,
    MethodParameters,
    declared,
    method_name,
    parameter,
)

BY_METHOD = {method_name(trainer): trainer for trainer in TRAINERS}


def read(block, trainer=nnUNetTrainerSemiTC):
    return trainer.read_hyperparameters({"ssl": block})


def test_defaults_without_a_block(trainer_class):
    assert trainer_class.read_hyperparameters({}) == trainer_class.Parameters()


def test_values_are_brought_to_their_type():
    hp = read(
        {"initial_lr": 1, "mirror_axes": [0, 1], "rotation_degrees": None, "SemiTC": {"interpolation": "nearest"}}
    )
    assert hp.initial_lr == 1.0
    assert isinstance(hp.initial_lr, float)
    assert hp.mirror_axes == (0, 1)
    assert hp.rotation_degrees is None
    assert hp.interpolation == "nearest"
    assert read({"mirror_axes": []}).mirror_axes == ()


# ---- flat names and blocks ----------------------------------------------------------------------------------------


def test_a_trainer_reads_the_blocks_of_its_base_trainers_and_its_own():
    assert nnUNetTrainerSemiTCPlus.blocks() == ("SupTC", "SemiTC", "SemiTCPlus")
    assert nnUNetTrainerDualNet.blocks() == ("DualNet",)
    assert nnUNetTrainerSupervised.blocks() == ("Supervised",)


def test_the_nearest_block_wins_wherever_it_stands():
    block = {
        "SemiTCPlus": {"smoothness": 0.4, "num_epochs": 4},
        "SemiTC": {"smoothness": 0.3, "displacement_std": 0.03, "num_epochs": 3},
        "SupTC": {"smoothness": 0.2, "displacement_std": 0.02, "consistency_weight": 2.0},
        "num_epochs": 7,
        "seed": 5,
    }
    found = [read(block, BY_METHOD[name]) for name in ("SupTC", "SemiTC", "SemiTCPlus")]
    assert [hp.smoothness for hp in found] == [0.2, 0.3, 0.4]
    assert [hp.displacement_std for hp in found] == [0.02, 0.03, 0.03]
    assert [hp.consistency_weight for hp in found] == [2.0, 2.0, 2.0]
    assert [hp.num_epochs for hp in found] == [7, 3, 4]
    assert [hp.seed for hp in found] == [5, 5, 5]


def test_shared_names_stand_flat_for_all_or_in_a_block_for_one():
    block = {"supervised_fraction": 0.1, "FDPL": {"supervised_fraction": 0.3, "unlabeled_ramp": 0.0}}
    assert [read(block, BY_METHOD[m]).supervised_fraction for m in ("SemiTC", "DualNet", "FDPL")] == [0.1, 0.1, 0.3]
    assert [read(block, BY_METHOD[m]).unlabeled_ramp for m in ("SemiTC", "DualNet", "FDPL")] == [0.0, 0.4, 0.0]


@pytest.mark.parametrize(("methods", "fraction", "ramp"), [
    (("SupTC", "SemiTC", "SemiTCPlus"), 0.5, 0.0), (("DualNet", "FDPL"), 0.25, 0.4),
])  # fmt: skip
def test_methods_have_defaults_of_their_own_for_what_is_shared(methods, fraction, ramp):
    assert (MethodParameters().supervised_fraction, MethodParameters().unlabeled_ramp) == (0.0, 0.0)
    for method in methods:
        hp = read({}, BY_METHOD[method])
        assert (hp.supervised_fraction, hp.unlabeled_ramp) == (fraction, ramp)


def test_one_name_of_two_methods_is_tuned_apart():
    block = {"SemiTC": {"consistency_weight": 0.5}, "DualNet": {"consistency_weight": 2.0}}
    found = [read(block, BY_METHOD[m]).consistency_weight for m in ("SupTC", "SemiTC", "SemiTCPlus", "DualNet")]
    assert found == [1.0, 0.5, 0.5, 2.0]


@pytest.mark.parametrize("foreign", [{}, {"nonsense": 1}, {"num_epochs": "many"}, {"a": {"b": []}}])
def test_blocks_of_other_methods_are_passed_over(trainer_class, foreign):
    assert read({"num_epochs": 7, "Foreign": foreign}, trainer_class).num_epochs == 7


def test_blocks_of_derived_trainers_are_other_methods():
    block = {"SemiTC": {"nonsense": 1}, "SemiTCPlus": {"nonsense": 1}}
    assert read(block, nnUNetTrainerSupTC) == nnUNetTrainerSupTC.Parameters()
    with pytest.raises(UserError, match=r"Unknown hyper-parameter SemiTC\.nonsense"):
        read(block, nnUNetTrainerSemiTCPlus)


def test_the_baseline_checks_what_methods_share_and_passes_it_over():
    hp = read({"num_epochs": 7, "supervised_fraction": 0.5}, nnUNetTrainerSupervised)
    assert hp.num_epochs == 7
    assert not hasattr(hp, "supervised_fraction")
    with pytest.raises(UserError, match="supervised_fraction must lie between"):
        read({"supervised_fraction": 1.5}, nnUNetTrainerSupervised)
    with pytest.raises(UserError, match=r"Unknown hyper-parameter Supervised\.supervised_fraction"):
        read({"Supervised": {"supervised_fraction": 0.5}}, nnUNetTrainerSupervised)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"num_epoch": 1}, r"Unknown hyper-parameter 'num_epoch'\. Did you mean num_epochs\?.*METHOD\.NAME=VALUE"),
        (
            {"consistency_wieght": 1.0},
            r"Unknown hyper-parameter 'consistency_wieght'\. Did you mean SupTC\.consistency_weight \(SemiTC and "
            r"SemiTCPlus read it too\) or DualNet\.consistency_weight( or \w+\.consistency_weight)?\?",
        ),
        ({"SemiTC.smoothness": 0.1}, r'Unknown hyper-parameter \'SemiTC.smoothness\'.*"METHOD": {"NAME": VALUE}'),
        ({"num_epochs": "20"}, r"num_epochs must be a whole number, got '20' \(str\)"),
        ({"num_epochs": True}, r"num_epochs must be a whole number, got True"),
        ({"num_epochs": 2.5}, r"num_epochs must be a whole number"),
        ({"num_epochs": {"SemiTC": 2}}, r"num_epochs must be a whole number"),
        ({"num_epochs": 0}, r"num_epochs must lie between 1 and None, got 0"),
        ({"initial_lr": float("nan")}, r"initial_lr must lie between"),
        ({"cpu_bfloat16": 1}, r"cpu_bfloat16 must be true or false"),
        ({"mirror_axes": [3]}, r"mirror_axes must lie between 0 and 2"),
        ({"mirror_axes": 0}, r"mirror_axes must be a list of whole numbers or null"),
        ({"unlabeled_ramp": 2}, r"unlabeled_ramp must lie between 0.0 and 1.0, got 2"),
        ([], r'"ssl" in the plans file must be an object'),
        ({"Foreign": [1]}, r"Unknown hyper-parameter 'Foreign'"),
    ],
)
def test_errors_of_what_is_shared(block, message, trainer_class):
    with pytest.raises(UserError, match=message):
        read(block, trainer_class)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"SemiTC": {"smoothnes": 1.0}},
            r"Unknown hyper-parameter SemiTC\.smoothnes\. Did you mean SemiTC\.smoothness",
        ),
        ({"SupTC": {"num_epoch": 1}}, r"Unknown hyper-parameter SupTC\.num_epoch\. Did you mean SupTC\.num_epochs\?"),
        ({"SemiTC": {"cutmix": True}}, r"Unknown hyper-parameter SemiTC\.cutmix\. Write FDPL\.cutmix\. SemiTC has: "),
        ({"SemiTC": {"consistency_ramp": 0.1}}, r"SemiTC\.consistency_ramp\. Write SupTC\.unlabeled_ramp"),
        ({"SemiTC": {"SemiTC": {}}}, r"Unknown hyper-parameter SemiTC\.SemiTC"),
        ({"SemiTC": {"interpolation": "cubic"}}, r"SemiTC\.interpolation must be one of \['linear', 'nearest'\]"),
        ({"SupTC": {"consistency_weight": "1"}}, r"SupTC\.consistency_weight must be a number, got '1' \(str\)"),
        ({"SupTC": {"consistency_weight": {"a": 1}}}, r"SupTC\.consistency_weight must be a number, got {'a': 1}"),
        ({"SemiTC": {"consistency_weight": -1}}, r"SemiTC\.consistency_weight must lie between 0.0 and None, got -1"),
        ({"SemiTC": {"num_epochs": 0.5}}, r"SemiTC\.num_epochs must be a whole number, got 0.5"),
        ({"SemiTC": 0.5}, r"Block SemiTC must be an object of names and values, found 0.5"),
        ({"SupTC": None}, r"Block SupTC must be an object of names and values, found None"),
    ],
)
def test_errors_in_the_blocks_that_a_trainer_reads(block, message):
    for trainer in (nnUNetTrainerSemiTC, nnUNetTrainerSemiTCPlus):
        with pytest.raises(UserError, match=message):
            read(block, trainer)


def test_names_that_are_no_longer_flat_are_refused_by_every_trainer(trainer_class):
    for name, places in FORMER_NAMES.items():
        with pytest.raises(UserError) as refused:
            read({name: 1.0}, trainer_class)
        # A trainer that has one of that name, in a block that is not listed, names its own place too.
        blocks = [method_name(t) for t in reversed(trainer_class.__mro__) if t in TRAINERS]
        its_own = name in declared(trainer_class.Parameters) and name not in SHARED
        listed = any(place.partition(".")[0] in blocks for place in places)
        expected = [*places, *([f"{blocks[-1]}.{name}"] if its_own and not listed else [])]
        assert str(refused.value) == f"{name} belongs to a method: write {' or '.join(expected)}."
    assert FORMER_NAMES["consistency_weight"] == (
        "SupTC.consistency_weight (SemiTC and SemiTCPlus read it too)",
        "DualNet.consistency_weight",
    )


def test_the_new_places_of_former_names_are_right():
    for former, places in FORMER_NAMES.items():
        for place in places:
            method, _, name = place.partition(" ")[0].rpartition(".")
            assert name == former or former == "consistency_ramp"
            readers = [BY_METHOD[m] for m in BY_METHOD if m == method or (m in place and "read it too" in place)]
            for trainer in readers or TRAINERS[1:]:
                default = getattr(trainer.Parameters(), name)
                table = {method: {name: default}} if method else {name: default}
                assert read(table, trainer) == trainer.Parameters()
    for method in ("SupTC", "DualNet", "FDPL"):
        assert set(declared(BY_METHOD[method].Parameters)) - SHARED <= FORMER_NAMES.keys()


# ---- how they are declared ----------------------------------------------------------------------------------------


def test_every_hyperparameter_says_what_it_means(trainer_class):
    kind = trainer_class.Parameters
    assert kind.__dataclass_params__.frozen
    assert issubclass(kind, MethodParameters) or kind is HyperParameters
    for name, field in declared(kind).items():
        assert field.metadata["meaning"], name
        # The default passes its own check.
        read({method_name(trainer_class): {name: getattr(kind(), name)}}, trainer_class)


def declare(source: str) -> type[HyperParameters]:
    """The class of a module that is forgotten after its import, as nnU-Net forgets those of other people."""
    module = types.ModuleType("somebody_elses")
    sys.modules["somebody_elses"] = module
    head = "from __future__ import annotations\nimport dataclasses\nfrom typing import ClassVar, Optional\n"
    imports = "from nnunet_ssl.training.hyperparameters import MethodParameters, parameter\n"
    exec(head + imports + source, module.__dict__)
    del sys.modules["somebody_elses"]
    return module.Mine


def test_types_are_known_after_nnunet_has_forgotten_the_module():
    kind = declare(
        "@dataclasses.dataclass(frozen=True)\n"
        "class Mine(MethodParameters):\n"
        "    limit: Optional[float] = parameter(0.5, 'a limit', maximum=1.0)\n"
        "    names: ClassVar[int] = 3\n"
    )
    assert kind.from_plans({"ssl": {"Mine": {"limit": None}}}, ["Mine"]).limit is None
    with pytest.raises(UserError, match=r"Mine\.limit must be a number or null, got 'x'"):
        kind.from_plans({"ssl": {"Mine": {"limit": "x"}}}, ["Mine"])
    with pytest.raises(UserError, match=r"limit belongs to a method: write Mine\.limit\."):
        kind.from_plans({"ssl": {"limit": 1}}, ["Base", "Mine"])


@pytest.mark.parametrize(
    "source",
    [
        "class Mine(MethodParameters):\n    limit: float = parameter(0.5, 'a limit')\n",
        "@dataclasses.dataclass(frozen=True)\nclass Mine(MethodParameters):\n    limit: float = 0.5\n",
    ],
    ids=["no dataclass", "no parameter"],
)
def test_a_declaration_that_went_wrong_is_explained(source):
    with pytest.raises(UserError, match=r"limit of Mine is no hyper-parameter; expected .*frozen=True.*parameter\("):
        declare(source).from_plans({}, ["Mine"])


def test_a_name_that_another_method_had_before_names_both_places():
    @dataclasses.dataclass(frozen=True)
    class Mine(MethodParameters):
        contrastive_margin: float = parameter(1.0, "of mine")

    with pytest.raises(UserError, match=r"write DualNet\.contrastive_margin or Mine\.contrastive_margin\."):
        Mine.from_plans({"ssl": {"contrastive_margin": 1.0}}, ["Mine"])


# ---- in trainers --------------------------------------------------------------------------------------------------


def test_the_trainer_uses_the_plans(tiny):
    trainer = tiny.trainer(TRAINERS[0], num_epochs=9, initial_lr=0.5, weight_decay=0.1, save_every=3)
    assert (trainer.num_epochs, trainer.initial_lr, trainer.weight_decay, trainer.save_every) == (9, 0.5, 0.1, 3)


def test_the_tiny_data_set_puts_names_where_a_trainer_reads_them(tiny, trainer_class):
    asked = {"supervised_fraction": 0.3, "smoothness": 0.3, "cutmix": "none", "contrastive_margin": 0.7}
    hp = tiny.trainer(trainer_class, **asked).hp.as_dict()
    assert {name: hp[name] for name in asked if name in hp} == {name: asked[name] for name in asked if name in hp}
    if trainer_class is nnUNetTrainerFDPL:
        assert hp["cutmix"] == "none"
        assert "smoothness" not in hp


def test_nothing_is_written_for_a_wrong_plans_file(tiny, trainer_class):
    with pytest.raises(UserError, match="Unknown hyper-parameter"):
        tiny.trainer(trainer_class, nonsense=1)
    assert not list((tiny.root / "nnUNet_results" / "Dataset900_Tiny").iterdir())

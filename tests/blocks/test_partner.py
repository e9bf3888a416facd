"""The second network: its architecture, and its life as a model of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.cli import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerFDPL, nnUNetTrainerSupervised
from nnunet_ssl.nnunet.plans import PLAIN, RESIDUAL, with_partner_network
from nnunet_ssl.testing.tiny import PATCHES, SSL, TinyDataset, make_plans


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerDualNet:
    """In its second stage from the start."""
    return tiny.initialized(nnUNetTrainerDualNet, **{"supervised_fraction": 0.0, **ssl})


@pytest.fixture
def trained(tiny):
    trainer = tiny.trainer(nnUNetTrainerDualNet, num_epochs=1, supervised_fraction=0.0)
    trainer.run_training()
    return tiny, trainer


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_the_partner_belongs_to_the_other_family(patch):
    plans = make_plans(PATCHES[patch])
    (name,) = plans["configurations"]
    partner = with_partner_network(plans, "Partner", name)
    back = with_partner_network(partner, "Back", name)
    families = [PlansManager(p).get_configuration(name).network_arch_class_name for p in (plans, partner, back)]
    assert families == [PLAIN, RESIDUAL, PLAIN]
    settings = [p["configurations"][name]["architecture"]["arch_kwargs"] for p in (plans, partner, back)]
    for key in ("n_stages", "features_per_stage", "strides", "kernel_sizes"):
        assert settings[0][key] == settings[1][key] == settings[2][key]
    assert settings[1]["n_blocks_per_stage"] == [1, 3, 4, 6]
    assert plans["plans_name"] == "nnUNetPlans"
    assert "n_conv_per_stage" in settings[0]


def test_an_unknown_network_has_no_partner():
    plans = make_plans(PATCHES["2d"])
    plans["configurations"]["2d"]["architecture"]["network_class_name"] = "some.Transformer"
    with pytest.raises(UserError, match=r"No partner is known for the network some\.Transformer of 2d"):
        with_partner_network(plans, "Partner", "2d")


def test_configure_writes_plans_to_train_the_partner_alone(tiny, capsys):
    (tiny.base / "nnUNetPlans.json").write_text(json.dumps(tiny.plans))
    base = ["configure", "-d", tiny.plans["dataset_name"], "-o", "Alone"]
    assert main([*base, "--partner-network"]) == 2
    assert "with -c" in capsys.readouterr().err
    assert main([*base, "-c", "2d", "--partner-network"]) == 0
    written = json.loads((tiny.base / "Alone.json").read_text())
    assert written["plans_name"] == "Alone"
    assert written["configurations"]["2d"]["architecture"]["network_class_name"] == RESIDUAL
    # It is a network of the same shape as the one that DualNet pairs.
    dual = initialized(tiny)
    shapes = [{k: v.shape for k, v in dual.companions["partner"].module.state_dict().items()}]
    tiny.plans = written | {"ssl": SSL}
    alone = tiny.trainer(nnUNetTrainerSupervised)
    alone.initialize()
    shapes.append({k: v.shape for k, v in alone.network.state_dict().items()})
    assert shapes[0] == shapes[1]


def export(tiny, *words, trainer="nnUNetTrainerDualNet"):
    return main(["export", "-d", tiny.plans["dataset_name"], "-c", "2d", "-tr", trainer, *words])


@pytest.mark.parametrize("cls", [nnUNetTrainerDualNet, nnUNetTrainerFDPL])
def test_stock_nnunet_predicts_with_the_exported_partner(tiny, capsys, cls):
    trainer = tiny.trainer(cls, num_epochs=1)
    trainer.run_training()
    assert export(tiny, trainer=cls.__name__) == 0
    folder = Path(trainer.output_folder).parents[0]
    target = folder.with_name(folder.name.replace(cls.__name__, f"{cls.__name__}Partner"))
    assert str(target) in capsys.readouterr().out
    data = torch.randn(1, 1, *tiny.patch)
    for model, network in ((target, trainer.companions["partner"].module), (folder, trainer.network)):
        predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        predictor.network.eval()
        network.eval()
        trainer.set_deep_supervision_enabled(False)
        torch.testing.assert_close(predictor.network(data), network(data))
    assert torch.load(target / "fold_0" / "checkpoint_final.pth", weights_only=False)["trainer_name"] == "nnUNetTrainer"


def logits_of(model: Path, folds: tuple[int, ...], data: torch.Tensor) -> torch.Tensor:
    """By stock nnU-Net, with what nnUNetv2_predict does of itself."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
    return predictor.predict_logits_from_preprocessed_data(data)


@pytest.mark.parametrize("folds", [1, 2])
def test_stock_nnunet_averages_two_networks_that_are_alike_as_folds_of_one_folder(tiny, capsys, folds):
    splits = json.loads((tiny.base / "splits_final.json").read_text())
    (tiny.base / "splits_final.json").write_text(json.dumps(splits * folds))
    for fold in range(folds):
        trainer = tiny.trainer(nnUNetTrainerFDPL, fold=fold, num_epochs=1, seed=fold)
        trainer.run_training()
    numbers = [str(fold) for fold in range(folds)]
    capsys.readouterr()
    assert export(tiny, "-f", *numbers, "--network", "both", trainer="nnUNetTrainerFDPL") == 0
    told = capsys.readouterr().out
    model = Path(trainer.output_folder).parents[0]
    both, partner = (model.with_name(model.name.replace("FDPL", f"FDPL{name}")) for name in ("Both", "Partner"))
    together = tuple(range(2 * folds))
    assert str(both) in told
    assert f"-tr nnUNetTrainerFDPLBoth -f {' '.join(map(str, together))} " in told
    assert not partner.exists()
    assert export(tiny, "-f", *numbers, trainer="nnUNetTrainerFDPL") == 0
    data = torch.randn(1, 1, *[side + 9 for side in tiny.patch])
    single = [logits_of(folder, (fold,), data) for fold in range(folds) for folder in (model, partner)]
    assert torch.equal(logits_of(both, together, data), sum(single[1:], single[0].clone()) / len(single))
    assert not torch.equal(single[0], single[1])
    # A folder of both predicts alone: nothing of the training goes along.
    checkpoint = torch.load(both / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert "optimizer_state" not in checkpoint
    assert "nnunet_ssl" not in checkpoint


def test_the_weights_behind_an_average_are_no_further_network_to_average(tiny, capsys):
    model = None
    for cls in (nnUNetTrainerFDPL, nnUNetTrainerSupervised):
        trainer = tiny.trainer(cls, num_epochs=1, averaged_decay=0.5)
        trainer.run_training()
        model = model or Path(trainer.output_folder).parents[0]
    assert export(tiny, "--network", "both", trainer="nnUNetTrainerFDPL") == 0
    both = torch.load(
        model.with_name(model.name.replace("FDPL", "FDPLBoth")) / "fold_1" / "checkpoint_final.pth", weights_only=False
    )
    whole = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    partner = whole["nnunet_ssl"]["companions"]["partner"]["weights"]
    assert all(torch.equal(value, partner[name]) for name, value in both["network_weights"].items())
    assert export(tiny, "--network", "both", trainer="nnUNetTrainerSupervised") == 2
    assert "holds one network only" in capsys.readouterr().err


def test_networks_that_are_not_alike_are_averaged_by_the_commands_that_are_printed(trained, capsys):
    tiny, trainer = trained
    capsys.readouterr()
    assert export(tiny, "--network", "both") == 0
    told = capsys.readouterr().out.splitlines()
    model = Path(trainer.output_folder).parents[0]
    assert not model.with_name(model.name.replace("DualNet", "DualNetBoth")).exists()
    assert model.with_name(model.name.replace("DualNet", "DualNetPartner")).is_dir()
    same = "nnUNetv2_predict -d Dataset900_Tiny -c 2d -p nnUNetPlans -tr nnUNetTrainerDualNet"
    rest = "-f 0 -chk checkpoint_final.pth -i IN -o OUT"
    assert told[1:] == [
        f"{same} {rest}_1 --save_probabilities",
        f"{same}Partner {rest}_2 --save_probabilities",
        "nnUNetv2_ensemble -i OUT_1 OUT_2 -o OUT",
    ]


def test_export_refuses_what_it_cannot_do(trained, capsys):
    tiny, trainer = trained
    assert export(tiny, "-f", "0", "1") == 2
    assert "Train the fold first" in capsys.readouterr().err
    folder = Path(trainer.output_folder).parents[0]
    assert not folder.with_name(folder.name.replace("DualNet", "DualNetPartner")).exists(), "nothing is half-written"
    assert export(tiny) == 0
    assert export(tiny) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert export(tiny, "--overwrite") == 0
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["nnunet_ssl"]["companions"] = {}
    torch.save(content, file)
    assert export(tiny, "--overwrite") == 2
    assert "holds one network only" in capsys.readouterr().err

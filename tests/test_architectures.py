"""Networks other than the plain U-Net of nnU-Net's default plans: residual encoders, and compiled ones."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATCHES, TinyDataset

from nnunet_ssl.plans import RESIDUAL, with_partner_network


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_residual_encoder_plans(tmp_path, trainer_class, patch):
    """As nnU-Net's ResEnc presets write them: trained, saved, and continued."""
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    tiny.plans = with_partner_network(tiny.plans, "nnUNetPlans", tiny.configuration)
    kind = tiny.plans["configurations"][tiny.configuration]["architecture"]["network_class_name"]
    assert kind == RESIDUAL
    trainer = tiny.trainer(trainer_class, num_epochs=2)
    trainer.run_training()
    assert type(trainer.network).__name__ == "ResidualEncoderUNet"
    again = tiny.trainer(trainer_class, num_epochs=3)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    for ours, theirs in zip(again.networks, trainer.networks):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(a, b)
    again.run_training()
    values = [again.logger.get_value(f"ssl_{name}", step=-1) for name in again.term_names]
    assert np.isfinite(values).all()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_networks_train_alike(tmp_path, trainer_class, monkeypatch):
    """nnU-Net compiles on CUDA alone; what is traced is the same everywhere, and so is what is saved."""
    weights = []
    for compiled in (False, True):
        name = "compiled" if compiled else "plain"
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(tmp_path / name / variable))
        tiny = TinyDataset(tmp_path / name, PATCHES["2d"])
        with pytest.MonkeyPatch.context() as patch:
            if compiled:
                patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
                patch.setattr(trainer_class, "_do_i_compile", lambda self: True)
            trainer = tiny.trainer(trainer_class, supervised_fraction=0.5)
            trainer.run_training()
        assert all(hasattr(network, "_orig_mod") == compiled for network in trainer.networks)
        checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
        partner = checkpoint["nnunet_ssl"]["partner"]
        weights.append([*checkpoint["network_weights"].items(), *(partner["weights"].items() if partner else ())])
    assert [name for name, _ in weights[0]] == [name for name, _ in weights[1]]
    for (name, plain), (_, traced) in zip(*weights):
        torch.testing.assert_close(plain, traced, atol=1e-4, rtol=1e-3, msg=name)

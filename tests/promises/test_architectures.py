"""Networks other than the plain U-Net of nnU-Net's default plans: residual encoders, and compiled ones; and devices."""

from __future__ import annotations

import functools
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet, nnUNetTrainerSemiTC
from nnunet_ssl.nnunet.plans import RESIDUAL, with_partner_network
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.device import Pass, heard_waits, measure, passes, ready, recompilations
from nnunet_ssl.testing.networks import differing, weights_of
from nnunet_ssl.testing.operations import DoublePrecision, Waits
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset
from nnunet_ssl.transforms.interpolation import spline_matrix


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
    assert not differing(weights_of(again), weights_of(trainer))
    again.run_training()
    values = [again.logger.get_value(f"ssl_{name}", step=-1) for name in again.term_names]
    assert np.isfinite(values).all()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_networks_train_alike(tmp_path, trainer_class, monkeypatch):
    """nnU-Net compiles on CUDA alone; what is traced is the same everywhere, and so is what is saved.

    Every batch size has a graph of its own, and all are made before the first epoch.
    """
    weights, symbolic, at_first_epoch = [], [], []

    def backend(module, inputs):
        symbolic.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return module.forward

    for compiled in (False, True):
        name = "compiled" if compiled else "plain"
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(tmp_path / name / variable))
        tiny = TinyDataset(tmp_path / name, PATCHES["2d"])
        with pytest.MonkeyPatch.context() as patch:
            if compiled:
                patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
                patch.setattr(trainer_class, "_do_i_compile", lambda self: True)
            trainer = tiny.trainer(trainer_class, supervised_fraction=0.5)
            start_epoch = trainer.on_train_epoch_start

            def note_and_start(start_epoch=start_epoch):
                at_first_epoch.append(len(symbolic))
                start_epoch()

            trainer.on_train_epoch_start = note_and_start
            trainer.run_training()
        networks = [trainer.network, *(companion.module for companion in trainer.companions.values())]
        assert all(hasattr(network, "_orig_mod") == compiled for network in networks)
        checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
        companions = checkpoint["nnunet_ssl"]["companions"].values()
        saved = [checkpoint["network_weights"], *(companion["weights"] for companion in companions)]
        weights.append([item for state in saved for item in state.items()])
    assert symbolic
    assert not any(symbolic)
    assert len(symbolic) == at_first_epoch[trainer.num_epochs]
    assert [name for name, _ in weights[0]] == [name for name, _ in weights[1]]
    for (name, plain), (_, traced) in zip(*weights):
        torch.testing.assert_close(plain, traced, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_a_step_knows_no_double_precision(tmp_path, trainer_class, patch):
    """Apple's devices (MPS) have none: an operation in double precision would end the training there."""
    spline_matrix.cache_clear()
    step = ready(trainer_class, TinyDataset(tmp_path, PATCHES[patch]))
    with DoublePrecision(trainer_class) as found:
        taken = step()
    assert np.isfinite(taken["loss"])
    assert found.operations == []


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_a_step_waits_for_the_device_as_often_as_a_stock_step(tmp_path, trainer_class, patch):
    """Besides, a step of either copies its loss to the host at its end: one transfer each."""
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    found = []
    for cls in (nnUNetTrainer, trainer_class):
        found.append(waits_of(cls, tiny))
    stock, ours = found
    assert ours.operations == stock.operations


def waits_of(cls: type, tiny: TinyDataset) -> Waits:
    """Of the second step: tables that are made once are there by then."""
    step = ready(cls, tiny)
    step()
    with Waits(cls) as waits:
        step()
    return waits


# Lines of a step that wait for a GPU, and lines on numbers that the host has drawn by itself.
WAITING = {
    "tolist": "torch.rand(3, generator=trainer.generator).tolist()",
    "numpy": "images.mean().detach().numpy()",
    "cpu": "images.mean().cpu()",
    "to": "images.mean().to('cpu')",
    "_local_scalar_dense": "float(images.mean())",
    "nonzero": "images.nonzero()",
    "index": "images[images > 0]",
    "is_nonzero": "bool((images > 0).any())",
}
OWN = ["torch.rand(3).tolist()", "(2 * torch.rand(3) > 1).sum().item()", "bool(torch.randint(2, ()))"]


@pytest.mark.parametrize("line", [*WAITING.values(), *OWN])
def test_a_line_that_waits_is_named_and_one_that_does_not_is_not(tiny, line):
    class Waiting(nnUNetTrainerDualNet):
        def step(self, labeled, unlabeled):
            eval(line, {"torch": torch}, {"trainer": self, "images": labeled.images})
            return super().step(labeled, unlabeled)

    plain, waiting = (waits_of(cls, tiny) for cls in (nnUNetTrainerDualNet, Waiting))
    extra = Counter(waiting.operations) - Counter(plain.operations)
    if line in OWN:
        assert not extra
        return
    assert sum(extra.values()) == 1
    assert any(place and place.startswith(__file__) for place in waiting.places)


def test_waiting_for_a_gpu_is_heard_where_it_happens():
    """What PyTorch says on CUDA, in its words; there is no GPU here."""
    places = []

    def wait():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with heard_waits(lambda: places.append([name for _, _, name, _ in traceback.extract_stack()][-4])):
        wait()
    assert places == ["wait"]


def test_what_passes_through_the_networks_of_a_step(tiny):
    """Two labeled and two unlabeled examples: both networks learn from all, and label the latter."""
    found = passes(nnUNetTrainerDualNet, tiny)
    assert list(found.values()) == [[Pass(4, True), Pass(2, False)]] * 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_what_is_compiled_after_the_first_epoch_is_named(tmp_path, monkeypatch):
    """A network whose kind of pass changes from epoch to epoch is; one that does the same again is not."""

    class Growing(nnUNetTrainerSemiTC):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            self.network._orig_mod.encoder.epoch = self.current_epoch

        def build(self):
            super().build()
            encoder = self.network._orig_mod.encoder
            encoder.epoch, forward = 0, encoder.forward
            encoder.forward = lambda x: [skip * (1 + encoder.epoch) for skip in forward(x)]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(nnUNetTrainerSemiTC, "_do_i_compile", lambda self: True)
    assert recompilations(nnUNetTrainerSemiTC, Bench(tmp_path / "same")) == []
    assert recompilations(Growing, Bench(tmp_path / "growing"))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_costs_are_measured_on_a_gpu_alone(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no device 'cuda'" if device == "cuda" else "on cuda, not on cpu"):
        measure(nnUNetTrainerDualNet, device)

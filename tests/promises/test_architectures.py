"""Networks other than the plain U-Net of nnU-Net's default plans: residual encoders, and compiled ones; and devices."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_ssl.losses.predictions import downsample_target
from nnunet_ssl.methods import nnUNetTrainerDualNet
from nnunet_ssl.nnunet.plans import RESIDUAL, with_partner_network
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


class DoublePrecision(TorchDispatchMode):
    """Notes the operations that give tensors of double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)):
            self.operations.append(str(func))
        return result


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_a_step_knows_no_double_precision(tmp_path, trainer_class, patch):
    """Apple's devices (MPS) have none: an operation in double precision would end the training there."""
    spline_matrix.cache_clear()
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    trainer = tiny.initialized(trainer_class, supervised_fraction=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter([unlabeled]) if trainer.uses_unlabeled else None
    with DoublePrecision() as found:
        step = trainer.train_step(labeled)
    assert np.isfinite(step["loss"])
    assert found.operations == []


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a device: those that hand it a value or a size."""

    _HANDING_OVER = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        dtypes = {t.dtype for t in tree_leaves(args[1:]) if isinstance(t, torch.Tensor)}
        # What a mask selects has a size that the host must know.
        if name in self._HANDING_OVER or (name.startswith("index") and torch.bool in dtypes):
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_a_step_waits_for_the_device_as_often_as_a_stock_step(tmp_path, trainer_class, patch):
    """Besides, a step of either copies its loss to the host at its end: one transfer each.

    DualNet asks which network teaches: the answer saves the teacher's backward pass.
    """
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    counts = []
    for cls in (nnUNetTrainer, trainer_class):
        trainer = tiny.trainer(cls, supervised_fraction=0.0)
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
        labeled, unlabeled = tiny.batches(trainer)
        if cls is nnUNetTrainer:
            shapes = [tuple(o.shape[2:]) for o in trainer.network(labeled["data"])]
            labeled["target"] = downsample_target(labeled["target"], shapes)
        else:
            trainer.dataloader_unlabeled = iter([unlabeled] * 2) if trainer.uses_unlabeled else None
        trainer.train_step(labeled)
        with Waits() as found:
            trainer.train_step(labeled)
        counts.append(found.operations)
    allowed = [*counts[0], *(["_local_scalar_dense"] if trainer_class is nnUNetTrainerDualNet else [])]
    assert counts[1] == allowed

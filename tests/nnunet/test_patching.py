"""Names of nnU-Net that are replaced at run time: whether nnU-Net still uses them, and gets them back."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer
import pytest
import torch
from nnunetv2.run import load_pretrained_weights

from nnunet_ssl.nnunet import patching

TRAINER_MODULE = nnunetv2.training.nnUNetTrainer.nnUNetTrainer
TRAINER = TRAINER_MODULE.nnUNetTrainer


@pytest.mark.parametrize(
    ("function", "use"),
    [
        (TRAINER.initialize, "self.network = DDP(self.network, device_ids=[self.local_rank])"),
        (TRAINER.get_dataloaders, "NonDetMultiThreadedAugmenter(data_loader=dl_tr"),
        (TRAINER.get_dataloaders, "NonDetMultiThreadedAugmenter(data_loader=dl_val"),
        (load_pretrained_weights.load_pretrained_weights, "torch.load(fname, map_location=torch.device('cuda'"),
    ],
)
def test_nnunet_still_uses_what_is_replaced(function, use):
    """If this fails, look at what the new version does there and whether the replacement is still needed."""
    assert use in inspect.getsource(function)


def test_no_other_module_of_the_package_replaces_names_of_nnunet():
    root = Path(patching.__file__).parents[1]
    files = [file for file in root.rglob("*.py") if file.parent.name != "testing"]
    users = [file.name for file in files if re.search(r"setattr\((?!self)", file.read_text())]
    assert users == ["patching.py"]


@pytest.mark.parametrize(
    ("replacement", "module", "name"),
    [
        (lambda: patching.ddp_wrapper(len), TRAINER_MODULE, "DDP"),
        (lambda: patching.background_workers(len), TRAINER_MODULE, "NonDetMultiThreadedAugmenter"),
        (patching.pretrained_weights_on_cpu, load_pretrained_weights, "torch"),
    ],
)
def test_names_are_given_back_also_after_an_error(replacement, module, name):
    stock = getattr(module, name)

    def interrupted() -> None:
        with replacement():
            assert getattr(module, name) is not stock
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert getattr(module, name) is stock


def test_pretrained_weights_are_loaded_to_the_cpu(tmp_path):
    torch.save({"network_weights": torch.ones(1)}, tmp_path / "weights.pth")
    with patching.pretrained_weights_on_cpu():
        inside = load_pretrained_weights.torch
        loaded = inside.load(tmp_path / "weights.pth", map_location=inside.device("cuda", 7), weights_only=False)
    assert loaded["network_weights"].device.type == "cpu"

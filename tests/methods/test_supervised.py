"""The supervised baseline is nnU-Net's own training."""

from __future__ import annotations

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.methods import nnUNetTrainerSupervised
from nnunet_ssl.testing.tiny import SSL
from nnunet_ssl.testing.whole import train


def test_it_equals_the_stock_trainer_through_a_whole_training(tiny):
    ours = tiny.trainer(nnUNetTrainerSupervised)
    weights = train(ours)
    torch.manual_seed(SSL["seed"])
    stock = tiny.trainer(nnUNetTrainer)
    stock.initialize()
    torch.manual_seed(SSL["seed"])
    np.random.seed(SSL["seed"])
    stock.run_training()
    for name, value in stock.network.state_dict().items():
        torch.testing.assert_close(weights[f"network.{name}"], value, atol=1e-5, rtol=1e-4)


def test_it_has_no_second_loader_and_one_network(tiny):
    trainer = tiny.trainer(nnUNetTrainerSupervised, num_epochs=1)
    trainer.run_training()
    assert trainer.dataloader_unlabeled is None
    assert trainer.companions == {}
    assert trainer.term_names == ("supervised",)
    assert trainer.switch_epoch == 0

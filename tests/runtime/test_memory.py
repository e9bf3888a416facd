"""What a training is said to have needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_ssl.methods import nnUNetTrainerMeanTeacher
from nnunet_ssl.runtime.memory import peak_memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells otherwise, too")
def test_memory_is_what_the_kernel_says():
    found = peak_memory(torch.device("cpu"))
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found == pytest.approx(int(kib) / 1024, rel=0.05)
    assert peak_memory(torch.device("mps")) is None


def test_a_training_notes_what_it_took(tiny):
    trainer = tiny.trainer(nnUNetTrainerMeanTeacher)
    trainer.run_training()
    costs = json.loads((Path(trainer.output_folder) / "nnunet_ssl.json").read_text())["costs"]
    log = trainer.logger.local_logger.my_fantastic_logging
    assert costs["seconds"] == round(sum(np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"])), 1)
    assert costs["peak_memory_mib"] > 100

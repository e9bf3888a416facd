"""The promise that nnU-Net predicts with a method's model where this package is not installed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.testing.bench import Bench, environment
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.whole import Training, shared_training

PREDICTION = "prediction"
# Run where importing nnunet_ssl fails; takes the model's folder, the image's file and where to write the labels.
_STOCK = """
import sys
import numpy, torch
try:
    import nnunet_ssl
except ImportError:
    pass
else:
    raise SystemExit("nnunet_ssl is not hidden")
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
model, image, output = sys.argv[1:]
torch.set_num_threads(1)
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, (0,), "checkpoint_final.pth")
logits = predictor.predict_logits_from_preprocessed_data(torch.load(image))
numpy.save(output, numpy.asarray(predictor.label_manager.convert_logits_to_segmentation(logits)))
"""


@dataclasses.dataclass
class StockPrediction:
    """A process of nnU-Net alone that predicts an image with the model of a training."""

    process: subprocess.Popen[str]
    output: Path

    def labels(self) -> np.ndarray:
        """What it predicted, once it has ended.

        Raises:
            BrokenPromise: Where it failed.
        """
        said = self.process.communicate()[0]
        if self.process.returncode != 0:
            raise BrokenPromise(
                PREDICTION,
                f"nnU-Net alone cannot predict with the model: {said.strip().splitlines()[-1]}",
                "The network must be the plan's own, and what checkpoints hold of it, tensors and plain values; "
                "everything else is a companion's.",
            )
        labels: np.ndarray = np.load(self.output)
        return labels

    def stop(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def start_stock_prediction(cls: type, bench: Bench) -> StockPrediction:
    """Let nnU-Net alone predict, beside this process; once per bench."""
    return bench.once(("prediction", cls), lambda: _start(shared_training(cls, bench), bench))


def stock_nnunet_predicts_alike(cls: type, bench: Bench) -> None:
    """nnU-Net without this package gives an image the labels that the trained network gives it.

    Raises:
        BrokenPromise: Where it cannot, or gives others.
    """
    stock = start_stock_prediction(cls, bench)
    training = shared_training(cls, bench)
    with bench.at(training.dataset):
        mine = _predict(training.trainer, _image(training))
    labels = stock.labels()
    if not np.array_equal(labels, mine):
        raise BrokenPromise(
            PREDICTION,
            f"nnU-Net alone gives {(labels != mine).mean():.1%} of an image's voxels other labels than the training's "
            f"network.",
            "Look for what stands between the network and its predictions: a network that is replaced after build, "
            "mirroring axes, another companion that is to predict (nnunet-ssl export makes a model of it).",
        )


def _start(training: Training, bench: Bench) -> StockPrediction:
    folder = bench.root / "stock"
    folder.mkdir()
    (folder / "nnunet_ssl.py").write_text("raise ImportError('nnunet_ssl is hidden here')\n")
    torch.save(_image(training), folder / "image.pt")
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, **environment(training.dataset), "PYTHONPATH": paths, "nnUNet_extTrainer": ""}
    model, output = str(Path(training.trainer.output_folder).parent), folder / "labels.npy"
    process = subprocess.Popen(
        [sys.executable, "-c", _STOCK, model, str(folder / "image.pt"), str(output)],
        env=variables,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return StockPrediction(process, output)


def _image(training: Training) -> Tensor:
    """Larger than the patch, so that windows slide over it."""
    dataset = training.dataset
    shape = (dataset.channels, *(1 if side == 1 else side + side // 2 for side in dataset.shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _predict(trainer: Any, image: Tensor) -> np.ndarray:
    """As nnU-Net's validation does it."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    predictor.manual_initialization(
        bare(trainer.network),
        trainer.plans_manager,
        trainer.configuration_manager,
        [bare(trainer.network).state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    logits = predictor.predict_logits_from_preprocessed_data(image)
    trainer.set_deep_supervision_enabled(True)
    return np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits))

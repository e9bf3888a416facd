"""The promise that a method trains on every kind of data that nnU-Net knows."""

from __future__ import annotations

import math
from typing import Any

import torch

from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.whole import train
from nnunet_ssl.training.logger import TermLogger

KINDS = "kinds"


def every_kind_of_data_trains(cls: type, bench: Bench) -> None:
    """Regions and ignored voxels in 2D, and classes in 3D; classes in 2D are everywhere else.

    Raises:
        BrokenPromise: Naming the kind.
    """
    for patch, scenario in (("2d", "regions"), ("2d", "ignore"), ("3d", "labels")):
        one_epoch_trains(cls, bench, patch, scenario)


def one_epoch_trains(cls: type, bench: Bench, patch: str, scenario: str, **ssl: Any) -> None:
    """A training of one epoch ends, and all terms that have a weight are logged and finite.

    Args:
        cls: A trainer.
        bench: Where.
        patch: One of ``tiny.PATCHES``.
        scenario: One of ``tiny.SCENARIOS``.
        ssl: Hyper-parameters.

    Raises:
        BrokenPromise: Naming the kind and the terms.
    """
    settings = {"num_epochs": 1, "num_iterations_per_epoch": 1, "supervised_fraction": 0.0, "picture_every": 0, **ssl}
    with bench.data(patch, scenario, device=bench.device) as tiny:
        trainer = tiny.trainer(cls, **settings)
        weights = train(trainer)
        logged = {name: trainer.logger.get_value(TermLogger.key(name), step=-1) for name in trainer.term_names}
    counting = [n for n in logged if n in trainer.supervised_terms or trainer.weight(n) > 0]
    bad = [name for name in counting if not math.isfinite(logged[name])]
    bad += [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise BrokenPromise(
            KINDS,
            f"With {scenario} in {patch.upper()}, {', '.join(bad[:4])} is not finite or missing after an epoch.",
            f"Look in {cls.__name__} for what knows classes or two dimensions alone: self.probabilities, "
            f"self.log_probabilities and self.hard_labels know regions.",
        )

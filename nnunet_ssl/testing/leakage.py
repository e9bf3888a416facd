"""The promise that labels nobody gave to a training cannot change it."""

from __future__ import annotations

from pathlib import Path

from nnunet_ssl.data.pseudo_labels import FOLDER
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.networks import counted, differing
from nnunet_ssl.testing.tiny import TinyDataset
from nnunet_ssl.testing.whole import SHARED_SETTINGS, Training, shared_training, train, write_decoys

LEAKAGE = "leakage"


def hidden_labels_change_nothing(cls: type, bench: Bench) -> None:
    """Two trainings, one with other labels of all cases that are not labeled, end with the same weights.

    And the first of them opens no file with such labels, but for the validation's.

    Raises:
        BrokenPromise: Naming the file that was opened, or the weights that differ.
    """
    honest = shared_training(cls, bench)
    no_label_is_opened(cls, honest)
    with bench.data() as tiny:
        write_decoys(tiny, seed=1)
        tiny.scramble_labels(tiny.hidden)
        trainer = tiny.trainer(cls, **SHARED_SETTINGS)
        # nnU-Net reads these for its validation, and crops by class locations: labels alone are others.
        tiny.scramble_labels_keeping_locations(tiny.validation)
        scrambled = train(trainer)
    names = differing(honest.weights, scrambled)
    if names:
        raise BrokenPromise(
            LEAKAGE,
            f"With other labels of hidden and validation cases, {counted(names, len(scrambled))} are others.",
            f"Look in {cls.__name__} for what reads a label that is not in its labeled batch, or depends on the "
            f"online validation.",
        )


def no_label_is_opened(cls: type, training: Training) -> None:
    """Of cases whose labels are hidden, a training opens the preprocessed image alone; of no other case, a decoy.

    Raises:
        BrokenPromise: Naming the file and the line that asked for it.
    """
    for opened in training.opened:
        if _holds_hidden_label(opened.path, training.dataset):
            raise BrokenPromise(
                LEAKAGE,
                f"The training opens {opened.path.name} in {opened.path.parent.name}, labels of an unlabeled case.",
                f"Look at {opened.place or cls.__name__}: an unlabeled case is its image, and nothing else.",
            )


def _holds_hidden_label(path: Path, dataset: TinyDataset) -> bool:
    if FOLDER in path.parts:
        # Pseudo-labels: of all cases, and made without a label of any of them.
        return False
    name, folder = path.name, path.parent.name
    case = name.partition(".")[0].removesuffix("_seg")
    if case in dataset.hidden:
        return name != f"{case}.b2nd"
    return case in dataset.unlabeled and not folder.endswith("_unlabeled")

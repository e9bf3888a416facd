"""The commands of self-training, in their order, and which of them have been done.

A round trains the members of an ensemble and lets them label the unlabeled cases. The members of the first round learn
as the chosen trainer does, those of later rounds from the labels of the round before, too. In the end the fold itself
is trained on its labels and on the pseudo-labels of the last round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnunet_ssl.data.pseudo_labels import PseudoLabels
from nnunet_ssl.nnunet.folders import read_json

TRAINER = "nnUNetTrainerSelfTraining"
TUNING_TRAINER = "nnUNetTrainerSupervised"
# Of fine-tuning, a tenth of nnU-Net's learning rate: the network has nearly arrived.
_TUNING_RATE = 0.001
_FINAL = "checkpoint_final.pth"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        words: Of the command line.
        is_done: Whether it has nothing to do any more.
        made: The round's pseudo-labels, after which people are told of them.
    """

    words: tuple[str, ...]
    is_done: bool
    made: PseudoLabels | None = None


@dataclasses.dataclass(frozen=True)
class Member:
    """A member of the ensemble: the fold it trains, and a seed where all members train the same fold."""

    fold: int | str
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Self-training of a fold.

    Attributes:
        dataset: Name of the data set.
        configuration: Of the plans.
        plans: Name of the plans to start from.
        trainer: Of the first round.
        fold: Number, or "all".
        name: Of this self-training, in the names of plans and pseudo-labels.
        members: Of the ensemble.
        number: Of rounds.
        device: "cuda", "cpu" or "mps".
        rule: Further options of nnunet-ssl pseudo-label.
        tuning_epochs: Of fine-tuning on labels alone; 0 for none.
        preprocessed: The data set's folder of plans.
        folder: The configuration's folder of preprocessed cases.
        results: The data set's folder of models.
    """

    dataset: str
    configuration: str
    plans: str
    trainer: str
    fold: int | str
    name: str
    members: Sequence[Member]
    number: int
    device: str
    rule: Sequence[str]
    tuning_epochs: int
    preprocessed: Path
    folder: Path
    results: Path

    def steps(self) -> Iterator[Step]:
        """The commands. What has been done is looked up when a step is asked for: take one after the other."""
        for number in range(1, self.number + 1):
            for member in self.members:
                yield from self._member(number, member)
            yield self._labeling(number)
        final = self._plans()
        yield self._configure(final, f"SelfTraining.labels={self.labels_name(self.number)}")
        yield self._training(TRAINER, final, self.fold, is_validated=True)
        if self.tuning_epochs:
            weights = str(self._model(TRAINER, final, self.fold) / _FINAL)
            tuned = f"{final}_tuned"
            yield self._configure(tuned, f"num_epochs={self.tuning_epochs}", f"initial_lr={_TUNING_RATE}")
            yield self._training(TUNING_TRAINER, tuned, self.fold, True, "-pretrained_weights", weights)

    @property
    def result(self) -> Path:
        """The folder of what is trained last."""
        if self.tuning_epochs:
            return self._model(TUNING_TRAINER, f"{self._plans()}_tuned", self.fold)
        return self._model(TRAINER, self._plans(), self.fold)

    def labels_name(self, number: int) -> str:
        """Of the pseudo-labels of a round."""
        return f"{self.name}_round_{number}"

    def models(self, number: int) -> list[str]:
        """The trained folds of a round, as nnunet-ssl pseudo-label --models takes them."""
        folders = (self._model(*self._of_member(number, m), m.fold) for m in self.members)
        return [f"{folder.parent.name}/{folder.name}" for folder in folders]

    def _member(self, number: int, member: Member) -> Iterator[Step]:
        trainer, plans = self._of_member(number, member)
        settings = [f"SelfTraining.labels={self.labels_name(number - 1)}"] if number > 1 else []
        settings += [f"seed={member.seed}"] if member.seed is not None else []
        if settings:
            yield self._configure(plans, *settings)
        yield self._training(trainer, plans, member.fold, is_validated=False)

    def _of_member(self, number: int, member: Member) -> tuple[str, str]:
        """Trainer and plans."""
        if number == 1 and member.seed is None:
            return self.trainer, self.plans
        seed = "" if member.seed is None else f"_seed_{member.seed}"
        return self.trainer if number == 1 else TRAINER, f"{self._plans()}_round_{number}{seed}"

    def _plans(self) -> str:
        return f"{self.plans}_{self.name}"

    def _model(self, trainer: str, plans: str, fold: int | str) -> Path:
        return self.results / f"{trainer}__{plans}__{self.configuration}" / f"fold_{fold}"

    def _configure(self, plans: str, *settings: str) -> Step:
        base, made = (self.preprocessed / f"{name}.json" for name in (self.plans, plans))
        is_done = made.is_file() and made.stat().st_mtime >= base.stat().st_mtime
        words = ("nnunet-ssl", "configure", "-d", self.dataset, "-p", self.plans, "-o", plans, "--overwrite")
        return Step((*words, "--set", *settings), is_done)

    def _training(self, trainer: str, plans: str, fold: int | str, is_validated: bool, *first: str) -> Step:
        """Of a member, the weights alone are waited for; nobody reads its validation."""
        folder = self._model(trainer, plans, fold)
        has_weights = (folder / _FINAL).is_file()
        is_done = has_weights and (not is_validated or (folder / "validation" / "summary.json").is_file())
        words = ("nnUNetv2_train", self.dataset, self.configuration, str(fold), "-tr", trainer, "-p", plans)
        begun = (folder / "checkpoint_latest.pth").is_file()
        how = () if is_done else ("--val",) if has_weights else ("--c",) if begun else first
        return Step((*words, "-device", self.device, *how), is_done)

    def _labeling(self, number: int) -> Step:
        labels = PseudoLabels.of(str(self.folder), self.fold, self.labels_name(number))
        models = self.models(number)
        previous = ("--previous", self.labels_name(number - 1)) if number > 1 else ()
        words = (
            *("nnunet-ssl", "pseudo-label", "-d", self.dataset, "-c", self.configuration, "-p", self.plans),
            *("-f", str(self.fold), "--name", self.labels_name(number), "--models", *models),
            *(*previous, *self.rule, "-device", self.device),
        )
        is_done = False
        if labels.manifest_file.is_file():
            # With other options the command says what to do.
            found = read_json(labels.manifest_file, "")["settings"]
            given = dict(zip(self.rule[::2], map(float, self.rule[1::2])))
            asked = {name.removeprefix("--").replace("-", "_"): value for name, value in given.items()}
            is_done = found == found | {"models": models, "previous": previous[1] if previous else None} | asked
        return Step(words, is_done, labels)

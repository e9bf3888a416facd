"""Methods as somebody else writes them: two that keep every promise, and others that break one each."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import blosc2
import torch
from torch import Tensor, nn
from torch import distributed as dist

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.blocks.networks import bare, full_resolution
from nnunet_ssl.blocks.teacher import EMATeacher
from nnunet_ssl.training import MethodParameters, SemiSupervisedTrainer, parameter


@dataclasses.dataclass(frozen=True)
class TeacherParameters(MethodParameters):
    """Hyper-parameters of a mean teacher."""

    agreement_weight: float = parameter(1.0, "weight of the agreement term", minimum=0.0)
    extra_weight: float = parameter(1.0, "weight of a further term on labels", minimum=0.0)


class nnUNetTrainerTeacher(SemiSupervisedTrainer[TeacherParameters]):
    """The network agrees with its average."""

    Parameters = TeacherParameters
    unlabeled_terms = ("agreement",)
    views = ("strong", "weak")

    def build(self) -> None:
        self.teacher: Any = self.add("teacher", EMATeacher(self.network, self.architecture, 0.9))

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        p = self.probabilities(self.network(unlabeled.strong))
        return {"agreement": (p - self.probabilities(self.teacher(unlabeled.weak))).square().mean()}


@dataclasses.dataclass(frozen=True)
class CrossParameters(MethodParameters):
    """Hyper-parameters of cross pseudo supervision."""

    supervised_fraction: float = parameter(0.5, "fraction of the epochs on labels alone", minimum=0.0, maximum=1.0)
    cross_weight: float = parameter(0.5, "weight of either term", minimum=0.0)


class nnUNetTrainerCross(SemiSupervisedTrainer[CrossParameters]):
    """Two networks, each taught by the other's labels."""

    Parameters = CrossParameters
    unlabeled_terms = ("cross", "cross_partner")

    def build(self) -> None:
        self.add("partner", self.build_partner())

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        first, second = (network(unlabeled.strong) for network in self.predictors)
        labels = [self.hard_labels(o, labeled.target) for o in (first, second)]
        return {
            "cross": self.supervised_loss(first, labels[1]),
            "cross_partner": self.supervised_loss(second, labels[0]),
        }


# ---- broken: gradients and signal ---------------------------------------------------------------------------------


class nnUNetTrainerUnbuilt(nnUNetTrainerTeacher):
    """It has a mistake in its first line."""

    def build(self) -> None:
        self.teacher = self.add("teacher", EMATeacher(self.netwrok, self.architecture, 0.9))


class nnUNetTrainerDetached(nnUNetTrainerTeacher):
    """Its predictions are detached, so the term teaches nothing."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        p = self.probabilities(self.network(unlabeled.strong)).detach()
        return {"agreement": (p - self.probabilities(self.teacher(unlabeled.weak))).square().mean()}


class nnUNetTrainerCutOff(nnUNetTrainerTeacher):
    """Its term acts on the bottleneck alone, so the decoder learns nothing of it."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        return {"agreement": bare(self.network).encoder(unlabeled.strong)[-1].square().mean()}


class nnUNetTrainerSwapped(nnUNetTrainerCross):
    """Its terms train the other network than they name."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        losses = super().unlabeled_losses(labeled, unlabeled, outputs)
        return {"cross": losses["cross_partner"], "cross_partner": losses["cross"]}


class nnUNetTrainerSilent(nnUNetTrainerTeacher):
    """It declares a term that it never gives."""

    unlabeled_terms = ("agreement", "agreement_again")


class nnUNetTrainerWrongImages(nnUNetTrainerTeacher):
    """It asks for unlabeled images and learns from the labeled ones alone."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        p = self.probabilities(self.network(labeled.images + 0.1))
        return {"agreement": (p - self.probabilities(self.teacher(labeled.images))).square().mean()}


# ---- broken: labels -----------------------------------------------------------------------------------------------


class nnUNetTrainerReader(nnUNetTrainerTeacher):
    """It reads the labels of unlabeled cases where nnU-Net keeps them."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        losses = super().unlabeled_losses(labeled, unlabeled, outputs)
        for file in (Path(self.preprocessed_dataset_folder) / f"{key}_seg.b2nd" for key in unlabeled.keys):
            if file.is_file():
                losses["agreement"] = losses["agreement"] * (1 + float(blosc2.open(str(file))[:].mean()))
        return losses


class nnUNetTrainerIgnorant(nnUNetTrainerTeacher):
    """Its loss on labels takes ignored voxels for the last structure."""

    labeled_terms = ("extra",)

    def labeled_losses(self, labeled, outputs):
        logits = full_resolution(outputs[0])
        target = labeled.target[:, 0].long().clamp(max=logits.shape[1] - 1)
        return {"extra": nn.functional.cross_entropy(logits.float(), target)}


class nnUNetTrainerGuessing(nnUNetTrainerTeacher):
    """Its unlabeled term takes ignored voxels of the labeled batch for background."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        losses = super().unlabeled_losses(labeled, unlabeled, outputs)
        p, structures = self.probabilities(outputs[0]), range(1, full_resolution(outputs[0]).shape[1])
        wanted = torch.stack([(labeled.target[:, 0] == c).float() for c in structures], 1)
        return {"agreement": losses["agreement"] + (p[:, 1:] - wanted).square().mean()}


# ---- broken: numbers ----------------------------------------------------------------------------------------------


class nnUNetTrainerNaive(nnUNetTrainerTeacher):
    """Its cross-entropy is 0 log 0 where the networks are sure."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        p = self.probabilities(self.network(unlabeled.strong))
        return {"agreement": -(self.probabilities(self.teacher(unlabeled.weak)) * p.log()).mean()}


class nnUNetTrainerHasty(nnUNetTrainerTeacher):
    """Its teacher follows within the step, taken or not."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        losses = super().unlabeled_losses(labeled, unlabeled, outputs)
        self.teacher.after_step()
        return losses


class nnUNetTrainerFlat(nnUNetTrainerTeacher):
    """It knows one-hot classes alone."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        assert not self.has_regions, "regions were forgotten"
        return super().unlabeled_losses(labeled, unlabeled, outputs)


# ---- broken: stops ------------------------------------------------------------------------------------------------


class nnUNetTrainerUnsaved(nnUNetTrainerTeacher):
    """It keeps its teacher in a list, where no checkpoint finds it."""

    def build(self) -> None:
        self.teachers = [EMATeacher(self.network, self.architecture, 0.9)]
        self.teacher = self.teachers[0]


class nnUNetTrainerHidden(nnUNetTrainerTeacher):
    """Beside its teacher it keeps a copy of the network, which it never tells of."""

    def build(self) -> None:
        super().build()
        self.first = copy.deepcopy(bare(self.network))


class Frozen(Companion):
    """Never changes."""

    trained = False


class nnUNetTrainerSharing(nnUNetTrainerTeacher):
    """Its companion is a part of the network."""

    def build(self) -> None:
        super().build()
        self.add("head", Frozen(nn.Sequential(bare(self.network).decoder.seg_layers[-1])))


class Forgetful(EMATeacher):
    """Counts from zero again after a stop."""

    def memory(self) -> dict[str, Any]:
        return {}

    def recall(self, memory: Any) -> None:
        pass


class nnUNetTrainerForgetful(nnUNetTrainerTeacher):
    """Its teacher forgets how many steps it has followed."""

    def build(self) -> None:
        self.teacher = self.add("teacher", Forgetful(self.network, self.architecture, 0.9))


class nnUNetTrainerFiltered(nnUNetTrainerCross):
    """What it trains is the network behind a filter that no checkpoint knows."""

    def build(self) -> None:
        super().build()
        bare(self.network).register_forward_hook(lambda module, inputs, outputs: _negative(outputs))


def _negative(outputs: Any) -> Any:
    return [-o for o in outputs] if isinstance(outputs, list) else -outputs


# ---- broken: two processes ----------------------------------------------------------------------------------------


class Drifting(EMATeacher):
    """Moves by what the images of its own process show."""

    shift: Tensor = torch.zeros(())

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        next(self.module.parameters()).add_(self.shift)


class nnUNetTrainerDrifting(nnUNetTrainerTeacher):
    """Its teacher learns from the images of one process."""

    def build(self) -> None:
        self.teacher = self.add("teacher", Drifting(self.network, self.architecture, 0.9))

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        self.teacher.shift = unlabeled.weak.mean()
        return super().unlabeled_losses(labeled, unlabeled, outputs)


class nnUNetTrainerWaiting(nnUNetTrainerTeacher):
    """One process waits for a word of the other, which has gone on."""

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        if self.is_ddp and dist.get_rank() == 0:
            dist.recv(torch.zeros(1), src=1)
        return super().unlabeled_losses(labeled, unlabeled, outputs)

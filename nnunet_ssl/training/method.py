"""What a method implements, and what it may ask its training for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import full_resolution, quiet_pass
from nnunet_ssl.losses.predictions import downsample_target, label_map
from nnunet_ssl.training.hyperparameters import HyperParameters
from nnunet_ssl.training.learned import overlap_counts
from nnunet_ssl.training.monitor import PSEUDO_LABELS
from nnunet_ssl.training.schedules import first_epoch_of_second_stage
from nnunet_ssl.training.step import LossTerm


class Method(ABC):
    """A semi-supervised method. ``SemiSupervisedTrainer`` brings the training, a deriving class the losses.

    A method sets ``hyperparameters_class``; ``term_names``, the loss terms it returns, in the order of the log;
    ``unlabeled_terms``, those that need more than labels; ``statistic_names``, what else it tells about a step;
    ``uses_unlabeled``, whether it needs the second loader; ``transductive``, whether it learns from validation and test
    images too.
    """

    hyperparameters_class: ClassVar[type[HyperParameters]] = HyperParameters
    term_names: ClassVar[tuple[str, ...]] = ("supervised",)
    unlabeled_terms: ClassVar[tuple[str, ...]] = ()
    statistic_names: ClassVar[tuple[str, ...]] = ()
    uses_unlabeled: ClassVar[bool] = False
    transductive: ClassVar[bool] = False
    hp: Any
    network: nn.Module
    partner: nn.Module | None
    loss: nn.Module
    device: torch.device
    label_manager: Any
    configuration_manager: Any
    is_cascaded: bool
    num_epochs: int
    num_iterations_per_epoch: int
    current_epoch: int
    statistics: dict[str, Tensor | float]
    labeled_overlap: Tensor | None
    generator: torch.Generator
    _iterations_done_in_epoch: int

    # ---- what a method implements ---------------------------------------------------------------------------------

    @abstractmethod
    def loss_terms(self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> dict[str, LossTerm]:
        """Turn the two batches into named loss terms.

        Called under autocast, once per step.

        Args:
            labeled: ``data`` (B_l, C, *S) and ``target`` at full resolution, (B_l, 1, *S) or region channels, both on
                the device, and ``keys``.
            unlabeled: ``strong`` (B_u, C, *(S + 2 unlabeled_margin)) on the device, ``weak`` like it where
                ``wants_weak_view``; None in stage 1 and for methods without it.

        Returns:
            A term per name of ``term_names``; one that is not computed in this stage may be left out. What
            ``statistic_names`` announces goes into ``self.statistics``, numbers or scalar tensors. A method with
            ``unlabeled_terms`` calls ``note_learned``; the weights of these terms are reduced by what comes of it.
        """

    def partner_plans(self) -> dict[str, Any] | None:
        """Plans whose network is the method's second network; None for methods with one network."""
        return None

    def view(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the method makes of unlabeled images, to be looked at; called without gradient, under autocast.

        Args:
            images: As the unlabeled loader gives them, without augmentation, (B, C, *(S + 2 unlabeled_margin)).
            generator: For what is random.

        Returns:
            Label maps and boolean masks (B, *S) by name, in the order of the picture; "pseudo-labels" is watched from
            epoch to epoch. "image" (B, C, *S) is shown instead of ``images``.
        """
        return {PSEUDO_LABELS: label_map(quiet_pass(self.network, images), self.label_manager.has_regions)}

    def after_step(self) -> None:  # noqa: B027 (few methods have something to do)
        """Called after every optimizer step, for what follows the weights (averages, roles)."""

    # ---- state of the training ------------------------------------------------------------------------------------

    @property
    def switch_epoch(self) -> int:
        """The epoch at which stage 2 starts; 0 for methods without stages, which are in stage 2 throughout."""
        return first_epoch_of_second_stage(self.num_epochs, getattr(self.hp, "supervised_fraction", 0.0))

    @property
    def in_second_stage(self) -> bool:
        """Whether the semi-supervised terms are on."""
        return self.current_epoch >= self.switch_epoch

    @property
    def stage_progress(self) -> float:
        """Fraction of the current stage that is done, in [0, 1); 0 in a stage without epochs."""
        first, last = (self.switch_epoch, self.num_epochs) if self.in_second_stage else (0, self.switch_epoch)
        done = (self.current_epoch - first) * self.num_iterations_per_epoch + self._iterations_done_in_epoch
        return done / max(1, (last - first) * self.num_iterations_per_epoch)

    @property
    def augments_slice_by_slice(self) -> bool:
        """Whether the patch is so anisotropic that nnU-Net augments its slices (axis 0) as 2D images."""
        patch_size = self.configuration_manager.patch_size
        return len(patch_size) == 3 and max(patch_size) / patch_size[0] > ANISO_THRESHOLD

    @property
    def unlabeled_margin(self) -> tuple[int, ...]:
        """By how many voxels per axis and side an unlabeled patch exceeds the network's; a method may ask for some."""
        return (0,) * len(self.configuration_manager.patch_size)

    @property
    def unlabeled_patch_size(self) -> tuple[int, ...]:
        """What the unlabeled loader gives, in voxels per axis."""
        return tuple(side + 2 * m for side, m in zip(self.configuration_manager.patch_size, self.unlabeled_margin))

    @property
    def wants_weak_view(self) -> bool:
        """Whether the unlabeled loader also gives every patch without changes of its intensities."""
        return getattr(self.hp, "weak_teacher", False)

    @property
    def networks(self) -> list[nn.Module]:
        """The plan's network, and the partner where there is one."""
        return [self.network] if self.partner is None else [self.network, self.partner]

    # ---- tools for methods ------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """As the stock trainer: on CUDA always; on the CPU bfloat16 where ``cpu_bfloat16`` asks for it."""
        if self.device.type == "cuda":
            return torch.autocast("cuda")
        if self.device.type == "cpu" and self.hp.cpu_bfloat16:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return nullcontext()

    def note_learned(self, outputs: Sequence[Any], target: Tensor) -> None:
        """Tell how well the labeled batch is known: unlabeled terms count only as far as every structure is.

        Args:
            outputs: Of every network for the labeled batch, without those of other images.
            target: As for ``supervised_loss``.
        """
        regions, ignore = self.label_manager.has_regions, self.label_manager.ignore_label
        counts = [overlap_counts(full_resolution(o), target, regions, ignore) for o in outputs]
        self.labeled_overlap = torch.stack(counts)

    def supervised_loss(self, outputs: Any, target: Tensor, loss: nn.Module | None = None) -> Tensor:
        """The trainer's loss of the network's outputs against a target at full resolution.

        Args:
            outputs: Logits (B, K, *S), with deep supervision a list of them by falling resolution.
            target: (B, 1, *S) or region channels.
            loss: Another loss of that kind, instead of the trainer's.
        """
        loss = self.loss if loss is None else loss
        if not isinstance(outputs, (list, tuple)):
            return loss(outputs, target)
        return loss(outputs, downsample_target(target, [tuple(o.shape[2:]) for o in outputs]))

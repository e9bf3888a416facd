"""What a method may ask its training for: predictions and losses of whatever kind of data it is given."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import full_resolution
from nnunet_ssl.losses import predictions
from nnunet_ssl.runtime.precision import autocast
from nnunet_ssl.training.hyperparameters import HyperParameters
from nnunet_ssl.training.learned import LearnedStructures, overlap_counts

P = TypeVar("P", bound=HyperParameters)

# What a network returns: logits (B, K, *S), with deep supervision a list of them by falling resolution.
Output = Any
# Of the plan's network and of every companion that predicts.
Outputs = Sequence[Output]


class Tools(ABC, Generic[P]):
    """Views on what networks predict, and nnU-Net's loss; each takes outputs with and without deep supervision.

    A structure that is waited for (``learned_dice``) counts as background in everything but ``supervised_loss`` and
    ``label_map``: what is learned without labels then says "background or this structure", which keeps nobody from
    finding it. A region that is waited for gets no gradient.
    """

    statistic_names: ClassVar[tuple[str, ...]] = ()

    hp: P
    loss: nn.Module
    device: torch.device
    label_manager: Any
    learned: LearnedStructures
    # nnU-Net's loss that passes over voxels; made with the networks.
    masked_loss: nn.Module
    _statistics: dict[str, Tensor | float]

    def note(self, name: str, value: Tensor | float) -> None:
        """Tell a statistic of this step: a number or a scalar tensor.

        Raises:
            ValueError: For one that ``statistic_names`` lacks.
        """
        if name not in self.statistic_names:
            raise ValueError(f"{type(self).__name__} notes {name!r}; declare it in statistic_names.")
        self._statistics[name] = value

    @property
    def has_regions(self) -> bool:
        """Whether the channels are overlapping regions, rather than classes of which one holds."""
        return bool(self.label_manager.has_regions)

    @property
    def ignore_value(self) -> int:
        """What marks voxels that do not count in a label map, whether dataset.json declares an ignore label or not."""
        return int(self.label_manager.num_segmentation_heads)

    def autocast(self) -> AbstractContextManager[Any]:
        """As the stock trainer: on CUDA always; on the CPU bfloat16 where ``cpu_bfloat16`` asks for it."""
        return autocast(self.device, self.hp.cpu_bfloat16)

    def overlap_counts(self, outputs: Outputs, target: Tensor) -> Tensor:
        """How well a labeled batch is known: counts (networks, 3, structures), see ``learned.overlap_counts``."""
        counts = [overlap_counts(full_resolution(o), target, self.has_regions, self.ignore_value) for o in outputs]
        return torch.stack(counts)

    def probabilities(self, outputs: Output) -> Tensor:
        """Probabilities (B, K, *S) in float32: of classes, or of regions each."""
        return predictions.probabilities(self._known(full_resolution(outputs)), self.has_regions)

    def log_probabilities(self, outputs: Output, temperature: float = 1.0) -> Tensor:
        """Logarithms of probabilities in groups of exclusive classes (B, G, K', *S); see ``losses.predictions``."""
        return predictions.log_probabilities(self._known(full_resolution(outputs)), self.has_regions, temperature)

    def hard_labels(self, outputs: Output, like: Tensor) -> Tensor:
        """What nnU-Net's loss takes as a target, of the type and channels of ``like``, without gradient."""
        labels = predictions.hard_labels(self._known(full_resolution(outputs)), like, self.has_regions)
        if self.has_regions:
            manager, count = self.label_manager, self.ignore_value
            regions = [(r,) if isinstance(r, int) else tuple(r) for r in manager.foreground_regions]
            maps = labels[:, :count], regions, manager.regions_class_order, self.learned.waiting
            labels[:, :count] = predictions.consistent_regions(*maps)
        return labels

    def label_map(self, outputs: Output) -> Tensor:
        """One label per voxel (B, *S), for pictures."""
        return predictions.label_map(full_resolution(outputs), self.has_regions)

    def supervised_loss(self, outputs: Output, target: Tensor, loss: nn.Module | None = None) -> Tensor:
        """The trainer's loss of the network's outputs against a target at full resolution.

        Args:
            outputs: Logits (B, K, *S), with deep supervision a list of them by falling resolution.
            target: (B, 1, *S) or region channels.
            loss: Another loss of that kind, instead of the trainer's.
        """
        loss = self.loss if loss is None else loss
        if not isinstance(outputs, (list, tuple)):
            return cast(Tensor, loss(outputs, target))
        shapes = [tuple(o.shape[2:]) for o in outputs]
        return cast(Tensor, loss(outputs, predictions.downsample_target(target, shapes)))

    def pseudo_label_loss(self, outputs: Output, labels: Tensor, counted: Tensor | None = None) -> Tensor:
        """nnU-Net's loss against labels that a network has made, at all resolutions; 0 where no voxel counts.

        Args:
            outputs: As in ``supervised_loss``.
            labels: As ``hard_labels`` makes them.
            counted: (B, 1, *S), boolean; the voxels that count. All do if absent.
        """
        several = isinstance(outputs, (list, tuple))
        known = [self._known(o) for o in outputs] if several else self._known(outputs)
        if not self.has_regions:
            # Labels of a mixture may come from a labeled image, which shows what is waited for.
            for structure in self.learned.waiting:
                labels = torch.where(labels == structure + 1, 0, labels)
        return self.masked_supervised_loss(known, labels, counted)

    def masked_supervised_loss(self, outputs: Output, target: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss on labels, over a part of the voxels; ignored ones do not count either. 0 where none counts.

        Args:
            outputs: As in ``supervised_loss``.
            target: As there.
            counted: (B, 1, *S), boolean; the voxels that count. All do if absent.
        """
        return self.supervised_loss(outputs, self.masked_target(target, counted), self.masked_loss)

    def masked_target(self, target: Tensor, counted: Tensor | None = None) -> Tensor:
        """A target of the same type in which voxels are ignored, whether dataset.json has an ignore label or not.

        Args:
            target: (B, 1, *S) or region channels (B, R, *S), with or without a last one of ignored voxels.
            counted: (B, 1, *S), boolean; the voxels that are not to be ignored. All if absent.

        Returns:
            (B, 1, *S) or (B, R + 1, *S).
        """
        if not self.has_regions:
            return target if counted is None else torch.where(counted, target, self.ignore_value)
        regions = self.ignore_value
        ignored = target[:, regions:] if target.shape[1] > regions else torch.zeros_like(target[:, :1])
        if counted is not None:
            ignored = torch.where(counted, ignored, torch.ones_like(ignored))
        return torch.cat([target[:, :regions], ignored], 1)

    def confidence(self, outputs: Output) -> Tensor:
        """The probability of the likeliest class, of regions that of the least sure one: (B, 1, *S), in [0, 1].

        Regions that are waited for need not be sure: they learn nothing from what is.
        """
        log_p = self.log_probabilities(outputs).detach().amax(2)
        if self.has_regions and not self.learned.all_wait:
            log_p = log_p[:, [region for region in range(log_p.shape[1]) if region not in self.learned.waiting]]
        return log_p.amin(1, keepdim=True).exp()

    def _known(self, logits: Tensor) -> Tensor:
        return predictions.without_structures(logits, self.learned.waiting, self.has_regions)

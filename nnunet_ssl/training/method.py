"""What a method declares and implements, and what it may ask its training for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.blocks.networks import quiet_pass
from nnunet_ssl.blocks.partner import Partner
from nnunet_ssl.data.batches import Labeled, Unlabeled
from nnunet_ssl.training.hyperparameters import HyperParameters, MethodParameters
from nnunet_ssl.training.monitor import View
from nnunet_ssl.training.schedules import first_epoch_of_second_stage, gaussian_ramp
from nnunet_ssl.training.tools import Outputs, P, Tools

C = TypeVar("C", bound=Companion)

Losses = dict[str, Tensor]

NETWORK = "network"
SUPERVISED = "supervised"


class Step(NamedTuple):
    """What a method makes of a step's batches.

    losses: scalar tensors by name, without their weights; known: the outputs of every network that learns from labels
    for the labeled batch, without those of other images, and their target. The unlabeled terms wait for what they show.
    """

    losses: Losses
    known: tuple[Outputs, Tensor]


class Method(Tools[P]):
    """A semi-supervised method. ``SemiSupervisedTrainer`` brings the training, a deriving class the losses.

    Attributes:
        Parameters: Frozen dataclass of hyper-parameters; for every term NAME one NAME_weight.
        unlabeled_terms: Names of the loss terms that need more than labels, in the order of the log. They are off in
            stage 1, their weights rise with ``unlabeled_ramp``, and they wait for the structures.
        labeled_terms: Names of further terms on labels, besides nnU-Net's loss of every network that learns from them.
        statistic_names: What else is told about a step, by ``note``.
        views: Of every unlabeled image that may be asked for: "strong" (nnU-Net's augmentation), "weak" (the same
            geometry, no changes of intensity), "strong_2" (the same geometry, other changes of intensity). Without
            any, no unlabeled image is loaded.
        transductive: Whether the fold's validation images and imagesTs are learned from too.
        uses_unlabeled: Whether there are views.
    """

    Parameters: ClassVar[type[HyperParameters]] = MethodParameters
    unlabeled_terms: ClassVar[tuple[str, ...]] = ()
    labeled_terms: ClassVar[tuple[str, ...]] = ()
    views: ClassVar[tuple[str, ...]] = ("strong",)
    transductive: ClassVar[bool] = False
    uses_unlabeled: ClassVar[bool]

    network: nn.Module
    generator: torch.Generator
    plans_manager: Any
    configuration_manager: Any
    configuration_name: str
    enable_deep_supervision: bool
    num_input_channels: int
    is_cascaded: bool
    num_epochs: int
    num_iterations_per_epoch: int
    current_epoch: int
    is_ddp: bool
    build_network_architecture: Callable[..., nn.Module]
    _do_i_compile: Callable[[], bool]
    companions: dict[str, Companion]
    _iterations_done_in_epoch: int

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Refuse what is declared wrongly, at its own lines and not hours later.

        Raises:
            TypeError: For a term without a weight, and for unlabeled images without what their batches need.
        """
        super().__init_subclass__(**keywords)
        cls.uses_unlabeled = bool(cls.views)
        if cls.uses_unlabeled and not issubclass(cls.Parameters, MethodParameters):
            raise TypeError(
                f"{cls.__name__} loads unlabeled images: derive {cls.Parameters.__name__} from MethodParameters."
            )
        if cls.weight is not Method.weight:
            return
        weights = [name for name in cls.Parameters.__dataclass_fields__ if name.endswith("_weight")]
        for term in (*cls.labeled_terms, *cls.unlabeled_terms):
            # The terms of companions share their hyper-parameter with the network's: cross and cross_partner.
            if not any(f"{term}_".startswith(name.removesuffix("weight")) for name in weights):
                raise TypeError(
                    f"{cls.__name__} has a loss term {term!r}; declare {term}_weight in {cls.Parameters.__name__}."
                )

    # ---- what a method implements, most of it by few ---------------------------------------------------------------

    def build(self) -> None:
        """Add companions and whatever else is needed, once the plan's network stands."""

    def labeled_losses(self, labeled: Labeled, outputs: Outputs) -> Losses:
        """The ``labeled_terms``, in both stages.

        Args:
            labeled: On the device.
            outputs: For it, of the plan's network and of every companion that predicts.
        """
        return {}

    def unlabeled_losses(self, labeled: Labeled, unlabeled: Unlabeled, outputs: Outputs) -> Losses:
        """The ``unlabeled_terms``; called in stage 2 where one of them has a weight.

        Passes with gradient come before those without: autocast would keep the copies of weights that the latter make,
        and these lead to no gradient.

        Args:
            labeled: On the device.
            unlabeled: On the device; images exceed the network's patch by ``unlabeled_margin``.
            outputs: For the labeled batch, of the plan's network and of every companion that predicts.
        """
        return {}

    def weight(self, term: str) -> float:
        """By how much a term counts now: its hyper-parameter, times the ramp for those that need more than labels."""
        base: float = getattr(self.hp, f"{self._base_term(term)[0]}_weight")
        return base * self.ramp if term in self.unlabeled_terms else base

    def trains(self, term: str) -> tuple[str, ...]:
        """The networks that a term's gradient reaches, asked after a step: companions by name, or "network"."""
        return (self._base_term(term)[1],)

    def wanted_views(self) -> tuple[str, ...]:
        """Those of ``views`` that the hyper-parameters ask for."""
        return self.views

    def view(self, images: Tensor, generator: torch.Generator) -> View:
        """What the method makes of unlabeled images, to be looked at; called without gradient, under autocast.

        Args:
            images: As the unlabeled loader gives them, without augmentation, (B, C, *(S + 2 unlabeled_margin)).
            generator: For what is random.
        """
        return View(self.label_map(quiet_pass(self.network, images)))

    def memory(self) -> dict[str, Any]:
        """What the method must remember across a stop besides its companions: tensors and plain values."""
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from what ``memory`` gave."""

    @property
    def unlabeled_margin(self) -> tuple[int, ...]:
        """By how many voxels per axis and side an unlabeled patch exceeds the network's; a method may ask for some."""
        return (0,) * len(self.configuration_manager.patch_size)

    def step(self, labeled: Labeled, unlabeled: Unlabeled | None) -> Step:
        """All losses of a step, under autocast; overridden where passes must be joined.

        Args:
            labeled: On the device.
            unlabeled: On the device; None in stage 1 and for methods without views.
        """
        outputs = [network(labeled.images) for network in self.predictors]
        losses = {
            name: self.supervised_loss(output, labeled.target) for name, output in zip(self.supervised_terms, outputs)
        }
        losses |= self.labeled_losses(labeled, outputs)
        if unlabeled is not None and any(self.weight(term) for term in self.unlabeled_terms):
            losses |= self.unlabeled_losses(labeled, unlabeled, outputs)
        return Step(losses, (outputs, labeled.target))

    # ---- networks ---------------------------------------------------------------------------------------------------

    def add(self, name: str, companion: C) -> C:
        """Let the training look after a further network; called in ``build``.

        Args:
            name: In checkpoints, in ``nnunet-ssl export --network``, and at the end of its loss terms' names.
            companion: Returned as it is, once its module is on the device.

        Raises:
            ValueError: For a name that is taken.
        """
        if name in (NETWORK, *self.companions):
            raise ValueError(f"There is a network {name!r} already.")
        companion.place(self.device, self._do_i_compile(), self.is_ddp)
        self.companions[name] = companion
        return companion

    def build_partner(self, plans: dict[str, Any] | None = None) -> Partner:
        """A network like the plan's, with other initial weights.

        Args:
            plans: Others than the training's, with the same patch, channels and heads.
        """
        manager = self.plans_manager if plans is None else PlansManager(plans)
        network = self.build_network_architecture(
            manager,
            manager.get_configuration(self.configuration_name),
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )
        return Partner(network, manager.get_configuration(self.configuration_name).configuration["architecture"])

    @property
    def architecture(self) -> dict[str, Any]:
        """The plan's network as plans describe it: what a copy of it, such as an averaged one, is exported with."""
        return cast("dict[str, Any]", self.configuration_manager.configuration["architecture"])

    @property
    def trained(self) -> list[nn.Module]:
        """The networks that the optimizer changes, the plan's first."""
        return [self.network, *(c.module for c in self.companions.values() if c.trained)]

    @property
    def predictors(self) -> list[nn.Module]:
        """The networks that learn from labels, the plan's first."""
        return [self.network, *(c.module for c in self.companions.values() if c.predicts)]

    @property
    def supervised_terms(self) -> tuple[str, ...]:
        """Names of the losses on labels of the ``predictors``."""
        return (SUPERVISED, *(f"{SUPERVISED}_{name}" for name, c in self.companions.items() if c.predicts))

    @property
    def term_names(self) -> tuple[str, ...]:
        """All loss terms, in the order of the log; known once the networks stand."""
        return (*self.supervised_terms, *self.labeled_terms, *self.unlabeled_terms)

    # ---- state of the training ------------------------------------------------------------------------------------

    @property
    def switch_epoch(self) -> int:
        """The epoch at which stage 2 starts; 0 for methods without stages, which are in stage 2 throughout."""
        fraction = self.hp.supervised_fraction if isinstance(self.hp, MethodParameters) else 0.0
        return first_epoch_of_second_stage(self.num_epochs, fraction)

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
    def ramp(self) -> float:
        """How far the weights of unlabeled terms have risen, in (0, 1]."""
        full_at = self.hp.unlabeled_ramp if isinstance(self.hp, MethodParameters) else 0.0
        return gaussian_ramp(self.stage_progress, full_at)

    @property
    def num_image_channels(self) -> int:
        """Channels of the image alone: behind them a cascade's second stage has the first one's segmentation."""
        further = len(self.label_manager.foreground_labels) if self.is_cascaded else 0
        return self.num_input_channels - further

    @property
    def augments_slice_by_slice(self) -> bool:
        """Whether the patch is so anisotropic that nnU-Net augments its slices (axis 0) as 2D images."""
        patch_size = self.configuration_manager.patch_size
        return len(patch_size) == 3 and max(patch_size) / patch_size[0] > ANISO_THRESHOLD

    @property
    def unlabeled_patch_size(self) -> tuple[int, ...]:
        """What the unlabeled loader gives, in voxels per axis."""
        return tuple(side + 2 * m for side, m in zip(self.configuration_manager.patch_size, self.unlabeled_margin))

    def _base_term(self, term: str) -> tuple[str, str]:
        """``cross_partner`` to ``cross`` and ``partner``; ``cross`` to itself and the plan's network."""
        owners = [name for name in self.companions if term.endswith(f"_{name}")]
        return (term.removesuffix(f"_{owners[0]}"), owners[0]) if owners else (term, NETWORK)

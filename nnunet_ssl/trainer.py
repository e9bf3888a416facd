"""SemiSupervisedTrainer: the only place that overrides nnU-Net's training.

A method derives from it, names its hyper-parameters and loss terms, and implements ``loss_terms``. Everything else
(second loader, schedule of stages, logging, checkpoints, resuming) is done here once.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from nnunet_ssl.augmentation import Augmentation, adjust, check_mirror_axes, warning_about_sides
from nnunet_ssl.checkpoint import read_state, restore_random_state, write_checkpoint
from nnunet_ssl.errors import UserError
from nnunet_ssl.hyperparameters import HyperParameters
from nnunet_ssl.losses import downsample_target
from nnunet_ssl.networks import bare, build_partner, set_deep_supervision
from nnunet_ssl.optimization import LossTerm, backward_and_step, weighted_sum
from nnunet_ssl.precision import cpu_has_bfloat16
from nnunet_ssl.preprocessing import preprocessing_settings
from nnunet_ssl.schedules import RestartingPolyLRScheduler, first_epoch_of_second_stage
from nnunet_ssl.term_logger import TermLogger
from nnunet_ssl.trainers_folder import check_found_through_trainers_folder
from nnunet_ssl.unlabeled_data import (
    UnlabeledCase,
    describe_cases,
    find_unlabeled_cases,
    hidden_cases,
    make_unlabeled_loader,
)


class SemiSupervisedTrainer(nnUNetTrainer, ABC):
    """nnU-Net's trainer with a second loader, for cases without labels, and with named loss terms.

    The total batch is the plan's, shared between labeled and unlabeled examples in stage 2; a plan's batch of 1
    becomes 1 + 1. Training may run in two stages: labels alone first, then everything, with the learning rate
    restarted at the switch.

    A method sets ``hyperparameters_class``; ``term_names``, the loss terms it returns, in the order of the log;
    ``unlabeled_terms``, those that need more than labels; ``statistic_names``, what else it tells about a step;
    ``uses_unlabeled``, whether it needs the second loader; ``transductive``, whether it learns from validation and test
    images too. A method with a second network implements ``partner_plans``; the network is then trained by the same
    optimizer, saved, resumed and exported.
    """

    hyperparameters_class: ClassVar[type[HyperParameters]] = HyperParameters
    term_names: ClassVar[tuple[str, ...]] = ("supervised",)
    unlabeled_terms: ClassVar[tuple[str, ...]] = ()
    statistic_names: ClassVar[tuple[str, ...]] = ()
    uses_unlabeled: ClassVar[bool] = False
    transductive: ClassVar[bool] = False
    batch_size: int

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads this signature)
    ) -> None:
        check_found_through_trainers_folder(SemiSupervisedTrainer)
        self.hp = self._read_hyperparameters(plans)
        planned = PlansManager(plans).get_configuration(configuration)
        check_mirror_axes(self.hp, planned.patch_size)
        if self.uses_unlabeled and planned.previous_stage_name is not None:
            raise UserError(
                f"{type(self).__name__} cannot train {configuration}: a cascade needs the previous stage's "
                f"segmentation of every unlabeled case. Train 2d, 3d_lowres or 3d_fullres."
            )
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.hp.num_epochs
        self.num_iterations_per_epoch = self.hp.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.hp.num_val_iterations_per_epoch
        self.initial_lr = self.hp.initial_lr
        self.weight_decay = self.hp.weight_decay
        self.save_every = self.hp.save_every
        self.oversample_foreground_percent = self.hp.oversample_foreground_percent
        self.logger.local_logger = TermLogger(self.term_names, self.statistic_names)
        self.partner: nn.Module | None = None
        self.statistics: dict[str, Tensor | float] = {}
        self.unlabeled_batch_size = 0
        self.dataloader_unlabeled: Iterator[dict[str, Any]] | None = None
        self.generator = torch.Generator()
        self._iterations_done_in_epoch = 0
        self._state_to_restore: dict[str, Any] | None = None
        self.print_to_log_file(f"Hyper-parameters: {self.hp.as_dict()}", add_timestamp=False)
        if self.hp.cpu_bfloat16 and device.type == "cpu" and not cpu_has_bfloat16():
            self.print_to_log_file("WARNING: this CPU emulates bfloat16; cpu_bfloat16=false trains much faster.")

    # ---- what a method implements ---------------------------------------------------------------------------------

    @abstractmethod
    def loss_terms(self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> dict[str, LossTerm]:
        """Turn the two batches into named loss terms.

        Called under autocast, once per step.

        Args:
            labeled: ``data`` (B_l, C, *S) and ``target`` at full resolution, (B_l, 1, *S) or region channels, both on
                the device, and ``keys``.
            unlabeled: ``data`` (B_u, C, *(S + 2 unlabeled_margin)) on the device, and ``keys``; None in stage 1 and for
                methods without it.

        Returns:
            A term per name of ``term_names``; one that is not computed in this stage may be left out. What
            ``statistic_names`` announces goes into ``self.statistics``, numbers or scalar tensors.
        """

    def partner_plans(self) -> dict[str, Any] | None:
        """Plans whose network is the method's second network; None for methods with one network."""
        return None

    def after_step(self) -> None:
        """Called after every optimizer step, for what follows the weights (averages, roles)."""

    # ---- state of the training ------------------------------------------------------------------------------------

    @property
    def switch_epoch(self) -> int:
        """The epoch at which stage 2 starts; methods without stages stay in stage 1's schedule throughout."""
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
    def networks(self) -> list[nn.Module]:
        """The plan's network, and the partner where there is one."""
        return [self.network] if self.partner is None else [self.network, self.partner]

    # ---- nnU-Net's hooks, in the order of a training ----------------------------------------------------------------

    def initialize(self) -> None:
        """Build network, optimizer and loss, from the seed where there is one."""
        rank = dist.get_rank() if self.is_ddp else 0
        if self.hp.seed is not None:
            # Weights alike on all ranks (DDP would copy rank 0's anyway), everything drawn later different.
            torch.manual_seed(self.hp.seed)
        super().initialize()
        plans = self.partner_plans()
        if plans is not None:
            self.partner = build_partner(self, plans)
            # One optimizer, so that one learning rate and one gradient scaler serve both networks.
            self.optimizer.add_param_group({"params": list(self.partner.parameters())})
        self.generator = torch.Generator(device=self.device if self.device.type == "cuda" else "cpu")
        if self.hp.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.hp.seed + rank)
            torch.manual_seed(self.hp.seed + rank)
            np.random.seed(self.hp.seed + rank)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch deep supervision of all networks."""
        super().set_deep_supervision_enabled(enabled)
        for network in self.networks[1:]:
            set_deep_supervision(network, enabled)

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        if not self.uses_unlabeled:
            return
        total: int = self.batch_size
        # The fraction nnU-Net really reaches with this batch: of 2 it centers 1, not 0.33, on a structure.
        centered = total - round(total * (1 - self.oversample_foreground_percent))
        self.unlabeled_batch_size = max(1, total // 2)
        self.batch_size = max(1, total - self.unlabeled_batch_size)
        self.oversample_foreground_percent = centered / total
        self.probabilistic_oversampling = True
        self.print_to_log_file(
            f"Batch of {total}: {self.batch_size} labeled + {self.unlabeled_batch_size} unlabeled examples"
        )

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        """nnU-Net's optimizer; its learning rate restarts at the switch of stages."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, RestartingPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, self.switch_epoch)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Augmentation:  # noqa: N802
        """nnU-Net's choices, with rotation range and mirroring axes as the hyper-parameters say."""
        stock = Augmentation(*super().configure_rotation_dummyDA_mirroring_and_inital_patch_size())
        self._augmentation = adjust(stock, self.hp, self.configuration_manager.patch_size)
        self.inference_allowed_mirroring_axes = self._augmentation.mirror_axes
        warning = warning_about_sides(self.dataset_json["labels"], self._augmentation)
        if warning:
            self.print_to_log_file(warning)
        return self._augmentation

    @staticmethod
    def get_training_transforms(
        patch_size: Any,
        rotation_for_DA: Any,  # noqa: N803
        deep_supervision_scales: Any,
        mirror_axes: Any,
        do_dummy_2d_data_aug: bool,
        **keywords: Any,
    ) -> BasicTransform:
        """nnU-Net's augmentation with targets left at full resolution: a method may still move them."""
        return nnUNetTrainer.get_training_transforms(
            patch_size, rotation_for_DA, None, mirror_axes, do_dummy_2d_data_aug, **keywords
        )

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's two loaders; makes the unlabeled one beside them."""
        labeled, validation = super().get_dataloaders()
        if self.uses_unlabeled:
            self.dataloader_unlabeled = make_unlabeled_loader(self, self._unlabeled_cases, self._augmentation)
        return labeled, validation

    def on_train_start(self) -> None:
        """Check the unlabeled data before anything is loaded, then start as nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        if self.uses_unlabeled:
            self._unlabeled_cases = self.find_unlabeled_cases()
            self.print_to_log_file(f"Training with {describe_cases(self._unlabeled_cases)}")
        super().on_train_start()
        if self._state_to_restore is not None:
            # Only now: making the loaders has drawn from the generators.
            if not restore_random_state(self._state_to_restore, self.device, self.generator):
                self.print_to_log_file("The checkpoint is from another kind of device: random numbers start anew")
            self._state_to_restore = None

    def on_train_epoch_start(self) -> None:
        """Put the networks into training mode and announce the switch of stages."""
        self._iterations_done_in_epoch = 0
        super().on_train_epoch_start()
        for network in self.networks:
            network.train()
        if 0 < self.switch_epoch == self.current_epoch:
            self.print_to_log_file("Stage 2: the semi-supervised terms are on, the learning rate restarts")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One optimizer step on the labeled batch and, in stage 2, an unlabeled one."""
        labeled = self._to_device(batch)
        unlabeled = None
        if self.dataloader_unlabeled is not None and self.in_second_stage:
            unlabeled = self._to_device(next(self.dataloader_unlabeled))
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            terms = self.loss_terms(labeled, unlabeled)
            total = weighted_sum(terms)
        backward_and_step(total, self.networks, self.optimizer, self.grad_scaler)
        self.after_step()
        self._iterations_done_in_epoch += 1
        logged = {name: term.value for name, term in terms.items()} | self.statistics
        values = [total, *(logged.get(name, float("nan")) for name in (*self.term_names, *self.statistic_names))]
        # One transfer for all values: a step waits for the device no more often than the stock trainer's.
        tensors = [torch.as_tensor(v, dtype=torch.float32, device=self.device).detach() for v in values]
        numbers = torch.stack(tensors).cpu().numpy()
        return {"loss": numbers[0], "terms": numbers[1:]}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the mean of every term and statistic over the epoch and over ranks."""
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        # The same terms were on in every step of the epoch: stages switch between epochs.
        means = np.stack([output["terms"] for output in train_outputs]).mean(0)
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = np.stack(gathered).mean(0)
        for name, mean in zip((*self.term_names, *self.statistic_names), means):
            self.logger.log(TermLogger.key(name), float(mean), self.current_epoch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, in the precision of the training."""
        with self.autocast():
            return super().validation_step(batch)

    def on_epoch_end(self) -> None:
        """Print the loss terms, then nnU-Net's lines; write its checkpoints and progress.png."""
        for title, names in (("loss terms:", self.term_names), ("statistics:", self.statistic_names)):
            values = [(n, self.logger.get_value(TermLogger.key(n), step=-1)) for n in names]
            said = ", ".join(f"{n} {v:.4f}" for n, v in values if not np.isnan(v))
            if said:
                self.print_to_log_file(title, said)
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Write checkpoint_final.pth and stop the loaders."""
        super().on_train_end()
        if isinstance(self.dataloader_unlabeled, NonDetMultiThreadedAugmenter):
            self.dataloader_unlabeled._finish()

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint, atomically, with the state that resuming needs under a key of its own.

        ``trainer_name`` says nnUNetTrainer where the network is the plan's own: such a file predicts on stock nnU-Net
        without this package.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        write_checkpoint(self, filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load nnU-Net's part and ours; random states are put back when training starts."""
        # First, because a checkpoint of another trainer must not be half loaded.
        state = read_state(filename_or_checkpoint, type(self).__name__)
        super().load_checkpoint(filename_or_checkpoint)
        if self.partner is not None:
            bare(self.partner).load_state_dict(state["partner"]["weights"])
        changed = {k: v for k, v in self.hp.as_dict().items() if state["hyperparameters"].get(k) != v}
        if changed:
            self.print_to_log_file(f"WARNING: the plans have changed since this checkpoint was written: {changed}")
        if self.local_rank == 0:
            self._state_to_restore = state["random_state"]
        elif self.hp.seed is not None:
            # The file holds rank 0's state; other ranks must draw something else, and not epoch 0's again.
            self.generator.manual_seed(self.hp.seed + self.local_rank + 1000 * self.current_epoch)

    # ---- tools for methods ------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """As the stock trainer: on CUDA always; on the CPU bfloat16 where ``cpu_bfloat16`` asks for it."""
        if self.device.type == "cuda":
            return torch.autocast("cuda")
        if self.device.type == "cpu" and self.hp.cpu_bfloat16:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return nullcontext()

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

    def find_unlabeled_cases(self) -> list[UnlabeledCase]:
        """The unlabeled cases of this training; see ``unlabeled_data.find_unlabeled_cases``."""
        folder = self.preprocessed_dataset_folder
        raw = os.path.join(nnUNet_raw.get(), self.plans_manager.dataset_name) if nnUNet_raw.is_set() else None
        settings = preprocessing_settings(self.plans_manager, self.configuration_name)
        train, val = self.do_split()
        split = {"train": train, "val": val, "unlabeled": hidden_cases(folder, self.fold)}
        cases, notes = find_unlabeled_cases(folder, raw, settings, split, self.transductive)
        for note in notes:
            self.print_to_log_file(note)
        return cases

    # ---- internals --------------------------------------------------------------------------------------------------

    @classmethod
    def _read_hyperparameters(cls, plans: dict[str, Any]) -> Any:
        from nnunet_ssl.methods import TRAINERS  # the table imports the methods, which import this module

        return cls.hyperparameters_class.from_plans(plans, [t.hyperparameters_class for t in TRAINERS])

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
